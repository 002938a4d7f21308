// Package doctor says what a host can do for calf, and how to mend what it
// cannot. It changes nothing on the host.
package doctor

import (
	"fmt"
	"io"
	"strings"
)

// State is how a check ended.
type State string

// States of a Check.
const (
	OK      State = "ok"
	Warning State = "warning" // guests run, but less well, or not all of them
	Missing State = "missing" // guests do not run
)

// Check is what was found out about one thing. Its fields are those of the JSON
// output.
type Check struct {
	Name  string `json:"name"`
	State State  `json:"state"`
	Found string `json:"found"`
	Mend  string `json:"mend,omitempty"` // what to do, in one sentence; empty if State is OK
}

// Report is what Examine found.
type Report struct {
	OK     bool    `json:"ok"` // nothing is missing: calf run works
	Checks []Check `json:"checks"`
}

// Options say what to look at beside the host.
type Options struct {
	Kernel       string // a kernel for guests, or empty
	KernelConfig string // its configuration; empty: looked for in the kernel and beside it
}

// Examine makes all checks. It fails if a file of opts cannot be read.
func Examine(h Host, opts Options) (Report, error) {
	checks := h.kvm()
	checks = append(checks, h.memory(), h.transparentHugePages(), h.reservedHugePages(), h.ioUring(), h.landlock())
	kernel, err := examineKernel(opts)
	if err != nil {
		return Report{}, err
	}
	r := Report{OK: true, Checks: append(checks, kernel...)}
	for _, c := range r.Checks {
		r.OK = r.OK && c.State != Missing
	}
	return r, nil
}

// Text writes the report as a list.
func (r Report) Text(w io.Writer) error {
	state, name := 0, 0
	for _, c := range r.Checks {
		state, name = max(state, len(c.State)), max(name, len(c.Name))
	}
	var b strings.Builder
	for _, c := range r.Checks {
		fmt.Fprintf(&b, "%-*s  %-*s  %s\n", state, c.State, name, c.Name, c.Found)
		if c.Mend != "" {
			fmt.Fprintf(&b, "%*s  → %s\n", state+2+name, "", c.Mend)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func ok(name, format string, args ...any) Check {
	return Check{Name: name, State: OK, Found: fmt.Sprintf(format, args...)}
}

func warning(name, found, mend string) Check {
	return Check{Name: name, State: Warning, Found: found, Mend: mend}
}

func missing(name, found, mend string) Check {
	return Check{Name: name, State: Missing, Found: found, Mend: mend}
}
