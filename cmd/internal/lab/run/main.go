// Command run runs a command on a machine whose /dev/kvm is real: this one
// where it has hardware virtualization, else an emulated one that it boots
// around the command. The exit status is the command's, or 125 where there is
// none.
//
//	go run ./cmd/internal/lab/run [flags] -- COMMAND [ARG...]
//
// The command finds calf on its PATH and in $CALF_BIN, and the stock kernels
// in $CALF_CACHE. See package lab for more.
package main

import (
	"flag"
	"fmt"
	"os"
	"path"
	"strings"
	"time"

	"github.com/calfvm/calf/cmd/internal/lab"
)

func main() {
	lab.RunAgent()
	cfg := lab.Config{Files: make(map[string]string)}
	flag.IntVar(&cfg.CPUs, "cpus", 0, "CPUs of the outer machine (default 1: see lab.Config)")
	flag.IntVar(&cfg.MemoryMiB, "memory", 0, "memory of the outer machine in MiB (default 4096)")
	flag.DurationVar(&cfg.Timeout, "timeout", 30*time.Minute, "limit of the whole run")
	flag.StringVar(&cfg.Calf, "calf", "", "the calf executable (default: built from this module)")
	flag.StringVar(&cfg.Artifacts, "artifacts", "", "directory for what the command leaves in $CALF_LAB_ARTIFACTS")
	flag.Func("file", "copy `PATH[:NAME]` to /lab/NAME in the outer machine; repeatable", func(s string) error {
		here, there, named := strings.Cut(s, ":")
		if !named {
			there = path.Base(here)
		}
		cfg.Files[there] = here
		return nil
	})
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(125)
	}
	status, err := lab.Exec(cfg, flag.Args())
	if err != nil {
		fmt.Fprintf(os.Stderr, "lab: %v\n", err)
		os.Exit(125)
	}
	os.Exit(status)
}
