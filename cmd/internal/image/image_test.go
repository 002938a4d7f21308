package image

import "testing"

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
