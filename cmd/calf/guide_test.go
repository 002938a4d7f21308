package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestGuide runs the sessions of docs/images.md and compares what they print. Those
// of a section run in one directory, with one shell. A line "…" stands for any
// lines, and "…" in a line for anything.
func TestGuide(t *testing.T) {
	text, err := os.ReadFile("../../docs/images.md")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	// The program that users have, as this one may be slowed by the race detector.
	build := exec.Command("go", "build", "-o", filepath.Join(bin, "calf"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building calf: %v\n%s", err, out)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	ran := 0
	for i, section := range strings.Split(string(text), "\n## ")[1:] {
		title, body, _ := strings.Cut(section, "\n")
		steps := guideSteps(body)
		ran += len(steps)
		t.Run(fmt.Sprintf("%d %s", i+1, title), func(t *testing.T) { runGuide(t, steps) })
	}
	if ran < 30 {
		t.Errorf("the guide has %d commands", ran)
	}
}

// guideStep is a command of the guide and what it prints.
type guideStep struct{ command, want string }

// guideSteps finds the commands in the blocks that are sessions.
func guideSteps(body string) []guideStep {
	var steps []guideStep
	inside := false
	for line := range strings.Lines(body) {
		switch {
		case strings.HasPrefix(line, "```"):
			inside = line == "```console\n"
		case !inside:
		case strings.HasPrefix(line, "$ "):
			steps = append(steps, guideStep{command: line[2:]})
		case len(steps) > 0:
			last := &steps[len(steps)-1]
			if strings.HasSuffix(last.command, "\\\n") && last.want == "" {
				last.command += line
				continue
			}
			last.want += line
		}
	}
	return steps
}

// runGuide runs the steps with one shell.
func runGuide(t *testing.T, steps []guideStep) {
	if len(steps) == 0 {
		t.Skip("no sessions")
	}
	const mark = "=== step done ==="
	var script strings.Builder
	for _, s := range steps {
		script.WriteString(s.command + "echo '" + mark + "'\n")
	}
	cmd := exec.Command("bash", "-c", "exec 2>&1\n"+script.String())
	cmd.Dir = t.TempDir()
	cmd.WaitDelay = 10 * time.Second
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		t.Errorf("the shell ended with %v", err)
	}
	got := strings.Split(out.String(), mark+"\n")
	for i, s := range steps {
		if i >= len(got)-1 {
			t.Fatalf("it ended before %q:\n%s", s.command, out.String())
		}
		if !guidePattern(s.want).MatchString(got[i]) {
			t.Errorf("$ %sprints\n%s\nwhere the guide has\n%s", s.command, got[i], s.want)
		}
	}
}

// guidePattern is what output has to match.
func guidePattern(want string) *regexp.Regexp {
	var p strings.Builder
	for line := range strings.Lines(want) {
		if line == "…\n" {
			p.WriteString(`(?s:.*\n)?`)
			continue
		}
		p.WriteString(strings.ReplaceAll(regexp.QuoteMeta(line), "…", ".*"))
	}
	return regexp.MustCompile(`\A` + p.String() + `\z`)
}
