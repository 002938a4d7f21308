package config_test

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/calfvm/calf/config"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var ignoreOrigins = cmpopts.IgnoreUnexported(config.Config{})

// effective returns what the runs of c mean.
func effective(c *config.Config) []*config.Config {
	var runs []*config.Config
	for _, t := range c.Expand() {
		runs = append(runs, t.Effective())
	}
	return runs
}

func parse(t *testing.T, text string) *config.Config {
	t.Helper()
	c, err := config.Parse("test.toml", "/dir", []byte(text))
	if err != nil {
		t.Fatalf("Parse: %v", err)
	}
	return c
}

// golden compares got with a file, or rewrites it.
func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

func TestLoadReadsEveryKey(t *testing.T) {
	got, err := config.Load("testdata/full.toml")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	want := &config.Config{
		VM: config.VM{Name: "ci", CPUs: 2, Memory: 1 << 30, Timeout: 10 * time.Minute, BootTimeout: 30 * time.Second},
		Boot: config.Boot{
			Kernel:  filepath.Join(dir, "vmlinuz"),
			Initrd:  filepath.Join(filepath.Dir(dir), "initrd.img"),
			Cmdline: "quiet loglevel=3",
		},
		Run: config.Run{
			Command: []string{"make", "test"}, Env: map[string]string{"CI": "1", "EMPTY": ""}, Workdir: "/src", User: "builder",
		},
		Vsock: config.Vsock{Path: filepath.Join(dir, "ci.sock"), CID: 42},
		Disks: []config.Disk{{
			Path: filepath.Join(dir, "debian-12.qcow2"), Snapshot: true, Queues: 4, QueueSize: 128,
			Cache: "unsafe", Engine: "sync", Discard: new(false), OnError: "stop", Serial: "root",
			ByteRate: 100 << 20, ByteBurst: 1 << 20, OpRate: 2000, OpBurst: 50,
			BackingDirs: []string{"/var/lib/images", filepath.Join(dir, "bases")}, DataFile: "allow", L2Cache: 32 << 20,
		}, {Path: "/srv/data.img", Format: "raw"}},
		Copies:    []config.Copy{{From: filepath.Join(dir, "src"), To: "/src/"}},
		Artifacts: []config.Artifact{{From: "/src/report.xml"}, {From: "/src/out", To: filepath.Dir(dir) + "/out/"}},
	}
	if diff := cmp.Diff(want, got, ignoreOrigins); diff != "" {
		t.Errorf("Load (-want +got):\n%s", diff)
	}
	kernel, noDisk := *want, *want
	kernel.Target = "6.12"
	kernel.VM.CPUs, kernel.VM.BootTimeout = 4, time.Minute
	kernel.Boot.Kernel = filepath.Join(dir, "k612", "vmlinuz")
	kernel.Vsock.Path = filepath.Join(dir, "612.sock")
	kernel.Run.Env = map[string]string{"CI": "2", "EMPTY": "", "MORE": "x"}
	kernel.Artifacts = nil
	noDisk.Target = "no disk"
	noDisk.Disks = nil
	noDisk.Run.Command = []string{"make", "check"}
	noDisk.Copies = []config.Copy{{From: "/tests", To: "/tests"}}
	if diff := cmp.Diff([]*config.Config{&kernel, &noDisk}, got.Expand(), ignoreOrigins, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("Expand (-want +got):\n%s", diff)
	}
	if err := got.Validate(); err != nil {
		t.Errorf("Validate: %v", err)
	}
}

func TestEffectiveFillsInTheDefaults(t *testing.T) {
	c := parse(t, "vm.cpus = 3\n[[disk]]\npath = 'a.QCOW2'\n[[disk]]\npath = 'b'\nformat = 'raw'\nqueues = 1\n")
	got := c.Effective()
	want := &config.Config{
		VM: config.VM{CPUs: 3, Memory: 512 << 20},
		Disks: []config.Disk{
			{Path: "/dir/a.QCOW2", Format: "qcow2", Queues: 3, QueueSize: 256, Cache: "writeback", Engine: "auto", Discard: new(true), OnError: "report"},
			{Path: "/dir/b", Format: "raw", Queues: 1, QueueSize: 256, Cache: "writeback", Engine: "auto", Discard: new(true), OnError: "report"},
		},
	}
	if diff := cmp.Diff(want, got, ignoreOrigins); diff != "" {
		t.Errorf("Effective (-want +got):\n%s", diff)
	}
	if c.Disks[0].Queues != 0 {
		t.Errorf("Effective changed its receiver: %+v", c.Disks[0])
	}
	if got := config.Default().VM; got != (config.VM{CPUs: 1, Memory: 512 << 20}) {
		t.Errorf("Default().VM = %+v", got)
	}
	if got := parse(t, "vm.cpus = 200\ndisk = [{path = 'a.qcow2'}]").Effective().Disks[0].Queues; got != 64 {
		t.Errorf("queues for 200 CPUs = %d, want 64", got)
	}
}

func TestTOMLReadsBackToTheSame(t *testing.T) {
	c, err := config.Load("testdata/full.toml")
	if err != nil {
		t.Fatal(err)
	}
	c.Expand()[0].Boot.Cmdline = `a="b c" \ $x`
	c.Expand()[0].Disks[0].Path = "/odd \"path\" with\nnewline.qcow2"
	for name, c := range map[string]*config.Config{"full": c, "default": config.Default()} {
		text, err := c.TOML()
		if err != nil {
			t.Fatal(err)
		}
		back, err := config.Parse("show.toml", "/elsewhere", text)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, text)
		}
		if diff := cmp.Diff(effective(c), effective(back), ignoreOrigins, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s: round trip (-want +got):\n%s\n%s", name, diff, text)
		}
	}
}

func TestErrorMessages(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.toml")
	if err != nil || len(files) < 10 {
		t.Fatalf("found %d files: %v", len(files), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".toml")
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			c, err := config.Parse(name+".toml", "/dir", data)
			var errs config.Errors
			if !errors.As(err, &errs) || c != nil {
				t.Fatalf("Parse = %v, %v; want config.Errors", c, err)
			}
			golden(t, strings.TrimSuffix(file, ".toml")+".golden", err.Error()+"\n")
		})
	}
}

func TestValidateNeedsAKernel(t *testing.T) {
	c := parse(t, "[vm]\ncpus = 2\n")
	const want = "test.toml:1:1: no kernel is given: set kernel in [boot], or use --kernel, or give a disk that has one"
	if err := c.Validate(); err == nil || err.Error() != want {
		t.Errorf("Validate = %v, want %s", err, want)
	}
	if err := c.Set("--kernel", "boot.kernel", "/k"); err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(); err != nil {
		t.Errorf("Validate with a kernel = %v", err)
	}
}

func TestValidateChecksPlainStructs(t *testing.T) {
	c := &config.Config{
		VM:    config.VM{CPUs: 1000, Memory: 4097, Timeout: -1},
		Boot:  config.Boot{Kernel: "k", Cmdline: "a\nb"},
		Disks: []config.Disk{{Path: "x.qcow2", QueueSize: 3, Engine: "warp"}, {}},
	}
	err := c.Validate()
	if err == nil {
		t.Fatal("Validate accepts impossible values")
	}
	for _, want := range []string{
		"vm.cpus must be an integer from 1 to 254, not 1000",
		"vm.memory must be a size from 32MiB to 16TiB, a multiple of 4KiB, not 4097",
		"vm.timeout must be a duration",
		"boot.cmdline must be a string of at most 2047 bytes of printable ASCII",
		"disk.queue_size must be a power of two from 4 to 1024, not 3",
		`disk.engine must be "auto" or "sync", not warp`,
		"disk.path is missing",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("Validate lacks %q:\n%v", want, err)
		}
	}
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]config.Size{
		"0": 0, "4096": 4096, "1K": 1 << 10, "1k": 1 << 10, "2KiB": 2 << 10, "3KB": 3 << 10, "1M": 1 << 20,
		"512MiB": 512 << 20, "1.5G": 3 << 29, "1 GiB": 1 << 30, "2T": 2 << 40, "8192T": 1 << 53, "7B": 7,
	} {
		got, err := config.ParseSize(text)
		if err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", text, got, err, want)
		}
		back, err := config.ParseSize(got.String())
		if err != nil || back != got {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", got.String(), back, err, got)
		}
	}
	for _, text := range []string{"", "G", "-1", "1X", "1KiBs", "0x10", "1e3", "inf", "1..5", " 1", "1  K", "9999999999999999T", "1P", "１"} {
		if got, err := config.ParseSize(text); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", text, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/*/*.toml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range append(files, "testdata/full.toml") {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := config.Parse("fuzz.toml", "/dir", data)
		if err != nil {
			checkErrors(t, data, err)
			return
		}
		text, err := c.TOML()
		if err != nil {
			t.Fatal(err)
		}
		back, err := config.Parse("show.toml", "/elsewhere", text)
		if err != nil {
			t.Fatalf("what was accepted cannot be read back: %v\n%s", err, text)
		}
		if diff := cmp.Diff(effective(c), effective(back), ignoreOrigins, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("round trip (-want +got):\n%s", diff)
		}
		for _, run := range c.Expand() {
			run.Run.Command = []string{"true"}
			err := errors.Join(run.Set("--kernel", "boot.kernel", "k"), run.Set("--vsock", "vsock.path", ""))
			if err != nil {
				t.Fatal(err)
			}
			run.SetSnapshot("--no-snapshot", false)
		}
		if err := c.Validate(); err != nil {
			t.Errorf("what was accepted is not valid: %v", err)
		}
	})
}

// checkErrors fails unless err has at least one error, all of them in order and
// at places that the file has.
func checkErrors(t *testing.T, data []byte, err error) {
	t.Helper()
	var errs config.Errors
	if !errors.As(err, &errs) || len(errs) == 0 {
		t.Fatalf("error of type %T: %v", err, err)
	}
	lines := strings.Split(string(data), "\n")
	for i, e := range errs {
		if e.File != "fuzz.toml" || e.Line < 1 || e.Line > len(lines) || e.Column < 1 || e.Column > len(lines[e.Line-1])+1 {
			t.Errorf("error outside the file: %v", e)
		}
		if i > 0 && (e.Line < errs[i-1].Line || e.Line == errs[i-1].Line && e.Column < errs[i-1].Column) {
			t.Errorf("errors out of order: %v", errs)
		}
	}
}
