package progress

import (
	"strings"
	"testing"
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
		{"a\tb\ac\x00\xff\u009b31m\u202e", 10, "a bc\ufffd31m"},
	} {
		if got := Cut(tt.in, tt.columns); got != tt.want {
			t.Errorf("Cut(%q, %d) = %q, want %q", tt.in, tt.columns, got, tt.want)
		}
	}
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
