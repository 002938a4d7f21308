package progress

import (
	"fmt"
	"io"
	"regexp"
	"strings"
	"unicode"
)

// Block is the last lines of a terminal, which change in place. It is not safe for
// concurrent use.
type Block struct {
	w     io.Writer
	lines int // that are shown
}

// NewBlock returns a block without lines on the terminal behind w, whose cursor is at
// the beginning of a line.
func NewBlock(w io.Writer) *Block { return &Block{w: w} }

// Draw shows lines in place of those shown before. None may be wider than the terminal,
// and there must be fewer than it has rows.
func (b *Block) Draw(lines []string) error {
	var s strings.Builder
	b.home(&s)
	for _, line := range lines {
		s.WriteString(line + "\x1b[K\n")
	}
	s.WriteString("\x1b[J")
	b.lines = len(lines)
	_, err := io.WriteString(b.w, s.String())
	return err
}

// Clear removes the block.
func (b *Block) Clear() error { return b.Draw(nil) }

// home moves the cursor to where the block begins.
func (b *Block) home(s *strings.Builder) {
	if b.lines > 0 {
		fmt.Fprintf(s, "\x1b[%dA", b.lines)
	}
	s.WriteString("\r")
}

// escapes are the sequences by which programs move the cursor and choose colours.
var escapes = regexp.MustCompile(`\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[ -/]*[0-~])`)

// Unescaped returns s without what moves a cursor or chooses a colour.
func Unescaped(s string) string { return escapes.ReplaceAllString(s, "") }

// Plain returns s as a terminal may be shown it, whoever has written it: as lines of
// text, without what would do anything else there.
func Plain(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsGraphic(r) && r != '\t' && r != '\n' {
			return -1
		}
		return r
	}, Unescaped(s))
}

// Cut returns as much of the text s as fits into a number of columns of one line,
// whatever the terminal makes of its characters.
func Cut(s string, columns int) string {
	var cut strings.Builder
	for _, r := range Plain(s) {
		if r == '\t' || r == '\n' {
			r = ' '
		}
		if columns -= width(r); columns < 0 {
			break
		}
		cut.WriteRune(r)
	}
	return cut.String()
}

// width is how many columns r takes at most: what is wide comes after all alphabets.
func width(r rune) int {
	if r < 0x1100 {
		return 1
	}
	return 2
}
