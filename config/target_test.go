package config_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/calfvm/calf/config"
)

// TestTargetsMeanWhatTheyMergeTo compares random targets with files that say what the
// merged tables say, and with what is printed of them.
func TestTargetsMeanWhatTheyMergeTo(t *testing.T) {
	seed := uint64(time.Now().UnixNano()) //nolint:gosec // G115: any number will do
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 300 {
		base := randomTables(rnd)
		var targets []map[string]any
		var want []*config.Config
		for i := range 1 + rnd.IntN(3) {
			target := randomTables(rnd)
			c := parse(t, encode(t, merged(base, target)))
			c.Target = fmt.Sprintf("target %d", i)
			want = append(want, c)
			target["name"] = c.Target
			targets = append(targets, target)
		}
		base["target"] = targets
		text := encode(t, base)
		c := parse(t, text)
		if diff := cmp.Diff(want, c.Expand(), ignoreOrigins, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("seed %d: targets (-want +got):\n%s\n%s", seed, diff, text)
		}
		for i, run := range effective(c) {
			if diff := cmp.Diff(want[i].Effective(), run, ignoreOrigins, cmpopts.EquateEmpty()); diff != "" {
				t.Fatalf("seed %d: effective (-want +got):\n%s\n%s", seed, diff, text)
			}
		}
		shown, err := c.TOML()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(effective(c), effective(parse(t, string(shown))), ignoreOrigins, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("seed %d: round trip (-want +got):\n%s\n%s", seed, diff, shown)
		}
	}
}

// randomTables returns some of the tables of a file, with some of their keys.
func randomTables(rnd *rand.Rand) map[string]any {
	maybe := func(keys map[string]any) map[string]any {
		maps.DeleteFunc(keys, func(string, any) bool { return rnd.IntN(2) == 0 })
		return keys
	}
	word := func() string {
		return string(rune('a'+rnd.IntN(26))) + []string{"", "", "{target}", "{target"}[rnd.IntN(4)]
	}
	several := func(item func() map[string]any) []map[string]any {
		tables := make([]map[string]any, rnd.IntN(3))
		for i := range tables {
			tables[i] = item()
		}
		return tables
	}
	return maybe(map[string]any{
		"vm":    maybe(map[string]any{"name": word(), "cpus": 1 + rnd.IntN(200), "memory": "64M", "timeout": "5s"}),
		"boot":  maybe(map[string]any{"kernel": word(), "initrd": "/" + word(), "cmdline": word()}),
		"vsock": maybe(map[string]any{"path": word(), "cid": 3 + rnd.IntN(9)}),
		"run": maybe(map[string]any{
			"command": []string{word(), word()}, "workdir": "/" + word(), "user": word(),
			"env": maybe(map[string]any{"A": word(), "B": word(), "C": word()}),
		}),
		"disk": several(func() map[string]any {
			disk := maybe(map[string]any{"queues": 1 + rnd.IntN(64), "snapshot": rnd.IntN(2) == 0, "serial": word(), "backing_dirs": []string{word()}})
			disk["path"] = word() + ".qcow2"
			return disk
		}),
		"copy": several(func() map[string]any { return map[string]any{"from": word() + "/", "to": "/" + word() + "/"} }),
		"artifact": several(func() map[string]any {
			artifact := maybe(map[string]any{"to": word() + "/"})
			artifact["from"] = "/" + word()
			return artifact
		}),
	})
}

// merged returns base with over merged over it: tables key by key, all else whole.
func merged(base, over map[string]any) map[string]any {
	all := maps.Clone(base)
	for key, value := range over {
		table, isTable := value.(map[string]any)
		under, wasTable := all[key].(map[string]any)
		if isTable && wasTable {
			value = merged(under, table)
		}
		all[key] = value
	}
	return all
}

func encode(t *testing.T, doc map[string]any) string {
	t.Helper()
	var text bytes.Buffer
	if err := toml.NewEncoder(&text).Encode(doc); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

// TestTargetsShareNothing changes one target by flags.
func TestTargetsShareNothing(t *testing.T) {
	const text = `
run = { command = ["true"], env = { A = "1" } }
disk = [{ path = "a.qcow2", backing_dirs = ["/b"] }]
copy = [{ from = "a", to = "/a" }]
artifact = [{ from = "/a" }]
target = [{ name = "a" }, { name = "b", boot.kernel = "k" }]
`
	c, want := parse(t, text), parse(t, text).Expand()[1]
	a := c.Expand()[0]
	a.SetEnv("--env", "A", "2")
	a.Run.Command[0] = "false"
	if err := a.AddDisk("--disk", "/dir/a.qcow2,backing_dirs=/c,readonly", config.Disk{}); err != nil {
		t.Fatal(err)
	}
	a.Disks[0].BackingDirs[0], a.Copies[0].From, a.Artifacts[0].From = "x", "x", "x"
	if err := a.Set("--kernel", "boot.kernel", ""); err == nil {
		t.Error("a kernel without a name is accepted")
	}
	a.SetSnapshot("--no-snapshot", false)
	got := c.Expand()[1]
	if diff := cmp.Diff(want, got, ignoreOrigins); diff != "" {
		t.Errorf("the other target (-want +got):\n%s", diff)
	}
	if !got.Effective().Disks[0].Snapshot || a.Effective().Disks[0].Snapshot {
		t.Error("--no-snapshot of a target is not what its disk has, or is what that of another has")
	}
}

// TestTargetInPaths has the name of the target in every path of the host, and nowhere
// else.
func TestTargetInPaths(t *testing.T) {
	const text = `
vm.name = "{target}"
boot = { kernel = "k/{target}", initrd = "/{target}/{target}", cmdline = "{target}" }
run = { command = ["{target}"], workdir = "/{target}" }
vsock.path = "{target}.sock"
disk = [{ path = "{target}.qcow2", serial = "{target}", backing_dirs = ["a", "{target}"] }]
copy = [{ from = "{target}", to = "/{target}" }]
artifact = [{ from = "/{target}", to = "{target}/" }, { from = "/{target}" }]
`
	alone := parse(t, text).Effective()
	if got := alone.Boot.Kernel; got != "/dir/k/{target}" {
		t.Errorf("the kernel of no target is %s", got)
	}
	c := parse(t, text+"target = [{ name = 'x' }]\n").Expand()[0]
	want := *alone
	want.Target = "x"
	want.Boot.Kernel, want.Boot.Initrd, want.Vsock.Path = "/dir/k/x", "/x/x", "/dir/x.sock"
	want.Disks[0].Path, want.Disks[0].BackingDirs = "/dir/x.qcow2", []string{"/dir/a", "/dir/x"}
	want.Copies[0].From = "/dir/x"
	want.Artifacts[0].To, want.Artifacts[1].To = "/dir/x/", "/dir/x"
	if diff := cmp.Diff(&want, c.Effective(), ignoreOrigins); diff != "" {
		t.Errorf("effective (-want +got):\n%s", diff)
	}
	if c.Boot.Kernel != "/dir/k/{target}" || c.Disks[0].BackingDirs[1] != "/dir/{target}" {
		t.Error("Effective changed its receiver")
	}
}

// TestValidateChecksTargets holds messages against the places that they name.
func TestValidateChecksTargets(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		change     func(runs []*config.Config) error
		want       []string
	}{
		{name: "all well", text: "boot.kernel = 'k'\n[[target]]\nname = 'a'\n[[target]]\nname = 'b'\n"},
		{
			name: "no kernel", text: "[[target]]\nname = 'a'\n[[target]]\nname = 'b'\nboot.kernel = 'k'\n  [[target]]\n  name = 'c'\n",
			want: []string{"test.toml:1:1: no kernel is given", "test.toml:6:3: no kernel is given"},
		},
		{
			name: "one socket", text: "boot.kernel = 'k'\n[[target]]\nname = 'a'\nvsock.path = 's'\n[[target]]\nname = 'b'\n[[target]]\nname = 'c'\nvsock.path = '/dir/./s'\n",
			want: []string{"test.toml:9:14: vsock.path is that of another target too"},
		},
		{
			name: "one socket above", text: "boot.kernel = 'k'\nvsock.path = 's'\n[[target]]\nname = 'a'\n[[target]]\nname = 'b'\n[[target]]\nname = 'c'\n",
			want: []string{"test.toml:2:14: vsock.path is that of another target too"},
		},
		{
			name: "one socket of a flag", text: "boot.kernel = 'k'\n[[target]]\nname = 'a'\n[[target]]\nname = 'b'\n",
			change: func(runs []*config.Config) error {
				for _, c := range runs {
					if err := c.Set("--vsock", "vsock.path", "s"); err != nil {
						return err
					}
				}
				return nil
			},
			want: []string{"--vsock is that of another target too"},
		},
		{
			name: "one artifact", text: "boot.kernel = 'k'\nrun.command = ['x']\nartifact = [{ from = '/a', to = 'out' }]\n[[target]]\nname = 'a'\n[[target]]\nname = 'b'\n" +
				"[[target]]\nname = 'c'\nartifact = [{ from = '/out' }, { from = '/b/out', to = './' }]\n",
			want: []string{"test.toml:3:33: artifact.to is that of another target too", "test.toml:10:13: artifact.to is that of another", "test.toml:10:56: artifact.to is that of another"},
		},
		{
			name: "each its own", text: "boot.kernel = 'k'\nrun.command = ['x']\nvsock.path = '{target}'\nartifact = [{ from = '/a', to = 'out/{target}/' }, { from = '/a', to = 'out/{target}/a' }]\n[[target]]\nname = 'a'\n[[target]]\nname = 'b'\n",
		},
		{
			name: "no command", text: "boot.kernel = 'k'\n[run]\nuser = 'u'\n[[target]]\nname = 'a'\n[[target]]\nname = 'b'\n[[target.copy]]\nfrom = '/a'\nto = '/a'\n[[target]]\nname = 'c'\nrun.command = ['x']\n",
			want: []string{"test.toml:3:8: run.user is for a command in the guest", "test.toml:8:1: copy is for a command in the guest"},
		},
		{
			name: "a flag of one", text: "disk = [{ path = 'a.qcow2' }]\n[[target]]\nname = 'a'\n[[target]]\nname = 'b'\n",
			change: func(runs []*config.Config) error { return runs[1].AddDisk("--disk", "b.img", config.Disk{}) },
			want:   []string{"--disk b.img: format is missing"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := parse(t, tt.text)
			if tt.change != nil {
				if err := tt.change(c.Expand()); err != nil {
					t.Fatal(err)
				}
			}
			says(t, c.Validate(), tt.want...)
		})
	}
}

// TestSelect leaves some of the targets.
func TestSelect(t *testing.T) {
	const text = "boot.kernel = 'k'\nvsock.path = 's'\n[[target]]\nname = '6.12'\n[[target]]\nname = '6.1'\n[[target]]\nname = 'old'\n"
	for _, tt := range []struct {
		names, want []string
		says        string
	}{
		{[]string{"old"}, []string{"old"}, ""},
		{[]string{"old", "6.12", "old"}, []string{"6.12", "old"}, ""},
		{[]string{"old", "6.13"}, nil, `--target 6.13: there is no such target: did you mean "6.12"? (there are: 6.12, 6.1 and old)`},
		{[]string{"x"}, nil, "--target x: there is no such target (there are: 6.12, 6.1 and old)"},
	} {
		c := parse(t, text)
		err := c.Select("--target", tt.names...)
		if tt.says != "" {
			says(t, err, tt.says)
			continue
		}
		var got []string
		for _, c := range c.Expand() {
			got = append(got, c.Target)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" || err != nil {
			t.Errorf("%v leaves %v, %v; want %v", tt.names, got, err, tt.want)
		}
		if err := c.Validate(); (err == nil) != (len(got) == 1) {
			t.Errorf("%v: %v", tt.names, err) // only those that are left can be in each other's way
		}
	}
	says(t, parse(t, "boot.kernel = 'k'\n").Select("--target", "a"), "--target a: there are no targets to choose from")
}

// TestNothingIsForNoCommand checks that what is said for a command is refused without
// one.
func TestNothingIsForNoCommand(t *testing.T) {
	const in = " is for a command in the guest: add -- COMMAND, or set command in [run]"
	c := parse(t, "boot.kernel = 'k'\n[run]\nenv.A = '1'\nworkdir = ''\n[[copy]]\nfrom = 'a'\nto = '/a'\n[[copy]]\nfrom = 'b'\nto = '/b'\n[[artifact]]\nfrom = '/a'\n")
	says(t, c.Validate(), "test.toml:3:1: run.env"+in, "test.toml:4:11: run.workdir"+in, "test.toml:5:1: copy"+in, "test.toml:11:1: artifact"+in)
	c.Run.Command = []string{"true"}
	says(t, c.Validate())
	c = parse(t, "boot.kernel = 'k'\n")
	c.SetEnv("--env", "A", "1")
	c.AddCopy("--copy", "a", "/a")
	c.AddArtifact("--artifact", "/a", "")
	if err := c.Set("--user", "run.user", "u"); err != nil {
		t.Fatal(err)
	}
	says(t, c.Validate(), "--artifact /a"+in, "--copy a"+in, "--env"+in, "--user"+in)
	c.Run.Command = []string{"true"}
	says(t, c.Validate())
}

// says fails unless err has a line for each of want, and begins each with it.
func says(t *testing.T, err error, want ...string) {
	t.Helper()
	var lines []string
	if err != nil {
		lines = strings.Split(err.Error(), "\n")
	}
	if len(lines) != len(want) {
		t.Fatalf("it says %q, want %q", lines, want)
	}
	for i := range want {
		if !strings.HasPrefix(lines[i], want[i]) {
			t.Errorf("it says %q, want %q", lines[i], want[i])
		}
	}
}
