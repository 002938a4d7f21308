package confine

import "golang.org/x/sys/unix"

// Offsets in what a filter looks at, struct seccomp_data of a little-endian machine.
const (
	callOffset = 0
	archOffset = 4
	argsOffset = 16 // of 8 bytes each
)

// x32Bit is set in the numbers of system calls of the x32 ABI, which are others.
const x32Bit = 0x40000000

const (
	refuse  = unix.SECCOMP_RET_ERRNO
	kill    = unix.SECCOMP_RET_KILL_PROCESS
	permit  = unix.SECCOMP_RET_ALLOW
	allBits = 1<<32 - 1
)

// filter allows all system calls but those
//   - that make sockets of other families than the network's, such as Unix sockets, whose
//     services would do for the program what it may not. A pair of connected streams is
//     good for nothing but itself;
//   - that leave the process group;
//   - that make an io_uring, whose requests no filter sees;
//   - that cut a file off by its name, which Landlock knows of since Linux 6.2 only. What
//     is open for writing can be cut off;
//   - of another ABI, whose numbers mean something else.
func filter() []unix.SockFilter {
	program := []unix.SockFilter{
		load(archOffset),
		equal(unix.AUDIT_ARCH_X86_64, 1, 0),
		end(kill),
		load(callOffset),
		{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, Jf: 1, K: x32Bit},
		end(kill),
	}
	program = append(program, onlyWith(unix.SYS_SOCKET, 0, allBits, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK)...)
	program = append(program, onlyWith(unix.SYS_SOCKETPAIR, 1, ^uint32(unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK), unix.SOCK_STREAM)...)
	return append(
		program,
		equal(unix.SYS_SETSID, 0, 1), end(refuse|uint32(unix.EPERM)),
		equal(unix.SYS_SETPGID, 0, 1), end(refuse|uint32(unix.EPERM)),
		equal(unix.SYS_IO_URING_SETUP, 0, 1), end(refuse|uint32(unix.ENOSYS)),
		equal(unix.SYS_TRUNCATE, 0, 1), end(refuse|uint32(unix.EPERM)),
		end(permit),
	)
}

// onlyWith refuses a call that makes sockets unless the bits of its argument are one of
// the values.
func onlyWith(call, arg, bits uint32, values ...uint32) []unix.SockFilter {
	block := []unix.SockFilter{load(argsOffset + 8*arg), {Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: bits}}
	toPermit := uint8(len(values)) //nolint:gosec // G115: there are few
	for _, v := range values {
		block = append(block, equal(v, toPermit, 0))
		toPermit--
	}
	block = append(block, end(refuse|uint32(unix.EAFNOSUPPORT)), end(permit))
	pass := uint8(len(block)) //nolint:gosec // G115: it is short
	return append([]unix.SockFilter{equal(call, 0, pass)}, block...)
}

func load(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

// equal skips as many instructions as yes or no says.
func equal(value uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: yes, Jf: no, K: value}
}

func end(verdict uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: verdict}
}
