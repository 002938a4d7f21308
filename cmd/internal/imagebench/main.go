// Command imagebench runs calf image and qemu-img side by side on the same images
// and prints how they compare, as a table in Markdown.
//
//	go run ./cmd/internal/imagebench -calf bin/calf [flags]
//
// Each job runs several times, by turns and in changing order, with what it reads in
// the page cache and nothing left to write back. Both programs are processes of their
// own; time, CPU time and peak memory are what the kernel says of them, and each
// figure is the median. A job whose results differ fails.
//
// On a machine with other work, run it under chrt -r 1, which keeps that from the
// CPUs: who has two threads loses more to it than who has one.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// config is what the flags say.
type config struct {
	calf, qemu string // programs
	dir        string // for images; empty: one that is removed
	rounds     int
	mib        int64 // of the disk that is converted
	jobs       string
}

func main() {
	var c config
	flag.StringVar(&c.calf, "calf", "bin/calf", "the calf executable")
	flag.StringVar(&c.qemu, "qemu-img", "qemu-img", "the qemu-img executable")
	flag.StringVar(&c.dir, "dir", "", "existing directory for the images; by default one that is removed")
	flag.IntVar(&c.rounds, "rounds", 7, "how often each job runs")
	flag.Int64Var(&c.mib, "size", 512, "of the disk that is converted, in MiB")
	flag.StringVar(&c.jobs, "run", "", "only the jobs whose names match this regular expression")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := c.run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "imagebench:", err)
		os.Exit(1)
	}
}

func (c config) run(ctx context.Context, w io.Writer) (err error) {
	only, err := regexp.Compile(c.jobs)
	if err != nil {
		return err
	}
	if c.dir == "" {
		if c.dir, err = os.MkdirTemp("", "imagebench"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(c.dir)) }()
	}
	b := &bench{config: c, ctx: ctx}
	if err := b.prepare(); err != nil {
		return err
	}
	version, err := exec.CommandContext(ctx, c.qemu, "--version").Output()
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(version), "\n")
	if _, err := fmt.Fprintf(w, "%s, %d CPUs, disk of %d MiB, medians of %d runs, calf / QEMU\n\n"+
		"| | time | CPU time | length of the result | peak memory |\n|---|---|---|---|---|\n", first, runtime.NumCPU(), c.mib, c.rounds); err != nil {
		return err
	}
	for _, j := range b.all() {
		if !only.MatchString(j.name) {
			continue
		}
		row, err := b.row(j)
		if err != nil {
			return fmt.Errorf("%s: %w", j.name, err)
		}
		if _, err := io.WriteString(w, row); err != nil {
			return err
		}
	}
	return nil
}

// bench is a run of the command.
type bench struct {
	config
	ctx context.Context
}

// job is what both programs do, by the same arguments.
type job struct {
	name string
	args []string // of both; a last one is added, the target, if there is one
	out  string   // its format; empty: there is none
}

func (b *bench) all() []job {
	convert := func(name, from, in, out string, more ...string) job {
		args := append([]string{"convert", "-q", "-f", in, "-O", out}, more...)
		return job{name, append(args, b.path(from)), out}
	}
	return []job{
		convert("convert raw → qcow2", "raw", "raw", "qcow2"),
		convert("convert qcow2 → raw", "qcow2", "qcow2", "raw"),
		convert("convert qcow2 → qcow2", "qcow2", "qcow2", "qcow2"),
		convert("convert -c, zlib", "raw", "raw", "qcow2", "-c"),
		convert("convert -c, zstd", "raw", "raw", "qcow2", "-c", "-o", "compression_type=zstd"),
		convert("convert zlib → raw", "zlib", "qcow2", "raw"),
		convert("convert zstd → raw", "zstd", "qcow2", "raw"),
		{name: "check, 1,000,000 clusters", args: []string{"check", "-f", "qcow2", b.path("clusters")}},
	}
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

// prepare makes the images that the jobs read.
func (b *bench) prepare() error {
	if err := makeDisk(b.path("raw"), b.mib); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"convert", "-f", "raw", "-O", "qcow2", b.path("raw"), b.path("qcow2")},
		{"convert", "-f", "raw", "-O", "qcow2", "-c", b.path("raw"), b.path("zlib")},
		{"convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", b.path("raw"), b.path("zstd")},
		{"create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", b.path("clusters"), "62500M"},
		{"resize", "-q", b.path("clusters"), "100G"},
	} {
		if out, err := exec.CommandContext(b.ctx, b.qemu, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("qemu-img %s: %w\n%s", args[0], err, out)
		}
	}
	return nil
}

// sample is what one run of a program took.
type sample struct {
	elapsed, cpu time.Duration
	memory, size int64 // bytes
}

// row runs a job and returns its row in the table.
func (b *bench) row(j job) (string, error) {
	programs := [2][]string{{b.calf, "image"}, {b.qemu}}
	var samples [2][]sample
	for round := range b.rounds {
		for turn := range programs {
			i := (round + turn) % len(programs)
			s, err := b.measure(j, programs[i], b.path(fmt.Sprint("out", i)))
			if err != nil {
				return "", err
			}
			samples[i] = append(samples[i], s)
		}
		if err := b.compare(j); err != nil {
			return "", err
		}
	}
	ours, theirs := median(samples[0]), median(samples[1])
	size := ""
	if j.out != "" {
		size = fmt.Sprintf("%.3f", float64(ours.size)/float64(theirs.size))
	}
	const mib = 1 << 20
	return fmt.Sprintf("| %s | %s | %s | %s | %d / %d MiB |\n", j.name, ratio(ours.elapsed, theirs.elapsed), ratio(ours.cpu, theirs.cpu),
		size, ours.memory/mib, theirs.memory/mib), nil
}

// measure runs a program once.
func (b *bench) measure(j job, program []string, target string) (s sample, err error) {
	args := append(slices.Clone(program[1:]), j.args...)
	if j.out != "" {
		args = append(args, target)
		if err := os.RemoveAll(target); err != nil {
			return s, err
		}
	}
	syscall.Sync()
	cmd := exec.CommandContext(b.ctx, program[0], args...)
	var said strings.Builder
	cmd.Stderr = &said
	begin := time.Now()
	if err := cmd.Run(); err != nil {
		return s, fmt.Errorf("%s: %w\n%s", cmd, err, said.String())
	}
	s.elapsed = time.Since(begin)
	usage := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	s.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	s.memory = usage.Maxrss << 10
	if j.out != "" {
		fi, err := os.Stat(target)
		if err != nil {
			return s, err
		}
		s.size = fi.Size()
	}
	return s, nil
}

// compare fails unless both programs made the same disk.
func (b *bench) compare(j job) error {
	if j.out == "" {
		return nil
	}
	out, err := exec.CommandContext(b.ctx, b.qemu, "compare", "-f", j.out, "-F", j.out, b.path("out0"), b.path("out1")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("the results differ: %w\n%s", err, out)
	}
	return nil
}

// median has the median of each figure.
func median(all []sample) sample {
	return sample{
		elapsed: middle(all, func(s sample) time.Duration { return s.elapsed }),
		cpu:     middle(all, func(s sample) time.Duration { return s.cpu }),
		memory:  middle(all, func(s sample) int64 { return s.memory }),
		size:    middle(all, func(s sample) int64 { return s.size }),
	}
}

func middle[T cmp.Ordered](all []sample, of func(sample) T) T {
	var v []T
	for _, s := range all {
		v = append(v, of(s))
	}
	slices.Sort(v)
	return v[len(v)/2]
}

func ratio(ours, theirs time.Duration) string {
	return fmt.Sprintf("%.2f", float64(ours)/float64(theirs))
}
