// Package pci is the PCI side of a virtio device that knows nothing of any
// machine: configuration space, capabilities, base address registers and
// MSI-X, as the PCI Local Bus and PCI Express specifications define them. What
// it needs of a machine is the Host interface.
package pci
