package config

import (
	"path/filepath"
	"reflect"
	"strconv"
)

// Validate reports every value of c that cannot be, wherever it came from, and
// what is missing. The error is of type Errors. Call it after the flags have
// been applied.
func (c *Config) Validate() error {
	errs := c.checkDisks()
	for _, t := range c.tables() {
		errs = append(errs, c.checkTable(t)...)
	}
	if c.Boot.Kernel == "" && len(c.Disks) == 0 {
		errs = append(errs, c.origins[""].errorf("no kernel is given: set kernel in [boot], or use --kernel, or give a disk that has one"))
	}
	return errs.sorted()
}

// table is a struct of a Config with its names.
type table struct {
	name, path string
	value      reflect.Value
}

// tables returns the tables that c is made of.
func (c *Config) tables() []table {
	tables := []table{
		{"vm", "vm", reflect.ValueOf(&c.VM).Elem()},
		{"boot", "boot", reflect.ValueOf(&c.Boot).Elem()},
		{"run", "run", reflect.ValueOf(&c.Run).Elem()},
		{"vsock", "vsock", reflect.ValueOf(&c.Vsock).Elem()},
	}
	for i := range c.Disks {
		tables = append(tables, c.diskTable(i))
	}
	return tables
}

func (c *Config) diskTable(i int) table {
	return table{"disk", diskPath(i), reflect.ValueOf(&c.Disks[i]).Elem()}
}

// diskPath is the path of a disk in Config.origins.
func diskPath(i int) string { return "disk[" + strconv.Itoa(i) + "]" }

// checkTable reports the values of t that break a rule. A field that is not set
// breaks none.
func (c *Config) checkTable(t table) Errors {
	var errs Errors
	for _, f := range fieldsOf(t.value.Type(), t.name+".") {
		v := t.value.Field(f.index)
		if v.IsZero() || f.rule.allows(v.Interface()) {
			continue
		}
		errs = append(errs, c.fault(t, f.key, "must be %s, not %v", f.rule.accepts(v.Type()), v.Interface()))
	}
	return errs
}

// checkDisks reports what is missing from disks, and what is wrong between
// values that are right by themselves.
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
		given := func(key string) bool {
			_, ok := c.origins[t.path+"."+key]
			return ok
		}
		fail := func(key, format string, args ...any) {
			errs = append(errs, c.fault(t, key, format, args...))
		}
		format := orDefault(d.Format, formatOf(d.Path))
		switch {
		case d.Path == "" && given("path"), format == "" && given("format"):
			// It has been refused already.
		case d.Path == "":
			fail("path", "is missing: every disk needs the path of an image")
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
		if d.Cache == CacheNone && d.Snapshot && !d.ReadOnly {
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
