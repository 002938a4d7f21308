package pid1

import (
	"slices"
	"strings"
	"testing"

	"github.com/calfvm/calf/guest/agent/internal/wire"
)

func TestParseArgs(t *testing.T) {
	for line, want := range map[string]args{
		"":                             {},
		"console=ttyS0 quiet\n":        {},
		"root=/dev/sda1 rootflags=a,b": {device: "/dev/sda1", flags: "a,b"},
		"root=UUID=x rootfstype=xfs calf.root=/dev/vda2 calf.rootfstype=ext4": {device: "/dev/vda2", kind: "ext4"},
		"calf.root=/dev/vda2 root=UUID=x":                                     {device: "/dev/vda2"},
		"root=a root=PARTUUID=b=c":                                            {device: "PARTUUID=b=c"},
		"calf.ro root=/dev/vda":                                               {device: "/dev/vda", readOnly: true},
		"xroot=/dev/vda calf.root":                                            {},
	} {
		if got := parseArgs(line); got != want {
			t.Errorf("%q gives %+v, want %+v", line, got, want)
		}
	}
}

func TestEnvironment(t *testing.T) {
	who := &identity{name: "me", home: "/home/me", shell: "/bin/sh"}
	env := environment(who, &wire.Start{Env: []string{"PATH=/opt", "X=a=b", "X=c", "EMPTY="}})
	for name, want := range map[string]string{"PATH": "/opt", "HOME": "/home/me", "USER": "me", "LOGNAME": "me", "X": "c", "EMPTY": ""} {
		if got := valueOf(env, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	names := map[string]bool{}
	for _, v := range env {
		name, _, _ := strings.Cut(v, "=")
		if names[name] {
			t.Errorf("%s is set twice in %q", name, env)
		}
		names[name] = true
	}
	if names["TERM"] || !slices.Contains(environment(who, &wire.Start{Terminal: &wire.Size{}}), "TERM=xterm") {
		t.Error("TERM is set without a terminal, or not with one")
	}
}

func TestLookUp(t *testing.T) {
	for spec, want := range map[string][2]uint32{
		"": {0, 0}, "root": {0, 0}, "0": {0, 0}, "54321": {54321, 54321}, "54321:7": {54321, 7}, "root:12345": {0, 12345},
	} {
		who, err := lookUp(spec)
		if err != nil {
			t.Errorf("%q: %v", spec, err)
			continue
		}
		if got := [2]uint32{who.credential.Uid, who.credential.Gid}; got != want {
			t.Errorf("%q is %v, want %v", spec, got, want)
		}
	}
	for _, spec := range []string{"no such user", "root:no such group", "-1", "99999999999"} {
		if who, err := lookUp(spec); err == nil {
			t.Errorf("%q is %+v", spec, who)
		}
	}
}
