package find

import (
	"io/fs"
	"slices"
	"strings"
)

// maxNames is how many entries of a directory are looked at.
const maxNames = 4096

// kernelNames are what the names of kernels begin with; what follows is the
// version.
var kernelNames = []string{"vmlinuz", "vmlinux", "bzImage", "kernel", "Image"}

// newest returns the newest kernel of a volume by the version in its name.
func newest(_ []*volume, v *volume) (*entry, error) {
	for _, dir := range []string{"boot", "."} {
		list, err := fs.ReadDir(v.files, dir)
		if err != nil {
			continue
		}
		var names []string
		for _, e := range list[:min(len(list), maxNames)] {
			if _, ok := kernelVersion(e.Name()); ok && !e.IsDir() {
				names = append(names, e.Name())
			}
		}
		// A name without a version is a link to the one to boot, or the only one.
		slices.SortFunc(names, func(a, b string) int {
			va, _ := kernelVersion(a)
			vb, _ := kernelVersion(b)
			return compareVersions(vb, va)
		})
		var last error
		for _, name := range names {
			e, err := plain(v, dir, name)
			if err == nil {
				err = e.check()
			}
			if err == nil {
				return e, nil
			}
			last = err
		}
		if last != nil {
			return nil, last
		}
	}
	return nil, nil
}

// plain is the entry of a kernel and the initial RAM disk that goes with it.
func plain(v *volume, dir, name string) (*entry, error) {
	kernel, err := v.openFile(dir + "/" + name)
	if err != nil {
		return nil, err
	}
	e := &entry{kernel: kernel}
	version, _ := kernelVersion(name)
	for _, initrd := range initrdNames(version) {
		if f, err := v.openFile(dir + "/" + initrd); err == nil {
			e.initrds = []*File{f}
			break
		}
	}
	return e, nil
}

// kernelVersion returns the version in the name of a kernel. One that has been
// replaced, or that is kept for a crash, is none.
func kernelVersion(name string) (version string, ok bool) {
	for _, begin := range kernelNames {
		rest, ok := strings.CutPrefix(name, begin)
		if !ok || rest != "" && rest[0] != '-' {
			continue
		}
		if strings.HasSuffix(rest, ".old") || strings.HasSuffix(rest, ".hmac") || strings.HasSuffix(rest, "-kdump") {
			return "", false
		}
		return strings.TrimPrefix(rest, "-"), true
	}
	return "", false
}

// initrdNames are what distributions call the initial RAM disk for a kernel.
func initrdNames(version string) []string {
	if version == "" {
		return []string{"initrd.img", "initrd", "initramfs.img", "initramfs", "initramfs-linux.img"}
	}
	return []string{
		"initrd.img-" + version,          // Debian, Ubuntu
		"initramfs-" + version + ".img",  // Fedora, Arch
		"initrd-" + version,              // openSUSE
		"initramfs-" + version,           // Alpine
		"initrd-" + version + ".img",     // older ones
		"initramfs-genkernel-" + version, // Gentoo
	}
}

// compareVersions compares as people do: numbers by their value. A tilde comes
// before everything, the end included: 6.12~rc1 is older than 6.12.
func compareVersions(a, b string) int {
	for a != "" || b != "" {
		var na, nb string
		if digits(a) > 0 && digits(b) > 0 {
			na, a = cutNumber(a)
			nb, b = cutNumber(b)
			if len(na) != len(nb) {
				return len(na) - len(nb)
			}
			if c := strings.Compare(na, nb); c != 0 {
				return c
			}
			continue
		}
		if c := rank(a) - rank(b); c != 0 {
			return c
		}
		a, b = a[1:], b[1:]
	}
	return 0
}

// rank orders what a version goes on with: a tilde, the end, a letter, a digit,
// anything else.
func rank(s string) int {
	switch {
	case s == "":
		return 1
	case s[0] == '~':
		return 0
	case s[0] >= '0' && s[0] <= '9':
		return 1000
	case s[0]|0x20 >= 'a' && s[0]|0x20 <= 'z':
		return 2 + int(s[0])
	}
	return 300 + int(s[0])
}

func digits(s string) int {
	return len(s) - len(strings.TrimLeft(s, "0123456789"))
}

// cutNumber takes the number off the beginning of s, without leading zeros.
func cutNumber(s string) (number, rest string) {
	n := digits(s)
	return strings.TrimLeft(s[:n], "0"), s[n:]
}
