package image

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/calfvm/calf/qcow2"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "512": 512, "1k": 1 << 10, "1K": 1 << 10, "1.5G": 3 << 29, "2T": 2 << 40, "1p": 1 << 50, "7E": 7 << 60, "1.5e": 3 << 59,
		"0x1000": 4096, "9007199254740993": 1<<53 + 1, "9223372036854775807": 1<<63 - 1, "10b": 10, "1KiB": 1 << 10,
	} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("%q is %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "k", "E", "-1", "+1", "1 G", "1X", "8E", "9223372036854775808", "99999999P", "1_000", "0x", "0x-1", "much", "1e3"} {
		if got, err := ParseSize(s); err == nil {
			t.Errorf("%q is %d", s, got)
		}
	}
}

// TestReadersAreCanceled ends the verbs that read for long before they begin.
func TestReadersAreCanceled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.qcow2")
	if _, err := Create(path, QCOW2, CreateOptions{CreateOptions: qcow2.CreateOptions{Size: 1 << 30}}, true); err != nil {
		t.Fatal(err)
	}
	m, err := Open(path, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.WritevAt([][]byte{{1}}, 1<<20), m.Close()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out strings.Builder
	code, err := Compare(ctx, &out, [2]string{path, path}, [2]OpenOptions{}, false, nil)
	if code != CompareNotRead || !errors.Is(err, context.Canceled) || out.Len() > 0 {
		t.Errorf("compare: code %d, %v, %s", code, err, out.String())
	}
	if err := Map(ctx, io.Discard, path, OpenOptions{ReadOnly: true}, MapRange{Most: -1}, true); !errors.Is(err, context.Canceled) {
		t.Errorf("map: %v", err)
	}
	if _, err := MeasureCopy(ctx, path, OpenOptions{}, QCOW2, CreateOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("measure: %v", err)
	}
	if _, code, err := Check(ctx, path, QCOW2, CheckOptions{}); code != CheckFailed || !errors.Is(err, context.Canceled) {
		t.Errorf("check: code %d, %v", code, err)
	}
}
