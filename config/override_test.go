package config_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/calfvm/calf/config"
)

const base = `
[vm]
cpus = 2
memory = "1G"
timeout = "1m"
[boot]
kernel = "k"
cmdline = "quiet"
[[disk]]
path = "root.qcow2"
queues = 2
backing_dirs = ["/a"]
`

func TestSetOverridesTheFile(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		key, value string
		get        func(*config.Config) any
		want       any
	}{
		{"vm.name", "x", func(c *config.Config) any { return c.VM.Name }, "x"},
		{"vm.cpus", "4", func(c *config.Config) any { return c.VM.CPUs }, 4},
		{"vm.memory", "2G", func(c *config.Config) any { return c.VM.Memory }, config.Size(2 << 30)},
		{"vm.memory", "67108864", func(c *config.Config) any { return c.VM.Memory }, config.Size(64 << 20)},
		{"vm.timeout", "0", func(c *config.Config) any { return c.VM.Timeout }, time.Duration(0)},
		{"vm.boot_timeout", "5s", func(c *config.Config) any { return c.VM.BootTimeout }, 5 * time.Second},
		{"boot.kernel", "other", func(c *config.Config) any { return c.Boot.Kernel }, filepath.Join(wd, "other")},
		{"boot.initrd", "/i", func(c *config.Config) any { return c.Boot.Initrd }, "/i"},
		{"vsock.path", "v.sock", func(c *config.Config) any { return c.Vsock.Path }, filepath.Join(wd, "v.sock")},
		{"boot.cmdline", "", func(c *config.Config) any { return c.Boot.Cmdline }, ""},
	} {
		c := parse(t, base)
		if err := c.Set("--flag", tt.key, tt.value); err != nil {
			t.Errorf("Set(%s, %q): %v", tt.key, tt.value, err)
		} else if got := tt.get(c); got != tt.want {
			t.Errorf("Set(%s, %q) gives %v, want %v", tt.key, tt.value, got, tt.want)
		}
	}
}

func TestSetErrorsNameTheFlag(t *testing.T) {
	for _, tt := range []struct{ key, value, want string }{
		{"vm.cpus", "0", "--flag must be an integer from 1 to 254, not 0"},
		{"vm.cpus", "two", `--flag must be an integer from 1 to 254, not "two"`},
		{"vm.memory", "lots", `--flag must be a size from 32MiB to 16TiB, a multiple of 4KiB, not "lots"`},
		{"vm.timeout", "10", `--flag must be a duration such as "90s" or "10m", not "10"`},
		{"boot.kernel", "", `--flag must be a path, not ""`},
	} {
		c := parse(t, base)
		if err := c.Set("--flag", tt.key, tt.value); err == nil || err.Error() != tt.want {
			t.Errorf("Set(%s, %q) = %v, want %s", tt.key, tt.value, err, tt.want)
		}
		if diff := cmp.Diff(parse(t, base), c, ignoreOrigins); diff != "" {
			t.Errorf("a refused value changed something:\n%s", diff)
		}
	}
}

func TestAddDisk(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, spec string
		base       config.Disk
		want       config.Disk
	}{
		{name: "plain", spec: "a.qcow2", want: config.Disk{Path: filepath.Join(wd, "a.qcow2")}},
		{name: "base", spec: "/a.qcow2", base: config.Disk{Snapshot: true}, want: config.Disk{Path: "/a.qcow2", Snapshot: true}},
		{name: "base overridden", spec: "/a.qcow2,snapshot=false", base: config.Disk{Snapshot: true}, want: config.Disk{Path: "/a.qcow2"}},
		{
			name: "every key",
			spec: "/a.img,format=raw,readonly,snapshot=true,queues=2,queue_size=64,cache=writethrough,engine=sync,discard=false,on_error=stop,byte_rate=1M,byte_burst=64K,op_rate=100,op_burst=7,serial=s",
			want: config.Disk{
				Path: "/a.img", Format: "raw", ReadOnly: true, Snapshot: true, Queues: 2, QueueSize: 64,
				Cache: "writethrough", Engine: "sync", Discard: new(false), OnError: "stop", Serial: "s",
				ByteRate: 1 << 20, ByteBurst: 64 << 10, OpRate: 100, OpBurst: 7,
			},
		},
		{
			name: "lists and sizes", spec: "/a.qcow2,backing_dirs=/b,backing_dirs=c,l2_cache=1M",
			want: config.Disk{Path: "/a.qcow2", BackingDirs: []string{"/b", filepath.Join(wd, "c")}, L2Cache: 1 << 20},
		},
		{name: "flags without a value", spec: "/a.qcow2,discard", want: config.Disk{Path: "/a.qcow2", Discard: new(true)}},
		{name: "comma", spec: "/a,,b.qcow2,serial=x,,y", want: config.Disk{Path: "/a,b.qcow2", Serial: "x,y"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := parse(t, base)
			if err := c.AddDisk("--disk", tt.spec, tt.base); err != nil {
				t.Fatal(err)
			}
			if len(c.Disks) != 2 {
				t.Fatalf("%d disks, want 2", len(c.Disks))
			}
			if diff := cmp.Diff(tt.want, c.Disks[1]); diff != "" {
				t.Errorf("disk (-want +got):\n%s", diff)
			}
			if err := c.Validate(); err != nil {
				t.Errorf("Validate: %v", err)
			}
		})
	}
}

func TestAddDiskChangesTheDiskOfTheFile(t *testing.T) {
	c := parse(t, base)
	if err := c.AddDisk("--disk", "/dir/./root.qcow2,readonly,backing_dirs=/b", config.Disk{Snapshot: true}); err != nil {
		t.Fatal(err)
	}
	want := []config.Disk{{Path: "/dir/root.qcow2", Queues: 2, ReadOnly: true, BackingDirs: []string{"/b"}}}
	if diff := cmp.Diff(want, c.Disks); diff != "" {
		t.Errorf("disks (-want +got):\n%s", diff)
	}
}

func TestAddDiskErrorsNameTheFlag(t *testing.T) {
	for _, tt := range []struct{ spec, want string }{
		{"", `--disk "": the path of the image is missing`},
		{",format=raw", `--disk ",format=raw": the path of the image is missing`},
		{"a.qcow2,fromat=raw", `--disk a.qcow2: unknown key "fromat" in [[disk]]: did you mean "format"? (accepted here: format, readonly, snapshot, queues, queue_size, cache, engine, discard, on_error, byte_rate, byte_burst, op_rate, op_burst, serial, backing_dirs, data_file, l2_cache)`},
		{"a.qcow2,queues=0,discard=1", "--disk a.qcow2: queues must be an integer from 1 to 64, not 0\n--disk a.qcow2: discard must be true or false, not \"1\""},
		{"a.qcow2,queues", `--disk a.qcow2: queues must be an integer from 1 to 64, not ""`},
		{"a.qcow2,readonly=yes", `--disk a.qcow2: readonly must be true or false, not "yes"`},
		{"a.qcow2,serial=a,serial=b", "--disk a.qcow2: serial is given twice"},
		{"a.qcow2,backing_dirs=", `--disk a.qcow2: backing_dirs must be a path, not ""`},
	} {
		c := parse(t, base)
		if err := c.AddDisk("--disk", tt.spec, config.Disk{}); err == nil || err.Error() != tt.want {
			t.Errorf("AddDisk(%q) = %v, want %s", tt.spec, err, tt.want)
		}
		if len(c.Disks) != 1 {
			t.Errorf("AddDisk(%q): a refused disk was added", tt.spec)
		}
	}
	c := parse(t, base)
	if err := c.AddDisk("--disk", "a.img", config.Disk{}); err != nil {
		t.Fatal(err)
	}
	const want = `--disk a.img: format is missing: "a.img" does not end in .qcow2, and the format is never guessed from content: set format to "raw" or "qcow2"`
	if err := c.Validate(); err == nil || err.Error() != want {
		t.Errorf("Validate = %v, want %s", err, want)
	}
}

// TestDiskKeysTogether checks values that are right by themselves but not with
// each other, and the number of disks, which is refused before any is opened.
func TestDiskKeysTogether(t *testing.T) {
	for _, tt := range []struct{ spec, want string }{
		{"/a.qcow2,cache=none", ""},
		{"/a.img,format=raw,cache=none,snapshot", `cache "none" cannot be had with a snapshot, whose throw-away overlay lies in the page cache: use "writeback"`},
		{"/a.img,format=raw,cache=none,snapshot,readonly", ""},
		{"/a.img,format=raw,cache=none", ""},
		{"/a.qcow2,byte_burst=1M", "byte_burst means nothing without byte_rate: set it, or remove this"},
		{"/a.qcow2,op_burst=1", "op_burst means nothing without op_rate: set it, or remove this"},
	} {
		c := parse(t, base)
		if err := c.AddDisk("--disk", tt.spec, config.Disk{}); err != nil {
			t.Fatal(err)
		}
		err := c.Validate()
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.spec, err)
		case tt.want != "" && (err == nil || !strings.HasSuffix(err.Error(), tt.want)):
			t.Errorf("%s: %v, want %s", tt.spec, err, tt.want)
		}
	}
	c := parse(t, base)
	for i := len(c.Disks); i <= 31; i++ {
		if err := c.Validate(); err != nil {
			t.Fatalf("%d disks: %v", i, err)
		}
		if err := c.AddDisk("--disk", fmt.Sprintf("/%d.qcow2", i), config.Disk{}); err != nil {
			t.Fatal(err)
		}
	}
	const want = "--disk /31.qcow2: one disk too many: a guest has at most 31"
	if err := c.Validate(); err == nil || err.Error() != want {
		t.Errorf("32 disks: %v, want %s", err, want)
	}
}

// TestSetTakesAnInitrdBack checks that a flag can undo what the file says of a
// file that a guest can do without.
func TestSetTakesAnInitrdBack(t *testing.T) {
	c := parse(t, base)
	for _, value := range []string{"/initrd", ""} {
		if err := c.Set("--initrd", "boot.initrd", value); err != nil || c.Boot.Initrd != value {
			t.Errorf("Set(%q) leaves %q: %v", value, c.Boot.Initrd, err)
		}
	}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
}

// TestFlagsAddFiles checks where copies and artifacts of flags begin and go, beside
// those of the file.
func TestFlagsAddFiles(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	c := parse(t, "run.command = ['x']\ncopy = [{ from = '../a/', to = '/x/../y/' }]\nartifact = [{ from = '/out/.' }, { from = '/.hidden', to = 'b/' }]\n"+base)
	c.AddCopy("--copy", "./b/", "/b/")
	c.AddArtifact("--artifact", "/deep/out/", "")
	c.AddArtifact("--artifact", "/deep/out", "./new//")
	c.AddArtifact("--artifact", "/deep/out", "/")
	got := c.Effective()
	if diff := cmp.Diff([]config.Copy{{From: "/a", To: "/x/../y/"}, {From: filepath.Join(wd, "b"), To: "/b/"}}, got.Copies); diff != "" {
		t.Errorf("copies (-want +got):\n%s", diff)
	}
	want := []config.Artifact{
		{From: "/out/.", To: "/dir/out"},
		{From: "/.hidden", To: "/dir/b/"},
		{From: "/deep/out/", To: filepath.Join(wd, "out")},
		{From: "/deep/out", To: filepath.Join(wd, "new") + "/"},
		{From: "/deep/out", To: "/"},
	}
	if diff := cmp.Diff(want, got.Artifacts); diff != "" {
		t.Errorf("artifacts (-want +got):\n%s", diff)
	}
	says(t, c.Validate())
	c.AddCopy("--copy", "", "b")
	c.AddArtifact("--artifact", "/..", "")
	says(t, c.Validate(), `--artifact /..: to is missing: "/.." has no last name to be called by`, "--copy : to must be an absolute path of the guest, not b")
}
