// Package guest holds what a guest sees at its first instruction: its physical
// memory (Memory, GPA) and, in package boot below it, the kernel, initrd,
// command line and boot parameters placed there. Package boot/find finds them on
// a disk.
//
// It knows nothing of devices.
package guest
