package lab

import (
	"cmp"
	"io"
	"os"
	"path/filepath"
)

// GuestRoot writes a new raw image with an ext4 file system for guests to
// file: busybox with a link for each of its commands in /bin, empty /dev,
// /proc, /sys, /tmp, /run, /etc, /root and /mnt, and the given files, by their
// paths. Those under /bin and /sbin can be executed. The named programs of this
// machine replace busybox's of the same names.
func GuestRoot(file string, sizeMiB int, files map[string]string, programs ...string) error {
	t := make(tree)
	if err := t.busybox(); err != nil {
		return err
	}
	t.dir("/sbin")
	for name, text := range files {
		t.text(name, text, 0o755)
	}
	for _, name := range programs {
		host, err := tool(name)
		if err != nil {
			return err
		}
		if err := t.program("/bin/"+filepath.Base(name), host); err != nil {
			return err
		}
	}
	return t.ext4(file, sizeMiB)
}

// WithScript writes an initramfs to file which, where k.Initrd would hand over
// to /sbin/init of the root, runs script instead, with the shell of the root
// (see guest-init.sh). The kernel is the one of k.
func (k Kernel) WithScript(file, script string) error {
	base, err := os.Open(k.Initrd)
	if err != nil {
		return err
	}
	defer base.Close()
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	// The kernel unpacks archives one after the other. Each is a multiple of
	// four bytes long, as the next one's place has to be.
	_, err = io.Copy(out, base)
	if err == nil {
		t := make(tree)
		t.text("/script", script, 0o755)
		err = t.writeCPIO(out)
	}
	return cmp.Or(err, out.Close())
}
