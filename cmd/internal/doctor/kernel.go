package doctor

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/calfvm/calf/guest/boot"
)

// option is an option of the kernel's configuration that a guest of calf needs.
type option struct {
	name     string
	purpose  string
	required bool
}

func options() []option {
	return []option{
		{"64BIT", "a 64-bit kernel", true},
		{"ACPI", "the processors, interrupts and power-off", true},
		{"PCI", "every device", true},
		{"VIRTIO_PCI", "every device", true},
		{"VIRTIO_BLK", "disks", true},
		{"PCI_MSI", "an interrupt for each queue", false},
		{"SERIAL_8250_CONSOLE", "the console", false},
		{"BLK_DEV_INITRD", "initial RAM disks, and commands", false},
		{"DEVTMPFS", "commands", false},
		{"VSOCKETS", "commands", false},
		{"VIRTIO_VSOCKETS", "commands", false},
		{"HW_RANDOM_VIRTIO", "entropy", false},
	}
}

// examineKernel makes the checks of a kernel that opts ask for.
func examineKernel(opts Options) ([]Check, error) {
	if opts.Kernel == "" {
		if opts.KernelConfig == "" {
			return nil, nil
		}
		c, err := examineConfigFile(opts.KernelConfig)
		return []Check{c}, err
	}
	f, size, err := openRegular("kernel", opts.Kernel)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read
	if err := boot.Check(boot.File{ReaderAt: f, Size: size}); err != nil {
		return []Check{missing("kernel", fmt.Sprintf("%s: %v", opts.Kernel, err),
			"Give a bzImage (vmlinuz), or an ELF vmlinux built with CONFIG_PVH.")}, nil
	}
	kernel := ok("kernel", "%s can be booted", opts.Kernel)
	if opts.KernelConfig != "" {
		c, err := examineConfigFile(opts.KernelConfig)
		return []Check{kernel, c}, err
	}
	if text, err := configWithin(f, size); err == nil {
		return []Check{kernel, examineConfig("within the kernel", text)}, nil
	}
	for _, path := range configsBeside(opts.Kernel) {
		switch c, err := examineConfigFile(path); {
		case err == nil:
			return []Check{kernel, c}, nil
		case !errors.Is(err, os.ErrNotExist):
			return nil, err
		}
	}
	return []Check{kernel, warning("kernel config", "none that can be read, within the kernel or beside it",
		"Pass it with --kernel-config.")}, nil
}

// configsBeside are the files in which a kernel's configuration may lie: as
// distributions install it, and in a tree where a kernel was built.
func configsBeside(kernel string) []string {
	dir, base := filepath.Split(kernel)
	_, version, versioned := strings.Cut(base, "-")
	switch {
	case versioned:
		return []string{filepath.Join(dir, "config-"+version)}
	case base == "bzImage":
		return []string{filepath.Join(dir, "../../../.config")}
	}
	return []string{filepath.Join(dir, "config"), filepath.Join(dir, ".config")}
}

func examineConfigFile(path string) (Check, error) {
	f, _, err := openRegular("configuration of the kernel", path)
	if err != nil {
		return Check{}, err
	}
	defer func() { _ = f.Close() }() // only read
	text, err := readConfig(bufio.NewReader(f))
	if err != nil {
		return Check{}, fmt.Errorf("%s: %w", path, err)
	}
	return examineConfig(path, text), nil
}

// examineConfig checks the configuration text, which was found in where.
func examineConfig(where, text string) Check {
	const name = "kernel config"
	values := make(map[string]string)
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			values[strings.TrimPrefix(key, "CONFIG_")] = value
		}
	}
	state := OK
	var absent, modules []string
	for _, o := range options() {
		switch values[o.name] {
		case "y":
		case "m":
			modules = append(modules, o.name)
		default:
			absent = append(absent, fmt.Sprintf("CONFIG_%s (%s)", o.name, o.purpose))
			if o.required {
				state = Missing
			} else if state == OK {
				state = Warning
			}
		}
	}
	if state != OK {
		return Check{name, state, fmt.Sprintf("%s: it lacks %s", where, strings.Join(absent, ", ")), "Build the kernel with what it lacks, or use a distribution's."}
	}
	found := where + ": all that guests need"
	if len(modules) > 0 {
		found += "; as modules, which an initial RAM disk must hold: " + strings.Join(modules, ", ")
	}
	return ok(name, "%s", found)
}

// openRegular opens a regular file, which is what. A pipe is not waited for.
func openRegular(what, path string) (*os.File, int64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, 0, fmt.Errorf("the %s: %w", what, err)
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("the %s: %s is not a file", what, path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, fmt.Errorf("the %s: %w", what, err)
	}
	return f, info.Size(), nil
}
