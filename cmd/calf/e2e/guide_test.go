package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/calfvm/calf/cmd/internal/guide"
	"github.com/calfvm/calf/cmd/internal/lab"
)

// TestGuide runs the sessions of docs/run.md with an image that is laid out like
// Debian's and has its kernel, but busybox for all programs.
func TestGuide(t *testing.T) {
	lab.Need(t)
	text, err := os.ReadFile(repository("docs/run.md"))
	if err != nil {
		t.Fatal(err)
	}
	image := newImages(t).distribution(withKernels(t, map[string]string{
		"/etc/passwd": "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n", "/usr/README": "",
	}, "/boot", []lab.Kernel{newestKernel(t)}))
	t.Setenv("PATH", filepath.Dir(lab.Calf())+":"+os.Getenv("PATH"))
	ran := 0
	for i, section := range guide.Sections(string(text)) {
		ran += len(section.Steps)
		t.Run(fmt.Sprintf("%d %s", i+1, section.Title), func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Link(image, filepath.Join(dir, "debian-12.qcow2")); err != nil {
				t.Fatal(err)
			}
			section.Run(t, "sh", dir)
		})
	}
	if ran < 15 {
		t.Errorf("the guide has %d commands", ran)
	}
}
