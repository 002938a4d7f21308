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

// CheckOptions say how to check an image.
type CheckOptions struct {
	Repair *qcow2.RepairMode // nil to change nothing
	// ForceShare checks the image beside a process that writes to it.
	ForceShare bool
	// Cache is that of OpenOptions.
	Cache string
}

// Check checks the image at path, after a repair if there is to be one. It returns
// the exit code that goes with the report. A report beside an error says only that
// the image could not be checked.
func Check(ctx context.Context, path, format string, o CheckOptions) (*CheckReport, int, error) {
	r := &CheckReport{Filename: path, Format: format}
	err := r.run(ctx, o)
	switch {
	case err != nil:
		return &CheckReport{Filename: path, Format: format, CheckErrors: 1}, failure(err), err
	case r.Corruptions > 0:
		return r, CheckCorrupt, nil
	case r.Leaks > 0:
		return r, CheckLeaks, nil
	}
	return r, CheckClean, nil
}

// run checks the image and fills in the report.
func (r *CheckReport) run(ctx context.Context, o CheckOptions) error {
	mode, err := parseCache(o.Cache)
	if err != nil {
		return err
	}
	if r.Format == Raw {
		return fmt.Errorf("%s: a raw image has nothing to check: %w", r.Filename, errors.ErrUnsupported)
	}
	opts := qcow2.CheckOptions{ForceShare: o.ForceShare, Direct: mode.direct}
	var result *qcow2.CheckResult
	if o.Repair == nil {
		result, err = qcow2.Check(ctx, r.Filename, opts)
	} else {
		result, err = r.repair(ctx, *o.Repair, opts)
	}
	if err != nil {
		return err
	}
	r.Corruptions, r.Leaks, r.ImageEnd = result.Corruptions, result.Leaks, result.ImageEnd
	r.Total, r.Allocated, r.Fragmented, r.Compressed = result.Total, result.Allocated, result.Fragmented, result.Compressed
	r.findings = result.Findings
	return nil
}

// repair repairs the image and counts what was repaired.
func (r *CheckReport) repair(ctx context.Context, mode qcow2.RepairMode, opts qcow2.CheckOptions) (*qcow2.CheckResult, error) {
	if opts.ForceShare {
		return nil, fmt.Errorf("%s: a repair changes the image, which -U lets others write to meanwhile: use one of -r and -U", r.Filename)
	}
	before, after, err := qcow2.Repair(ctx, r.Filename, mode, opts)
	if err != nil {
		return nil, err
	}
	r.CorruptionsFixed = max(before.Corruptions-after.Corruptions, 0)
	r.LeaksFixed = max(before.Leaks-after.Leaks, 0)
	return after, nil
}

func failure(err error) int {
	if errors.Is(err, qcow2.ErrUnsupported) || errors.Is(err, errors.ErrUnsupported) {
		return CheckUnsupported
	}
	return CheckFailed
}

// Findings writes what was found, a line for each finding: those that begin with
// ERROR may cost data, those that begin with Leaked only room.
func (r *CheckReport) Findings(w io.Writer) error {
	p := printer{w: w}
	word := map[qcow2.FindingKind]string{qcow2.Corruption: "ERROR", qcow2.Leak: "Leaked"}
	for _, f := range r.findings {
		p.f("%s: %s\n", word[f.Kind], f.What)
	}
	if unseen := r.Corruptions + r.Leaks - int64(len(r.findings)); unseen > 0 {
		p.f("and %d more\n", unseen)
	}
	return p.err
}

// Text writes the report but for the findings in qemu-img's lines.
func (r *CheckReport) Text(w io.Writer) error {
	p := printer{w: w}
	if r.CorruptionsFixed+r.LeaksFixed > 0 {
		p.f("The following inconsistencies were found and repaired:\n\n    %d leaked clusters\n    %d corruptions\n\n"+
			"Double checking the fixed image now...\n", r.LeaksFixed, r.CorruptionsFixed)
	}
	if r.Corruptions+r.Leaks == 0 {
		p.f("No errors were found on the image.\n")
	}
	if r.Corruptions > 0 {
		p.f("\n%d errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n", r.Corruptions)
	}
	if r.Leaks > 0 {
		p.f("\n%d leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n", r.Leaks)
	}
	if r.Allocated > 0 {
		p.f("%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n", r.Allocated, r.Total,
			percent(r.Allocated, r.Total), percent(r.Fragmented, r.Allocated), percent(r.Compressed, r.Allocated))
	}
	if r.ImageEnd > 0 {
		p.f("Image end offset: %d\n", r.ImageEnd)
	}
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
