package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/calfvm/calf/qcow2"
)

// TestCompact rewrites images of every kind. The disk stays what it is, and so do the
// options of the image; it takes no more room than one that qemu-img has converted.
func TestCompact(t *testing.T) {
	r := newRandomImages(t)
	for i := range rounds(t, 20) {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Chdir(t.TempDir())
			r.t = t
			name, flags := r.source()
			format := flags[1]
			if _, info := qemuImg(t, "info", "-f", format, name); strings.Contains(info, "data file:") {
				t.Skip("its data is in another file")
			}
			if format == "qcow2" {
				i, err := qcow2.Inspect(name)
				if err != nil {
					t.Fatal(err)
				}
				for _, s := range i.Snapshots {
					must(t, "qemu-img", "snapshot", "-d", s.Name, name)
				}
			}
			// QEMU leaves faults where a snapshot took more than narrow counts hold.
			qemuImg(t, "check", "-q", "-r", "all", "-f", format, name)
			must(t, "qemu-img", "convert", "-f", format, "-O", "raw", name, "want")
			_, info := qemuImg(t, "info", "-f", format, name)
			before := onDisk(t, name)
			args := []string{"image", "compact", "-q", "-f", format}
			if format == "qcow2" && r.IntN(3) == 0 {
				args = append(args, "-c")
			}
			mustCalf(t, append(args, name)...)
			if code, out := qemuImg(t, "compare", "-f", format, "-F", "raw", name, "want"); code != 0 {
				t.Fatalf("%q: %s", args, out)
			}
			if format == "qcow2" {
				must(t, "qemu-img", "check", "-q", "-f", format, name)
			}
			_, after := qemuImg(t, "info", "-f", format, name)
			if without(info, "disk size") != without(after, "disk size") {
				t.Errorf("%q: it was\n%s\nand is\n%s", args, info, after)
			}
			if now := onDisk(t, name); now > before+4096 { // attributes may take a block
				t.Errorf("%q: it took %d bytes and takes %d", args, before, now)
			}
		})
	}
}

// without leaves out the line that begins with start.
func without(text, start string) string {
	lines := slices.DeleteFunc(strings.Split(text, "\n"), func(l string) bool { return strings.HasPrefix(l, start) })
	return strings.Join(lines, "\n")
}

// TestCompactWins drops what was written and is zero or discarded now, keeps what is
// compressed so, and keeps all that the file is beside its contents.
func TestCompactWins(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "raw", "raw", "8M")
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 5 0 4M", "raw")
	must(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "raw", "a.qcow2")
	must(t, "qemu-io", "-c", "write -P 6 4M 2M", "-c", "write -P 0 4M 1M", "-c", "write -P 7 6M 1M", "a.qcow2")
	must(t, "qemu-img", "snapshot", "-c", "x", "a.qcow2")
	must(t, "qemu-io", "-c", "write -P 7 6M 1M", "a.qcow2")
	must(t, "qemu-img", "snapshot", "-d", "x", "a.qcow2")
	must(t, "qemu-img", "convert", "-O", "raw", "a.qcow2", "want")
	fatal := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	fatal(os.Chmod("a.qcow2", 0o604))
	fatal(os.Symlink("a.qcow2", "link.qcow2"))
	labelled := syscall.Setxattr("a.qcow2", "user.label", []byte("mine"), 0) == nil
	if os.Getuid() == 0 {
		fatal(os.Chown("a.qcow2", 12, 34))
	}
	old, err := os.Stat("a.qcow2")
	fatal(err)
	out := mustCalf(t, "image", "compact", "link.qcow2")
	if !strings.Contains(out, "link.qcow2 took ") || !strings.Contains(out, "won") {
		t.Errorf("it prints %q", out)
	}
	must(t, "qemu-img", "compare", "a.qcow2", "want")
	if _, out := qemuImg(t, "check", "a.qcow2"); !strings.Contains(out, "66.67% compressed") { // 64 of 96
		t.Errorf("it is not compressed where it was: %s", out)
	}
	if got := onDisk(t, "a.qcow2"); got > 3<<20 {
		t.Errorf("it takes %d bytes", got)
	}
	fi, err := os.Stat("a.qcow2")
	fatal(err)
	was, is := old.Sys().(*syscall.Stat_t), fi.Sys().(*syscall.Stat_t)
	if is.Ino == was.Ino || fi.Mode() != old.Mode() || is.Uid != was.Uid || is.Gid != was.Gid {
		t.Errorf("the new file is %+v, the old one was %+v", is, was)
	}
	var label [16]byte
	if n, err := syscall.Getxattr("a.qcow2", "user.label", label[:]); labelled && string(label[:max(n, 0)]) != "mine" {
		t.Errorf("its label is %q, %v", label[:max(n, 0)], err)
	}
	if _, err := os.Readlink("link.qcow2"); err != nil {
		t.Error(err)
	}
	if out := mustCalf(t, "image", "compact", "a.qcow2"); !strings.Contains(out, "needs it") {
		t.Errorf("the second time it prints %q", out)
	}
	mustCalf(t, "image", "compact", "-c", "-o", "compression_type=zstd", "a.qcow2")
	if _, out := qemuImg(t, "info", "a.qcow2"); !strings.Contains(out, "zstd") {
		t.Error(out)
	}
	must(t, "qemu-img", "compare", "a.qcow2", "want")
	mustCalf(t, "image", "compact", "-f", "raw", "want")
	must(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "want")
	must(t, "qemu-img", "convert", "-S", "0", "-O", "raw", "want", "full")
	mustCalf(t, "image", "compact", "-f", "raw", "full")
	if got := onDisk(t, "full"); got > 6<<20+64<<10 {
		t.Errorf("a raw image takes %d bytes", got)
	}
	must(t, "cmp", "full", "want")
}

// TestCompactRefusals leaves images alone that it cannot rewrite.
func TestCompactRefusals(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, name := range []string{"snapshots", "leaky", "corrupt", "linked"} {
		must(t, "qemu-img", "create", "-q", "-f", "qcow2", name, "1M")
		must(t, "qemu-io", "-f", "qcow2", "-c", "write 0 64k", name)
	}
	must(t, "qemu-img", "snapshot", "-c", "x", "snapshots")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "external", "1M")
	must(t, "ln", "linked", "other")
	f, err := os.OpenFile("corrupt", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{0, 0}, 0x20000+2*4); err != nil { // the count of the L2 table
		t.Fatal(err)
	}
	_ = f.Close()
	before := entries(t)
	for _, c := range []struct{ says, args string }{
		{"snapshot -d", "-f qcow2 snapshots"},
		{"in another file", "-f qcow2 external"},
		{"check -r all", "-f qcow2 corrupt"},
		{"other names", "-f qcow2 linked"},
		{"cannot be compressed", "-f raw -c leaky"},
		{"compression_type", "-f qcow2 -o cluster_size=4k leaky"},
		{"compression type", "-f qcow2 -o compression_type=xz leaky"},
		{"none", "none"},
	} {
		var old []byte
		name := c.args[strings.LastIndex(c.args, " ")+1:]
		if name != "none" {
			if old, err = os.ReadFile(name); err != nil {
				t.Fatal(err)
			}
		}
		code, out, messages := calf(t, append([]string{"image", "compact"}, strings.Fields(c.args)...)...)
		if code != 1 || out != "" || !strings.Contains(messages, c.says) {
			t.Errorf("%q: code %d, %s%s, want %q in it", c.args, code, out, messages, c.says)
		}
		if b, err := os.ReadFile(name); name != "none" && (err != nil || string(b) != string(old)) {
			t.Errorf("%q changes the image (%v)", c.args, err)
		}
		if after := entries(t); !slices.Equal(before, after) {
			t.Fatalf("%q leaves %v", c.args, after)
		}
	}
}

// TestCompactInterrupted kills it at random moments. The disk is what it was.
func TestCompactInterrupted(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRandomImages(t)
	must(t, "qemu-img", "create", "-q", "-f", "raw", "want", "32M")
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 5 0 16M", "want")
	must(t, "qemu-img", "convert", "-S", "0", "-f", "raw", "-O", "qcow2", "want", "fat.qcow2")
	must(t, "cp", "want", "fat.img")
	for i := range rounds(t, 12) {
		in := []string{"fat.qcow2", "fat.img"}[i%2]
		must(t, "cp", "--sparse=never", in, "a"+in[3:])
		s := []syscall.Signal{syscall.SIGINT, syscall.SIGKILL}[i/2%2]
		cmd := command("image", "compact", "-q", "a"+in[3:])
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(r.Int64N(int64(150 * time.Millisecond))))
		_ = cmd.Process.Signal(s)
		_ = cmd.Wait()
		must(t, "qemu-img", "compare", "want", "a"+in[3:])
		for _, name := range entries(t) {
			if !strings.HasPrefix(name, ".a.") {
				continue
			}
			if s != syscall.SIGKILL {
				t.Errorf("%v left %s", s, name)
			}
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
	}
}
