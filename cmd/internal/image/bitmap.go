package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/calfvm/calf/qcow2"
)

// The actions on a bitmap.
const (
	AddBitmap     = "add"
	RemoveBitmap  = "remove"
	ClearBitmap   = "clear"
	EnableBitmap  = "enable"
	DisableBitmap = "disable"
	MergeBitmap   = "merge"
)

// BitmapAction is one of the actions, and of MergeBitmap the bitmap that is merged.
type BitmapAction struct{ What, Source string }

// BitmapOptions say where bitmaps are and what a new one is like.
type BitmapOptions struct {
	OpenOptions        // of the image
	Granularity  int64 // in bytes, 0 for the default
	SourceFile   string
	SourceFormat string
}

// ChangeBitmap does the actions with the bitmap name of the image at path, in their
// order. Those before one that fails stay done. Bitmaps are merged from SourceFile, or
// from the image if it is empty.
func ChangeBitmap(ctx context.Context, path, name string, actions []BitmapAction, o BitmapOptions) (err error) {
	m, err := openForBitmaps(path, o.OpenOptions)
	if err != nil {
		return err
	}
	defer closing(m, &err)
	source := m
	if o.SourceFile != "" {
		from := o.OpenOptions
		from.Format, from.ReadOnly = o.SourceFormat, true
		if source, err = openForBitmaps(o.SourceFile, from); err != nil {
			return err
		}
		defer closing(source, &err)
	}
	for _, a := range actions {
		if err := a.do(ctx, m, name, source, o.Granularity); err != nil {
			return err
		}
	}
	return nil
}

// openForBitmaps opens an image that may have bitmaps.
func openForBitmaps(path string, o OpenOptions) (*qcow2.Image, error) {
	m, err := Open(path, o)
	if err != nil {
		return nil, err
	}
	if m.QCOW2 == nil {
		return nil, errors.Join(fmt.Errorf("%s: a raw image has no bitmaps", path), m.Close())
	}
	return m.QCOW2, nil
}

// do does the action with the bitmap name of m.
func (a BitmapAction) do(ctx context.Context, m *qcow2.Image, name string, source *qcow2.Image, granularity int64) error {
	switch a.What {
	case AddBitmap:
		return m.AddBitmap(ctx, name, qcow2.BitmapOptions{Granularity: granularity})
	case RemoveBitmap:
		return m.RemoveBitmap(ctx, name)
	case ClearBitmap:
		return m.ClearBitmap(ctx, name)
	case EnableBitmap:
		return m.EnableBitmap(ctx, name)
	case DisableBitmap:
		return m.DisableBitmap(ctx, name)
	default:
		return m.MergeBitmap(ctx, name, source, a.Source)
	}
}

// checkBitmaps refuses to copy bitmaps from an image that has none, or has one that
// cannot be trusted, unless skip is told to leave that out.
func checkBitmaps(from *Image, skip func(name string)) ([]qcow2.Bitmap, error) {
	if from.QCOW2 == nil {
		return nil, fmt.Errorf("%s is raw, and has no bitmaps to copy", from.Path)
	}
	all, err := from.QCOW2.Bitmaps()
	if err != nil {
		return nil, err
	}
	var sound []qcow2.Bitmap
	for _, b := range all {
		switch {
		case !b.InUse:
			sound = append(sound, b)
		case skip == nil:
			return nil, fmt.Errorf("%s: the bitmap %q is in use and cannot be trusted: remove it with calf image bitmap --remove", from.Path, b.Name)
		default:
			skip(b.Name)
		}
	}
	return sound, nil
}

// copyBitmaps adds the bitmaps of from to to, whose disk is as long.
func copyBitmaps(ctx context.Context, bitmaps []qcow2.Bitmap, from, to *Image) error {
	if len(bitmaps) > 0 && to.QCOW2 == nil {
		return errors.New("a raw image has no bitmaps")
	}
	for _, b := range bitmaps {
		if err := to.QCOW2.AddBitmap(ctx, b.Name, qcow2.BitmapOptions{Granularity: b.Granularity, Disabled: !b.Enabled}); err != nil {
			return err
		}
		if err := to.QCOW2.MergeBitmap(ctx, b.Name, from.QCOW2, b.Name); err != nil {
			return err
		}
	}
	return nil
}
