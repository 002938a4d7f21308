package image

import (
	"context"
	"errors"
	"io"

	"github.com/calfvm/calf/qcow2"
)

// SnapshotVerb is something done with the snapshot of a name: one of the three
// functions below.
type SnapshotVerb func(ctx context.Context, m *qcow2.Image, name string) error

// CreateSnapshot keeps the present state of the disk.
func CreateSnapshot(ctx context.Context, m *qcow2.Image, name string) error {
	_, err := m.CreateSnapshot(ctx, name)
	return err
}

// ApplySnapshot makes the disk what it was.
func ApplySnapshot(ctx context.Context, m *qcow2.Image, name string) error {
	return m.ApplySnapshot(ctx, name)
}

// DeleteSnapshot removes the snapshot.
func DeleteSnapshot(ctx context.Context, m *qcow2.Image, name string) error {
	return m.DeleteSnapshot(ctx, name)
}

// ChangeSnapshot does verb with the snapshot name of the image at path.
func ChangeSnapshot(ctx context.Context, path string, verb SnapshotVerb, name string) (err error) {
	m, err := qcow2.Open(path, qcow2.Options{DataFile: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	return verb(ctx, m, name)
}

// ListSnapshots writes a table of the snapshots of an image, nothing if there are
// none.
func ListSnapshots(w io.Writer, i *Info) error {
	if len(i.Snapshots) == 0 {
		return nil
	}
	p := printer{w: w}
	p.snapshots(i.image.Snapshots)
	return p.err
}
