package exercise

import (
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sigaction mirrors the kernel's struct sigaction. Its zero value is SIG_DFL.
type sigaction struct {
	handler  uintptr
	flags    uint64
	restorer uintptr
	mask     uint64
}

// restoreDefault takes sig from the runtime, which would print the stacks of all
// goroutines for some, and end the program with a status of its own. It does
// nothing for signals that cannot be caught.
func restoreDefault(sig syscall.Signal) {
	var byDefault sigaction
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&byDefault)), 0, unsafe.Sizeof(byDefault.mask), 0, 0)
}

// raise sends sig to the calling thread, so that it has been delivered when raise
// returns.
func raise(sig syscall.Signal) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return unix.Tgkill(unix.Getpid(), unix.Gettid(), sig)
}
