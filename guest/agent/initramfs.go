package agent

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/calfvm/calf/guest/agent/pid1"
)

// maxProgram bounds the size of a program that becomes an agent.
const maxProgram = 64 << 20

// GivesUp begins the line on the guest's console that says why the agent cannot do its
// work.
const GivesUp = pid1.GivesUp

// Initramfs returns an initramfs whose /.calf/init is the program at path: a static
// one, that calls pid1.Main. It is to follow that of the image, if there is one: the
// kernel unpacks both. With Cmdline, the kernel runs it as its first process.
func Initramfs(path string) ([]byte, error) {
	program, err := readProgram(path)
	if err != nil {
		return nil, err
	}
	return archiveOf(cpio.Directory(pid1.Dir, 0o700), cpio.StaticFile(pid1.Program, string(program), 0o700))
}

func archiveOf(records ...cpio.Record) ([]byte, error) {
	var b bytes.Buffer
	w := cpio.Newc.Writer(&b)
	if err := cpio.WriteRecords(w, records); err != nil {
		return nil, err
	}
	return b.Bytes(), cpio.WriteTrailer(w)
}

// Drivers are the modules that an agent needs for a root with a kind of file system, as
// far as they are not part of the kernel.
func Drivers(kind string) []string { return pid1.Drivers(kind) }

// Modules returns an initramfs with files of modules, by their paths, which the agent
// uses where that of the image lacks one.
func Modules(files map[string][]byte) ([]byte, error) {
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

// readProgram reads the program at path, which may be one that has been replaced
// since it was started, by way of /proc.
func readProgram(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // it was read only
	b, err := io.ReadAll(io.LimitReader(f, maxProgram+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxProgram {
		return nil, fmt.Errorf("%s is larger than %d MiB, too large for an agent", path, maxProgram>>20)
	}
	program, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%s is no program in ELF format: %w", path, err)
	}
	for _, p := range program.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("%s needs shared libraries, which the guest may not have: build it with CGO_ENABLED=0", path)
		}
	}
	return b, nil
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
