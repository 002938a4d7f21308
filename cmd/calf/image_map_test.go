package main

import (
	"fmt"
	"strings"
	"testing"
)

// withoutCompressed is a map without the key that only newer versions of qemu-img
// have.
func withoutCompressed(s string) string {
	return strings.NewReplacer(`, "compressed": true`, "", `, "compressed": false`, "").Replace(s)
}

// TestImageMap maps random chains of images with both programs, which print the
// same but for what is compressed.
func TestImageMap(t *testing.T) {
	r := newRandomImages(t)
	for range rounds(t, 12) {
		t.Chdir(t.TempDir())
		name, format := r.chain("layer")
		for _, flags := range [][]string{
			{"--output=json"},
			{"--output=human"},
			{"--output=json", "-s", fmt.Sprint(r.IntN(5 << 20)), "-l", fmt.Sprint(r.IntN(2 << 20))},
			{"--output=json", "-U", "--start-offset=64M"},
		} {
			args := append(append([]string{"map"}, flags...), "-f", format, name)
			wantCode, want := qemuImg(t, args...)
			code, got, messages := calf(t, append([]string{"image"}, args...)...)
			if code != wantCode || withoutCompressed(got) != want {
				_, info := qemuImg(t, "info", "--backing-chain", name)
				t.Fatalf("%q: code %d, %s prints\n%s\nwant %d,\n%s\n%s", args, code, messages, got, wantCode, want, info)
			}
		}
	}
}

// TestImageMapPreallocated maps disks whose clusters have their places before they
// have data: some read as zero, which the host knows.
func TestImageMapPreallocated(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, options := range []string{
		"preallocation=metadata", "preallocation=falloc", "preallocation=full", "preallocation=metadata,extended_l2=on",
		"data_file=d,data_file_raw=on", "data_file=e,preallocation=metadata", "preallocation=metadata,cluster_size=512,refcount_bits=1",
	} {
		qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "3M")
		for _, command := range []string{"write 1M 64k", "write 0 4k", "write -z 2M 64k", "discard 2560k 64k"} {
			qemuIO(t, "a.qcow2", command)
			_, want := qemuImg(t, "map", "--output=json", "a.qcow2")
			if got := mustCalf(t, "image", "map", "--output=json", "a.qcow2"); withoutCompressed(got) != want {
				t.Errorf("%s: it prints\n%s\nwant\n%s", options, got, want)
			}
		}
	}
}

// TestImageMapCompressed tells what is compressed, and says why a table cannot.
func TestImageMapCompressed(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "128k")
	qemuIO(t, "a.qcow2", "write -c 0 64k", "write 64k 64k")
	out := mustCalf(t, "image", "map", "--output=json", "a.qcow2")
	if !strings.HasPrefix(out, `[{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, "compressed": true},`) {
		t.Errorf("it prints %s", out)
	}
	if code, _, messages := calf(t, "image", "map", "a.qcow2"); code != 1 || !strings.Contains(messages, "--output=json") {
		t.Errorf("code %d, %s", code, messages)
	}
}
