package guide

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSections(t *testing.T) {
	text := "# Guide\n```console\n$ not in a section\n```\n## One\ntext\n```toml\n# a.toml\nx = 1\n```\n" +
		"```toml\nnameless = 1\n```\n```console\n$ echo a \\\n    b\na b\n$ true\n```\n$ prose\n## Two\n```\n$ plain\n```\n"
	want := []Section{
		{Title: "One", Files: map[string]string{"a.toml": "# a.toml\nx = 1\n"}, Steps: []Step{
			{Command: "echo a \\\n    b\n", Want: "a b\n"}, {Command: "true\n"},
		}},
		{Title: "Two", Files: map[string]string{}},
	}
	if diff := cmp.Diff(want, Sections(text)); diff != "" {
		t.Error(diff)
	}
}

func TestPattern(t *testing.T) {
	for _, tt := range []struct {
		want, got string
		match     bool
	}{
		{"", "", true},
		{"", "a\n", false},
		{"a (…) b\n", "a (1.5 s) b\n", true},
		{"a … b\n", "a\nb\n", false},
		{"a\n…\nb\n", "a\nb\n", true},
		{"a\n…\nb\n", "a\n1\n2\nb\n", true},
		{"a\n…\nb\n", "a\n1\nb\nc\n", false},
		{"a.c\n", "abc\n", false},
	} {
		if got := pattern(tt.want).MatchString(tt.got); got != tt.match {
			t.Errorf("%q matches %q: %v", tt.want, tt.got, got)
		}
	}
}

func TestRun(t *testing.T) {
	Section{
		Files: map[string]string{"a.toml": "x\n"},
		Steps: []Step{{Command: "cat a.toml; y=1\n", Want: "x\n"}, {Command: "echo $y >&2; (exit 3)\n", Want: "…\n1\n"}, {Command: "echo $?\n", Want: "3\n"}},
	}.Run(t, "sh", t.TempDir())
}
