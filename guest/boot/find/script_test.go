package find

import (
	"strings"
	"testing"
	"time"
)

// shell returns what runs a script in a test, on one volume with its files.
func shell(files tree) *grubShell {
	return &grubShell{
		parts: []*volume{files.volume(1, debianUUID)}, steps: maxSteps,
		functions: make(map[string][]*statement), menu: &menu{},
		env: map[string]string{"root": "hd0,gpt1", "prefix": "(hd0,gpt1)/boot/grub"},
	}
}

// TestScript runs scripts and looks at the variable out.
func TestScript(t *testing.T) {
	files := tree{"dir/file": "set out=sourced", "boot/grub/grubenv": "# GRUB\nout=loaded\nother=x=y\n####", "dir/env": "out=elsewhere\n"}
	for script, want := range map[string]string{
		`set out=a`:                            "a",
		`out=a`:                                "a",
		"set out='a b'; set out2=c":            "a b",
		`set out="a\"b\$c\d"`:                  `a"b$c\d`,
		`set out=a\ b`:                         "a b",
		"set out=a\\\nb":                       "a",
		"set out=a # comment\n# set out=b":     "a",
		`set x=1; set out=${x}2$x`:             "121",
		`set x=1; set out='$x'"$x"`:            "$x1",
		`set x="a b"; set out=$x`:              "a",
		`set x="a b"; set out="$x"`:            "a b",
		`set out=$none`:                        "",
		`set out=a; unset out`:                 "",
		`set out=$`:                            "$",
		`if true; then out=a; else out=b; fi`:  "a",
		`if false; then out=a; else out=b; fi`: "b",
		"if false\nthen\nout=a\nelif true\nthen\nout=c\nelse\nout=b\nfi":  "c",
		`if [ a = a ]; then if [ a = b ]; then out=1; else out=2; fi; fi`: "2",
		`if [ "$none" ]; then out=a; else out=b; fi`:                      "b",
		`if [ x$none = x ]; then out=a; fi`:                               "a",
		`if ! false; then out=a; fi`:                                      "a",
		`if [ ! a = b ]; then out=a; fi`:                                  "a",
		`if [ -z "$none" -a a != b ]; then out=a; fi`:                     "a",
		`if [ a = b -o c = c ]; then out=a; fi`:                           "a",
		`if [ a = b -o c = c -a d = e ]; then out=a; else out=b; fi`:      "b",
		`if [ 10 -gt 9 ]; then out=a; fi`:                                 "a",
		`if [ x -gt 9 ]; then out=a; else out=b; fi`:                      "b",
		`if [ -n ]; then out=a; fi`:                                       "a",
		`if [ -f /dir/file -a -e (hd0,gpt1)/dir ]; then out=a; fi`:        "a",
		`if [ -f /nothing ]; then out=a; else out=b; fi`:                  "b",
		`if test -s ($root)/dir/file; then out=a; fi`:                     "a",
		`for i in a b "c d"; do out="$out.$i"; done`:                      ".a.b.c d",
		`x=1; while [ $x != 1111 ]; do x=1$x; out=$x; done`:               "1111",
		`x=1; until [ $x = 111 ]; do x=1$x; done; out=$x`:                 "111",
		`function f { out="$1-$2-$3"; }; f a "b c"`:                       "a-b c-",
		"function f {\n out=x\n}\nf":                                      "x",
		`source /dir/file`:                                                "sourced",
		`if source /none; then out=a; else out=b; fi`:                     "b",
		`load_env`:                     "loaded",
		`load_env -f /dir/env`:         "elsewhere",
		`load_env --file /dir/env out`: "elsewhere",
		`search --no-floppy --fs-uuid --set=out --hint-bios=hd0,gpt7 --hint hd1 ` + debianUUID: "hd0,gpt1",
		`search.fs_uuid ` + strings.ToUpper(debianUUID) + ` out hd0`:                           "hd0,gpt1",
		`search --set=out --file /dir/file`:                                                    "hd0,gpt1",
		`if search --fs-uuid --set=root none; then out=a; else out=$root; fi`:                  "hd0,gpt1",
		`insmod x; unknown; out=a`:                                                             "a",
		`menuentry 'a } b' --class x { out=b; }`:                                               "",
		`if keystatus --shift; then out=a; else out=b; fi`:                                     "b",
	} {
		list, err := parse(script)
		if err != nil {
			t.Errorf("%s: %v", script, err)
			continue
		}
		g := shell(files)
		if _, err := g.run(list); err != nil || g.env["out"] != want {
			t.Errorf("%s: %q, %v; want %q", script, g.env["out"], err, want)
		}
	}
}

// TestEntries starts entries whose arguments and functions matter.
func TestEntries(t *testing.T) {
	for script, want := range map[string]string{
		"menuentry a { linux /v $1; }":                                                      "a",
		"menuentry --class x 'a b' --users '' c d { linux /v $1 $2 $3 $4; }":                "a b c d",
		"for i in a b; do menuentry $i $i.x { linux /v $2; }; done; default=b":              "b.x",
		"function f { linux /v $1; }; menuentry a { f b; }":                                 "b",
		"menuentry a --id=x { linux /v x; }\nmenuentry b --id y { linux /v y; }\ndefault=y": "y",
		"x=1; submenu a { x=2; menuentry b { linux /v $x; }; }":                             "2",
		"x=1; menuentry a { x=2; linux /v $x; x=3; }":                                       "2",
		"menuentry a { linux /none; }":                                                      "",
	} {
		g := shell(tree{"boot/grub/grub.cfg": script, "v": ""})
		err := g.source("/boot/grub/grub.cfg")
		var e *entry
		if err == nil {
			e, err = g.choose()
		}
		if (err == nil) != (want != "") || err == nil && strings.Join(e.args, " ") != want {
			t.Errorf("%s: %+v, %v; want %q", script, e, err, want)
		}
	}
}

func TestSyntax(t *testing.T) {
	for _, script := range []string{
		"if true; then", "if true", "if true; fi", "menuentry a {", "}", "set a='b", `set a="b`, `set a="b\`, "while true; do", "for x in a b",
		"if true; then a; else b; elif c; then d; fi", "{ a; }", strings.Repeat("if true; then ", 60), "menuentry a { if true; then }",
	} {
		if list, err := parse(script); err == nil {
			t.Errorf("%q is taken: %d statements", script, len(list))
		}
	}
}

// TestEndless: scripts that would run for ever, or take all memory, end with an
// error or in time.
func TestEndless(t *testing.T) {
	for name, script := range map[string]string{
		"while": "while true; do x=1; done", "until": "until false; do true; done", "empty": "while true; do\ndone",
		"function": "function f { f; f; }; f", "source": strings.Repeat("source /file; ", 1000),
		"doubling": "x=xxxxxxxxxx; while true; do x=$x$x$x; y=\"$x $x\"; echo $y $y $y $y; done",
		"entries":  "while true; do menuentry a { true; }; done", "menus": "while true; do submenu a { submenu b { menuentry c { true; }; }; }; done",
		"variables": "x=x; while true; do set a$x=b; x=x$x; done",
	} {
		t.Run(name, func(t *testing.T) {
			g := shell(tree{"file": strings.Repeat("source /file; ", 1000)})
			list, err := parse(script)
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			_, err = g.run(list)
			if err == nil && name != "source" {
				t.Error("it ends without an error")
			}
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("it took %v", took)
			}
			for name, value := range g.env {
				if len(value) > maxValue {
					t.Errorf("%s is %d bytes long", name, len(value))
				}
			}
			if len(g.env) > maxEntries || len(g.menu.items) > maxEntries {
				t.Errorf("%d variables, %d entries", len(g.env), len(g.menu.items))
			}
		})
	}
}

// FuzzScript runs anything: no panic, and an end.
func FuzzScript(f *testing.F) {
	for _, name := range []string{"debian.cfg", "ubuntu.cfg", "fedora.cfg"} {
		f.Add(testdata(f, name))
	}
	f.Add("submenu a { menuentry b { linux /v $x; initrd /v; }; }; default=0\\>1; function f { source /f; }; f")
	f.Add("for i in a b; do while [ $i = c ]; do x=\"$i\"; done; done; blscfg; load_env -f /f")
	f.Fuzz(func(t *testing.T, script string) {
		g := shell(tree{"f": script, "v": "", "loader/entries/a.conf": "linux /v\noptions " + script})
		g.steps = 2000
		if g.source("/f") != nil {
			return
		}
		if e, err := g.choose(); err == nil && e.kernel == nil {
			t.Error("an entry without a kernel")
		}
	})
}
