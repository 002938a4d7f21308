package progress

import (
	"bytes"
	"regexp"
	"testing"
	"time"
)

var rates = regexp.MustCompile(`  [0-9.]+[kKMG]?i?B/s`)

func TestState(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name        string
		done, total int64
		after       time.Duration
		want        string
	}{
		{"in the middle", 25 * mib, 100 * mib, 5 * time.Second, " 25.0 %  25MiB of 100MiB  5MiB/s  15s left"},
		{"nothing yet", 0, 100 * mib, 0, "  0.0 %  0B of 100MiB  0B/s"},
		{"the end", 100 * mib, 100 * mib, 10 * time.Second, "100.0 %  100MiB of 100MiB  10MiB/s"},
		{"more than expected", 101 * mib, 100 * mib, 10 * time.Second, "100.0 %  100MiB of 100MiB  10MiB/s"},
		{"who knows how long", 100 * mib, 0, 10 * time.Second, "100MiB  10MiB/s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var m Meter
			m.Expect(c.total)
			m.Add(c.done)
			if got := m.state(c.after); got != c.want {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
	var none *Meter // counts nothing, and does not fail
	none.Expect(1)
	none.Add(1)
}

func TestShow(t *testing.T) {
	for _, c := range []struct {
		terminal bool
		want     string
	}{
		{false, "7B  0B/s\n7B  0B/s\n"},
		{true, "\r7B  0B/s\x1b[K\r7B  0B/s\x1b[K\r\x1b[K"},
	} {
		var m Meter
		var out bytes.Buffer
		ticks := make(chan time.Time)
		stop := show(&out, c.terminal, &m, ticks)
		m.Add(7)
		ticks <- time.Time{}
		ticks <- time.Time{}
		stop()
		got := rates.ReplaceAllString(out.String(), "  0B/s")
		if got != c.want {
			t.Errorf("terminal %t: got %q, want %q", c.terminal, got, c.want)
		}
	}
}

func TestShowNothing(t *testing.T) {
	var out bytes.Buffer
	show(&out, true, &Meter{}, nil)()
	if out.Len() > 0 {
		t.Errorf("work that ended before the first tick left %q", out.String())
	}
}
