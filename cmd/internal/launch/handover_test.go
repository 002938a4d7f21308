package launch

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/guest/boot"
	"github.com/calfvm/calf/guest/boot/find"
	"github.com/calfvm/calf/vmm"
)

// TestHandOver: the agent is the first process where calf knows the root, and nothing
// says that the image's initial RAM disk is needed.
func TestHandOver(t *testing.T) {
	ext4, lvm := &find.Partition{Number: 2, Kind: "ext4"}, &find.Partition{Number: 2, Kind: "an LVM physical volume"}
	for _, tt := range []struct {
		name string
		root *find.Partition
		args string
		want string
	}{
		{"a root", ext4, "ro quiet", "rdinit=/.calf/init calf.init calf.root=/dev/vda2 calf.rootfstype=ext4 root=R ro quiet"},
		{"an LVM", lvm, "ro", "root=R ro"},
		{"not on this disk", nil, "ro", "root=R ro"},
		{"an argument for the initial RAM disk", ext4, "boot=live", "root=R boot=live"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := &handOver{initramfs: boot.File{ReaderAt: strings.NewReader("agent"), Size: 5}}
			f := &find.Found{Root: "root=R", RootPartition: tt.root, Args: strings.Fields(tt.args)}
			p := &vmm.Payload{Cmdline: f.Cmdline()}
			used := h.use(p, f)
			if p.Cmdline != tt.want || (p.Initrd != nil) != used || used != strings.Contains(tt.want, "rdinit") {
				t.Errorf("%q, %v, want %q", p.Cmdline, p.Initrd, tt.want)
			}
		})
	}
	disks := []config.Disk{{Path: "x"}}
	for name, cfg := range map[string]*config.Config{
		"a command":           {Run: config.Run{Command: []string{"true"}}, Disks: disks},
		"a kernel":            {Boot: config.Boot{Kernel: "x"}, Disks: disks},
		"no disk":             {},
		"rdinit= by the user": {Boot: config.Boot{Cmdline: "quiet rdinit=/init"}, Disks: disks},
	} {
		if h := newHandOver(cfg, slog.New(slog.DiscardHandler), nil); h != nil {
			t.Errorf("%s: there is an agent", name)
		}
	}
}

// TestHandOverTimeout: each boot has its time, until the guest is up.
func TestHandOverTimeout(t *testing.T) {
	f := &find.Found{Root: "root=R", RootPartition: &find.Partition{Kind: "ext4"}}
	var h *handOver
	use := func() {
		t.Helper()
		if !h.use(&vmm.Payload{}, f) {
			t.Fatal("the agent is not used")
		}
	}
	ended := make(chan error, 1)
	h = &handOver{timeout: time.Hour, end: func(err error) { ended <- err }}
	use()
	if first := h.late; !first.Stop() {
		t.Error("nothing waits for the guest")
	}
	h.timeout = time.Millisecond
	use()
	if err := <-ended; !errors.Is(err, errBootTimeout) {
		t.Errorf("the guest ends with %v", err)
	}
	h.timeout = time.Hour
	use()
	last := h.late
	if !h.stop() || h.stop() {
		t.Error("a boot is up once")
	}
	if last.Stop() {
		t.Error("the wait goes on after the guest is up")
	}
}
