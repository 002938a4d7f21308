package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/calfvm/calf/cmd/internal/lab"
)

const (
	repositoryRoot = "../../.." // on the host
	goExampleTests = "build/ramdir.test"
)

// repository is a file or directory of this repository, by its path there. Inside an
// outer machine there are those of repositoryFiles.
func repository(path string) string {
	if lab.Inside() {
		return filepath.Join("/lab", path)
	}
	return filepath.Join(repositoryRoot, path)
}

// repositoryFiles are the files of this repository that tests use: by their paths
// there, where they are.
func repositoryFiles() map[string]string {
	files := map[string]string{}
	add := func(path string) { files[path] = filepath.Join(repositoryRoot, path) }
	add("docs/run.md")
	add(".github/action/run.sh")
	add("examples/go/" + goExampleTests)
	for _, pattern := range []string{"*.toml", "*.sh"} {
		paths, err := fs.Glob(os.DirFS(repositoryRoot), "examples/*/"+pattern)
		if err != nil {
			panic("BUG: " + err.Error())
		}
		for _, path := range paths {
			add(path)
		}
	}
	return files
}

// buildGoExample builds the tests of examples/go as its test.sh does: where guests run,
// there may be no Go.
func buildGoExample() error {
	cmd := exec.Command("go", "test", "-c", "-cover", "-o", goExampleTests)
	cmd.Dir = filepath.Join(repositoryRoot, "examples/go")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the tests of examples/go: %w: %s", err, out)
	}
	return nil
}
