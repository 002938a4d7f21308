package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"

	"github.com/calfvm/calf/qcow2"
)

// Measurement says how long the file of a new image has to be. Its keys are
// qemu-img's.
type Measurement struct {
	Required       int64  `json:"required"`
	FullyAllocated int64  `json:"fully-allocated"`
	Bitmaps        *int64 `json:"bitmaps,omitempty"` // nil if source or target has none by nature
}

// MeasureNew measures an empty image of the format with the options.
func MeasureNew(format string, o CreateOptions) (*Measurement, error) {
	return measure(format, o, nil)
}

// MeasureCopy measures an image of the format with the options which is to be a
// copy of the image at path.
func MeasureCopy(ctx context.Context, path string, source OpenOptions, format string, o CreateOptions) (_ *Measurement, err error) {
	source.ReadOnly = true
	m, err := Open(path, source)
	if err != nil {
		return nil, err
	}
	defer closing(m, &err)
	o.Size = m.Size()
	r, err := measure(format, o, whileGoing(ctx, m.Map(0, m.Size())))
	if err != nil || format == Raw || o.Version == 2 || m.QCOW2 == nil {
		return r, err
	}
	if r.Bitmaps, err = m.measureBitmaps(o.ClusterSize); err != nil {
		return nil, err
	}
	return r, nil
}

func measure(format string, o CreateOptions, content iter.Seq2[qcow2.Mapping, error]) (*Measurement, error) {
	if format == Raw {
		if o.Size > math.MaxInt64-511 {
			return nil, fmt.Errorf("a raw image of %d bytes is too large", o.Size)
		}
		size := (o.Size + 511) &^ 511
		return &Measurement{Required: size, FullyAllocated: size}, nil
	}
	r, err := o.Measure(content)
	if err != nil {
		return nil, err
	}
	return &Measurement{Required: r.Required, FullyAllocated: r.FullyAllocated}, nil
}

// measureBitmaps returns the room that the bitmaps of the image, which is qcow2,
// take in one with clusters of the given size; nil if it can have none.
func (m *Image) measureBitmaps(clusterSize int64) (*int64, error) {
	if m.QCOW2.Version() == 2 {
		return nil, nil
	}
	bitmaps, err := m.QCOW2.Bitmaps()
	if err != nil {
		return nil, err
	}
	return new(qcow2.MeasureBitmaps(bitmaps, m.Size(), clusterSize)), nil
}

// whileGoing is seq, ended by an error once ctx is done.
func whileGoing(ctx context.Context, seq iter.Seq2[qcow2.Mapping, error]) iter.Seq2[qcow2.Mapping, error] {
	return func(yield func(qcow2.Mapping, error) bool) {
		for m, err := range seq {
			if !yield(m, errors.Join(err, ctx.Err())) {
				return
			}
		}
	}
}

// Text writes the measurement in qemu-img's lines.
func (r *Measurement) Text(w io.Writer) error {
	_, err := fmt.Fprintf(w, "required size: %d\nfully allocated size: %d\n", r.Required, r.FullyAllocated)
	if r.Bitmaps != nil && err == nil {
		_, err = fmt.Fprintf(w, "bitmaps size: %d\n", *r.Bitmaps)
	}
	return err
}
