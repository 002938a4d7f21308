package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestBench writes as qemu-img does, and prints its lines.
func TestBench(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		for _, flags := range [][]string{
			{"-w", "-c", "200", "--pattern", "65"},
			{"-w", "-c", "100", "-s", "3k", "-S", "5000", "-o", "1111", "--pattern=0x7f", "-d", "4", "--flush-interval", "8", "-t", "none"},
			{"-w", "-c", "31", "-s", "64k", "-S", "128k", "--pattern", "1", "-d", "2", "--flush-interval", "2", "--no-drain", "-t", "writethrough"},
			{"-c", "300", "-S", "512", "-U", "-i", "threads"},
		} {
			t.Run(format+" "+strings.Join(flags, " "), func(t *testing.T) {
				t.Chdir(t.TempDir())
				for _, path := range []string{"ours", "theirs"} {
					must(t, "qemu-img", "create", "-q", "-f", format, path, "4M")
				}
				flags = append([]string{"bench", "-f", format}, flags...)
				code, want := qemuImg(t, append(flags, "theirs")...)
				if code != 0 {
					t.Fatal(want)
				}
				code, out, messages := calf(t, append(append([]string{"image"}, flags...), "ours")...)
				if code != 0 || messages != "" {
					t.Fatalf("code %d, %s", code, messages)
				}
				same, _, _ := strings.Cut(want, "Run completed in ")
				var seconds, rate float64
				ours, ok := strings.CutPrefix(out, same)
				if n, _ := fmt.Sscanf(ours, "Run completed in %f seconds.\n%f requests/s, ", &seconds, &rate); !ok || n != 2 || rate <= 0 {
					t.Errorf("prints\n%s\nqemu-img\n%s", out, want)
				}
				if code, out := qemuImg(t, "compare", "-f", format, "-F", format, "ours", "theirs"); code != 0 {
					t.Errorf("%s", out)
				}
				sound(t, layer{"ours", format, 0})
			})
		}
	}
}

// TestBenchJSON has queues read at random places of an image over another, and
// prints what was measured as JSON.
func TestBenchJSON(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "raw", "base.img", "8M")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2")
	code, out, messages := calf(t, "image", "bench", "--json", "--queues", "3", "-d", "4", "--pattern", "rand", "--engine", "sync", "-c", "1000", "a.qcow2")
	var r struct {
		Filename, Format, Engine string
		Requests, Bytes          int64
		Seconds                  float64
		Rate                     float64            `json:"requests-per-second"`
		Latency                  map[string]float64 `json:"latency-ns"`
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != 0 || messages != "" {
		t.Fatalf("code %d, %v: %s%s", code, err, out, messages)
	}
	if r.Filename != "a.qcow2" || r.Format != "qcow2" || r.Engine != "sync" || r.Requests != 1000 || r.Bytes != 1000*4096 {
		t.Errorf("%s", out)
	}
	if got := r.Rate * r.Seconds; got < 999 || got > 1001 {
		t.Errorf("%v requests in %v s", got, r.Seconds)
	}
	for _, key := range []string{"mean", "p50", "p99", "p99.9", "max"} {
		if r.Latency[key] <= 0 {
			t.Errorf("no %s in %s", key, out)
		}
	}
}

// TestBenchRefused shows what is refused, most of it by qemu-img too.
func TestBenchRefused(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "raw", "a.img", "1M")
	for _, c := range []struct {
		says  string
		args  []string
		alone bool // qemu-img does it, or never ends
	}{
		{"--flush-interval is only available in write tests", []string{"--flush-interval", "10"}, false},
		{"smaller than depth", []string{"-w", "--flush-interval", "10"}, false},
		{"-s", []string{"-s", "much"}, false},
		{"-S", []string{"-S", "much"}, false},
		{"-o", []string{"-o", "much"}, false},
		{"--pattern", []string{"-w", "--pattern", "256"}, false},
		{"beyond its end", []string{"-s", "2M"}, false},
		{"beyond its end", []string{"-o", "1M"}, false},
		{"-U or -w", []string{"-U", "-w"}, false},
		{"1024 in all", []string{"-d", "0"}, true},
		{"1024 in all", []string{"-d", "1000", "--queues", "2"}, true},
		{"128MiB at most", []string{"-s", "8M"}, false},
		{"preadv", []string{"-i", "io_uring"}, true},
		{"preadv", []string{"-i", "native"}, false},
		{"preadv", []string{"-n"}, false},
		{"preadv", []string{"--engine", "io_uring"}, true},
		{`"turbo"`, []string{"--engine", "turbo"}, true},
		{`"sometimes"`, []string{"-t", "sometimes"}, false},
		{"none.img", []string{"none.img"}, false},
	} {
		args := append([]string{"bench", "-f", "raw"}, c.args...)
		if c.says != "none.img" {
			args = append(args, "a.img")
		}
		code, _, messages := calf(t, append([]string{"image"}, args...)...)
		if code != 1 || !strings.Contains(messages, c.says) {
			t.Errorf("%q: code %d, says %q, want %q in it", c.args, code, messages, c.says)
		}
		if !c.alone && exec.Command("qemu-img", args...).Run() == nil {
			t.Errorf("qemu-img does %q", c.args)
		}
	}
	if b, err := os.ReadFile("a.img"); err != nil || strings.Trim(string(b), "\x00") != "" {
		t.Errorf("the image has changed (%v)", err)
	}
}
