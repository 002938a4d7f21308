package config

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/BurntSushi/toml"

	"github.com/calfvm/calf/config/internal/tomlpos"
)

// Parse reads a file that has been read into data. name is what messages call
// it; relative paths in it start from dir. An error is of type Errors and holds
// everything that is wrong; there is no Config then.
func Parse(name, dir string, data []byte) (*Config, error) {
	const mark = "\ufeff" // of byte order; the TOML library drops one as well
	src := strings.TrimPrefix(string(data), mark)
	d := &decoder{name: name, src: src, dir: dir, cfg: &Config{dir: dir, origins: map[string]origin{}}}
	d.cfg.origins[""] = origin{file: name, line: 1, column: 1}
	if off := invalidUTF8(src); off >= 0 {
		return nil, Errors{d.at(off).errorf("the file is not UTF-8")}
	}
	if strings.HasPrefix(src, mark) {
		return nil, Errors{d.at(0).errorf("the file begins with two byte order marks")}
	}
	var doc map[string]any
	if _, err := toml.Decode(src, &doc); err != nil {
		return nil, Errors{d.syntaxError(err)}
	}
	index, err := tomlpos.Index(src)
	if err != nil {
		return nil, Errors{d.syntaxError(err)}
	}
	targets, isSet := doc["target"]
	delete(doc, "target")
	d.table(reflect.ValueOf(d.cfg).Elem(), fieldsOf(reflect.TypeFor[Config](), ""), "", "", doc, index)
	if isSet {
		d.targets(targets, index.Fields["target"])
	}
	errs := append(d.errs, d.cfg.checkTogether()...)
	for _, t := range d.cfg.targets {
		errs = append(errs, t.checkTogether()...)
	}
	if err := append(errs, d.cfg.checkNames()...).sorted(); err != nil {
		return nil, err
	}
	return d.cfg, nil
}

// invalidUTF8 returns the offset of the first byte that is not part of a
// character, or -1.
func invalidUTF8(s string) int {
	for i, r := range s {
		if r == utf8.RuneError {
			if _, size := utf8.DecodeRuneInString(s[i:]); size == 1 {
				return i
			}
		}
	}
	return -1
}

// decoder moves a decoded document into a Config and collects what is wrong.
type decoder struct {
	name, src, dir string
	cfg            *Config
	errs           Errors
}

// at is the place of a byte of the file.
func (d *decoder) at(offset int) origin {
	before := d.src[:min(max(offset, 0), len(d.src))]
	line := before[strings.LastIndexByte(before, '\n')+1:]
	return origin{
		file:   d.name,
		line:   strings.Count(before, "\n") + 1,
		column: utf8.RuneCountInString(line) + 1,
	}
}

func (d *decoder) fail(offset int, format string, args ...any) {
	d.errs = append(d.errs, d.at(offset).errorf(format, args...))
}

// syntaxError places an error of the TOML library or of the index.
func (d *decoder) syntaxError(err error) *Error {
	var parse toml.ParseError
	var index *tomlpos.Error
	switch {
	case errors.As(err, &parse):
		return d.at(parse.Position.Start).errorf("%s", parse.Message)
	case errors.As(err, &index):
		return d.at(index.Offset).errorf("%s", index.Message)
	}
	return d.at(0).errorf("%v", err)
}

// targets merges each of the tables in value over what has been decoded of the rest
// of the file.
func (d *decoder) targets(value any, at *tomlpos.Node) {
	base := d.cfg
	var targets []*Config
	for i, table := range d.tables("target", "target", value, at) {
		d.cfg = base.clone()
		d.cfg.origins[""] = d.at(at.Items[i].Value)
		d.table(reflect.ValueOf(d.cfg).Elem(), targetFields(), "target", "", table, at.Items[i])
		targets = append(targets, d.cfg)
	}
	base.targets, d.cfg = targets, base
}

// tables returns value as the tables of an array, or reports that it is none. name is
// that of the array, and inFile what its tables are begun with.
func (d *decoder) tables(name, inFile string, value any, at *tomlpos.Node) []map[string]any {
	tables, ok := tablesOf(value)
	if !ok {
		d.fail(at.Value, "%s must be an array of tables, each begun with %s, not %s", name, header(inFile), describe(value))
		return nil
	}
	return tables
}

// table moves data, which stands at node, into the struct dst, which has the given
// fields. name is the name of the table as the file has it, and path as the origins
// do.
func (d *decoder) table(dst reflect.Value, fields []field, name, path string, data map[string]any, node *tomlpos.Node) {
	for key, value := range data {
		at := node.Fields[key]
		i := slices.IndexFunc(fields, func(f field) bool { return f.key == key })
		if i < 0 {
			d.fail(at.Key, "%s", unknownKey(name, key, keysOf(fields)))
			continue
		}
		f := fields[i]
		d.field(dst.Field(f.index), f, join(name, key), join(path, key), value, at)
	}
}

// field moves the value of f into dst. It replaces what is there, but a table merges
// over that. name is what a table of that name is begun with, and path as in table.
func (d *decoder) field(dst reflect.Value, f field, name, path string, value any, at *tomlpos.Node) {
	switch {
	case dst.Kind() == reflect.Struct:
		table, ok := value.(map[string]any)
		if !ok {
			d.fail(at.Value, "%s must be a table, begun with %s, not %s", f.name, header(name), describe(value))
			return
		}
		d.cfg.origins[path] = d.at(at.Value)
		d.table(dst, fieldsOf(dst.Type(), f.name), name, path, table, at)
	case isTables(dst.Type()):
		tables := d.tables(f.name, name, value, at)
		dst.Set(reflect.MakeSlice(dst.Type(), len(tables), len(tables)))
		maps.DeleteFunc(d.cfg.origins, func(p string, _ origin) bool { return strings.HasPrefix(p, path+"[") })
		for i, table := range tables {
			item := itemPath(path, i)
			d.cfg.origins[item] = d.at(at.Items[i].Value)
			d.table(dst.Index(i), fieldsOf(dst.Type().Elem(), f.name), name, item, table, at.Items[i])
		}
	default:
		if !assign(dst, f.rule, d.dir, value) {
			d.refuse(dst.Type(), f, value, at)
		}
		// A refused value has a place too, by which it is known not to be
		// missing.
		d.cfg.origins[path] = d.at(at.Value)
	}
}

// refuse reports a value that assign did not take: what is at fault in an array or a
// table, else the whole.
func (d *decoder) refuse(t reflect.Type, f field, value any, at *tomlpos.Node) {
	if table, ok := value.(map[string]any); ok && t.Kind() == reflect.Map {
		d.refuseEntries(t, f, table, at)
		return
	}
	items, _ := value.([]any)
	for i, item := range items {
		elem := reflect.New(reflect.TypeFor[string]()).Elem()
		if t.Kind() == reflect.Slice && !assign(elem, f.rule, d.dir, item) {
			d.fail(at.Items[i].Value, "each of %s %s", f.name, f.rule.refusal(elem.Type(), item))
			return
		}
	}
	d.fail(at.Value, "%s %s", f.name, f.rule.refusal(t, value))
}

// refuseEntries reports the entries of a table of strings that assign did not take.
func (d *decoder) refuseEntries(t reflect.Type, f field, table map[string]any, at *tomlpos.Node) {
	for name, value := range table {
		entry := at.Fields[name]
		switch {
		case !f.rule.allows(map[string]string{name: ""}):
			d.fail(entry.Key, "%s cannot have %q: the name of a variable is not empty and has neither equals signs nor null characters", f.name, name)
		case !assign(reflect.New(t).Elem(), f.rule, d.dir, map[string]any{name: value}):
			d.fail(entry.Value, "%q of %s must be a string without null characters, not %s", name, f.name, describe(value))
		}
	}
}

// tablesOf returns value as an array of tables, if it is one.
func tablesOf(value any) ([]map[string]any, bool) {
	if tables, ok := value.([]map[string]any); ok {
		return tables, true
	}
	items, ok := value.([]any)
	tables := make([]map[string]any, len(items))
	for i := range items {
		table, isTable := items[i].(map[string]any)
		tables[i], ok = table, ok && isTable
	}
	return tables, ok
}

// assign stores value, as the TOML library decodes it, into dst, if it is of
// the right type and keeps the rule; a table is added to the one in dst. It reports
// whether it did.
func assign(dst reflect.Value, r rule, dir string, value any) bool {
	converted, ok := convert(dst.Type(), value)
	if !ok || !r.allows(converted) {
		return false
	}
	if r.path {
		converted = r.resolve(dir, converted)
	}
	if table, ok := reflect.TypeAssert[map[string]string](dst); ok && table != nil {
		maps.Copy(table, converted.(map[string]string))
		return true
	}
	dst.Set(reflect.ValueOf(converted))
	return true
}

// convert returns value as a value of type t.
func convert(t reflect.Type, value any) (any, bool) {
	switch t {
	case reflect.TypeFor[bool]():
		v, ok := value.(bool)
		return v, ok
	case reflect.TypeFor[*bool]():
		v, ok := value.(bool)
		return &v, ok
	case reflect.TypeFor[string]():
		v, ok := value.(string)
		return v, ok
	case reflect.TypeFor[int]():
		v, ok := value.(int64)
		return int(v), ok && int64(int(v)) == v
	case reflect.TypeFor[Size]():
		if v, ok := value.(int64); ok {
			return Size(v), v >= 0 //nolint:gosec // G115: refused where it is negative
		}
		s, ok := value.(string)
		v, err := ParseSize(s)
		return v, ok && err == nil
	case reflect.TypeFor[time.Duration]():
		s, ok := value.(string)
		v, err := time.ParseDuration(s)
		return v, ok && err == nil
	case reflect.TypeFor[[]string]():
		items, ok := value.([]any)
		v := make([]string, len(items))
		for i := range items {
			s, isString := items[i].(string)
			v[i], ok = s, ok && isString
		}
		return v, ok
	case reflect.TypeFor[map[string]string]():
		table, ok := value.(map[string]any)
		v := make(map[string]string, len(table))
		for name := range table {
			s, isString := table[name].(string)
			v[name], ok = s, ok && isString
		}
		return v, ok
	}
	panic(fmt.Sprintf("BUG: config: no conversion to %v", t))
}

// resolve makes the path or paths in v, which begin in dir, absolute.
func (r rule) resolve(dir string, v any) any {
	switch v := v.(type) {
	case string:
		clean := filepath.Join(dir, v)
		if filepath.IsAbs(v) {
			clean = filepath.Clean(v)
		}
		if r.slash && strings.HasSuffix(v, "/") && clean != "/" {
			clean += "/"
		}
		return clean
	case []string:
		paths := make([]string, len(v))
		for i := range v {
			paths[i] = r.resolve(dir, v[i]).(string)
		}
		return paths
	}
	panic(fmt.Sprintf("BUG: config: a path of type %T", v))
}

// unknownKey is the message for a key that a table does not have. keys are
// those that it has.
func unknownKey(table, key string, keys []string) string {
	in := ""
	if table != "" {
		in = " in " + header(table)
	}
	msg := fmt.Sprintf("unknown key %q%s", key, in)
	if word := nearest(key, keys); word != "" {
		msg += fmt.Sprintf(": did you mean %q?", word)
	} else if home := homeOf(key); home != "" {
		if table == "target" || strings.HasPrefix(table, "target.") {
			home = join("target", home)
		}
		msg += ": it belongs in " + header(home)
	}
	return msg + fmt.Sprintf(" (accepted here: %s)", strings.Join(keys, ", "))
}

// header is the line that begins a table of a file.
func header(table string) string {
	if isArray(table) {
		return "[[" + table + "]]"
	}
	return "[" + table + "]"
}

// isArray reports whether there can be several of a table.
func isArray(table string) bool {
	top := reflect.TypeFor[Config]()
	return slices.ContainsFunc(fieldsOf(top, ""), func(f field) bool {
		return f.name == strings.TrimPrefix(table, "target.") && top.Field(f.index).Type.Kind() == reflect.Slice
	})
}

// homeOf returns the table that has the given key, or "".
func homeOf(key string) string {
	for _, table := range fieldsOf(reflect.TypeFor[Config](), "") {
		if _, ok := rules[join(table.name, key)]; ok {
			return table.name
		}
	}
	return ""
}
