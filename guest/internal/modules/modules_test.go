package modules

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// module makes an ELF file with the section .modinfo.
func module(info string) []byte {
	const names = "\x00.modinfo\x00.shstrtab\x00"
	le := binary.LittleEndian
	b := make([]byte, 64)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 1)  // ET_REL
	le.PutUint16(b[18:], 62) // EM_X86_64
	le.PutUint32(b[20:], 1)
	b = append(b, info+names...)
	le.PutUint64(b[40:], uint64(len(b))) // the section headers
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[58:], 64)
	le.PutUint16(b[60:], 3)
	le.PutUint16(b[62:], 2)
	section := func(name, kind, offset, size int) {
		var h [64]byte
		le.PutUint32(h[0:], uint32(name))
		le.PutUint32(h[4:], uint32(kind))
		le.PutUint64(h[24:], uint64(offset))
		le.PutUint64(h[32:], uint64(size))
		b = append(b, h[:]...)
	}
	section(0, 0, 0, 0)
	section(1, 1, 64, len(info))
	section(10, 3, 64+len(info), len(names))
	return b
}

func packed(t *testing.T, b []byte, suffix string) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch suffix {
	case ".gz":
		w = gzip.NewWriter(&out)
	case ".xz":
		w, err = xz.NewWriter(&out)
	case ".zst":
		w, err = zstd.NewWriter(&out)
	default:
		return b
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write(b)
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestRead reads modules as distributions pack them, with a list of them and without.
func TestRead(t *testing.T) {
	plain := module("license=GPL\x00depends=a,b-c\x00vermagic=6\x00")
	for _, suffix := range []string{"", ".gz", ".xz", ".zst"} {
		files := fstest.MapFS{
			"kernel/fs/one-two.ko" + suffix:    {Data: packed(t, plain, suffix)},
			"kernel/lone.ko" + suffix:          {Data: packed(t, module("depends=\x00"), suffix)},
			"kernel/fs/cut.ko" + suffix:        {Data: packed(t, plain, suffix)[:40]},
			"kernel/fs/text.ko" + suffix:       {Data: packed(t, []byte("text"), suffix)},
			"kernel/one_two.ko.sig":            {Data: []byte("no module")},
			"kernel/fs/one_two.koala" + suffix: {Data: []byte("no module")},
		}
		for range 2 {
			s, err := Open(files)
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"one_two", "one-two"} {
				image, needs, err := s.Read(name)
				if err != nil || !bytes.Equal(image, plain) || !slices.Equal(needs, []string{"a", "b-c"}) {
					t.Errorf("%s: %d bytes, %q, %v", suffix, len(image), needs, err)
				}
			}
			if _, needs, err := s.Read("lone"); err != nil || len(needs) != 0 {
				t.Errorf("%s: %q, %v", suffix, needs, err)
			}
			for name, want := range map[string]string{"cut": "cut.ko", "text": "text.ko", "none": "no such module"} {
				if _, _, err := s.Read(name); err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, ErrNoModule) != (name == "none") {
					t.Errorf("%s: %s: %v", suffix, name, err)
				}
			}
			list := ""
			for _, name := range []string{"fs/one-two", "lone", "fs/cut", "fs/text"} {
				list += "kernel/" + name + ".ko" + suffix + ":\n"
			}
			files["modules.dep"] = &fstest.MapFile{Data: []byte(list)}
		}
	}
}

// TestFiles follows what modules need, in circles, too.
func TestFiles(t *testing.T) {
	s, err := Open(fstest.MapFS{"modules.dep": {Data: []byte("k/a.ko.zst: k/b.ko.zst k/c.ko.zst\nk/b.ko.zst: k/c.ko.zst k/gone.ko.zst\nk/c.ko.zst: k/a.ko.zst\nk/d-d.ko.zst:\nno line\n/k/e.ko:\n../f.ko:\n")}})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ names, want string }{
		{"a", "k/a.ko.zst k/b.ko.zst k/c.ko.zst"}, {"c d_d", "k/c.ko.zst k/d-d.ko.zst k/a.ko.zst k/b.ko.zst"}, {"d-d d_d x", "k/d-d.ko.zst"}, {"e f line", ""},
	} {
		if got := strings.Join(s.Files(strings.Fields(tt.names)...), " "); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.names, got, tt.want)
		}
	}
}

// TestLongList reads no more of a list than any kernel has.
func TestLongList(t *testing.T) {
	list := append(bytes.Repeat([]byte("k/a.ko: k/b.ko k/b.ko k/b.ko\n"), 9<<20/29), "k/last.ko:\n"...)
	s, err := Open(fstest.MapFS{"modules.dep": {Data: list}})
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Files("a", "last"); len(got) != 1 {
		t.Errorf("got %q", got)
	}
}

// FuzzSet reads what no image should have.
func FuzzSet(f *testing.F) {
	f.Add([]byte("k/a.ko: k/b.ko\nk/b.ko:\n"), module("depends=b\x00"), "a")
	f.Add([]byte("a.ko.xz: a.ko.xz\n"), []byte("\xfd7zXZ\x00"), "a")
	f.Fuzz(func(t *testing.T, list, image []byte, name string) {
		s, err := Open(fstest.MapFS{"modules.dep": {Data: list}, "k/a.ko": {Data: image}, "a.ko.xz": {Data: image}, "a.ko.zst": {Data: image}})
		if err != nil {
			return
		}
		if n := len(s.Files(name, "a")); n > len(s.paths) {
			t.Errorf("%d files of %d modules", n, len(s.paths))
		}
		for _, name := range []string{name, "a"} {
			if b, _, err := s.Read(name); err != nil && b != nil {
				t.Errorf("%d bytes and %v", len(b), err)
			}
		}
	})
}
