package matrix

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/cmd/internal/launch"
)

// display is a terminal that knows what the status needs.
type display struct {
	mu    sync.Mutex
	lines [][]rune
	row   int
	all   strings.Builder
}

// write shows s, which holds whole sequences.
func (d *display) write(s string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.all.WriteString(s)
	column := 0
	for len(s) > 0 {
		for len(d.lines) <= d.row {
			d.lines = append(d.lines, nil)
		}
		var up int
		switch {
		case s[0] == '\r':
			column, s = 0, s[1:]
		case s[0] == '\n':
			d.row, column, s = d.row+1, 0, s[1:]
		case strings.HasPrefix(s, "\x1b[K"):
			d.lines[d.row], s = d.lines[d.row][:min(column, len(d.lines[d.row]))], s[3:]
		case strings.HasPrefix(s, "\x1b[J"):
			d.lines, s = d.lines[:d.row], s[3:]
		case s[0] == 0x1b:
			if _, err := fmt.Sscanf(s, "\x1b[%dA", &up); err != nil {
				panic(fmt.Sprintf("unknown sequence %q", s[:min(len(s), 10)]))
			}
			d.row -= up
			s = s[strings.IndexByte(s, 'A')+1:]
		default:
			r := []rune(s)[0]
			d.lines[d.row] = append(d.lines[d.row][:min(column, len(d.lines[d.row]))], r)
			column, s = column+1, s[len(string(r)):]
		}
	}
}

func (d *display) text() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var s strings.Builder
	for _, line := range d.lines {
		s.WriteString(strings.TrimRight(string(line), " ") + "\n")
	}
	return s.String()
}

// TestTerminal shows a matrix on a terminal while it runs and when it has ended.
func TestTerminal(t *testing.T) {
	t.Setenv("TERM", "xterm")
	master, slave := openPTY(t)
	if err := pty.Setsize(master, &pty.Winsize{Rows: 10, Cols: 60}); err != nil {
		t.Fatal(err)
	}
	var d display
	go func() {
		var part string
		for buf := make([]byte, 4096); ; {
			n, err := master.Read(buf)
			part += strings.ReplaceAll(string(buf[:n]), "\r\n", "\n")
			// A sequence that is not whole waits for its rest.
			if end := strings.LastIndexAny(part, "\n\r") + 1; end > 0 && !strings.HasSuffix(part[:end], "\r") {
				d.write(part[:end])
				part = part[end:]
			}
			if err != nil {
				return
			}
		}
	}()
	expect := func(want string) {
		t.Helper()
		pattern := regexp.MustCompile(strings.ReplaceAll(regexp.QuoteMeta(want), "N s", "[ 0-9]+ s"))
		for late := time.Now().Add(patience); !pattern.MatchString(d.text()); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(late) {
				t.Fatalf("the terminal lacks %q:\n%s", want, d.text())
			}
		}
	}
	first, second := make(chan launch.Result), make(chan launch.Result)
	targets := []Target{
		{"6.12", func(s Slot) launch.Result {
			s.Running()
			fmt.Fprintf(s.Streams.Out, "\x1b[31mcc main.c\x1b[0m %s\n", strings.Repeat("-", 100))
			fmt.Fprintf(s.Streams.Messages, "calf: the disk waits\n")
			return <-first
		}},
		{"6.1", func(s Slot) launch.Result {
			fmt.Fprintf(s.Streams.Err, "broken\n")
			r := <-second
			fmt.Fprintf(s.Streams.Messages, "calf: be warned\n")
			return r
		}},
		{"old", func(Slot) launch.Result { return outcome(0) }},
	}
	done := make(chan Report)
	go func() {
		r, err := Run(targets, 2, console.Streams{In: os.Stdin, Out: slave, Err: slave, Messages: console.NewMessages(slave)})
		if err != nil {
			t.Error(err)
		}
		done <- r
	}()
	expect("6.12 | calf: the disk waits\n6.12  running  N s  cc main.c " + strings.Repeat("-", 27) + "\n6.1   booting  N s  broken\nold   waiting\n")
	first <- outcome(0)
	expect("6.12  PASS     1.2 s\n6.1   booting")
	expect("old   PASS     1.2 s\n")
	second <- outcome(7)
	if r := <-done; r.ExitCode != 7 {
		t.Errorf("report %+v", r)
	}
	const want = "6.12 | calf: the disk waits\n6.1 | calf: be warned\n" +
		"6.12  PASS     1.2 s\n6.1   FAIL     7 in 1.2 s\nold   PASS     1.2 s\n" +
		"calf: 6.1: failed with 7 in 1.2 s\n6.1 | broken\n" +
		"calf: 3 targets: 2 passed, 1 failed\n"
	expect(want)
	if got := d.text(); got != want {
		t.Errorf("the terminal shows\n%s\nwant\n%s", got, want)
	}
}

// openPTY returns both ends of a terminal, until the end of the test.
func openPTY(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = master.Close(), slave.Close() })
	return master, slave
}

// TestStatusBesideAFile shows what targets say in a file as it comes, and once, where only
// standard error is a terminal.
func TestStatusBesideAFile(t *testing.T) {
	t.Setenv("TERM", "xterm")
	master, slave := openPTY(t)
	go func() { _, _ = io.Copy(io.Discard, master) }()
	out, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	target := Target{"a", func(s Slot) launch.Result {
		fmt.Fprintln(s.Streams.Out, "hello")
		for late := time.Now().Add(patience); time.Now().Before(late); time.Sleep(time.Millisecond) {
			if b, _ := os.ReadFile(out.Name()); len(b) > 0 {
				break
			}
		}
		return outcome(1)
	}}
	if _, err := Run([]Target{target}, 1, console.Streams{In: os.Stdin, Out: out, Err: slave, Messages: console.NewMessages(slave)}); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(out.Name()); err != nil || string(b) != "a | hello\n" {
		t.Errorf("the file has %q, %v", b, err)
	}
}

// TestAllShownAtTheEnd leaves a line for each target where not all fit.
func TestAllShownAtTheEnd(t *testing.T) {
	t.Setenv("TERM", "xterm")
	master, slave := openPTY(t)
	if err := pty.Setsize(master, &pty.Winsize{Rows: 3, Cols: 40}); err != nil {
		t.Fatal(err)
	}
	var targets []Target
	var want strings.Builder
	for i := range 6 {
		name := fmt.Sprintf("t%d", i)
		targets = append(targets, Target{name, func(Slot) launch.Result { return outcome(0) }})
		want.WriteString(name + "  PASS     1.2 s\x1b[K\r\n")
	}
	want.WriteString("\x1b[Jcalf: 6 targets: 6 passed, 0 failed\r\n")
	if _, err := Run(targets, 1, console.Streams{In: os.Stdin, Out: slave, Err: slave, Messages: console.NewMessages(slave)}); err != nil {
		t.Fatal(err)
	}
	if got := shown(t, master, "0 failed\r\n"); !strings.HasSuffix(got, want.String()) {
		t.Errorf("the terminal got %q, want %q", got, want.String())
	}
}

// TestDumbTerminal writes plain lines to a terminal that can do no more.
func TestDumbTerminal(t *testing.T) {
	t.Setenv("TERM", "dumb")
	master, slave := openPTY(t)
	target := Target{"a", func(s Slot) launch.Result { fmt.Fprintln(s.Streams.Out, "hello"); return outcome(0) }}
	if _, err := Run([]Target{target}, 1, console.Streams{In: os.Stdin, Out: slave, Err: slave, Messages: console.NewMessages(slave)}); err != nil {
		t.Fatal(err)
	}
	if got := shown(t, master, "0 failed\r\n"); got != "a | hello\r\ncalf: a: passed in 1.2 s\r\ncalf: 1 target: 1 passed, 0 failed\r\n" {
		t.Errorf("the terminal got %q", got)
	}
}

// shown returns what a terminal gets, up to last.
func shown(t *testing.T, master *os.File, last string) string {
	t.Helper()
	late := time.AfterFunc(patience, func() { panic("the terminal does not get " + last) })
	defer late.Stop()
	var got strings.Builder
	for buf := make([]byte, 4096); !strings.HasSuffix(got.String(), last); {
		n, err := master.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got.Write(buf[:n])
	}
	return got.String()
}

// TestStatusWithoutRoom shows what runs where not all fit.
func TestStatusWithoutRoom(t *testing.T) {
	var rows []*row
	for i := range 20 {
		rows = append(rows, &row{name: fmt.Sprintf("t%d", i), state: waiting})
	}
	now := time.Now()
	for i := range 5 {
		rows[i].state, rows[i].result = passed, outcome(0)
	}
	rows[2].state, rows[2].result = failed, outcome(9)
	for i := 5; i < 8; i++ {
		rows[i].state, rows[i].began, rows[i].latest = running, now.Add(-12*time.Second), "日本語日本語日本語"
	}
	want := []string{
		"t2   FAIL     9 in 1.2 s",
		"t5   running   12 s  日本",
		"t6   running   12 s  日本",
		"t7   running   12 s  日本",
		"and 16 more: 4 PASS, 12 w",
	}
	if got := status(rows, 25, 5, now); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for room := range 25 {
		if got := len(status(rows, 80, room, now)); got > max(1, room) || room >= 20 && got != 20 {
			t.Errorf("%d lines in %d rows", got, room)
		}
	}
}
