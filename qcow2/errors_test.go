package qcow2

import (
	"errors"
	"strings"
	"testing"
)

// TestInFileCopies shows that an error which several requests share is not
// changed when each of them names its file.
func TestInFileCopies(t *testing.T) {
	shared := corruptf("a test")
	err := inFile("disk", shared)
	if shared.Path != "" || shared.Mend != "" {
		t.Errorf("the shared error became %+v", *shared)
	}
	if !errors.Is(err, ErrCorrupt) || !strings.HasPrefix(err.Error(), "disk: a test; ") {
		t.Errorf("got %v", err)
	}
}
