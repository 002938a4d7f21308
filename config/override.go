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
// optional file. Paths are relative to the working directory. The error names the flag; a key that is not one of [vm], [boot], [vsock] or [run] is a
// mistake of the caller and panics.
func (c *Config) Set(flag, key, value string) error {
	table, name, _ := strings.Cut(key, ".")
	var dst reflect.Value
	switch table {
	case "vm":
		dst = reflect.ValueOf(&c.VM).Elem()
	case "boot":
		dst = reflect.ValueOf(&c.Boot).Elem()
	case "run":
		dst = reflect.ValueOf(&c.Run).Elem()
	case "vsock":
		dst = reflect.ValueOf(&c.Vsock).Elem()
	default:
		panic("BUG: config: no table for key " + key)
	}
	fields := fieldsOf(dst.Type(), table+".")
	i := slices.IndexFunc(fields, func(f field) bool { return f.key == name })
	if i < 0 {
		panic("BUG: config: no key " + key)
	}
	f := fields[i]
	if value == "" && f.rule.optional {
		dst.Field(f.index).SetZero()
	} else if msg := setText(dst.Field(f.index), f.rule, value); msg != "" {
		return Errors{origin{}.errorf("%s %s", flag, msg)}
	}
	c.setOrigin(key, origin{flag: flag})
	return nil
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
		c.setOrigin(diskPath(i)+key, from)
	}
	return nil
}

// setKeys applies "key=value" settings to disk. It returns the keys that were
// given, each after a dot.
func setKeys(disk *Disk, from origin, settings []string) (given []string, errs Errors) {
	dst := reflect.ValueOf(disk).Elem()
	fields := fieldsOf(dst.Type(), "disk.")
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
