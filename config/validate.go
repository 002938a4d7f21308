package config

import (
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
)

// Validate reports every value of c that cannot be, wherever it came from, and
// what is missing. The error is of type Errors. Call it after the flags have
// been applied.
func (c *Config) Validate() error {
	var errs Errors
	for _, t := range c.Expand() {
		errs = append(errs, t.check()...)
	}
	return append(errs, c.checkShared()...).sorted()
}

// check reports what is wrong with c, targets aside.
func (c *Config) check() Errors {
	errs := append(c.checkTogether(), c.checkCommand()...)
	for _, t := range c.tables() {
		errs = append(errs, c.checkTable(t)...)
	}
	if c.Boot.Kernel == "" && len(c.Disks) == 0 {
		errs = append(errs, c.origins[""].errorf("no kernel is given: set kernel in [boot], or use --kernel, or give a disk that has one"))
	}
	return errs
}

// checkNames reports targets without a name, and those with the name of another.
func (c *Config) checkNames() Errors {
	var errs Errors
	seen := map[string]bool{}
	for _, t := range c.targets {
		switch {
		case t.Target == "" && !t.given("name"):
			errs = append(errs, t.origins[""].errorf("target.name is missing: %s", rules["target.name"].required))
		case seen[t.Target]:
			errs = append(errs, t.origins["name"].errorf("target.name %q is that of another target too", t.Target))
		}
		seen[t.Target] = t.Target != ""
	}
	return errs
}

// checkShared reports what targets, which can run at once, would make in the same
// place.
func (c *Config) checkShared() Errors {
	var errs Errors
	taken := map[string]bool{}
	for _, t := range c.targets {
		makes := map[string]bool{}
		use := func(in table, key, path string) {
			if taken[path] {
				errs = append(errs, t.fault(in, key, "is that of another target too, and they can run at once: give each its own, such as one with %s in it", targetMark))
			}
			makes[path] = path != ""
		}
		e := t.Effective()
		use(table{name: "vsock", path: "vsock"}, "path", e.Vsock.Path)
		for i, a := range e.Artifacts {
			if strings.HasSuffix(a.To, "/") {
				a.To += lastName(a.From)
			}
			use(table{name: "artifact", path: itemPath("artifact", i)}, "to", a.To)
		}
		maps.Copy(taken, makes)
	}
	return errs
}

// table is a struct of a Config with its names.
type table struct {
	name, path string
	value      reflect.Value
}

// tables returns the tables that c is made of.
func (c *Config) tables() []table {
	var tables []table
	top := reflect.ValueOf(c).Elem()
	for _, f := range fieldsOf(top.Type(), "") {
		v := top.Field(f.index)
		if v.Kind() == reflect.Struct {
			tables = append(tables, table{f.name, f.name, v})
		}
		for i := 0; isTables(v.Type()) && i < v.Len(); i++ {
			tables = append(tables, table{f.name, itemPath(f.name, i), v.Index(i)})
		}
	}
	return tables
}

func (c *Config) diskTable(i int) table {
	return table{"disk", itemPath("disk", i), reflect.ValueOf(&c.Disks[i]).Elem()}
}

// itemPath is the path of a table of an array in Config.origins.
func itemPath(array string, i int) string { return array + "[" + strconv.Itoa(i) + "]" }

// given reports whether the file or a flag says something of path.
func (c *Config) given(path string) bool {
	_, ok := c.origins[path]
	return ok
}

// checkTable reports the values of t that break a rule. A field that is not set
// breaks none.
func (c *Config) checkTable(t table) Errors {
	var errs Errors
	for _, f := range fieldsOf(t.value.Type(), t.name) {
		v := t.value.Field(f.index)
		if v.IsZero() || f.rule.allows(v.Interface()) {
			continue
		}
		errs = append(errs, c.fault(t, f.key, "must be %s, not %v", f.rule.accepts(v.Type()), v.Interface()))
	}
	return errs
}

// checkTogether reports what is missing, and what is wrong between values that are
// right by themselves.
func (c *Config) checkTogether() Errors {
	var errs Errors
	for _, t := range c.tables() {
		for _, f := range fieldsOf(t.value.Type(), t.name) {
			// What has been given and refused has been reported already.
			if f.rule.required != "" && t.value.Field(f.index).IsZero() && !c.given(join(t.path, f.key)) {
				errs = append(errs, c.fault(t, f.key, "is missing: %s", f.rule.required))
			}
		}
		a, ok := reflect.TypeAssert[Artifact](t.value)
		if ok && a.From != "" && lastName(a.From) == "" && a.To == "" && !c.given(t.path+".to") {
			errs = append(errs, c.fault(t, "to", "is missing: %q has no last name to be called by", a.From))
		}
	}
	return append(errs, c.checkDisks()...)
}

// needsCommand is the error about what, a key or a flag, that means nothing without a
// command.
func needsCommand(what string) error {
	return fmt.Errorf("%s is for a command in the guest: add -- COMMAND, or set command in [run]", what)
}

// checkCommand reports what is said for a command where there is none.
func (c *Config) checkCommand() Errors {
	if len(c.Run.Command) > 0 {
		return nil
	}
	var errs Errors
	taken, isTaken := c.origins["run.command"] // by an empty array, which may be that of a target
	fail := func(o origin, name string) {
		if isTaken && o.flag == "" {
			errs = append(errs, taken.errorf("run.command is empty, but %s is for a command in the guest: remove it, or name a command", name))
			return
		}
		errs = append(errs, o.errorf("%v", needsCommand(orDefault(o.flag, name))))
	}
	for _, t := range c.tables() {
		switch t.path {
		case "run":
			for _, f := range fieldsOf(t.value.Type(), t.name) {
				if f.key != "command" && (c.given(f.name) || !t.value.Field(f.index).IsZero()) {
					fail(c.place(t, f.key), f.name)
				}
			}
		case itemPath("copy", 0), itemPath("artifact", 0):
			fail(c.origins[t.path], t.name)
		}
	}
	return errs
}

// checkDisks reports what is wrong with disks.
func (c *Config) checkDisks() Errors {
	var errs Errors
	if len(c.Disks) > maxDisks {
		o := c.place(c.diskTable(maxDisks), "path")
		subject := ""
		if o.flag != "" {
			subject = o.flag + ": "
		}
		errs = append(errs, o.errorf("%sone disk too many: a guest has at most %d", subject, maxDisks))
	}
	for i, d := range c.Disks {
		t := c.diskTable(i)
		fail := func(key, format string, args ...any) {
			errs = append(errs, c.fault(t, key, format, args...))
		}
		format := orDefault(d.Format, formatOf(d.Path))
		switch {
		case d.Path == "", format == "" && c.given(t.path+".format"):
			// It has been refused already.
		case format == "":
			fail("format", "is missing: %q does not end in .qcow2, and the format is never guessed from content: set format to %q or %q",
				filepath.Base(d.Path), FormatRaw, FormatQCOW2)
		case format == FormatRaw && len(d.BackingDirs) > 0:
			fail("backing_dirs", "means nothing for format %q, which has no backing files: remove it", FormatRaw)
		case format == FormatRaw && d.DataFile != "":
			fail("data_file", "means nothing for format %q, which names no other file: remove it", FormatRaw)
		case format == FormatRaw && d.L2Cache > 0:
			fail("l2_cache", "means nothing for format %q, which has no tables: remove it", FormatRaw)
		}
		if d.Cache == CacheNone && c.snapshot(i) && !d.ReadOnly {
			fail("cache", "%q cannot be had with a snapshot, whose throw-away overlay lies in the page cache: use %q", CacheNone, CacheWriteback)
		}
		if d.ByteBurst > 0 && d.ByteRate == 0 {
			fail("byte_burst", "means nothing without byte_rate: set it, or remove this")
		}
		if d.OpBurst > 0 && d.OpRate == 0 {
			fail("op_burst", "means nothing without op_rate: set it, or remove this")
		}
	}
	return errs
}

// fault is an error about a key of a table.
func (c *Config) fault(t table, key, format string, args ...any) *Error {
	o := c.place(t, key)
	return o.errorf("%s "+format, append([]any{o.subject(t.name, key)}, args...)...)
}

// place is where an error about a key of a table belongs: to the value, or to the
// path of the disk, or to the table, whichever has one.
func (c *Config) place(t table, key string) origin {
	o, ok := c.origins[t.path+"."+key]
	if !ok && t.name == "disk" {
		o, ok = c.origins[t.path+".path"]
	}
	if !ok {
		o = c.origins[t.path]
	}
	return o
}
