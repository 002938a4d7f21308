package virtio_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// ruleDirs are the packages whose code cites rules.md, by the name it calls
// their tests with.
var ruleDirs = map[string]string{"virtio": ".", "pci": "pci", "blk": "../blk"}

var (
	ruleRow  = regexp.MustCompile(`(?m)^\| ([VPBK]\d+) \| .+ \| (.+) \|$`)
	ruleID   = regexp.MustCompile(`\b[VPBK]\d{1,2}\b`)
	testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
)

// TestRules checks that every rule the code cites is in rules.md, and that the
// tests listed there exist.
func TestRules(t *testing.T) {
	text, err := os.ReadFile("rules.md")
	if err != nil {
		t.Fatal(err)
	}
	tests := make(map[string]bool)
	cited := make(map[string]string)
	for name, dir := range ruleDirs {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no Go files in %s: %v", dir, err)
		}
		for _, file := range files {
			src, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(file, "_test.go") {
				for _, m := range testFunc.FindAllStringSubmatch(string(src), -1) {
					tests[name+"."+m[1]] = true
				}
			}
			for _, id := range ruleID.FindAllString(string(src), -1) {
				cited[id] = file
			}
		}
	}
	rows := make(map[string]bool)
	for _, m := range ruleRow.FindAllStringSubmatch(string(text), -1) {
		if rows[m[1]] {
			t.Errorf("rule %s has two rows", m[1])
		}
		rows[m[1]] = true
		for name := range strings.SplitSeq(m[2], ", ") {
			if !tests[name] {
				t.Errorf("rule %s lists %s, which does not exist", m[1], name)
			}
		}
	}
	for id, file := range cited {
		if !rows[id] {
			t.Errorf("%s cites rule %s, which has no row", file, id)
		}
	}
}
