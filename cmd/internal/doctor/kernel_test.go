package doctor

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	if _, err := z.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zstded(t testing.TB, b []byte) []byte {
	t.Helper()
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return z.EncodeAll(b, nil)
}

// unpackedKernel holds config after n other bytes and a mark that is none.
func unpackedKernel(t testing.TB, config string, n int) []byte {
	t.Helper()
	b := append(bytes.Repeat([]byte{'I'}, n), configMark+"\x00"...)
	b = append(append(b, configMark...), gzipped(t, []byte(config))...)
	return append(b, "IKCFG_ED and more"...)
}

// bzImage has what boot.Check looks at, and a payload with the trailer that the
// kernel's build adds.
func bzImage(payload []byte) []byte {
	b := make([]byte, 2*512, 2*512+len(payload)+4)
	le := binary.LittleEndian
	b[0x1F1] = 1 // setup_sects
	le.PutUint16(b[0x1FE:], 0xAA55)
	copy(b[0x202:], "HdrS")
	le.PutUint16(b[0x206:], 0x20F)
	b[0x234] = 1
	le.PutUint16(b[0x236:], 1)
	le.PutUint32(b[0x24C:], uint32(len(payload)+4))
	return append(append(b, payload...), "size"...)
}

// config is a configuration with every option but those without.
func config(value string, without ...string) string {
	s := "# a kernel\nCONFIG_LOCALVERSION=\"\"\n"
	for _, o := range options() {
		s += "CONFIG_" + o.name + "=" + value + "\n"
	}
	for _, name := range without {
		s = strings.Replace(s, "CONFIG_"+name+"="+value+"\n", "# CONFIG_"+name+" is not set\n", 1)
	}
	return s
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// check returns the last check that is made of opts.
func check(t *testing.T, opts Options) Check {
	t.Helper()
	checks, err := examineKernel(opts)
	if err != nil || len(checks) == 0 {
		t.Fatalf("%+v, %v", checks, err)
	}
	return checks[len(checks)-1]
}

func TestKernelOptions(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	test := func(name, text string, state State, found string) {
		t.Run(name, func(t *testing.T) {
			write(t, path, []byte(text))
			c := check(t, Options{KernelConfig: path})
			if c.State != state || !strings.Contains(c.Found, found) || (c.Mend == "") != (state == OK) {
				t.Errorf("got %+v, want it %s, with %q", c, state, found)
			}
		})
	}
	test("built in", config("y"), OK, "all that guests need")
	test("modules", config("m"), OK, "initial RAM disk must hold: 64BIT, ACPI, PCI, VIRTIO_PCI, VIRTIO_BLK")
	test("packed", string(gzipped(t, []byte(config("y")))), OK, "all that guests need")
	test("both", config("y", "VSOCKETS", "VIRTIO_BLK"), Missing, "CONFIG_VIRTIO_BLK (disks), CONFIG_VSOCKETS (commands)")
	for _, o := range options() {
		state := Warning
		if o.required {
			state = Missing
		}
		test("without "+o.name, config("y", o.name), state, "lacks CONFIG_"+o.name+" ("+o.purpose+")")
	}
}

// Where a configuration lies, and how a kernel is packed.
func TestKernelConfig(t *testing.T) {
	whole, poor := []byte(config("y")), []byte(config("y", "VSOCKETS"))
	plain := bzImage(gzipped(t, []byte("no configuration")))
	within := func(n int) []byte { return unpackedKernel(t, config("y"), n) }
	for _, test := range []struct {
		name, kernel string
		image        []byte
		beside       string // has poor
		state        State
		found        string
	}{
		{"gzip", "vmlinuz", bzImage(gzipped(t, within(100))), "config", OK, "within the kernel"},
		{"zstd", "vmlinuz", bzImage(zstded(t, within(1<<20))), "config", OK, "within the kernel"},
		{"across chunks", "vmlinuz", bzImage(gzipped(t, within(chunk-len(configMark)-4))), "", OK, "within the kernel"},
		{"another packer", "vmlinuz-1.2-x", bzImage([]byte("\xfd7zXZ\x00")), "config-1.2-x", Warning, "CONFIG_VSOCKETS"},
		{"installed", "vmlinuz-1.2-x", plain, "config-1.2-x", Warning, "CONFIG_VSOCKETS"},
		{"of another", "vmlinuz-1.2-x", plain, "config-1.3", Warning, "none that can be read"},
		{"of modules", "vmlinuz", plain, "config", Warning, "CONFIG_VSOCKETS"},
		{"built", "arch/x86/boot/bzImage", plain, ".config", Warning, "CONFIG_VSOCKETS"},
		{"none", "vmlinuz", plain, "", Warning, "none that can be read"},
		{"no kernel", "vmlinuz", whole, "config", Missing, "neither a bzImage"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			kernel := filepath.Join(dir, test.kernel)
			write(t, kernel, test.image)
			if test.beside != "" {
				write(t, filepath.Join(dir, test.beside), poor)
			}
			if c := check(t, Options{Kernel: kernel}); c.State != test.state || !strings.Contains(c.Found, test.found) {
				t.Errorf("got %+v, want it %s, with %q", c, test.state, test.found)
			}
			if test.state == Missing {
				return
			}
			given := filepath.Join(dir, "given")
			write(t, given, whole)
			if c := check(t, Options{Kernel: kernel, KernelConfig: given}); c.State != OK || !strings.Contains(c.Found, given) {
				t.Errorf("with a file given: %+v", c)
			}
		})
	}
	// An ELF kernel is looked through as it is.
	elf := append([]byte("\x7fELF"), within(1000)...)
	if text, err := configWithin(bytes.NewReader(elf), int64(len(elf))); err != nil || text != string(whole) {
		t.Errorf("in an ELF file: %q, %v", text, err)
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	text, long := filepath.Join(dir, "text"), filepath.Join(dir, "long")
	write(t, text, []byte("no such thing"))
	write(t, long, gzipped(t, []byte("CONFIG_"+strings.Repeat(" ", maxConfig))))
	for _, test := range []struct {
		opts Options
		want error
		said string
	}{
		{Options{Kernel: filepath.Join(dir, "gone")}, fs.ErrNotExist, "gone"},
		{Options{KernelConfig: filepath.Join(dir, "gone")}, fs.ErrNotExist, "gone"},
		{Options{Kernel: pipe}, nil, "is not a file"},
		{Options{KernelConfig: dir}, nil, "is not a file"},
		{Options{KernelConfig: text}, errNoConfig, text},
		{Options{KernelConfig: long}, errNoConfig, "longer"},
	} {
		_, err := Examine(healthy(), test.opts)
		if err == nil || test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.said) {
			t.Errorf("%+v: %v", test.opts, err)
		}
	}
}

func FuzzConfigWithin(f *testing.F) {
	unpacked := unpackedKernel(f, config("y"), 10)
	f.Add(bzImage(gzipped(f, unpacked)))
	f.Add(bzImage(zstded(f, unpacked)))
	f.Add(append([]byte("\x7fELF"), unpacked...))
	f.Fuzz(func(t *testing.T, b []byte) {
		text, err := configWithin(bytes.NewReader(b), int64(len(b)))
		if err == nil && (len(text) > maxConfig || !strings.Contains(text, "CONFIG_")) {
			t.Errorf("%d bytes of configuration", len(text))
		}
		examineConfig("it", text)
	})
}
