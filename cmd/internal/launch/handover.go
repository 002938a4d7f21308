package launch

import (
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/guest/agent"
	"github.com/calfvm/calf/guest/boot"
	"github.com/calfvm/calf/guest/boot/find"
	"github.com/calfvm/calf/vmm"
)

// handOver is the agent of a run without a command: it mounts the root that calf knows
// of, and lets the image's init take over. Nil: the image's initial RAM disk does so.
type handOver struct {
	server    agent.HandOver
	initramfs boot.File
	readOnly  bool
	timeout   time.Duration // of each boot; 0: none
	end       func(error)   // ends the guest

	mu   sync.Mutex
	late *time.Timer // guarded by mu; of the boot under way
	up   bool        // guarded by mu; the guest has said so in this boot
}

// newHandOver returns the agent for a guest of cfg, nil if it is none for it. A boot
// that takes too long is ended with end.
func newHandOver(cfg *config.Config, log *slog.Logger, end func(error)) *handOver {
	if len(cfg.Run.Command) > 0 || cfg.Boot.Kernel != "" || len(cfg.Disks) == 0 || wantsInitrd(strings.Fields(cfg.Boot.Cmdline)) {
		return nil
	}
	initramfs, err := agent.Initramfs(guestProgram)
	if err != nil {
		log.Warn("the image's own initial RAM disk has to find the root", "error", err)
		return nil
	}
	h := &handOver{initramfs: initramfs, readOnly: cfg.Disks[0].ReadOnly, timeout: cfg.VM.BootTimeout, end: end}
	h.server = agent.HandOver{Hostname: cfg.VM.Name, Up: func(kernel string) {
		if h.stop() { // a guest may say so for ever
			log.Info("the guest's root is in place", "kernel", kernel)
		}
	}}
	return h
}

// initrdArgs are the arguments that only an image's initial RAM disk understands: of
// what is no plain root, and of what is to happen before there is one.
var initrdArgs = []string{"rdinit", "boot", "break", "rd.break", "ostree", "overlayroot", "systemd.volatile", "resume", "cryptdevice", "rd.luks.uuid", "rd.luks.name"}

func wantsInitrd(args []string) bool {
	return slices.ContainsFunc(args, func(arg string) bool {
		name, _, _ := strings.Cut(arg, "=")
		return slices.Contains(initrdArgs, name)
	})
}

// use makes the agent the first process of a guest that is about to boot, if it can
// mount the root, and reports whether it is.
func (h *handOver) use(p *vmm.Payload, f *find.Found) bool {
	h.stop()
	if h == nil || f.RootPartition == nil || !slices.Contains(find.RootKinds, f.RootPartition.Kind) || wantsInitrd(f.Args) {
		return false
	}
	putFirst(p, h.initramfs)
	p.Cmdline = strings.TrimSpace(agent.CmdlineInit(h.readOnly) + " " + rootArgs(f.RootPartition) + " " + p.Cmdline)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.up = false
	if h.timeout > 0 {
		h.late = time.AfterFunc(h.timeout, func() { h.end(errBootTimeout) })
	}
	return true
}

// stop ends the wait for the guest: it is up, or has ended. It reports whether that is
// the first it hears of it in this boot.
func (h *handOver) stop() (first bool) {
	if h == nil {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.late != nil {
		h.late.Stop()
	}
	first, h.up = !h.up, true
	return first
}

// serve takes the connections of the agents.
func (h *handOver) serve() func(agent.Conn) {
	if h == nil {
		return nil
	}
	return h.server.Serve
}
