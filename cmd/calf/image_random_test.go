package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// randomImages makes chains of images with qemu-img and qemu-io that differ in all
// that a verb which reads has to know.
type randomImages struct {
	*rand.Rand
	t *testing.T
}

func newRandomImages(t *testing.T) *randomImages {
	t.Helper()
	seed := uint64(time.Now().UnixNano()) //nolint:gosec // G115: any bits will do
	if s := os.Getenv("CALF_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("CALF_SEED=%d does it again", seed)
		}
	})
	return &randomImages{rand.New(rand.NewPCG(seed, 0)), t}
}

// rounds is how many images a test makes of them: CALF_ROUNDS, if it is set.
func rounds(t *testing.T, usual int) int {
	t.Helper()
	if s := os.Getenv("CALF_ROUNDS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if testing.Short() {
		return (usual + 4) / 5
	}
	return usual
}

func (r *randomImages) one(of ...string) string { return of[r.IntN(len(of))] }

// options are random options of a qcow2 image, for -o, that is called name.
func (r *randomImages) options(name string, backed bool) []string {
	clusters := []string{"512", "2k", "4k", "64k", "64k", "256k", "2M"}
	if r.IntN(4) == 0 {
		return []string{"compat=0.10,cluster_size=" + r.one(clusters...)}
	}
	o := []string{"lazy_refcounts=" + r.one("on", "off"), "refcount_bits=" + r.one("8", "16", "64"), "compression_type=" + r.one("zlib", "zstd")}
	extended := r.IntN(3) == 0
	if extended {
		o, clusters = append(o, "extended_l2=on"), clusters[3:]
	}
	if r.IntN(4) == 0 && (extended || !backed) {
		o = append(o, "preallocation="+r.one("metadata", "falloc", "full"))
	}
	if r.IntN(5) == 0 {
		o = append(o, "data_file="+name+".data")
		if !backed {
			o = append(o, "data_file_raw="+r.one("on", "off"))
		}
	}
	return append(o, "cluster_size="+r.one(clusters...))
}

// chain makes a chain of up to four images, of which all but the lowest are qcow2,
// and returns the name and the format of the uppermost.
func (r *randomImages) chain(prefix string) (name, format string) {
	r.t.Helper()
	for depth := range 1 + r.IntN(4) {
		under, underFormat := name, format
		name, format = fmt.Sprintf("%s%d", prefix, depth), "qcow2"
		size := fmt.Sprint((1 + r.Int64N(8<<11)) * 512)
		if depth == 0 && r.IntN(3) == 0 {
			format = "raw"
			r.raw(name)
			continue
		}
		args := []string{"create", "-q", "-f", format, "-o", strings.Join(r.options(name, depth > 0), ",")}
		if depth > 0 {
			args = append(args, "-b", under, "-F", underFormat)
		}
		if code, _ := qemuImg(r.t, append(args, name, size)...); code != 0 {
			r.t.Fatalf("%q: exit code %d", args, code)
		}
		r.fill(name)
	}
	return name, format
}

// raw makes a raw image with holes, which may end inside a sector.
func (r *randomImages) raw(name string) {
	r.t.Helper()
	f, err := os.Create(name)
	if err != nil {
		r.t.Fatal(err)
	}
	size := 1 + r.Int64N(4<<20)
	err = f.Truncate(size)
	for range r.IntN(6) {
		at := r.Int64N(size)
		data := bytes.Repeat([]byte{byte(1 + r.IntN(200))}, int(min(size-at, 1+r.Int64N(150000))))
		if _, e := f.WriteAt(data, at); e != nil {
			err = e
		}
	}
	if err := errors.Join(err, f.Close()); err != nil {
		r.t.Fatal(err)
	}
}

// fill writes to the image in all ways, and makes snapshots on the way.
func (r *randomImages) fill(name string) {
	r.t.Helper()
	_, info := qemuImg(r.t, "info", "--output=json", name)
	dataFile := strings.Contains(info, "data-file")
	var size int64
	if i := strings.Index(info, `"virtual-size": `); i >= 0 {
		if _, err := fmt.Sscanf(info[i:], `"virtual-size": %d`, &size); err != nil {
			r.t.Fatal(err)
		}
	}
	for range r.IntN(3) {
		var commands []string
		for range r.IntN(12) {
			off := r.Int64N(size/512) * 512
			n := min(size-off, (1+r.Int64N(300))*512)
			how := r.one("write", "write", "write -z", "write -z -u", "discard", "write -c")
			switch {
			case how == "write":
				how = fmt.Sprintf("write -P %d", 1+r.IntN(200))
			case how == "write -c" && dataFile:
				continue
			case how == "write -c":
				off &^= 2<<20 - 1 // of any cluster size
				how = fmt.Sprintf("write -c -P %d %d %d", 1+r.IntN(200), off, min(2<<20, size-off))
				// In a process of its own, because QEMU packs on into what a discard
				// has freed; and it fails where there is something already.
				_ = exec.Command("qemu-io", "-f", "qcow2", "-c", how, name).Run()
				continue
			}
			commands = append(commands, fmt.Sprintf("%s %d %d", how, off, n))
		}
		qemuIO(r.t, name, commands...)
		if !dataFile && r.IntN(4) == 0 {
			qemuImg(r.t, "snapshot", "-c", fmt.Sprint("s", r.Int()), name)
		}
	}
}

// qemuIO does commands on a qcow2 image.
func qemuIO(t *testing.T, name string, commands ...string) {
	t.Helper()
	qemuIOFormat(t, "qcow2", name, commands...)
}

func qemuIOFormat(t *testing.T, format, name string, commands ...string) {
	t.Helper()
	args := []string{"-f", format, "-d", "unmap"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out, err := exec.Command("qemu-io", append(args, name)...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-io %q: %v\n%s", args, err, out)
	}
}
