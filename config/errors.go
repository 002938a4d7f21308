package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/agnivade/levenshtein"
)

// Error is one thing wrong with a configuration.
type Error struct {
	// File, Line and Column are the place in a file, counted from 1, columns
	// in characters. File is empty for what did not come from a file.
	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"`
	Column int    `json:"column,omitempty"`
	// Message names the key or the flag and says what would be right.
	Message string `json:"message"`
}

func (e *Error) Error() string {
	if e.File == "" {
		return e.Message
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Message)
}

// Errors is everything wrong with a configuration, in the order of the file,
// then what came from elsewhere.
type Errors []*Error

// Error returns one line for each error.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, err := range e {
		lines[i] = err.Error()
	}
	return strings.Join(lines, "\n")
}

// sorted returns e in order and each error once, as an error that is nil iff e is
// empty.
func (e Errors) sorted() error {
	if len(e) == 0 {
		return nil
	}
	slices.SortStableFunc(e, func(a, b *Error) int {
		if (a.File == "") != (b.File == "") {
			return cmp.Compare(b.File, a.File) // files first
		}
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column), cmp.Compare(a.Message, b.Message))
	})
	return slices.CompactFunc(e, func(a, b *Error) bool { return *a == *b })
}

// origin says where a value came from: a place in a file, or a flag.
type origin struct {
	file         string
	line, column int
	flag         string // such as "--cpus", or "--disk data.img" for a table
}

func (o origin) errorf(format string, args ...any) *Error {
	return &Error{File: o.file, Line: o.line, Column: o.column, Message: fmt.Sprintf(format, args...)}
}

// subject is what a message about a key of a table begins with: the flag that
// gave the value, or the key as the file spells it.
func (o origin) subject(table, key string) string {
	switch {
	case o.flag == "":
		return table + "." + key
	case isArray(table):
		return o.flag + ": " + key
	}
	return o.flag
}

// nearest returns the word that s was probably meant to be, or "".
func nearest(s string, words []string) string {
	plain := func(s string) string { return strings.ReplaceAll(strings.ToLower(s), "-", "_") }
	best, limit := "", max(1, len(s)/3)+1
	for _, w := range words {
		if len(s) > 2 && strings.HasPrefix(plain(w), plain(s)) {
			return w
		}
		if d := levenshtein.ComputeDistance(plain(s), plain(w)); d < limit {
			best, limit = w, d
		}
	}
	return best
}

// list joins words as in "a, b or c".
func list(words []string, last string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	n := len(words) - 1
	return strings.Join(words[:n], ", ") + " " + last + " " + words[n]
}
