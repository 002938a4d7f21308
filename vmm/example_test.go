package vmm_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/calfvm/calf/qcow2"
	"github.com/calfvm/calf/vmm"
)

// A kernel boots from a QCOW2 image.
func Example() {
	outcome, err := boot(context.Background(), "vmlinuz", "disk.qcow2")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(outcome)
}

// boot closes the machine before the image that it uses.
func boot(ctx context.Context, kernel, image string) (outcome vmm.Outcome, err error) {
	m, err := vmm.New(vmm.Config{CPUs: 2, Kernel: kernel})
	if err != nil {
		return vmm.Unknown, err
	}
	img, err := qcow2.Open(image, qcow2.Options{})
	if err != nil {
		return vmm.Unknown, errors.Join(err, m.Close())
	}
	defer func() { err = errors.Join(err, m.Close(), img.Close()) }()
	if err := m.AddDisk(vmm.Disk{Name: image, Disk: img}); err != nil {
		return vmm.Unknown, err
	}
	return m.Run(ctx)
}
