package qcow2

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// The kinds of failure that a caller may want to tell apart, with errors.Is.
// Every error of this package that concerns a file is an *Error.
var (
	// ErrNotQCOW2 means that the file does not begin with a QCOW2 header.
	ErrNotQCOW2 = errors.New("qcow2: not a QCOW2 image")
	// ErrUnsupported means that the image uses a feature that this package
	// does not have; the message names it.
	ErrUnsupported = errors.New("qcow2: unsupported feature")
	// ErrCorrupt means that the image breaks a rule of the format.
	ErrCorrupt = errors.New("qcow2: corrupt image")
	// ErrLocked means that another process uses the image.
	ErrLocked = errors.New("qcow2: image in use")
	// ErrBackingRefused means that the image names a backing file which the
	// trust rule does not let it open.
	ErrBackingRefused = errors.New("qcow2: backing file refused")
	// ErrReadOnly means that the image was opened for reading.
	ErrReadOnly = errors.New("qcow2: image is read-only")
	// ErrNoSnapshot means that the image has not the one internal snapshot
	// that was asked for.
	ErrNoSnapshot = errors.New("qcow2: no such snapshot")
	// ErrNoBitmap means that the image has not the persistent bitmap that was
	// asked for.
	ErrNoBitmap = errors.New("qcow2: no such bitmap")
	// ErrBitmapInUse means that a persistent bitmap has not followed the disk,
	// or may not have: nothing can be done with it but to remove it.
	ErrBitmapInUse = errors.New("qcow2: bitmap cannot be trusted")
	// ErrRange means that a request does not lie inside [0, Size).
	ErrRange = errors.New("qcow2: range outside the image")
	// ErrClosed means that the image was closed.
	ErrClosed = errors.New("qcow2: image is closed")
	// ErrFlushFailed means that an earlier flush failed in a way that leaves
	// unknown what reached stable storage. It stays: no later flush or write
	// succeeds until the image is opened anew.
	ErrFlushFailed = errors.New("qcow2: an earlier flush failed")
	// ErrInvalidOption means that an option given to Create or Open is
	// impossible.
	ErrInvalidOption = errors.New("qcow2: invalid option")
)

// Error says in one sentence which file, what is wrong with it, and how to
// mend it where there is a way.
type Error struct {
	Path string // the file concerned
	Kind error  // one of the Err variables above, or nil
	What string // what is wrong
	Mend string // what the user can do; may be empty
	Err  error  // the cause; may be nil
}

func (e *Error) Error() string {
	s := shown(e.Path) + ": " + e.What
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	if e.Mend != "" {
		s += "; " + e.Mend
	}
	return s
}

// Unwrap makes errors.Is and errors.As see both the kind and the cause.
func (e *Error) Unwrap() []error {
	var errs []error
	if e.Kind != nil {
		errs = append(errs, e.Kind)
	}
	if e.Err != nil {
		errs = append(errs, e.Err)
	}
	return errs
}

// corruptf returns an ErrCorrupt whose path is not known yet.
func corruptf(format string, args ...any) *Error {
	return &Error{Kind: ErrCorrupt, What: fmt.Sprintf(format, args...)}
}

// headerFault is corruptf for what is wrong with the header itself, without which
// nobody knows what the rest means.
func headerFault(format string, args ...any) *Error {
	e := corruptf(format, args...)
	e.Mend = "no tool can mend a header: take a copy of the image"
	return e
}

// inFile gives an *Error that has no path this one, with a repair as the
// mend of a corruption, and any other error the path. Requests may share err, as
// those that wait for the same commit do, so it is copied and never changed.
func inFile(path string, err error) error {
	if err == nil {
		return nil
	}
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return &Error{Path: path, What: "input/output failed", Err: err}
	}
	if e.Path != "" {
		return err
	}
	named := *e
	named.Path = path
	if errors.Is(e.Kind, ErrCorrupt) && e.Mend == "" {
		named.Mend = repairHint(path)
	}
	return &named
}

func repairHint(path string) string {
	return "to mend it, run: calf image check -f qcow2 -r all " + shellWord(path)
}

// shellWord is name as one word of a shell command that a user may copy. Names
// come from images nobody trusts, so it is quoted unless it is plain, and one
// that is an option, or that a terminal would not show as it is, gives way to
// the word FILE.
func shellWord(name string) string {
	if name == "" || name[0] == '-' {
		return "FILE"
	}
	plain := true
	for _, r := range name {
		if r == '\uFFFD' || !strconv.IsPrint(r) {
			return "FILE"
		}
		plain = plain && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+,:@%=", r))
	}
	if plain {
		return name
	}
	return "'" + strings.ReplaceAll(name, "'", `'\''`) + "'"
}

// shown is a name for the eyes of a user: as it is if it is plain to a shell
// too, else quoted and escaped.
func shown(name string) string {
	if shellWord(name) == name {
		return name
	}
	return strconv.Quote(name)
}
