package matrix

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/cmd/internal/launch"
)

// patience bounds every wait of a test.
const patience = 20 * time.Second

// outcome is the result of a command that has ended with code.
func outcome(code int) launch.Result {
	return launch.Result{Outcome: "exited", ExitCode: code, Seconds: 1.25, Command: &launch.CommandResult{Status: code}}
}

// files are where a matrix of a test writes.
type files struct{ out, err string }

// runFiles runs a matrix that writes to files.
func runFiles(t *testing.T, targets []Target, jobs int) (Report, files) {
	t.Helper()
	create := func(name string) *os.File {
		f, err := os.Create(filepath.Join(t.TempDir(), name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	out, errs := create("out"), create("err")
	r, err := Run(targets, jobs, console.Streams{In: os.Stdin, Out: out, Err: errs, Messages: console.NewMessages(errs)})
	if err != nil {
		t.Fatal(err)
	}
	read := func(f *os.File) string {
		b, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	return r, files{read(out), read(errs)}
}

// TestRun runs more targets than may run at once.
func TestRun(t *testing.T) {
	const jobs = 3
	var now, most atomic.Int32
	var order []string
	var mu sync.Mutex
	var targets []Target
	full := make(chan struct{})
	for i := range 10 {
		name := fmt.Sprintf("t%d", i)
		targets = append(targets, Target{Name: name, Run: func(s Slot) launch.Result {
			defer now.Add(-1)
			mu.Lock()
			order = append(order, name)
			most.Store(max(most.Load(), now.Add(1)))
			if len(order) == jobs {
				close(full) // as many as may run do
			}
			mu.Unlock()
			<-full
			if b, err := io.ReadAll(s.Streams.In); len(b) > 0 || err != nil {
				t.Errorf("standard input has %q, %v", b, err)
			}
			fmt.Fprintf(s.Streams.Out, "out of %s\n", name)
			fmt.Fprintf(s.Streams.Err, "err of %s", name)
			if i == 4 || i == 7 {
				return outcome(i)
			}
			return outcome(0)
		}})
	}
	r, wrote := runFiles(t, targets, jobs)
	if most.Load() != jobs {
		t.Errorf("%d targets ran at once, want %d", most.Load(), jobs)
	}
	slices.Sort(order[:jobs]) // they have begun together
	if !slices.Equal(order[:jobs], []string{"t0", "t1", "t2"}) {
		t.Errorf("the first were %v", order)
	}
	if r.ExitCode != 4 || len(r.Targets) != 10 || r.Targets[7].Name != "t7" || r.Targets[7].ExitCode != 7 || r.Seconds <= 0 {
		t.Errorf("report %+v", r)
	}
	for i := range 10 {
		verdict := "passed in 1.2 s"
		if i == 4 || i == 7 {
			verdict = fmt.Sprintf("failed with %d in 1.2 s", i)
		}
		if out := fmt.Sprintf("t%d | out of t%d\n", i, i); !strings.Contains(wrote.out, out) {
			t.Errorf("standard output lacks %q", out)
		}
		if errs := fmt.Sprintf("t%d | err of t%d\n", i, i); !strings.Contains(wrote.err, errs) {
			t.Errorf("standard error lacks %q", errs)
		}
		if line := fmt.Sprintf("calf: t%d: %s\n", i, verdict); !strings.Contains(wrote.err, line) {
			t.Errorf("standard error lacks %q", line)
		}
	}
	if strings.Count(wrote.out, "\n") != 10 || !strings.HasSuffix(wrote.err, "calf: 10 targets: 8 passed, 2 failed\n") {
		t.Errorf("it wrote %q and %q", wrote.out, wrote.err)
	}
	before := openFiles(t)
	runFiles(t, targets, jobs)
	if after := openFiles(t); after > before+4 { // the files of the test itself and their poller
		t.Errorf("%d files are open, %d were", after, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// TestLinesStayWhole has targets write random lines in random pieces.
func TestLinesStayWhole(t *testing.T) {
	seed := rand.Uint64()
	want := make([]string, 4)
	var targets []Target
	for i := range want {
		random := rand.New(rand.NewPCG(seed, uint64(i)))
		var text strings.Builder
		for range 200 {
			text.WriteString(strings.Repeat(string(rune('a'+i)), random.IntN(3000)) + "\n")
		}
		text.WriteString("unfinished")
		want[i] = text.String()
		targets = append(targets, Target{Name: string(rune('A' + i)), Run: func(s Slot) launch.Result {
			for rest := want[i]; rest != ""; {
				n := min(len(rest), 1+random.IntN(5000))
				if _, err := io.WriteString(s.Streams.Out, rest[:n]); err != nil {
					t.Error(err)
				}
				rest = rest[n:]
			}
			return outcome(0)
		}})
	}
	_, wrote := runFiles(t, targets, len(targets))
	got := make([]string, len(want))
	for line := range strings.Lines(wrote.out) {
		name, text, _ := strings.Cut(line, " | ")
		i := strings.Index("ABCD", name)
		if i < 0 {
			t.Fatalf("seed %d: a line begins with %q", seed, line[:min(len(line), 60)])
		}
		got[i] += text
	}
	for i := range want {
		if got[i] != want[i]+"\n" {
			t.Errorf("seed %d: %d bytes of %c came, of %d", seed, len(got[i]), 'A'+i, len(want[i])+1)
		}
	}
}

// TestEndlessLine shows a line that never ends in parts.
func TestEndlessLine(t *testing.T) {
	var got []string
	l := lines{take: func(whole []string) { got = append(got, whole...) }}
	for range 3*maxLine/100 + 1 {
		if _, err := l.Write(bytes.Repeat([]byte("x"), 100)); err != nil {
			t.Fatal(err)
		}
	}
	if len(got) != 3 || len(got[0]) != maxLine || len(l.part) >= maxLine {
		t.Errorf("%d parts came, and %d bytes are kept", len(got), len(l.part))
	}
}

// TestLogIsBounded keeps the end of what a target has said, in bounded memory.
func TestLogIsBounded(t *testing.T) {
	var l log
	for i := range 100_000 {
		l.add(line{stream: stdout, text: fmt.Sprintf("line %d\n", i)})
	}
	if l.size > maxLog || l.dropped+len(l.lines) != 100_000 || !strings.HasSuffix(l.of(stdout), "line 99998\nline 99999\n") {
		t.Errorf("%d bytes, %d lines, %d dropped", l.size, len(l.lines), l.dropped)
	}
	array := make([]line, 100)
	l = log{lines: array[:0]}
	for range array {
		l.add(line{stream: stdout, text: strings.Repeat("x", maxLine)})
	}
	held := 0
	for _, n := range array {
		held += len(n.text)
	}
	if held > maxLog || l.of(stderr) != "" {
		t.Errorf("%d bytes are held", held)
	}
}

// TestSignals ends a matrix of three targets while two run.
func TestSignals(t *testing.T) {
	send := func() {
		if err := unix.Kill(unix.Getpid(), unix.SIGTERM); err != nil {
			t.Error(err)
		}
	}
	var up sync.WaitGroup
	up.Add(2)
	until := func(n int) func(Slot) launch.Result {
		return func(s Slot) launch.Result {
			up.Done()
			for range n {
				if sig := <-s.Signals; sig != unix.SIGTERM {
					t.Errorf("it got %v", sig)
				}
				fmt.Fprintf(s.Streams.Messages, "calf: heard\n")
			}
			return launch.Result{Outcome: "killed", ExitCode: 128 + 15}
		}
	}
	third := func(Slot) launch.Result {
		t.Error("the third target was started")
		return launch.Result{}
	}
	go func() {
		up.Wait()
		send()
		time.Sleep(100 * time.Millisecond) // signals of one moment may become one
		send()
	}()
	r, wrote := runFiles(t, []Target{{"a", until(1)}, {"b", until(2)}, {"c", third}}, 2)
	if r.ExitCode != 128+15 || !r.Targets[2].Skipped() || r.Targets[2].ExitCode != 128+15 {
		t.Errorf("report %+v", r)
	}
	for _, want := range []string{
		"calf: terminated: no further target is started; a second signal ends all guests\n",
		"a | calf: heard\n",
		"calf: c: not started: signal 15 (terminated) came before its turn\n",
		"calf: 3 targets: 0 passed, 2 failed, 1 not started\n",
	} {
		if strings.Count(wrote.err, want) != 1 {
			t.Errorf("it said %q, which lacks one %q", wrote.err, want)
		}
	}
	if n := strings.Count(wrote.err, "b | calf: heard\n"); n != 2 {
		t.Errorf("the second target heard %d signals", n)
	}
}

// TestNobodyReads ends a matrix by two signals whose standard output has a reader that
// does not read.
func TestNobodyReads(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	errs, err := os.Create(filepath.Join(t.TempDir(), "err"))
	if err != nil {
		t.Fatal(err)
	}
	defer errs.Close()
	talk := func(s Slot) launch.Result {
		// As launch does, which lets go of its output when it is told to end.
		go func() {
			for range 1000 {
				if _, err := s.Streams.Out.WriteString(strings.Repeat("x", 1000) + "\n"); err != nil {
					return
				}
			}
		}()
		<-s.Signals
		<-s.Signals
		return launch.Result{Outcome: "killed", ExitCode: 128 + 2}
	}
	go func() {
		for range 2 {
			time.Sleep(100 * time.Millisecond)
			if err := unix.Kill(unix.Getpid(), unix.SIGINT); err != nil {
				t.Error(err)
			}
		}
	}()
	late := time.AfterFunc(patience, func() { panic("the matrix waits for its reader") })
	defer late.Stop()
	report, err := Run([]Target{{"a", talk}}, 1, console.Streams{In: os.Stdin, Out: w, Err: errs, Messages: console.NewMessages(errs)})
	if err != nil || report.ExitCode != 128+2 {
		t.Errorf("report %+v, %v", report, err)
	}
	if b, err := os.ReadFile(errs.Name()); err != nil || !strings.Contains(string(b), "calf: 1 target: 0 passed, 1 failed\n") {
		t.Errorf("it said %q, %v", b, err)
	}
}

// TestNoRoomForOutput reports output that could not be written, and ends no target
// because of it; a reader that has gone is no error.
func TestNoRoomForOutput(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer full.Close()
	gone, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	gone.Close()
	errs, err := os.Create(filepath.Join(t.TempDir(), "err"))
	if err != nil {
		t.Fatal(err)
	}
	defer errs.Close()
	for out, want := range map[*os.File]error{full: unix.ENOSPC, w: nil} {
		report, err := Run([]Target{{"a", func(s Slot) launch.Result {
			fmt.Fprintln(s.Streams.Out, strings.Repeat("x", 100_000))
			return outcome(0)
		}}}, 1, console.Streams{In: os.Stdin, Out: out, Err: errs, Messages: console.NewMessages(errs)})
		if !errors.Is(err, want) || report.ExitCode != 0 || report.Targets[0].log.size < 100_000 {
			t.Errorf("error %v, want %v; report %+v", err, want, report)
		}
	}
}
