package find

import (
	"errors"
	"fmt"
	"strings"
)

// A script of GRUB is much like one of a shell: commands of words, which end with
// a line or a semicolon; if, for, while and until; functions; and blocks in braces
// as last words of a command. It has no pipes, redirections or substitutions.

// statement is a command with its blocks.
type statement struct {
	words []word
	// conditions are those of if and elif, while and until, or the words of for;
	// bodies what each leads to. An else has no condition.
	conditions [][]*statement
	bodies     [][]*statement
}

// word is a word as it is written: pieces of text and names of variables.
type word []piece

type piece struct {
	text     string // or the name of a variable
	variable bool
	quoted   bool
}

// literal returns what a word says that has no variables and no quotes, or "".
func (w word) literal() string {
	if len(w) != 1 || w[0].variable || w[0].quoted {
		return ""
	}
	return w[0].text
}

// maxNesting is how deeply blocks may lie in one another.
const maxNesting = 50

var errSyntax = errors.New("its syntax is not GRUB's")

// parser reads a script.
type parser struct {
	s     string
	depth int
	// ahead is the token that has been read and not been taken.
	ahead token
}

// token is a word, or a separator: ';' for the end of a command, '{', '}', or 0 for
// the end of the script.
type token struct {
	word word
	sep  byte
}

// parse returns the statements of a script.
func parse(script string) ([]*statement, error) {
	p := &parser{s: strings.NewReplacer("\r\n", "\n", "\\\n", " ").Replace(script)}
	if err := p.next(); err != nil {
		return nil, err
	}
	list, err := p.list()
	if err == nil && (p.ahead.word != nil || p.ahead.sep != 0) {
		err = errSyntax
	}
	return list, err
}

// next reads a token.
func (p *parser) next() error {
	p.s = strings.TrimLeft(p.s, " \t\r")
	if p.s == "" {
		p.ahead = token{}
		return nil
	}
	if p.s[0] == '#' {
		end := strings.IndexByte(p.s+"\n", '\n')
		p.s = p.s[end:]
		return p.next()
	}
	if strings.IndexByte(";\n{}", p.s[0]) >= 0 {
		p.ahead = token{sep: p.s[0]}
		if p.s[0] == '\n' {
			p.ahead.sep = ';'
		}
		p.s = p.s[1:]
		return nil
	}
	w, err := p.word()
	p.ahead = token{word: w}
	return err
}

// word reads a word.
func (p *parser) word() (word, error) {
	w := word{}
	add := func(text string, quoted bool) { w = append(w, piece{text: text, quoted: quoted}) }
	for p.s != "" && strings.IndexByte(" \t\n;{}", p.s[0]) < 0 {
		c := p.s[0]
		switch c {
		case '\\':
			add(p.s[1:min(2, len(p.s))], true)
			p.s = p.s[min(2, len(p.s)):]
		case '\'':
			text, rest, ok := strings.Cut(p.s[1:], "'")
			if !ok {
				return nil, errSyntax
			}
			add(text, true)
			p.s = rest
		case '"':
			var err error
			p.s = p.s[1:]
			if w, err = p.quoted(w); err != nil {
				return nil, err
			}
		case '$':
			w = append(w, p.variable(false))
		default:
			end := strings.IndexAny(p.s, " \t\n;{}\\'\"$")
			if end < 0 {
				end = len(p.s)
			}
			add(p.s[:end], false)
			p.s = p.s[end:]
		}
	}
	return w, nil
}

// quoted reads what double quotes hold, and the second of them.
func (p *parser) quoted(w word) (word, error) {
	w = append(w, piece{quoted: true}) // "" is a word, too
	for {
		end := strings.IndexAny(p.s, "\\\"$")
		if end < 0 {
			return nil, errSyntax
		}
		w = append(w, piece{text: p.s[:end], quoted: true})
		p.s = p.s[end:]
		switch p.s[0] {
		case '"':
			p.s = p.s[1:]
			return w, nil
		case '\\':
			if len(p.s) < 2 {
				return nil, errSyntax
			}
			text := p.s[:2]
			if strings.IndexByte("\\\"$", text[1]) >= 0 {
				text = text[1:]
			}
			w = append(w, piece{text: text, quoted: true})
			p.s = p.s[2:]
		case '$':
			w = append(w, p.variable(true))
		}
	}
}

// variable reads a dollar sign and the name of a variable.
func (p *parser) variable(quoted bool) piece {
	name, rest := variableName(p.s[1:])
	if name == "" {
		p.s = p.s[1:]
		return piece{text: "$", quoted: quoted}
	}
	p.s = rest
	return piece{text: name, variable: true, quoted: quoted}
}

// variableName takes the name of a variable from the beginning of s, where it may
// be in braces; empty if there is none.
func variableName(s string) (name, rest string) {
	if inner, ok := strings.CutPrefix(s, "{"); ok {
		if name, rest, ok = strings.Cut(inner, "}"); ok {
			return name, rest
		}
		return "", s
	}
	n := 0
	for n < len(s) && (s[n] == '_' || s[n]|0x20 >= 'a' && s[n]|0x20 <= 'z' || s[n] >= '0' && s[n] <= '9') {
		n++
	}
	if n == 0 && s != "" && strings.IndexByte("?#*@", s[0]) >= 0 {
		n = 1
	}
	return s[:n], s[n:]
}

// list reads statements up to one of the words, or to the end of a block; it leaves
// what ends it.
func (p *parser) list(until ...string) ([]*statement, error) {
	var list []*statement
	if p.depth++; p.depth > maxNesting {
		return nil, fmt.Errorf("%w: its blocks lie too deeply in one another", errSyntax)
	}
	defer func() { p.depth-- }()
	for {
		switch {
		case p.ahead.sep == ';':
			if err := p.next(); err != nil {
				return nil, err
			}
			continue
		case p.ahead.word == nil:
			return list, nil
		}
		for _, word := range until {
			if p.ahead.word.literal() == word {
				return list, nil
			}
		}
		s, err := p.statement()
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
}

// statement reads a statement.
func (p *parser) statement() (*statement, error) {
	s := &statement{}
	switch p.ahead.word.literal() {
	case "if":
		return s, p.conditional(s)
	case "while", "until":
		s.words = []word{p.ahead.word}
		return s, p.loop(s)
	}
	for p.ahead.word != nil || p.ahead.sep == '{' {
		if p.ahead.sep == 0 {
			s.words = append(s.words, p.ahead.word)
			if err := p.next(); err != nil {
				return nil, err
			}
			if s.words[0].literal() == "for" && p.ahead.sep == ';' {
				return s, p.body(s)
			}
			continue
		}
		if err := p.next(); err != nil {
			return nil, err
		}
		body, err := p.list()
		if err != nil {
			return nil, err
		}
		s.bodies = append(s.bodies, body)
		if err := p.take('}', ""); err != nil {
			return nil, err
		}
	}
	if s.words[0].literal() == "for" {
		return nil, errSyntax
	}
	return s, nil
}

// take reads over a separator or a keyword, which has to be there.
func (p *parser) take(sep byte, keyword string) error {
	if p.ahead.sep != sep || p.ahead.word.literal() != keyword {
		return errSyntax
	}
	return p.next()
}

// conditional reads if, with elif and else, up to fi.
func (p *parser) conditional(s *statement) error {
	s.words = []word{p.ahead.word}
	keyword := "if"
	for keyword != "fi" {
		if err := p.take(0, keyword); err != nil {
			return err
		}
		if keyword != "else" {
			condition, err := p.list("then")
			if err != nil {
				return err
			}
			s.conditions = append(s.conditions, condition)
			if err := p.take(0, "then"); err != nil {
				return err
			}
		}
		body, err := p.list("elif", "else", "fi")
		if err != nil {
			return err
		}
		s.bodies = append(s.bodies, body)
		if keyword == "else" && p.ahead.word.literal() != "fi" {
			return errSyntax
		}
		if keyword = p.ahead.word.literal(); keyword == "" {
			return errSyntax
		}
	}
	return p.take(0, "fi")
}

// loop reads the condition and the body of while and until.
func (p *parser) loop(s *statement) error {
	if err := p.next(); err != nil {
		return err
	}
	condition, err := p.list("do")
	if err != nil {
		return err
	}
	s.conditions = [][]*statement{condition}
	return p.body(s)
}

// body reads what lies between do and done.
func (p *parser) body(s *statement) error {
	for p.ahead.sep == ';' {
		if err := p.next(); err != nil {
			return err
		}
	}
	if err := p.take(0, "do"); err != nil {
		return err
	}
	body, err := p.list("done")
	if err != nil {
		return err
	}
	s.bodies = [][]*statement{body}
	return p.take(0, "done")
}
