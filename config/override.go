package config

import (
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// Set gives the key, such as "vm.cpus", the value that a flag holds, in place
// of what the file says; an empty one takes back what the file says of an
// optional file. Paths are relative to the working directory. The error names the
// flag; a key that is not one of [vm], [boot], [vsock] or [run] is a mistake of the
// caller and panics.
func (c *Config) Set(flag, key, value string) error {
	for _, t := range c.tables() {
		for _, f := range fieldsOf(t.value.Type(), t.name) {
			if f.name != key || t.path != t.name {
				continue
			}
			dst := t.value.Field(f.index)
			if value == "" && f.rule.optional {
				dst.SetZero()
			} else if msg := setText(dst, f.rule, value); msg != "" {
				return Errors{origin{}.errorf("%s %s", flag, msg)}
			}
			c.setOrigin(key, origin{flag: flag})
			return nil
		}
	}
	panic("BUG: config: no key " + key)
}

// SetEnv sets a variable for the command, which flag gives, beside those of the file.
func (c *Config) SetEnv(flag, name, value string) {
	if c.Run.Env == nil {
		c.Run.Env = map[string]string{}
	}
	c.Run.Env[name] = value
	c.setOrigin("run.env", origin{flag: flag})
}

// AddCopy adds a copy that flag gives. from is relative to the working directory.
func (c *Config) AddCopy(flag, from, to string) {
	c.setOrigin(itemPath("copy", len(c.Copies)), origin{flag: flag + " " + from})
	c.Copies = append(c.Copies, Copy{From: fromHere(from), To: to})
}

// AddArtifact adds an artifact that flag gives. to is relative to the working
// directory, and where it goes under its last name if to is empty.
func (c *Config) AddArtifact(flag, from, to string) {
	c.setOrigin(itemPath("artifact", len(c.Artifacts)), origin{flag: flag + " " + from})
	if to = orDefault(to, lastName(from)); to != "" {
		to = rules["artifact.to"].resolve(fromHere("."), to).(string)
	}
	c.Artifacts = append(c.Artifacts, Artifact{From: from, To: to})
}

// AddDisk adds a disk that a flag describes: a path, then keys of [[disk]] with
// their values, as in "data.img,format=raw,readonly". A comma in a value is
// written twice, a key without a value means true, and backing_dirs may be
// given more than once. If there is a disk with the same path already, the keys
// change that one. A new one starts as base. The error names the flag.
func (c *Config) AddDisk(flag, spec string, base Disk) error {
	parts := splitSpec(spec)
	from := origin{flag: flag + " " + parts[0]}
	if parts[0] == "" {
		return Errors{origin{}.errorf("%s %q: the path of the image is missing", flag, spec)}
	}
	path := fromHere(parts[0])
	i := slices.IndexFunc(c.Disks, func(d Disk) bool { return d.Path == path })
	isNew := i < 0
	disk := base
	if isNew {
		i = len(c.Disks)
	} else {
		disk = c.Disks[i]
	}
	disk.Path = path
	given, errs := setKeys(&disk, from, parts[1:])
	if len(errs) > 0 {
		return errs
	}
	if isNew {
		c.Disks = append(c.Disks, disk)
		given = append(given, "", ".path")
	} else {
		c.Disks[i] = disk
	}
	for _, key := range given {
		c.setOrigin(itemPath("disk", i)+key, from)
	}
	return nil
}

// SetSnapshot says of all disks, in place of the file and for flag, whether their
// writes go to throw-away overlays.
func (c *Config) SetSnapshot(flag string, on bool) {
	for i := range c.Disks {
		c.Disks[i].Snapshot = on
		c.setOrigin(itemPath("disk", i)+".snapshot", origin{flag: flag})
	}
}

// setKeys applies "key=value" settings to disk. It returns the keys that were
// given, each after a dot.
func setKeys(disk *Disk, from origin, settings []string) (given []string, errs Errors) {
	dst := reflect.ValueOf(disk).Elem()
	fields := fieldsOf(dst.Type(), "disk")
	fields = slices.DeleteFunc(fields, func(f field) bool { return f.key == "path" })
	for _, setting := range settings {
		key, value, hasValue := strings.Cut(setting, "=")
		i := slices.IndexFunc(fields, func(f field) bool { return f.key == key })
		if i < 0 {
			errs = append(errs, from.errorf("%s: %s", from.flag, unknownKey("disk", key, keysOf(fields))))
			continue
		}
		f := fields[i]
		target := dst.Field(f.index)
		again := slices.Contains(given, "."+key)
		if !hasValue && isBool(target) {
			value = "true"
		}
		var msg string
		switch {
		case target.Type() == reflect.TypeFor[[]string]():
			if !again {
				disk.BackingDirs = nil // the flag replaces what the file lists
			}
			msg = setText(target, f.rule, value)
		case again:
			msg = "is given twice"
		default:
			msg = setText(target, f.rule, value)
		}
		if msg != "" {
			errs = append(errs, from.errorf("%s: %s %s", from.flag, key, msg))
			continue
		}
		given = append(given, "."+key)
	}
	return given, errs
}

// setText stores the text of a flag into dst, to which a path is added if dst
// holds several. It returns why it could not, or "".
func setText(dst reflect.Value, r rule, text string) string {
	var value any = text
	switch {
	case dst.Kind() == reflect.Int:
		if n, err := strconv.ParseInt(text, 10, 64); err == nil {
			value = n
		}
	case isBool(dst):
		if text == "true" || text == "false" {
			value = text == "true"
		}
	case dst.Kind() == reflect.Slice:
		items := []any{text}
		for i := range dst.Len() {
			items = slices.Insert(items, i, dst.Index(i).Interface())
		}
		value = items
	}
	if r.path && !r.allows(text) {
		return r.refusal(reflect.TypeFor[string](), text)
	}
	if !assign(dst, r, fromHere("."), value) {
		return r.refusal(dst.Type(), value)
	}
	return ""
}

// isBool reports whether v is a bool, or one that may be unset.
func isBool(v reflect.Value) bool {
	return v.Kind() == reflect.Bool || v.Type() == reflect.TypeFor[*bool]()
}

// setOrigin records where a value came from.
func (c *Config) setOrigin(path string, o origin) {
	if c.origins == nil {
		c.origins = map[string]origin{}
	}
	c.origins[path] = o
}

// fromHere returns path relative to the root of the file system, so that it
// can be compared with the paths of a file. Where the working directory is
// gone, it returns path as it is.
func fromHere(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// splitSpec splits at commas; two commas in a row stand for one that is part of
// a value.
func splitSpec(spec string) []string {
	const placeholder = "\x00" // in no path
	parts := strings.Split(strings.ReplaceAll(spec, ",,", placeholder), ",")
	for i := range parts {
		parts[i] = strings.ReplaceAll(parts[i], placeholder, ",")
	}
	return parts
}
