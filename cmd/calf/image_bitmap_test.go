package main

import (
	"os"
	"strings"
	"testing"
)

// TestImageBitmap gives the same command lines to both programs, on copies of the same
// images. They end with the same exit codes, and leave bitmaps that qemu-img describes
// alike and finds no fault with.
func TestImageBitmap(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, dir := range []string{"ours", "theirs"} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for name, size := range map[string]string{"a.qcow2": "10M", "b.qcow2": "10M", "long.qcow2": "20M"} {
			qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", dir+"/"+name, size)
			qemuImg(t, "bitmap", "--add", "-g", "512", dir+"/"+name, "source")
			qemuIO(t, dir+"/"+name, "write 1M 3M")
		}
		qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "compat=0.10", dir+"/old.qcow2", "10M")
		qemuImg(t, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "a.qcow2", dir+"/over.qcow2")
		qemuImg(t, "create", "-q", "-f", "raw", dir+"/r.raw", "1M")
	}
	for _, line := range []string{
		"--add a.qcow2 x",
		"--add a.qcow2 x",
		"--add -g 512 --disable a.qcow2 fine",
		"--add -g 0 a.qcow2 zero",
		"-g 2G --add a.qcow2 coarse",
		"--add -g 100 a.qcow2 y",
		"--add -g 4G a.qcow2 y",
		"--add -g 1.5k a.qcow2 y",
		"--add -g much a.qcow2 y",
		"--add --remove a.qcow2 y",
		"--remove --add a.qcow2 y",
		"--add --remove --add --disable -g 8k a.qcow2 y",
		"--enable --disable --enable a.qcow2 fine",
		"--merge source a.qcow2 x",
		"--merge source --merge x -b b.qcow2 -F qcow2 a.qcow2 fine",
		"--merge source -b b.qcow2 -F qcow2 a.qcow2 fine",
		"--clear --merge source -b b.qcow2 a.qcow2 x",
		"--add --merge source -b long.qcow2 -F qcow2 a.qcow2 kept",
		"--merge none a.qcow2 x",
		"--merge source -b none.qcow2 a.qcow2 x",
		"--merge source -b r.raw -F raw a.qcow2 x",
		"--clear a.qcow2 x",
		"--clear a.qcow2 none",
		"--enable a.qcow2 none",
		"--remove a.qcow2 zero",
		"--remove a.qcow2 none",
		"--add over.qcow2 x",
		"--add -f raw a.qcow2 z",
		"--add r.raw z",
		"--add old.qcow2 z",
		"--add none.qcow2 z",
		"--add a.qcow2",
		"--add a.qcow2 b c",
		"a.qcow2 x",
		"-g 512 --remove a.qcow2 x",
		"-F qcow2 --merge x a.qcow2 x",
		"-b b.qcow2 --clear a.qcow2 x",
		"--add -q a.qcow2 z",
		"--add --image-opts a.qcow2 z",
	} {
		args := append([]string{"bitmap"}, strings.Fields(line)...)
		t.Chdir("theirs")
		wantCode, _ := qemuImg(t, args...)
		_, want := qemuImg(t, "info", "--output=json", "a.qcow2")
		t.Chdir("../ours")
		code, out, messages := calf(t, append([]string{"image"}, args...)...)
		_, got := qemuImg(t, "info", "--output=json", "a.qcow2")
		t.Chdir("..")
		if code != wantCode || out != "" || (code != 0) != (messages != "") {
			t.Errorf("%s: exit code %d, %q, %q; qemu-img's is %d", line, code, out, messages, wantCode)
		}
		if bitmapsOf(got) != bitmapsOf(want) {
			t.Errorf("%s leaves %s\nwant %s", line, bitmapsOf(got), bitmapsOf(want))
		}
		for _, name := range []string{"a", "over"} {
			if code, _ := qemuImg(t, "check", "-q", "ours/"+name+".qcow2"); code != 0 {
				t.Errorf("%s: qemu-img check ends with %d", line, code)
			}
		}
	}
}

// bitmapsOf is the part of qemu-img's description of an image for its bitmaps.
func bitmapsOf(info string) string {
	_, list, _ := strings.Cut(info, `"bitmaps": [`)
	list, _, _ = strings.Cut(list, `"refcount-bits"`)
	return list
}
