// Package guide runs the sessions of a guide and compares what they print.
//
// A session is a block of Markdown marked as console: a line that begins with "$ "
// is a command, with what ends in a backslash continued on the next line, and what
// follows it is what it prints, to either stream. A line "…" stands for any lines,
// and "…" in a line for anything. A block marked as toml whose first line is a
// comment with a name, such as "# ci.toml", is a file of that name.
package guide

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Section is a part of a guide with a title. Its sessions share a directory and a
// shell.
type Section struct {
	Title string
	Steps []Step
	Files map[string]string // contents by name
}

// Step is a command and what it prints.
type Step struct{ Command, Want string }

// Sections returns the sections of the second level of a guide, which is Markdown.
func Sections(text string) []Section {
	var sections []Section
	for _, part := range strings.Split(text, "\n## ")[1:] {
		title, body, _ := strings.Cut(part, "\n")
		s := Section{Title: title, Files: map[string]string{}}
		s.read(body)
		sections = append(sections, s)
	}
	return sections
}

var fileName = regexp.MustCompile(`\A# (\S+\.toml)\n`)

// read finds the blocks of a section.
func (s *Section) read(body string) {
	kind, block := "", ""
	for line := range strings.Lines(body) {
		mark, isMark := strings.CutPrefix(line, "```")
		switch {
		case !isMark && kind == "console":
			s.readSession(line)
		case !isMark:
			block += line
		default:
			if name := fileName.FindStringSubmatch(block); kind == "toml" && name != nil {
				s.Files[name[1]] = block
			}
			kind, block = strings.TrimSpace(mark), ""
		}
	}
}

// readSession reads a line of a session.
func (s *Section) readSession(line string) {
	if command, ok := strings.CutPrefix(line, "$ "); ok {
		s.Steps = append(s.Steps, Step{Command: command})
		return
	}
	if len(s.Steps) == 0 {
		return
	}
	last := &s.Steps[len(s.Steps)-1]
	if strings.HasSuffix(last.Command, "\\\n") && last.Want == "" {
		last.Command += line
		return
	}
	last.Want += line
}

// Run runs the sessions of a section in dir with one shell, which is looked up.
func (s Section) Run(t *testing.T, shell, dir string) {
	t.Helper()
	if len(s.Steps) == 0 {
		t.Skip("no sessions")
	}
	for name, text := range s.Files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const mark = "=== step done ==="
	var script strings.Builder
	for _, step := range s.Steps { // each of which sees the status of the one before
		script.WriteString(step.Command + "guide=$?; echo '" + mark + "'; (exit $guide)\n")
	}
	cmd := exec.Command(shell, "-c", "exec 2>&1\n"+script.String()+"exit 0\n")
	cmd.Dir = dir
	cmd.WaitDelay = 10 * time.Second
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		t.Errorf("the shell ended with %v", err)
	}
	got := strings.Split(out.String(), mark+"\n")
	for i, step := range s.Steps {
		if i >= len(got)-1 {
			t.Fatalf("it ended before %q:\n%s", step.Command, out.String())
		}
		if !pattern(step.Want).MatchString(got[i]) {
			t.Errorf("$ %sprints\n%s\nwhere the guide has\n%s", step.Command, got[i], step.Want)
		}
	}
}

// pattern is what output has to match.
func pattern(want string) *regexp.Regexp {
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
