// Package pci presents a virtio device as a PCI function that knows nothing of
// any machine: configuration space, base address register and MSI-X as the PCI
// Local Bus specification defines them, and over them the modern transport of
// virtio 1.2, section 4.1. What it needs of a machine is the Host interface.
package pci
