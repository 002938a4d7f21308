package agent

import (
	"bytes"
	"debug/elf"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest/agent/pid1"
	"github.com/calfvm/calf/guest/boot"
)

// maxProgram bounds the size of a program that becomes an agent.
const maxProgram = 64 << 20

// GivesUp begins the line on the guest's console that says why the agent cannot do its
// work.
const GivesUp = pid1.GivesUp

// Initramfs returns an initramfs whose /.calf/init is the program at path: a static
// one, that calls pid1.Main. It is to precede that of the image, if there is one: the
// kernel unpacks both. With Cmdline, the kernel runs it as its first process.
//
// The program stays where it is until the initramfs is read. By way of /proc it can be
// one whose file has been replaced since it was started.
func Initramfs(path string) (boot.File, error) {
	size, err := programSize(path)
	if err != nil {
		return boot.File{}, err
	}
	dir := recordHeader(pid1.Dir, unix.S_IFDIR|0o700, 0)
	init := recordHeader(pid1.Program, unix.S_IFREG|0o700, size)
	end, err := archiveOf()
	return boot.Join(inMemory(dir), inMemory(init), boot.File{ReaderAt: program(path), Size: size}, end), err
}

// recordHeader is what precedes the contents of a file in an archive of the kind that
// cpio calls newc. Its length is a multiple of 4.
func recordHeader(name string, mode uint32, size int64) []byte {
	const links = 1
	b := fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		0, mode, 0, 0, links, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	return append(b, make([]byte, -len(b)&3)...)
}

func inMemory(b []byte) boot.File {
	return boot.File{ReaderAt: bytes.NewReader(b), Size: int64(len(b))}
}

// archiveOf is an archive in memory, as cpio makes it.
func archiveOf(records ...cpio.Record) (boot.File, error) {
	var b bytes.Buffer
	w := cpio.Newc.Writer(&b)
	if err := cpio.WriteRecords(w, records); err != nil {
		return boot.File{}, err
	}
	err := cpio.WriteTrailer(w)
	return inMemory(b.Bytes()), err
}

// Drivers are the modules that an agent needs for a root with a kind of file system, as
// far as they are not part of the kernel.
func Drivers(kind string) []string { return pid1.Drivers(kind) }

// Modules returns an initramfs with files of modules, by their paths, which the agent
// uses where that of the image lacks one.
func Modules(files map[string][]byte) (boot.File, error) {
	dirs := make(map[string]bool)
	var records []cpio.Record
	for _, name := range slices.Sorted(maps.Keys(files)) {
		name, content := path.Join(pid1.ModulesDir, name), files[name]
		for i, c := range name { // the kernel makes no directory by itself
			if dir := name[:i]; c == '/' && !dirs[dir] {
				dirs[dir] = true
				records = append(records, cpio.Directory(dir, 0o700))
			}
		}
		records = append(records, cpio.StaticFile(name, string(content), 0o600))
	}
	return archiveOf(records...)
}

// program is the path of one. It is open only while it is read.
type program string

// ReadAt implements io.ReaderAt.
func (p program) ReadAt(b []byte, off int64) (int, error) {
	f, err := os.Open(string(p))
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }() // it was read only
	return f.ReadAt(b, off)
}

// programSize checks the program at path, and returns how much of its file it needs to
// run: what debuggers want to know comes last, and stays out.
func programSize(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }() // it was read only
	e, err := elf.NewFile(f)
	if err != nil {
		return 0, fmt.Errorf("%s is no program in ELF format: %w", path, err)
	}
	var size uint64
	for _, p := range e.Progs {
		switch {
		case p.Type == elf.PT_INTERP:
			return 0, fmt.Errorf("%s needs shared libraries, which the guest may not have: build it with CGO_ENABLED=0", path)
		case p.Off > maxProgram || p.Filesz > maxProgram || p.Off+p.Filesz > maxProgram:
			return 0, fmt.Errorf("%s is larger than %d MiB, too large for an agent", path, maxProgram>>20)
		}
		size = max(size, p.Off+p.Filesz)
	}
	return int64(size), nil
}

// Cmdline is what the kernel needs to be told to run the agent. readOnly says that the
// disk of its root cannot be written.
func Cmdline(readOnly bool) string {
	s := "rdinit=/" + pid1.Program
	if readOnly {
		s += " " + pid1.ArgReadOnly
	}
	return s
}

// CmdlineInit is Cmdline for an agent that lets the image's init take over, even if it
// cannot reach the host. What the init is to be told has to follow it: a kernel forgets
// the words before rdinit=.
func CmdlineInit(readOnly bool) string { return Cmdline(readOnly) + " " + pid1.ArgInit }

// RootArgs tell the agent that its root is on the device, such as /dev/vda1, with a
// file system of the given kind, which may be empty. Without them it goes by root= and
// rootfstype=.
func RootArgs(device, kind string) string {
	s := pid1.ArgRoot + device
	if kind != "" {
		s += " " + pid1.ArgKind + kind
	}
	return s
}
