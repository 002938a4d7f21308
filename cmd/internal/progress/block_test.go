package progress

import (
	"strings"
	"testing"
	"unicode"
)

func TestCut(t *testing.T) {
	for _, tt := range []struct {
		in      string
		columns int
		want    string
	}{
		{"make", 10, "make"},
		{"make all", 4, "make"},
		{"日本語", 4, "日本"},
		{"日本語", 5, "日本"},
		{"é", 1, "é"},
		{"\x1b[1;31mred\x1b[0m\x1b[K \x1b]0;title\x07t\x1b]8;;x\x1b\\u", 10, "red tu"},
		{"\x1b(Bx\x1b=y\x1b", 10, "xy"},
		{"a\tb\n\ac\x00\xff\u009b31m\u202e", 10, "a b c\ufffd31m"},
	} {
		if got := Cut(tt.in, tt.columns); got != tt.want {
			t.Errorf("Cut(%q, %d) = %q, want %q", tt.in, tt.columns, got, tt.want)
		}
	}
}

// FuzzPlain shows a terminal what a guest or an image says.
func FuzzPlain(f *testing.F) {
	f.Add("\x1b[1;31mred\x1b[0m\x1b]0;title\x07\tt\x1b]8;;x\x1b\\u\n\u202e\xff\u009b", 3)
	f.Fuzz(func(t *testing.T, s string, columns int) {
		if got := Plain(s); strings.ContainsFunc(got, func(r rune) bool { return unicode.IsControl(r) && r != '\t' && r != '\n' }) {
			t.Errorf("Plain(%q) = %q", s, got)
		}
		got, width := Cut(s, columns%100), 0
		for _, r := range got {
			if width++; r >= 0x1100 {
				width++
			}
			if unicode.IsControl(r) {
				t.Errorf("Cut(%q) = %q", s, got)
			}
		}
		if width > max(0, columns%100) {
			t.Errorf("Cut(%q, %d) = %q", s, columns%100, got)
		}
	})
}

func TestBlock(t *testing.T) {
	var w strings.Builder
	b := NewBlock(&w)
	for _, lines := range [][]string{{"a", "b"}, {"c"}} {
		if err := b.Draw(lines); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Clear(); err != nil {
		t.Fatal(err)
	}
	if want := "\ra\x1b[K\nb\x1b[K\n\x1b[J" + "\x1b[2A\rc\x1b[K\n\x1b[J" + "\x1b[1A\r\x1b[J"; w.String() != want {
		t.Errorf("it wrote %q, want %q", w.String(), want)
	}
}
