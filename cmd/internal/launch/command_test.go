package launch

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/calfvm/calf/guest/agent"
)

// TestTail keeps the end of a console, or what a panic begins with.
func TestTail(t *testing.T) {
	var c tail
	for i := range 5000 {
		if _, err := fmt.Fprintf(&c, "\x1b[1mline %d\a\r\n\r\n", i); err != nil {
			t.Fatal(err)
		}
	}
	var want []string
	for i := 5000 - tailLines; i < 5000; i++ {
		want = append(want, fmt.Sprintf("line %d", i))
	}
	if got := c.lines(); !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	if len(c.b) > 2*tailBytes {
		t.Errorf("%d bytes are kept", len(c.b))
	}
	if got := c.reason(); got != "" {
		t.Errorf("the agent gives up: %q", got)
	}
	_, _ = c.Write([]byte("[0.9] " + agent.GivesUp + "no\x1b[1m driver\r\n"))
	if got := c.reason(); got != "no driver" {
		t.Errorf("the agent gives up: %q", got)
	}
	_, _ = c.Write([]byte("[1.0] " + panicMark + ": why\n" + strings.Repeat("trace\n", 100)))
	if got := c.lines(); len(got) != tailLines || !strings.Contains(got[0], "why") {
		t.Errorf("of a panic: %q", got)
	}
	var none tail
	var out strings.Builder
	none.show(&out)
	if out.String() != "" {
		t.Errorf("an empty console shows %q", &out)
	}
}
