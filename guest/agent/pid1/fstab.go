package pid1

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// fstab is where an image says what file systems belong to it.
const fstab = "/etc/fstab"

// entry is a line of fstab.
type entry struct{ device, at, kind, options string }

// parseFstab returns the lines of an fstab that name a file system of a device to be
// mounted at start, beside the root.
func parseFstab(text string) []entry {
	var entries []entry
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 3 || strings.HasPrefix(f[0], "#") {
			continue
		}
		e := entry{device: unescape(f[0]), at: filepath.Clean(unescape(f[1])), kind: f[2]}
		if len(f) > 3 {
			e.options = unescape(f[3])
		}
		isDevice := strings.HasPrefix(e.device, "/dev/") || strings.Contains(e.device, "=")
		if isDevice && filepath.IsAbs(e.at) && e.at != "/" && e.kind != "swap" && e.kind != "none" && !slices.Contains(strings.Split(e.options, ","), "noauto") {
			entries = append(entries, e)
		}
	}
	return entries
}

// unescape replaces the \040 that fstab has for a blank, and others of that kind.
func unescape(s string) string {
	var b strings.Builder
	for {
		before, rest, ok := strings.Cut(s, `\`)
		b.WriteString(before)
		if !ok {
			return b.String()
		}
		digits := rest[:min(3, len(rest))]
		if c, err := strconv.ParseUint(digits, 8, 8); err == nil && len(digits) == 3 {
			b.WriteByte(byte(c))
			rest = rest[3:]
		} else {
			b.WriteByte('\\')
		}
		s = rest
	}
}

// mountFstab mounts what fstab names and wanted says, as far as devices and directories
// are there. What goes wrong is said on the console: the guest may do without.
func mountFstab(wanted func(entry) bool, more uintptr) {
	text, err := os.ReadFile(fstab)
	if err != nil {
		return
	}
	for _, e := range parseFstab(string(text)) {
		path := deviceOf(e.device)
		if st, err := os.Stat(e.at); path == "" || !wanted(e) || err != nil || !st.IsDir() {
			continue
		}
		if e.kind == "auto" {
			e.kind = kindOf(path)
		}
		if !isKnown(typeOf(e.kind)) {
			_ = newLoader().load(driversOf(e.kind)...) // the mount tells
		}
		flags, data := parseOptions(e.options)
		if err := mountDevice(path, e.at, typeOf(e.kind), flags|more, data); err != nil {
			fmt.Fprintf(os.Stderr, "calf: %s: %v\n", fstab, err)
		}
	}
}

// isKnown reports whether the kernel has the driver of a type of file system already.
func isKnown(kind string) bool {
	list, err := os.ReadFile("/proc/filesystems")
	return err == nil && slices.Contains(strings.Fields(string(list)), kind)
}

// mountDevice mounts a device; one that cannot be written is mounted for reading.
func mountDevice(device, at, kind string, flags uintptr, data string) error {
	err := unix.Mount(device, at, kind, flags, data)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
		err = unix.Mount(device, at, kind, flags|unix.MS_RDONLY, data)
	}
	if err != nil {
		return fmt.Errorf("mounting %s at %s as %s: %w", device, at, kind, err)
	}
	return nil
}
