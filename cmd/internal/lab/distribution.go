package lab

import (
	"fmt"
	"os"
	"path/filepath"
)

// Disks are QCOW2 images with the distribution of the machine that ran
// .ci/setup, as its packages make it: systemd, its kernel, its initial RAM disk
// and its grub.cfg. All tests share them, so none may change one.
type Disks struct {
	Whole string // one file system
	Boot  string // an EFI system partition, a file system for /boot, the root
}

// wholeDisk is the name of the file Disks.Whole.
const wholeDisk = "disk.qcow2"

// Distribution returns the disks that .ci/setup made.
func Distribution() (Disks, error) {
	cache, err := cacheDir()
	if err != nil {
		return Disks{}, err
	}
	dir := filepath.Join(cache, "images")
	d := Disks{Whole: filepath.Join(dir, wholeDisk), Boot: filepath.Join(dir, "boot.qcow2")}
	for _, file := range []string{d.Whole, d.Boot} {
		if _, err := os.Stat(file); err != nil {
			return Disks{}, fmt.Errorf("%w: run .ci/setup", err)
		}
	}
	return d, nil
}
