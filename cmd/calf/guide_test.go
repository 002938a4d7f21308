package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/calfvm/calf/cmd/internal/guide"
)

// TestGuide runs the sessions of docs/images.md and compares what they print. Those
// of docs/run.md need guests: TestGuide of the package e2e runs them.
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
	for i, section := range guide.Sections(string(text)) {
		ran += len(section.Steps)
		t.Run(fmt.Sprintf("%d %s", i+1, section.Title), func(t *testing.T) { section.Run(t, "bash", t.TempDir()) })
	}
	if ran < 30 {
		t.Errorf("the guide has %d commands", ran)
	}
}
