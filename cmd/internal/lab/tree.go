package lab

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// tree is a small file system in the making: absolute paths to what is there.
// Directories that entries need come by themselves.
type tree map[string]node

// node is one file of a tree. Exactly one of host and data is set for a
// regular file; neither for a directory.
type node struct {
	mode   fs.FileMode // type bits as in fs, and permissions
	host   string      // regular file: its contents are those of this file here
	data   []byte      // regular file: its contents; symbolic link: its target
	device uint32      // character device: major<<8 | minor
}

func (t tree) add(name string, n node) {
	name = path.Clean("/" + name)
	t[name] = n
	for dir := path.Dir(name); dir != "/"; dir = path.Dir(dir) {
		if _, ok := t[dir]; !ok {
			t[dir] = node{mode: fs.ModeDir | 0o755}
		}
	}
}

func (t tree) has(name string) bool {
	_, ok := t[name]
	return ok
}

func (t tree) dir(name string) { t.add(name, node{mode: fs.ModeDir | 0o755}) }

func (t tree) text(name, text string, perm fs.FileMode) {
	t.add(name, node{mode: perm, data: []byte(text)})
}

func (t tree) link(name, target string) {
	t.add(name, node{mode: fs.ModeSymlink | 0o777, data: []byte(target)})
}

// file adds the file at host, links followed, with its permissions.
func (t tree) file(name, host string) error {
	real, err := filepath.EvalSymlinks(host)
	if err != nil {
		return err
	}
	st, err := os.Stat(real)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file", host)
	}
	t.add(name, node{mode: st.Mode().Perm() | 0o444, host: real})
	return nil
}

// program adds the program at host and the shared libraries it is linked with,
// these under their own paths.
func (t tree) program(name, host string) error {
	if err := t.file(name, host); err != nil {
		return err
	}
	libs, err := sharedLibraries(host)
	if err != nil {
		return err
	}
	for _, lib := range libs {
		if err := t.file(lib, lib); err != nil {
			return err
		}
	}
	return nil
}

// sharedLibraries returns the paths of the libraries of a program and of its
// loader; none for a static one and for what is no program of this machine. The
// loader itself is asked, for ldd is not everywhere.
func sharedLibraries(program string) ([]string, error) {
	loader, err := loaderOf(program)
	if err != nil || loader == "" {
		return nil, err
	}
	list := exec.Command(loader, "--list", program)
	list.Env = []string{} // so that it looks where it looks by itself, as it will in the tree
	out, err := list.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s --list %s: %w: %s", loader, program, err, bytes.TrimSpace(out))
	}
	libs := []string{loader}
	for line := range strings.Lines(string(out)) {
		// "name => /path (address)", or "/loader (address)".
		if strings.Contains(line, "not found") {
			return nil, fmt.Errorf("%s: %s", program, strings.TrimSpace(line))
		}
		for word := range strings.FieldsSeq(line) {
			if strings.HasPrefix(word, "/") {
				libs = append(libs, word)
				break
			}
		}
	}
	return libs, nil
}

// loaderOf returns the path of the loader that the program in file needs, or "".
func loaderOf(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	program, err := elf.NewFile(f)
	if err != nil {
		return "", nil // a script, or plain data
	}
	i := slices.IndexFunc(program.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
	if i < 0 {
		return "", nil
	}
	name, err := io.ReadAll(program.Progs[i].Open())
	return strings.TrimRight(string(name), "\x00"), err
}

// busybox adds busybox and a link for each of its commands.
func (t tree) busybox() error {
	host, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("%w: run .ci/setup", err)
	}
	if loader, err := loaderOf(host); err != nil || loader != "" {
		return cmp.Or(err, fmt.Errorf("%s needs shared libraries: install busybox-static", host))
	}
	if err := t.file("/bin/busybox", host); err != nil {
		return err
	}
	list, err := exec.Command(host, "--list").Output()
	if err != nil {
		return fmt.Errorf("busybox --list: %w", err)
	}
	for applet := range strings.FieldsSeq(string(list)) {
		if applet != "busybox" {
			t.link("/bin/"+applet, "busybox")
		}
	}
	for _, dir := range []string{"/dev", "/proc", "/sys", "/tmp", "/run", "/etc", "/root", "/mnt"} {
		t.dir(dir)
	}
	return nil
}

// names returns the paths in an order in which parents precede children.
func (t tree) names() []string { return slices.Sorted(maps.Keys(t)) }

// digest identifies the tree without reading host files: these count by path,
// size and time of change.
func (t tree) digest() (string, error) {
	h := sha256.New()
	for _, name := range t.names() {
		n := t[name]
		fmt.Fprintf(h, "%q %v %d %q %d:", name, n.mode, n.device, n.host, len(n.data))
		h.Write(n.data)
		if n.host == "" {
			continue
		}
		st, err := os.Stat(n.host)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, " %d %d\n", st.Size(), st.ModTime().UnixNano())
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// materialize writes the tree below dir, leaving out device nodes, which need
// privileges.
func (t tree) materialize(dir string) error {
	for _, name := range t.names() {
		n, dst := t[name], filepath.Join(dir, name)
		var err error
		switch {
		case n.mode.IsDir():
			err = os.MkdirAll(dst, 0o755)
		case n.mode&fs.ModeSymlink != 0:
			err = os.Symlink(string(n.data), dst)
		case n.mode&fs.ModeDevice != 0:
			continue
		case n.host != "":
			err = linkOrCopy(dst, n.host, n.mode.Perm())
		default:
			err = os.WriteFile(dst, n.data, n.mode.Perm())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// linkOrCopy makes dst the same file as src, or a copy where that cannot be:
// on another file system, or with other permissions.
func linkOrCopy(dst, src string, perm fs.FileMode) error {
	if st, err := os.Stat(src); err == nil && st.Mode().Perm() == perm && os.Link(src, dst) == nil {
		return nil
	}
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return cmp.Or(err, out.Close())
}

// ext4 writes the tree to a new sparse ext4 image of the given size. It needs
// no privileges.
func (t tree) ext4(image string, sizeMiB int) error {
	dir, err := os.MkdirTemp(filepath.Dir(image), "tree-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := t.materialize(dir); err != nil {
		return err
	}
	mke2fs, err := tool("mke2fs")
	if err != nil {
		return err
	}
	cmd := exec.Command(mke2fs, "-q", "-F", "-t", "ext4", "-d", dir,
		"-E", "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1",
		image, fmt.Sprintf("%dM", sizeMiB))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mke2fs: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// tool finds a program on PATH or where Debian keeps those of the
// administrator, which is on the PATH of root only.
func tool(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not installed: run .ci/setup", name)
}

// initramfs writes the tree as an uncompressed initramfs: decompressing one
// costs an emulated processor more than loading it.
func (t tree) initramfs(file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	err = t.writeCPIO(w)
	return cmp.Or(err, w.Flush(), f.Close())
}

// writeCPIO writes the tree in the "newc" format
// (Documentation/driver-api/early-userspace/buffer-format.rst).
func (t tree) writeCPIO(w io.Writer) error {
	for i, name := range t.names() {
		n := t[name]
		data := n.data
		if n.host != "" {
			var err error
			if data, err = os.ReadFile(n.host); err != nil {
				return err
			}
		}
		if err := writeCPIOEntry(w, uint32(i)+1, strings.TrimPrefix(name, "/"), n, data); err != nil {
			return err
		}
	}
	return writeCPIOEntry(w, 0, "TRAILER!!!", node{}, nil)
}

func writeCPIOEntry(w io.Writer, inode uint32, name string, n node, data []byte) error {
	major, minor := n.device>>8, n.device&0xff
	var b bytes.Buffer
	b.WriteString("070701")
	for _, field := range []uint32{
		inode, unixMode(n.mode), 0, 0, 1, 0, uint32(len(data)),
		0, 0, major, minor, uint32(len(name)) + 1, 0,
	} {
		fmt.Fprintf(&b, "%08x", field)
	}
	b.WriteString(name)
	b.WriteByte(0)
	pad4(&b)
	b.Write(data)
	pad4(&b)
	_, err := w.Write(b.Bytes())
	return err
}

// pad4 pads b with zeros to a multiple of four bytes.
func pad4(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

// unixMode is the st_mode of a node.
func unixMode(m fs.FileMode) uint32 {
	const (
		sIFCHR = 0o020000
		sIFDIR = 0o040000
		sIFREG = 0o100000
		sIFLNK = 0o120000
	)
	perm := uint32(m.Perm())
	switch {
	case m.IsDir():
		return sIFDIR | perm
	case m&fs.ModeSymlink != 0:
		return sIFLNK | perm
	case m&fs.ModeCharDevice != 0:
		return sIFCHR | perm
	}
	return sIFREG | perm
}
