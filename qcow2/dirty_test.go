package qcow2

import (
	"bytes"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestOpenDirty opens images that a killed QEMU with lazy counts leaves behind:
// for reading as they are, for writing after their repair.
func TestOpenDirty(t *testing.T) {
	for _, options := range []string{"cluster_size=4k", "cluster_size=512,refcount_bits=64", "cluster_size=64k,refcount_bits=1"} {
		t.Run(options, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,"+options, path, "1M")
			model := append(bytes.Repeat([]byte{7}, 200<<10), make([]byte, 1<<20-200<<10)...)
			out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 200k", "-c", "flush", "-c", "abort", path).CombinedOutput()
			if err == nil {
				t.Fatalf("qemu-io was not killed: %s", out)
			}
			before := readFile(t, path)
			if before[offIncompatible+7] != 1<<incompatDirty || check(t, path).Corruptions == 0 {
				t.Fatal("the image is not dirty")
			}
			closeImage(t, open(t, path, Options{ReadOnly: true}))
			holder := open(t, path, Options{ReadOnly: true})
			if _, err := Open(path, Options{}); !errors.Is(err, ErrLocked) {
				t.Errorf("beside a reader: %v", err)
			}
			if !bytes.Equal(readFile(t, path), before) {
				t.Error("a reader, or a writer without the lock, changed the image")
			}
			closeImage(t, holder)

			m := open(t, path, Options{})
			now := readFile(t, path)
			if now[offIncompatible+7] != 0 || now[80+7] != 1<<compatLazyRefcounts {
				t.Errorf("the features are %x", now[offIncompatible:96])
			}
			copy(model[100<<10:], "more")
			must(t, m.WritevAt([][]byte{[]byte("more")}, 100<<10))
			closeImage(t, m)
			qemu(t, "qemu-img", "check", "-q", path)
			compare(t, t.TempDir(), path, model)
		})
	}
}

// TestOpenDirtyBroken shows that an image whose repair leaves a fault is refused
// with the reason and keeps its mark, and that one whose table of counts is broken
// is not. (QEMU refuses the latter once, as in row 060.)
func TestOpenDirtyBroken(t *testing.T) {
	good, l2 := hostileImage(t, CreateOptions{Size: 1 << 20})
	put(good, offIncompatible, 8, 1<<incompatDirty)
	path := filepath.Join(t.TempDir(), "disk.qcow2")

	b := append([]byte(nil), good...)
	put(b, l2, 8, 0x8000000000052a00)
	writeFile(t, path, b)
	_, err := Open(path, Options{})
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "middle of a cluster") || !strings.Contains(err.Error(), path) {
		t.Errorf("an unaligned entry: %v", err)
	}
	if readFile(t, path)[offIncompatible+7] != 1<<incompatDirty {
		t.Error("the dirty bit is gone")
	}
	closeImage(t, open(t, path, Options{ReadOnly: true}))

	b = append(b[:0], good...)
	put(b, 0x10000, 8, 0xffff2a00)
	writeFile(t, path, b)
	closeImage(t, open(t, path, Options{}))
	qemu(t, "qemu-img", "check", "-q", path)

	b = append(b[:0], good...)
	put(b, offIncompatible, 8, 1<<incompatDirty|1<<incompatCorrupt)
	writeFile(t, path, b)
	if _, err := Open(path, Options{}); !errors.Is(err, ErrCorrupt) || !bytes.Equal(readFile(t, path), b) {
		t.Errorf("dirty and corrupt: %v", err)
	}
}

// TestOpenDirtyFailures fails each file operation of the open of a dirty image:
// the next open mends what this one began.
func TestOpenDirtyFailures(t *testing.T) {
	good, _ := hostileImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	put(good, offIncompatible, 8, 1<<incompatDirty)
	put(good, 0x2000, 8, 0) // some counts
	total := 0
	for at := 0; at <= total; at++ {
		f, n := &memFile{data: append([]byte(nil), good...)}, 0
		f.setFail(func(string) error {
			if n++; n == at {
				return errors.New("broken")
			}
			return nil
		})
		m, err := openFile(f, "memory", Options{}, &chain{})
		if at == 0 {
			total = n
		}
		if (err == nil) != (at == 0) {
			t.Errorf("failure %d of %d: %v", at, total, err)
		}
		if err == nil {
			closeImage(t, m)
		}
		f.setFail(nil)
		m, err = openFile(f, "memory", Options{}, &chain{})
		must(t, err)
		closeImage(t, m)
		if v := checkImage(f.data); len(v.corruptions) > 0 || v.leaks > 0 {
			t.Errorf("failure %d: %v", at, v)
		}
	}
}

// TestOpenDirtyCommit is row 098: QEMU fails while it empties an image after it
// has committed it to its backing file.
func TestOpenDirtyCommit(t *testing.T) {
	dir := t.TempDir()
	base, path := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, path)
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 0 200k", path)
	good := readFile(t, path)
	want := append(bytes.Repeat([]byte{7}, 200<<10), make([]byte, 1<<20-200<<10)...)
	for event, class := range map[string]int{
		"l1_update":           exitClean,
		"empty_image_prepare": exitLeaks,
		"reftable_update":     exitCorrupt,
		"refblock_alloc":      exitCorrupt,
	} {
		writeFile(t, path, good)
		writeFile(t, filepath.Join(dir, "errors"), []byte("[inject-error]\nevent = \""+event+"\"\nerrno = \"5\"\nonce = \"on\"\n"))
		command := exec.Command("qemu-img", "commit", "-q", "-f", "qcow2", "blkdebug:errors:top.qcow2")
		command.Dir = dir
		if out, err := command.CombinedOutput(); err == nil {
			t.Fatalf("%s: the commit did not fail: %s", event, out)
		}
		if got := check(t, path); exitOf(got) != class || qemuClass(t, path) != class || readFile(t, path)[offIncompatible+7] != 1 {
			t.Errorf("%s: the check finds %v, want class %d of a dirty image", event, got.Findings, class)
		}
		m := open(t, path, Options{})
		got := make([]byte, m.Size())
		if err := m.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: other data (%v)", event, err)
		}
		must(t, m.WritevAt([][]byte{got}, 0))
		closeImage(t, m)
		qemu(t, "qemu-img", "check", "-q", path)
	}
}
