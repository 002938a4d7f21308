package launch

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/qcow2"
)

// keepOverlay puts a new overlay at path over the first disk of cfg, which takes what
// is written to it.
func keepOverlay(cfg *config.Config, path string) error {
	d := &cfg.Disks[0]
	base, err := openDisk(*d, true)
	if err != nil {
		return err
	}
	size := base.Size()
	if err := base.Close(); err != nil {
		return err
	}
	under, errBase := filepath.Abs(d.Path)
	over, errOver := filepath.Abs(path)
	if err := errors.Join(errBase, errOver); err != nil {
		return err
	}
	dir := filepath.Dir(under)
	if dir == filepath.Dir(over) {
		under = filepath.Base(under)
	}
	switch err := qcow2.Create(path, qcow2.CreateOptions{Size: size, BackingFile: under, BackingFormat: d.Format}); {
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("--keep makes a new file, and %s is there already: boot that, remove it, or name another", path)
	case err != nil:
		return fmt.Errorf("--keep: %w", err)
	}
	d.Path, d.Format, d.Snapshot, d.ReadOnly = path, config.FormatQCOW2, false, false
	d.BackingDirs = append(slices.Clone(d.BackingDirs), dir)
	return nil
}
