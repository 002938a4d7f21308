package exercise

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
)

// generator makes up sessions. What it makes, QEMU and calf agree about: what a
// command does to data and to where that is must not be up to them.
type generator struct {
	rand   *rand.Rand
	sample sample
	aio    bool // with asynchronous requests, whose reports come in any order
	size   int64
}

// session returns n commands and more.
func (g *generator) session(n int) []string {
	size, err := parseNumber(g.sample.size)
	if err != nil {
		panic(err)
	}
	g.size = size
	script := append([]string{"length", "map"}, g.begin()...)
	for len(script) < n {
		script = append(script, g.command()...)
	}
	return append(script, "aio_flush", "map", "length")
}

// unit is a multiple of the clusters of all samples.
const unit = 2 << 20

// begin writes to the whole disk, unless it lies over another one: a zero over
// nothing needs no mark, but QEMU sets one. Some of it is compressed. QEMU must not
// do that later: it packs what it compresses into clusters that it has freed.
func (g *generator) begin() []string {
	var script []string
	for off := int64(0); off < g.size; off += unit {
		n := min(unit, g.size-off)
		switch {
		case g.sample.compresses() && g.rand.IntN(2) == 0:
			script = append(script, fmt.Sprintf("write -c %s-P %d %d %d", g.flags("q", "C"), 1+g.rand.IntN(255), off, n))
		case !g.sample.base:
			script = append(script, fmt.Sprintf("write -qP 1 %d %d", off, n))
		}
	}
	return script
}

// compresses reports whether a write to a new image can be compressed.
func (s sample) compresses() bool {
	return s.format == "qcow2" && !strings.Contains(strings.Join(s.create, ","), "data") // nor are there preallocated clusters
}

// span returns an offset and a length inside the disk.
func (g *generator) span() (off, n int64) {
	off = g.rand.Int64N(g.size + 1)
	n = min(1+g.rand.Int64N([]int64{600, 5000, 200 << 10}[g.rand.IntN(3)]), g.size-off)
	if g.rand.IntN(3) == 0 {
		off, n = off&^0xffff, n&^0xfff
	}
	return off, n
}

// number writes n in one of its forms.
func (g *generator) number(n int64) string {
	switch {
	case g.rand.IntN(3) == 0:
		return fmt.Sprintf("%#x", n)
	case n%1024 == 0 && g.rand.IntN(2) == 0:
		return strconv.FormatInt(n/1024, 10) + []string{"k", "K"}[g.rand.IntN(2)]
	}
	return strconv.FormatInt(n, 10)
}

func (g *generator) flags(of ...string) string {
	s := ""
	for _, f := range of {
		if g.rand.IntN(3) == 0 {
			s += "-" + f + " "
		}
	}
	return s
}

// command returns a command, or some that belong together.
func (g *generator) command() []string {
	off, n := g.span()
	at := g.number(off) + " " + g.number(n)
	pattern := g.rand.IntN(256)
	line := func(format string, args ...any) []string { return []string{fmt.Sprintf(format, args...)} }
	switch g.rand.IntN(19) {
	case 0, 1, 2:
		return line("write %s-P %#x %s", g.flags("C", "f", "q"), pattern, at)
	case 3:
		return line("writev %s-P %d %s %d %d", g.flags("C", "f", "q"), pattern, g.number(off), n/3, n-n/3)
	case 4:
		return line("write %s-s pattern %s %d", g.flags("q"), g.number(off), max(n, 1))
	case 5, 6:
		if g.sample.old {
			return nil // QEMU gives up what it makes zero, asked or not
		}
		return line("write -z %s%s", g.flags("u", "f", "C", "q"), at)
	case 7, 8:
		return line("read %s-P %d %s", g.flags("C", "q"), []int{0, 1, 0x77, 0xcd, pattern}[g.rand.IntN(5)], at)
	case 9:
		return line("read -v %s %d", g.number(off), min(n, 200))
	case 10:
		return line("readv %s%s %d %d", g.flags("C", "q", "v"), g.number(off), min(n, 100)/3, min(n, 100)-min(n, 100)/3)
	case 11:
		return g.discard()
	case 12:
		return g.resize()
	case 13:
		return line("alloc %s", at)
	case 14:
		return []string{"map"}
	case 15, 16:
		if g.aio {
			return g.asynchronous()
		}
	case 17:
		return [][]string{
			{"flush"},
			{"length"},
			{"reopen"},
			{"reopen -r", "write 0 1", "reopen -w"},
			{"reopen -c writethrough", "reopen -c writeback"},
			{"close", "open -o driver=" + g.sample.format + " " + g.sample.file()},
			{"sleep 1"},
			{""},
		}[g.rand.IntN(8)]
	}
	return line("%s", []string{
		"read " + g.number(g.size) + " 1", "write -z " + g.number(g.size-1) + " 2", "foo", "read -x 0 1", "write -u 0 1", "help write_", "alloc " + g.number(g.size+1),
		"discard 0 " + g.number(g.size+1), "truncate x",
	}[g.rand.IntN(9)])
}

// discard discards whole clusters of any sample, of which both give up all.
func (g *generator) discard() []string {
	if g.sample.old && g.sample.base || g.size < unit {
		return nil
	}
	off := g.rand.Int64N(g.size/unit) * unit
	return []string{fmt.Sprintf("discard %s%s %s", g.flags("C", "q"), g.number(off), g.number(unit))}
}

// resize changes the size of the disk and fills what it gains.
func (g *generator) resize() []string {
	old := g.size
	g.size = max(1<<20, g.size+g.rand.Int64N(2<<20)-1<<20) &^ 511
	if g.sample.base {
		g.size &^= 0xffff // QEMU fails to grow some overlays that end inside a cluster
	}
	script := []string{"truncate " + g.number(g.size), "length"}
	if g.size > old {
		script = append(script, fmt.Sprintf("write -qP 2 %d %d", old, g.size-old))
	}
	return script
}

// asynchronous begins requests that have nothing to do with each other and waits
// for them.
func (g *generator) asynchronous() []string {
	var script []string
	for range 1 + g.rand.IntN(8) {
		part := g.size / 8
		off := int64(len(script)) * part
		n := g.rand.Int64N(part + 1)
		switch at := fmt.Sprintf("%d %d", off, n); g.rand.IntN(4) {
		case 0:
			script = append(script, fmt.Sprintf("aio_write -P %d %s %d", g.rand.IntN(256), g.flags("C", "f", "q"), off)+fmt.Sprintf(" %d %d", n/2, n-n/2))
		case 1:
			if g.sample.old {
				break
			}
			script = append(script, "aio_write -z "+g.flags("u", "f", "q")+at)
		case 2:
			script = append(script, "aio_read -P 1 "+g.flags("C", "q")+at)
		case 3:
			script = append(script, fmt.Sprintf("aio_read -v %d %d", off, min(n, 40)))
		}
	}
	return append(script, "aio_flush")
}
