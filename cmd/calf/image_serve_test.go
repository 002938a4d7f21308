package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// serving is calf image serve in a process of its own.
type serving struct {
	t        *testing.T
	cmd      *exec.Cmd
	uris     []string
	messages bytes.Buffer
}

// serve starts calf image serve and waits for the addresses of so many exports.
func serve(t *testing.T, exports int, args ...string) *serving {
	t.Helper()
	s := &serving{t: t, cmd: command(append([]string{"image", "serve"}, args...)...)}
	s.cmd.Env = append(s.cmd.Env, "GORACE=atexit_sleep_ms=0") // no pause at the end under the race detector
	s.cmd.Stderr = &s.messages
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.cmd.Process.Kill() })
	lines := bufio.NewScanner(out)
	for len(s.uris) < exports && lines.Scan() {
		s.uris = append(s.uris, lines.Text())
	}
	if len(s.uris) < exports {
		t.Fatalf("serve %q: %v, %s", args, s.cmd.Wait(), &s.messages)
	}
	return s
}

// wait returns the exit code and what was said.
func (s *serving) wait() (code int, messages string) {
	s.t.Helper()
	late := time.AfterFunc(30*time.Second, func() { _ = s.cmd.Process.Kill() })
	defer late.Stop()
	if err := s.cmd.Wait(); err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok {
			s.t.Fatal(exit, err)
		}
	}
	return s.cmd.ProcessState.ExitCode(), s.messages.String()
}

// end ends the server, which must go well.
func (s *serving) end() (messages string) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	code, messages := s.wait()
	if code != 0 || !strings.HasPrefix(messages, "calf: served ") {
		s.t.Fatalf("serve ends with %d and says %s", code, messages)
	}
	return messages
}

// tool runs a program, which must succeed, and returns what it prints.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// leaksAtWorst checks an image that nobody has closed.
func leaksAtWorst(t *testing.T, path string) {
	t.Helper()
	if code, out := qemuImg(t, "check", "-f", "qcow2", path); code != 0 && code != 3 {
		t.Errorf("check of %s: %d, %s", path, code, out)
	}
}

// ioSession is a random session of qemu-io on a disk of 64 MiB.
func ioSession(r *rand.Rand, n int) []string {
	var commands []string
	for range n {
		off, length := r.IntN(1000)<<16+r.IntN(3)*512, (1+r.IntN(300))<<9
		at := fmt.Sprintf(" %d %d", off, length)
		commands = append(commands, []string{
			fmt.Sprintf("write -P %d", 1+r.IntN(255)), fmt.Sprintf("write -f -P %d", 1+r.IntN(255)),
			"write -z", "write -z -u", "discard", "flush\nread",
		}[r.IntN(6)]+at)
	}
	return strings.Split(strings.Join(commands, "\n"), "\n")
}

// scribbled makes an image of 64 MiB that qemu-io has written to at random.
func scribbled(t *testing.T, r *rand.Rand, path string, options ...string) {
	t.Helper()
	format := "qcow2"
	if strings.HasSuffix(path, ".img") {
		format = "raw"
	}
	tool(t, "qemu-img", append(append([]string{"create", "-q", "-f", format}, options...), path, "64M")...)
	qemuIOFormat(t, format, path, ioSession(r, 40)...)
}

// TestServeMap compares what stock clients are told of random chains of images with
// what qemu-nbd tells them, and the data.
func TestServeMap(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRandomImages(t)
	for i := range rounds(t, 4) {
		path, format := r.chain(fmt.Sprintf("i%d-", i))
		s := serve(t, 1, "-t", "-r", "-k", "ours", "-f", format, path)
		ours, theirs := s.uris[0], qemuNBD(t, "-r", "-f", format, path)
		if diff := cmp.Diff(mapOf(t, theirs, ""), mapOf(t, ours, "")); diff != "" {
			t.Errorf("the map of %s (-qemu-nbd +calf)\n%s", path, diff)
		}
		tool(t, "nbdcopy", ours, path+".copy")
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", format, path+".copy", path)
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", format, ours, path)
		s.end()
	}
}

// TestServeBitmap compares what stock clients are told of persistent bitmaps with
// what qemu-nbd tells them.
func TestServeBitmap(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRand(t)
	scribbled(t, r, "a.qcow2")
	for _, b := range []string{"fine", "coarse", "none", "all"} {
		tool(t, "qemu-img", "bitmap", "--add", "-g", map[string]string{"fine": "512", "coarse": "1M"}[b]+map[string]string{"none": "64k", "all": "64k"}[b], "a.qcow2", b)
		switch b {
		case "fine", "coarse":
			qemuIOFormat(t, "qcow2", "a.qcow2", ioSession(r, 30)...)
		case "all":
			qemuIOFormat(t, "qcow2", "a.qcow2", "write 0 64M")
		}
		tool(t, "qemu-img", "bitmap", "--disable", "a.qcow2", b)
	}
	for _, args := range [][]string{{"-B", "fine", "a.qcow2"}, {"-r", "-B", "other", "a.qcow2"}, {"-r", "-s", "-B", "fine", "a.qcow2"}} {
		if code, out, messages := calf(t, append([]string{"image", "serve", "-k", "s"}, args...)...); code != 1 || out != "" || !strings.Contains(messages, "bitmap") {
			t.Errorf("%q: code %d, %s%s", args, code, out, messages)
		}
	}
	for _, b := range []string{"fine", "coarse", "none", "all"} {
		s := serve(t, 1, "-t", "-r", "-k", "ours", "-B", b, "a.qcow2")
		theirs, context := qemuNBD(t, "-r", "-f", "qcow2", "-B", b, "a.qcow2"), "=qemu:dirty-bitmap:"+b
		want := mapOf(t, theirs, context)
		if diff := cmp.Diff(want, mapOf(t, s.uris[0], context)); diff != "" || (b == "fine") != (len(want) > 4) && b != "coarse" {
			t.Errorf("%s (-qemu-nbd +calf)\n%s", b, diff)
		}
		s.end()
	}
}

// qemuNBD serves an image with qemu-nbd until the end of the test.
func qemuNBD(t *testing.T, args ...string) (uri string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	cmd := exec.Command("qemu-nbd", append([]string{"-t", "-e", "16", "-k", socket}, args...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for range 500 {
		if nc, err := net.Dial("unix", socket); err == nil {
			_ = nc.Close()
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return "nbd+unix:///?socket=" + socket
}

// extent is a range of a map.
type extent struct {
	Offset, Length int64
	Type           int
}

// mapOf is what nbdinfo finds out about the ranges of a disk, neighbours that are
// alike together.
func mapOf(t *testing.T, uri, context string) []extent {
	t.Helper()
	var all, merged []extent
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", "--map"+context, uri)), &all); err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if last := len(merged) - 1; last >= 0 && merged[last].Type == e.Type {
			merged[last].Length += e.Length
			continue
		}
		merged = append(merged, e)
	}
	return merged
}

// TestServeClients has the stock clients write the same through a server as to a
// copy of the image, and compares the disks.
func TestServeClients(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRand(t)
	scribbled(t, r, "base.qcow2")
	for _, c := range []struct{ name, format string }{{"a.qcow2", "qcow2"}, {"a.img", "raw"}} {
		t.Run(c.format, func(t *testing.T) {
			create := []string{"create", "-q", "-f", c.format, c.name, "64M"}
			if c.format == "qcow2" {
				create = append(create, "-b", "base.qcow2", "-F", "qcow2")
			}
			tool(t, "qemu-img", create...)
			tool(t, "cp", "--sparse=always", c.name, "copy-"+c.name)
			s := serve(t, 1, "-t", "-k", "s", c.name)
			for range 3 {
				commands := ioSession(r, 30)
				for i, c := range commands {
					commands[i] = strings.Replace(c, "discard", "write -z -u", 1) // what it leaves may differ
				}
				qemuIOFormat(t, "raw", s.uris[0], commands...)
				qemuIOFormat(t, c.format, "copy-"+c.name, commands...)
			}
			qemuIOFormat(t, "raw", s.uris[0], "discard 1M 1M", "discard 0 512", "flush")
			qemuIOFormat(t, "raw", s.uris[0], "write -P 5 0 2M")
			qemuIOFormat(t, c.format, "copy-"+c.name, "write -P 5 0 2M")
			tool(t, "qemu-img", "compare", "-f", "raw", "-F", c.format, s.uris[0], "copy-"+c.name)
			s.end()
			tool(t, "qemu-img", "compare", "-f", c.format, "-F", c.format, c.name, "copy-"+c.name)
			if c.format == "qcow2" {
				sound(t, layer{path: c.name, format: "qcow2"})
			}

			tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "b.qcow2", "64M") // and all of it by nbdcopy
			s = serve(t, 1, "-t", "-k", "s", "b.qcow2")
			source := serve(t, 1, "-t", "-r", "-k", "source", c.name)
			tool(t, "nbdcopy", "--flush", source.uris[0], s.uris[0])
			tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source.uris[0], s.uris[0])
			s.end()
			tool(t, "qemu-img", "compare", "-f", "qcow2", "-F", c.format, "b.qcow2", c.name)
			sound(t, layer{path: "b.qcow2", format: "qcow2"})
		})
	}
}

// fio starts fio's jobs on ranges of their own of a disk, which it verifies.
func fio(uri, seconds string, jobs int) *exec.Cmd {
	return exec.Command("fio", "--name=verify", "--ioengine=nbd", "--uri="+uri, "--rw=randrw", "--bsrange=512-128k",
		"--iodepth=16", "--numjobs="+strconv.Itoa(jobs), "--size=8M", "--offset_increment=8M", "--time_based", "--runtime="+seconds,
		"--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--fsync=32", "--group_reporting")
}

// TestServeKilledClients has fio verify what it writes on several connections, while
// other clients copy the disk and are killed in the middle.
func TestServeKilledClients(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRand(t)
	scribbled(t, r, "a.qcow2")
	s := serve(t, 1, "-t", "-k", "s", "-e", "20", "a.qcow2")
	var killing sync.WaitGroup
	stop := make(chan struct{})
	killing.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			cmd := exec.Command("nbdcopy", s.uris[0], "null:")
			if i%2 == 0 { // writes only what nobody verifies
				cmd = exec.Command("qemu-io", "-f", "raw", "-c", "write 32M 32M", "-c", "discard 32M 32M", "-c", "write -z 40M 10M", s.uris[0])
			}
			if err := cmd.Start(); err != nil {
				t.Error(err)
				return
			}
			time.Sleep(time.Duration(r.IntN(60)) * time.Millisecond)
			_ = cmd.Process.Kill()
			_ = cmd.Wait() // It was killed.
		}
	})
	out, err := fio(s.uris[0], "1", 4).CombinedOutput()
	close(stop)
	killing.Wait()
	if err != nil {
		t.Errorf("fio: %v\n%s", err, out)
	}
	s.end()
	sound(t, layer{path: "a.qcow2", format: "qcow2"})
}

// TestServeKilled kills the server while clients write. What was flushed is there,
// the image has leaks at worst, and the next server takes over the socket.
func TestServeKilled(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRand(t)
	scribbled(t, r, "base.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "a.qcow2", "128M")
	for round := range min(rounds(t, 4), 20) { // as many marks as there is room for
		s := serve(t, 1, "-t", "-k", "s", "-e", "20", "a.qcow2")
		mark := fmt.Sprintf("-P %d %dM 3M", 10+round, 64+3*round)
		qemuIOFormat(t, "raw", s.uris[0], "write "+mark, "flush")
		writer := fio(s.uris[0], "10", 4)
		if err := writer.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(200+r.IntN(300)) * time.Millisecond)
		_ = s.cmd.Process.Kill()
		if code, _ := s.wait(); code != -1 {
			t.Errorf("the server ended by itself with %d", code)
		}
		_ = writer.Wait() // It has lost its server.
		leaksAtWorst(t, "a.qcow2")
		for i := range round + 1 {
			qemuIOFormat(t, "qcow2", "a.qcow2", fmt.Sprintf("read -P %d %dM 3M", 10+i, 64+3*i))
		}
	}
	if st, err := os.Lstat("s"); err != nil || st.Mode().Type() != fs.ModeSocket {
		t.Errorf("a killed server has removed its socket: %v", err)
	}
	serve(t, 1, "-t", "-k", "s", "a.qcow2").end()
	if _, err := os.Lstat("s"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a socket is left: %v", err)
	}
}

// TestServeLock lets nobody else have a served image as a disk.
func TestServeLock(t *testing.T) {
	t.Chdir(t.TempDir())
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	tool(t, "qemu-img", "create", "-q", "-f", "raw", "a.img", "1M")
	for _, path := range []string{"a.qcow2", "a.img"} {
		writable := serve(t, 1, "-t", "-k", "s", path)
		for _, flag := range []string{"-t", "-r"} {
			if code, out, messages := calf(t, "image", "serve", flag, "-k", "s2", path); code != 1 || out != "" || !strings.Contains(messages, "in use") {
				t.Errorf("%s is served twice: %d, %s%s", path, code, out, messages)
			}
		}
		if out, err := exec.Command("qemu-io", "-f", strings.TrimPrefix(filepath.Ext(strings.Replace(path, "img", "raw", 1)), "."), "-c", "read 0 512", path).CombinedOutput(); err == nil {
			t.Errorf("qemu-io opens %s: %s", path, out)
		}
		writable.end()
		readOnly := serve(t, 1, "-t", "-r", "-k", "s", path)
		serve(t, 1, "-t", "-r", "-k", "s2", path).end()
		if code, _, messages := calf(t, "image", "serve", "-k", "s2", path); code != 1 || !strings.Contains(messages, "in use") {
			t.Errorf("%s is served for writing beside a reader: %d, %s", path, code, messages)
		}
		readOnly.end()
	}
	for _, name := range []string{"s", "s2"} {
		if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left", name)
		}
	}
}

// TestServeEnds goes with the last client unless it is to stay, tells what it has
// done, and leaves no file.
func TestServeEnds(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "8M")
	if err := os.WriteFile("pid", []byte("12345678\n"), 0o600); err != nil { // of a server that was killed
		t.Fatal(err)
	}
	s := serve(t, 1, "-k", "s", "--pid-file", "pid", "a.qcow2")
	if want := "nbd+unix:///?socket=" + dir + "/s"; s.uris[0] != want {
		t.Errorf("the address is %s, want %s", s.uris[0], want)
	}
	if b, err := os.ReadFile("pid"); err != nil || string(b) != fmt.Sprintln(s.cmd.Process.Pid) {
		t.Errorf("pid file: %q, %v", b, err)
	}
	qemuIOFormat(t, "raw", s.uris[0], "write -P 1 0 1M", "flush", "read -P 1 0 512k")
	code, messages := s.wait()
	if ok, _ := regexp.MatchString(`^calf: served 1 connections: [0-9]+ requests, 0 of them failed; 512KiB read, 1MiB written, [1-9] flushes\n$`, messages); code != 0 || !ok {
		t.Errorf("it ends with %d and says %s", code, messages)
	}
	for _, name := range []string{"s", "pid"} {
		if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left", name)
		}
	}
	s = serve(t, 1, "-t", "-q", "-p", "0", "-b", "::1", "a.qcow2")
	if !strings.HasPrefix(s.uris[0], "nbd://[::1]:") {
		t.Errorf("the address is %s", s.uris[0])
	}
	for range 2 {
		qemuIOFormat(t, "raw", s.uris[0], "read -P 1 0 1M")
	}
	if err := s.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code, messages := s.wait(); code != 0 || messages != "" {
		t.Errorf("it ends with %d and says %s", code, messages)
	}
}

// TestServeExports serves several images, each in its own way.
func TestServeExports(t *testing.T) {
	t.Chdir(t.TempDir())
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	tool(t, "qemu-img", "create", "-q", "-f", "raw", "b,c.img", "2M")
	s := serve(t, 2, "-t", "-k", "a socket", "a.qcow2", "--export", "data=b,,c.img,format=raw,readonly=on,description=b,, c")
	if !strings.HasSuffix(s.uris[1], "/a%20socket") || !strings.HasPrefix(s.uris[1], "nbd+unix:///data?socket=/") {
		t.Errorf("the address is %s", s.uris[1])
	}
	for i, want := range []string{`"a.qcow2" "" 1048576 false`, `"data" "b, c" 2097152 true`} {
		var list struct {
			Exports []struct {
				Name     string `json:"export-name"`
				Text     string `json:"description"`
				Size     int64  `json:"export-size"`
				ReadOnly bool   `json:"is_read_only"`
			}
		}
		if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", s.uris[i])), &list); err != nil {
			t.Fatal(err)
		}
		e := list.Exports[0]
		if got := fmt.Sprintf("%q %q %d %t", e.Name, e.Text, e.Size, e.ReadOnly); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	listed := tool(t, "nbdinfo", "--list", "nbd+unix:///?socket=a%20socket")
	for _, name := range []string{"a.qcow2", "data"} {
		if !strings.Contains(listed, "export="+strconv.Quote(name)) {
			t.Errorf("%s is not in the list\n%s", name, listed)
		}
	}
	s.end()
}

// TestServeViews serves an image without changing it, and what it was.
func TestServeViews(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRand(t)
	scribbled(t, r, "a.qcow2")
	tool(t, "qemu-img", "snapshot", "-c", "before", "a.qcow2")
	tool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "before.img")
	qemuIOFormat(t, "qcow2", "a.qcow2", ioSession(r, 20)...)
	image, err := os.ReadFile("a.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	for _, snapshot := range []string{"before", "snapshot.id=1", "snapshot.name=before"} {
		s := serve(t, 1, "-t", "-k", "s", "-l", snapshot, "a.qcow2")
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", s.uris[0], "before.img")
		if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", s.uris[0]).CombinedOutput(); err == nil {
			t.Errorf("a snapshot is written to: %s", out)
		}
		s.end()
	}
	for _, args := range [][]string{{"-s", "a.qcow2"}, {"-s", "-l", "before", "a.qcow2"}, {"-s", "before.img"}} {
		s := serve(t, 1, append([]string{"-t", "-k", "s"}, args...)...)
		commands := []string{"write -P 9 1M 20M", "discard 30M 1M", "write -z 40M 1M", "flush", "read -P 9 1M 20M", "read -P 0 40M 1M"}
		qemuIOFormat(t, "raw", s.uris[0], commands...)
		s.end()
	}
	if after, err := os.ReadFile("a.qcow2"); err != nil || !bytes.Equal(after, image) {
		t.Errorf("the image has changed: %v", err)
	}
}

// TestServeDiscard gives room back to the host, or keeps it.
func TestServeDiscard(t *testing.T) {
	t.Chdir(t.TempDir())
	for mode, want := range map[string]int{"unmap": 3, "ignore": 0} {
		tool(t, "qemu-img", "create", "-q", "-f", "raw", mode, "8M")
		s := serve(t, 1, "-t", "-k", "s", "-f", "raw", "--discard", mode, mode)
		qemuIOFormat(t, "raw", s.uris[0], "write -P 1 0 8M", "discard 1M 1M", "write -z -u 3M 1M")
		for _, e := range mapOf(t, s.uris[0], "") {
			if e.Offset == 1<<20 && e.Type != want {
				t.Errorf("%s: what was discarded is of type %d", mode, e.Type)
			}
		}
		qemuIOFormat(t, "raw", s.uris[0], "read -P 0 3M 1M", "read -P 1 4M 4M")
		s.end()
	}
}

// TestServeRefuses what cannot be served, before it opens anything.
func TestServeRefuses(t *testing.T) {
	t.Chdir(t.TempDir())
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	tool(t, "qemu-img", "create", "-q", "-f", "raw", "file", "1M")
	ln, err := net.Listen("unix", "busy")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "nothing to serve"},
		{[]string{"-b", "0.0.0.0", "a.qcow2"}, "0.0.0.0"},
		{[]string{"-b", "::", "a.qcow2"}, "loopback"},
		{[]string{"-b", "192.0.2.1", "a.qcow2"}, "ssh -L"},
		{[]string{"-b", "example.org", "a.qcow2"}, "example.org"},
		{[]string{"-p", "65536", "a.qcow2"}, "65536"},
		{[]string{"-k", "s", "-p", "1", "a.qcow2"}, "give one of them"},
		{[]string{"-k", "busy", "a.qcow2"}, "another program"},
		{[]string{"-k", "file", "a.qcow2"}, "is no socket"},
		{[]string{"-k", strings.Repeat("x", 200), "a.qcow2"}, "at most 107 bytes"},
		{[]string{"-k", "s", "--pid-file", "a.qcow2", "a.qcow2"}, "no process ID"},
		{[]string{"-k", "none/s", "a.qcow2"}, "no such file"},
		{[]string{"-k", "s", "none.qcow2"}, "none.qcow2"},
		{[]string{"-k", "s", "-f", "vmdk", "a.qcow2"}, "vmdk"},
		{[]string{"-k", "s", "-e", "257", "a.qcow2"}, "256"},
		{[]string{"-k", "s", "-x", "name", "a.qcow2", "file"}, "--export NAME=PATH"},
		{[]string{"-k", "s", "a.qcow2", "--export", "a.qcow2=file"}, "two exports"},
		{[]string{"-k", "s", "--export", "file"}, "KEY=VALUE"},
		{[]string{"-k", "s", "--export", "a=file,readonly=yes"}, "on or off"},
		{[]string{"-k", "s", "--export", "a=file,offset=1"}, "offset"},
		{[]string{"-k", "s", "--cache", "fast", "a.qcow2"}, "fast"},
		{[]string{"-k", "s", "--discard", "perhaps", "a.qcow2"}, "perhaps"},
		{[]string{"-k", "s", "-l", "none", "a.qcow2"}, "none"},
		{[]string{"-k", "s", "-D", strings.Repeat("d", 4097), "a.qcow2"}, "4096 bytes"},
	} {
		code, out, messages := calf(t, append([]string{"image", "serve"}, c.args...)...)
		if code != 1 || out != "" || !strings.Contains(messages, c.want) || strings.Count(messages, "\n") != 1 {
			t.Errorf("%q: code %d, %s%s, want %q", c.args, code, out, messages, c.want)
		}
	}
	if _, err := os.Lstat("busy"); err != nil {
		t.Error(err)
	}
	sound(t, layer{path: "a.qcow2", format: "qcow2"})
}

// TestServeFlags walks all flags in qemu-nbd's help: each is taken, with a value or
// without, or refused by its name.
func TestServeFlags(t *testing.T) {
	flags := newImageServe().Flags()
	verb := newImageServe()
	refuseFlags(verb)
	seen := 0
	for _, line := range regexp.MustCompile(`(?m)^  (?:(-[a-zA-Z]), |    )--([a-z-]+)(=?)| {2}--([a-z-]+)(=| )`).FindAllStringSubmatch(tool(t, "qemu-nbd", "--help"), -1) {
		short, name, value := line[1], line[2]+line[4], line[3]+line[5]
		if name == "trace" {
			short, value = "", "=" // as of qemu-img, where its value is optional
		}
		if name == "help" {
			continue
		}
		seen++
		flag := verb.Flags().Lookup(name)
		if flag == nil {
			t.Errorf("--%s is missing", name)
			continue
		}
		if short != "" && flag.Shorthand != short[1:] && flag.Name != "version" {
			t.Errorf("%s is not --%s", short, name)
		}
		if (flag.NoOptDefVal == "") != (value == "=" || name == "object") {
			t.Errorf("--%s: it takes a value %t", name, flag.NoOptDefVal == "")
		}
		if _, refused := flag.Value.(refusedFlag); refused == (flags.Lookup(name) != nil) {
			t.Errorf("--%s is neither taken nor refused", name)
		}
	}
	if seen < 30 {
		t.Errorf("the help of qemu-nbd has only %d flags", seen)
	}
}
