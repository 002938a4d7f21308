package lab

import (
	"bufio"
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// Kernel is a stock kernel, unmodified, as a distribution's package holds it.
type Kernel struct {
	// Release is what uname -r says, such as 6.1.0-56-cloud-amd64.
	Release string
	// Image is the path of the bzImage.
	Image string
	// Initrd is the path of an initramfs that mounts the first virtio disk as
	// the root, as a distribution's does: see guestInit. WithScript makes one
	// for a test.
	Initrd string
}

// modules is the directory of the kernel's modules, on the host.
func (k Kernel) modules() string { return filepath.Join(filepath.Dir(k.Image), "modules") }

// Series is the first two numbers of the release, such as 6.1.
func (k Kernel) Series() string {
	v := append(k.version(), 0, 0)
	return fmt.Sprintf("%d.%d", v[0], v[1])
}

// version is the numbers in the release, the most significant first.
func (k Kernel) version() []int {
	var v []int
	for _, field := range strings.FieldsFunc(k.Release, func(r rune) bool { return r < '0' || r > '9' }) {
		n, _ := strconv.Atoi(field) // digits only; one too large is as good as any
		v = append(v, n)
	}
	return v
}

// Kernels returns the kernels that .ci/setup unpacked, oldest first; at least
// one. Of each series only the newest counts.
func Kernels() ([]Kernel, error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	images, err := filepath.Glob(filepath.Join(cache, "kernels", "*", "vmlinuz"))
	if err != nil {
		return nil, err
	}
	if len(images) == 0 {
		return nil, fmt.Errorf("no kernels in %s: run .ci/setup", filepath.Join(cache, "kernels"))
	}
	var kernels []Kernel
	for _, image := range images {
		dir := filepath.Dir(image)
		kernels = append(kernels, Kernel{
			Release: filepath.Base(dir),
			Image:   image,
			Initrd:  filepath.Join(dir, "initrd"),
		})
	}
	slices.SortFunc(kernels, func(a, b Kernel) int { return slices.Compare(a.version(), b.version()) })
	newest := kernels[:0]
	for i, k := range kernels {
		if i+1 == len(kernels) || kernels[i+1].Series() != k.Series() {
			newest = append(newest, k)
		}
	}
	if Inside() {
		return newest, nil // the root disk has their initramfs
	}
	for i := range newest {
		if newest[i].Initrd, err = guestInitrd(newest[i]); err != nil {
			return nil, err
		}
	}
	return newest, nil
}

// module is a loadable kernel module.
type module struct {
	name    string
	depends []string
	data    []byte // the ELF file, uncompressed
}

// load returns the named modules and all that they depend on, in an order in
// which they can be inserted. Names that are built into the kernel are left
// out.
func (k Kernel) load(names ...string) ([]module, error) {
	files, err := k.moduleFiles()
	if err != nil {
		return nil, err
	}
	var order []module
	done := make(map[string]bool)
	var visit func(name string) error
	visit = func(name string) error {
		name = moduleName(name)
		file, ok := files[name]
		if !ok {
			return fmt.Errorf("kernel %s has no module %s", k.Release, name)
		}
		if done[name] || file == "" {
			return nil
		}
		done[name] = true
		data, err := readModule(file)
		if err != nil {
			return fmt.Errorf("module %s: %w", file, err)
		}
		depends, err := moduleDepends(data)
		if err != nil {
			return fmt.Errorf("module %s: %w", file, err)
		}
		for _, d := range depends {
			if err := visit(d); err != nil {
				return err
			}
		}
		order = append(order, module{name, depends, data})
		return nil
	}
	for _, name := range names {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleFiles maps the names of the kernel's modules to their files, and the
// names of the built-in ones to "".
func (k Kernel) moduleFiles() (map[string]string, error) {
	files := make(map[string]string)
	builtin, err := os.Open(filepath.Join(k.modules(), "modules.builtin"))
	if err != nil {
		return nil, err
	}
	defer builtin.Close()
	for s := bufio.NewScanner(builtin); s.Scan(); {
		files[moduleName(s.Text())] = ""
	}
	err = filepath.WalkDir(k.modules(), func(file string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.Contains(d.Name(), ".ko") {
			files[moduleName(file)] = file
		}
		return err
	})
	return files, err
}

// moduleName is the name by which modules refer to the one in file.
func moduleName(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModule returns the uncompressed contents of a module's file.
func readModule(file string) ([]byte, error) {
	switch filepath.Ext(file) {
	case ".xz":
		return exec.Command("xz", "-dc", file).Output()
	case ".zst":
		packed, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		d, err := zstd.NewReader(nil)
		if err != nil {
			return nil, err
		}
		defer d.Close()
		return d.DecodeAll(packed, nil)
	}
	return os.ReadFile(file)
}

// moduleDepends returns the names of the modules that the module in data says
// it needs.
func moduleDepends(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok {
			return strings.FieldsFunc(list, func(r rune) bool { return r == ',' }), nil
		}
	}
	return nil, nil
}

// addModules puts the named modules and what they need into t below dir, and a
// file named order that lists them as they have to be inserted.
func (k Kernel) addModules(t tree, dir string, names ...string) error {
	modules, err := k.load(names...)
	if err != nil {
		return err
	}
	var order strings.Builder
	for _, m := range modules {
		t.add(filepath.Join(dir, m.name+".ko"), node{mode: 0o644, data: m.data})
		fmt.Fprintln(&order, m.name)
	}
	t.text(filepath.Join(dir, "order"), order.String(), 0o644)
	return nil
}

// linkModules makes the modules, which addModules has put into the given
// directories, known where a distribution has them, with their modules.dep.
func (k Kernel) linkModules(t tree, dirs, names []string) error {
	modules, err := k.load(names...)
	if err != nil {
		return err
	}
	home := "/lib/modules/" + k.Release
	var deps strings.Builder
	for _, m := range modules {
		for _, dir := range dirs {
			if file := filepath.Join(dir, m.name+".ko"); t.has(file) {
				t.link(filepath.Join(home, m.name+".ko"), file)
			}
		}
		deps.WriteString(m.name + ".ko:")
		for _, d := range m.depends {
			if t.has(filepath.Join(home, moduleName(d)+".ko")) { // and is no part of the kernel
				deps.WriteString(" " + moduleName(d) + ".ko")
			}
		}
		deps.WriteString("\n")
	}
	t.text(filepath.Join(home, "modules.dep"), deps.String(), 0o644)
	return nil
}
