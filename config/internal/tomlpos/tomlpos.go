// Package tomlpos says where in a TOML document every key and value stands.
//
// The TOML library decodes a document without keeping the positions of what it
// read, so this package scans the same text a second time and builds a tree of
// the same shape as the decoded tables and arrays. It is to be given documents
// that the library has accepted (TOML 1.1), and a test walks both trees side by
// side. It refuses by itself only keys that are defined twice, some of which
// the library lets pass.
package tomlpos

import (
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

// Node is the place of one value. Offsets are bytes from the start of the
// document.
type Node struct {
	// Key is where the part of the key that names this value starts. An
	// element of an array written in brackets has no key: its Key is Value.
	Key int
	// Value and End enclose the value, [Value, End). For a table made by a
	// header they enclose the header, and for one that exists only because a
	// longer key runs through it, that part of the key.
	Value, End int
	// Fields holds what a table contains, nil for anything else.
	Fields map[string]*Node
	// Items holds the elements of an array, nil for anything else.
	Items []*Node
}

// Error reports what is wrong at an offset in the document.
type Error struct {
	Offset  int
	Message string
}

func (e *Error) Error() string { return e.Message }

// Index returns the root table of src. Every error is an *Error.
func Index(src string) (*Node, error) {
	root := &Node{Fields: map[string]*Node{}}
	s := &scanner{src: src}
	table := root
	for {
		s.skipBlank()
		if s.done() {
			return root, nil
		}
		var err error
		if s.peek("[") {
			table, err = s.header(root)
		} else {
			err = s.keyValue(table)
		}
		if err != nil {
			return nil, err
		}
	}
}

// scanner is a cursor over a document.
type scanner struct {
	src string
	pos int
}

// syntaxError says that the document is not TOML after all.
func (s *scanner) syntaxError() error { return &Error{s.pos, "invalid TOML"} }

// twice says that a key is defined a second time.
func twice(p part) error {
	return &Error{p.start, "key " + strconv.Quote(p.name) + " is defined twice"}
}

func (s *scanner) done() bool              { return s.pos >= len(s.src) }
func (s *scanner) peek(prefix string) bool { return strings.HasPrefix(s.src[s.pos:], prefix) }

func (s *scanner) accept(prefix string) bool {
	if !s.peek(prefix) {
		return false
	}
	s.pos += len(prefix)
	return true
}

// skip passes over every byte that is in set.
func (s *scanner) skip(set string) {
	for !s.done() && strings.IndexByte(set, s.src[s.pos]) >= 0 {
		s.pos++
	}
}

// skipUntil stops at the first byte that is in set, or at the end.
func (s *scanner) skipUntil(set string) {
	for !s.done() && strings.IndexByte(set, s.src[s.pos]) < 0 {
		s.pos++
	}
}

// skipBlank passes over white space, newlines and comments.
func (s *scanner) skipBlank() {
	for {
		s.skip(" \t\r\n")
		if !s.peek("#") {
			return
		}
		s.skipUntil("\n")
	}
}

// part is one piece of a dotted key.
type part struct {
	name       string
	start, end int
}

// header scans [a.b] or [[a.b]] and returns the table that it opens.
func (s *scanner) header(root *Node) (*Node, error) {
	start := s.pos
	closing := "]"
	s.accept("[")
	if s.accept("[") {
		closing = "]]"
	}
	parts, err := s.key()
	if err != nil {
		return nil, err
	}
	if !s.accept(closing) {
		return nil, s.syntaxError()
	}
	parent, err := walk(root, parts)
	if err != nil {
		return nil, err
	}
	last := parts[len(parts)-1]
	node := parent.Fields[last.name]
	if node == nil {
		node = &Node{}
		parent.Fields[last.name] = node
	} else if node.Fields == nil && node.Items == nil {
		return nil, twice(last) // it is a plain value
	}
	place := func(n *Node) { n.Key, n.Value, n.End = last.start, start, s.pos }
	if closing == "]]" {
		if node.Fields != nil {
			return nil, twice(last)
		}
		if len(node.Items) == 0 {
			place(node)
		}
		item := &Node{Fields: map[string]*Node{}}
		place(item)
		node.Items = append(node.Items, item)
		return item, nil
	}
	if node.Items != nil {
		return nil, twice(last)
	}
	if node.Fields == nil {
		node.Fields = map[string]*Node{}
	}
	place(node)
	return node, nil
}

// keyValue scans "key = value" into table.
func (s *scanner) keyValue(table *Node) error {
	parts, err := s.key()
	if err != nil {
		return err
	}
	if !s.accept("=") {
		return s.syntaxError()
	}
	s.skip(" \t")
	node, err := s.value()
	if err != nil {
		return err
	}
	parent, err := walk(table, parts)
	if err != nil {
		return err
	}
	last := parts[len(parts)-1]
	if parent.Fields[last.name] != nil {
		return twice(last)
	}
	node.Key = last.start
	parent.Fields[last.name] = node
	return nil
}

// walk follows all but the last of parts from table, making the tables that
// are not there yet. An array of tables stands for its newest element.
func walk(table *Node, parts []part) (*Node, error) {
	for _, p := range parts[:len(parts)-1] {
		next := table.Fields[p.name]
		if next == nil {
			next = &Node{Key: p.start, Value: p.start, End: p.end, Fields: map[string]*Node{}}
			table.Fields[p.name] = next
		}
		if n := len(next.Items); n > 0 {
			next = next.Items[n-1]
		}
		if next.Fields == nil {
			return nil, twice(p)
		}
		table = next
	}
	return table, nil
}

// key scans a dotted key and the white space around it. It returns at least
// one part.
func (s *scanner) key() ([]part, error) {
	var parts []part
	for {
		s.skip(" \t")
		p := part{start: s.pos}
		if s.peek(`"`) || s.peek(`'`) {
			if err := s.quoted(); err != nil {
				return nil, err
			}
			name, err := unquote(s.src[p.start:s.pos])
			if err != nil {
				return nil, s.syntaxError()
			}
			p.name = name
		} else {
			s.skipUntil(" \t\r\n.=]")
			p.name = s.src[p.start:s.pos]
		}
		p.end = s.pos
		parts = append(parts, p)
		s.skip(" \t")
		if !s.accept(".") {
			return parts, nil
		}
	}
}

// unquote returns the string that a quoted key stands for.
func unquote(quoted string) (string, error) {
	var doc struct{ K string }
	if _, err := toml.Decode("K = "+quoted, &doc); err != nil {
		return "", err
	}
	return doc.K, nil
}

// value scans one value of any kind.
func (s *scanner) value() (*Node, error) {
	node := &Node{Key: s.pos, Value: s.pos}
	var err error
	switch {
	case s.peek(`"`), s.peek(`'`):
		err = s.quoted()
	case s.accept("["):
		err = s.array(node)
	case s.accept("{"):
		err = s.inlineTable(node)
	default:
		s.skipUntil(",]}#\r\n")
		s.pos = node.Value + len(strings.TrimRight(s.src[node.Value:s.pos], " \t"))
	}
	node.End = s.pos
	return node, err
}

// quoted scans a string of any of the four kinds.
func (s *scanner) quoted() error {
	quote := s.src[s.pos : s.pos+1]
	long := strings.Repeat(quote, 3)
	closing := quote
	if s.peek(long) {
		closing = long
	}
	s.pos += len(closing)
	for !s.peek(closing) {
		if quote == `"` && s.peek(`\`) {
			s.pos++
		}
		s.pos++
		if s.done() {
			s.pos = len(s.src)
			return s.syntaxError()
		}
	}
	s.pos += len(closing)
	// A multi-line string may hold up to two quotes right before its end.
	for i := 0; closing == long && i < 2; i++ {
		s.accept(quote)
	}
	return nil
}

// array scans what follows an opening bracket.
func (s *scanner) array(node *Node) error {
	node.Items = []*Node{}
	for {
		s.skipBlank()
		if s.accept("]") {
			return nil
		}
		if s.done() {
			return s.syntaxError()
		}
		item, err := s.value()
		if err != nil {
			return err
		}
		node.Items = append(node.Items, item)
		s.skipBlank()
		if !s.accept(",") && !s.peek("]") {
			return s.syntaxError()
		}
	}
}

// inlineTable scans what follows an opening brace.
func (s *scanner) inlineTable(node *Node) error {
	node.Fields = map[string]*Node{}
	for {
		s.skipBlank()
		if s.accept("}") {
			return nil
		}
		if s.done() {
			return s.syntaxError()
		}
		if err := s.keyValue(node); err != nil {
			return err
		}
		s.skipBlank()
		if !s.accept(",") && !s.peek("}") {
			return s.syntaxError()
		}
	}
}
