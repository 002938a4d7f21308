package image

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/calfvm/calf/qcow2"
)

// The exit codes of a check, which are qemu-img's.
const (
	CheckClean       = 0
	CheckFailed      = 1 // it could not be done
	CheckCorrupt     = 2
	CheckLeaks       = 3
	CheckUnsupported = 63 // the format cannot be checked
)

// CheckReport is the result of a check, after the repair if there was one. Its
// keys are qemu-img's.
type CheckReport struct {
	Filename         string `json:"filename"`
	Format           string `json:"format"`
	CheckErrors      int64  `json:"check-errors"`
	ImageEnd         int64  `json:"image-end-offset,omitempty"`
	Corruptions      int64  `json:"corruptions,omitempty"`
	Leaks            int64  `json:"leaks,omitempty"`
	CorruptionsFixed int64  `json:"corruptions-fixed,omitempty"`
	LeaksFixed       int64  `json:"leaks-fixed,omitempty"`
	Total            int64  `json:"total-clusters,omitempty"`
	Allocated        int64  `json:"allocated-clusters,omitempty"`
	Fragmented       int64  `json:"fragmented-clusters,omitempty"`
	Compressed       int64  `json:"compressed-clusters,omitempty"`

	findings []qcow2.Finding
}

// Check checks the image at path, after a repair if mode is not nil. It returns
// the exit code that goes with the report, which is nil if there is none.
func Check(ctx context.Context, path, format string, mode *qcow2.RepairMode) (*CheckReport, int, error) {
	if format == Raw {
		return nil, CheckUnsupported, fmt.Errorf("%s: a raw image has nothing to check", path)
	}
	r := &CheckReport{Filename: path, Format: format}
	result, err := r.run(ctx, mode)
	if err != nil {
		return nil, failure(err), err
	}
	r.Corruptions, r.Leaks, r.ImageEnd = result.Corruptions, result.Leaks, result.ImageEnd
	r.Total, r.Allocated, r.Fragmented, r.Compressed = result.Total, result.Allocated, result.Fragmented, result.Compressed
	r.findings = result.Findings
	switch {
	case r.Corruptions > 0:
		return r, CheckCorrupt, nil
	case r.Leaks > 0:
		return r, CheckLeaks, nil
	}
	return r, CheckClean, nil
}

// run checks or repairs, and counts what was repaired.
func (r *CheckReport) run(ctx context.Context, mode *qcow2.RepairMode) (*qcow2.CheckResult, error) {
	if mode == nil {
		return qcow2.Check(ctx, r.Filename, qcow2.CheckOptions{})
	}
	before, after, err := qcow2.Repair(ctx, r.Filename, *mode, qcow2.CheckOptions{})
	if err != nil {
		return nil, err
	}
	r.CorruptionsFixed = max(before.Corruptions-after.Corruptions, 0)
	r.LeaksFixed = max(before.Leaks-after.Leaks, 0)
	return after, nil
}

func failure(err error) int {
	if errors.Is(err, qcow2.ErrUnsupported) {
		return CheckUnsupported
	}
	return CheckFailed
}

// Text writes the report for people.
func (r *CheckReport) Text(w io.Writer) error {
	p := printer{w: w}
	for _, f := range r.findings {
		p.f("%s: %s\n", f.Kind, f.What)
	}
	if unseen := r.Corruptions + r.Leaks - int64(len(r.findings)); unseen > 0 {
		p.f("and %d more\n", unseen)
	}
	if r.CorruptionsFixed+r.LeaksFixed > 0 {
		p.f("The repair mended %d corruptions and %d leaks.\n", r.CorruptionsFixed, r.LeaksFixed)
	}
	switch {
	case r.Corruptions > 0:
		p.f("%d corruptions and %d leaks were found on the image: data may be lost.\n", r.Corruptions, r.Leaks)
	case r.Leaks > 0:
		p.f("%d leaked clusters were found on the image: they cost space and harm no data.\n", r.Leaks)
	default:
		p.f("No errors were found on the image.\n")
	}
	if r.Allocated > 0 {
		p.f("%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n", r.Allocated, r.Total,
			percent(r.Allocated, r.Total), percent(r.Fragmented, r.Allocated), percent(r.Compressed, r.Allocated))
	}
	p.f("Image end offset: %d\n", r.ImageEnd)
	return p.err
}

func percent(part, of int64) float64 {
	if of == 0 {
		return 0
	}
	return 100 * float64(part) / float64(of)
}

// printer writes lines until one fails.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) f(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}
