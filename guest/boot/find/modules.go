package find

import (
	"fmt"
	"io/fs"
	"path"

	"github.com/calfvm/calf/guest/boot"
	"github.com/calfvm/calf/guest/internal/modules"
)

// maxModules bounds the size of the modules that are taken from a disk, in bytes.
const maxModules = 64 << 20

// Modules returns the files of the kernel's modules with the names, and of all that they
// need, as the root has them: by their paths from the directory for the kernel's
// release. Those that are not there are left out, which may be all.
func (f *Found) Modules(names ...string) (map[string][]byte, error) {
	release, err := boot.Release(boot.File{ReaderAt: f.Kernel, Size: f.Kernel.Size})
	if err != nil || f.RootPartition == nil {
		return nil, err
	}
	for _, v := range f.volumes {
		if v.files == nil || v.Number != f.RootPartition.Number {
			continue
		}
		for _, dir := range []string{"lib/modules", "usr/lib/modules"} {
			if dir = path.Join(dir, release); fs.ValidPath(dir) && v.has(dir) {
				return v.modules(dir, names)
			}
		}
	}
	return nil, nil
}

func (v *volume) modules(dir string, names []string) (map[string][]byte, error) {
	files, err := fs.Sub(v.files, dir)
	if err != nil {
		return nil, err
	}
	set, err := modules.Open(files)
	if err != nil {
		return nil, fmt.Errorf("%v: /%s: %w", v.Partition, dir, err)
	}
	all, left := make(map[string][]byte), int64(maxModules)
	for _, file := range set.Files(names...) {
		if all[file], err = v.readFile(path.Join(dir, file), left); err != nil {
			return nil, err
		}
		left -= int64(len(all[file]))
	}
	return all, nil
}
