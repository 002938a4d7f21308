package image

import (
	"context"
	"fmt"

	"github.com/calfvm/calf/cmd/internal/progress"
	"github.com/calfvm/calf/qcow2"
)

// CommitOptions say how to merge an overlay into a file that it lies over.
type CommitOptions struct {
	Open OpenOptions // for the overlay and all files under it
	// Base is the file to merge into, empty for the one that the overlay lies
	// over directly. The files between keep what they have, which is of no use
	// without the old contents of Base.
	Base string
	// Keep leaves in the overlay what it has.
	Keep bool
	Rate int64 // bytes in a second; 0 is no limit
}

// Commit writes what the overlay at path shows into a file that it lies over, which
// becomes longer if it is too short, and then empties the overlay. Until the file
// has all of it on stable storage the overlay stays as it is, so that whatever
// happens it shows the same.
func Commit(ctx context.Context, path string, o CommitOptions, meter *progress.Meter) (err error) {
	if o.Open.Base, err = commitBase(path, o); err != nil {
		return err
	}
	top, err := Open(path, o.Open)
	if err != nil {
		return err
	}
	defer closing(top, &err)
	base, layer := top.QCOW2.Base()
	if base.Size() < top.Size() {
		if err := base.Resize(ctx, top.Size(), qcow2.ResizeOptions{}); err != nil {
			return err
		}
	}
	empty := top.QCOW2.Empty
	if o.Keep {
		empty = func(context.Context) error { return nil }
	}
	const page = 4096
	return merge(ctx, base, empty, &copying{
		from: top, to: diskSink{base}, base: base, shared: layer, sparse: page,
		workers: defaultWorkers(), rate: o.Rate, meter: meter,
	})
}

// merge copies an overlay to its base, and empties the overlay once that is stable.
func merge(ctx context.Context, base qcow2.Base, empty func(context.Context) error, c *copying) error {
	c.expect()
	if err := c.disk(ctx); err != nil {
		return err
	}
	if err := base.Flush(); err != nil {
		return err
	}
	return empty(ctx)
}

// commitBase returns the name of the file to merge into.
func commitBase(path string, o CommitOptions) (string, error) {
	format, err := FormatOf(path, o.Open.Format)
	if err != nil || o.Base != "" && format == QCOW2 {
		return o.Base, err
	}
	none := fmt.Errorf("%s has no backing file to commit to", path)
	if format == Raw {
		return "", none
	}
	i, err := qcow2.Inspect(path)
	if err != nil {
		return "", err
	}
	if i.BackingFile == "" {
		return "", none
	}
	return i.BackingFile, nil
}
