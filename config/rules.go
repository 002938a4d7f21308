package config

import (
	"fmt"
	"math/bits"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// rule is what is to be said of a key beyond the type of its struct field.
type rule struct {
	doc string
	// min and max bound an integer or a size, both inclusive. max alone is
	// the greatest length of a string in bytes.
	min, max uint64
	// powerOfTwo and multipleOf narrow the range further.
	powerOfTwo bool
	multipleOf uint64
	// values are the strings that are accepted, all if there are none.
	values []string
	// later are strings that the file format has and this version does not.
	later []string
	// path makes a string a file name: never empty, relative to the file. With
	// slash, one at its end has a meaning and stays.
	path, slash bool
	// guest makes a string an absolute path of the guest.
	guest bool
	// fileName makes a string one that a file can have as its name.
	fileName bool
	// required says who needs the key, in a table that lacks it.
	required string
	// optional says that an empty flag takes back what the file says.
	optional bool
	// ascii admits printable ASCII only.
	ascii bool
}

// maxGuestPath is Linux's PATH_MAX, in bytes with one that ends the path.
const maxGuestPath = 4096

// rules describes every key. A test holds it against the structs.
var rules = map[string]rule{
	"vm":              {doc: "The machine."},
	"vm.name":         {doc: "Name of the guest, for messages.", max: 64},
	"vm.cpus":         {doc: "Number of virtual CPUs. The host may allow fewer.", min: 1, max: 254},
	"vm.memory":       {doc: "Guest memory. It is taken from the host as the guest touches it.", min: 32 << 20, max: 16 << 40, multipleOf: 4096},
	"vm.timeout":      {doc: "Time after which the run is ended; 0 for none."},
	"vm.boot_timeout": {doc: "Time after which the run is ended if the guest has not come up; 0 for none."},

	"boot":         {doc: "What the guest runs first."},
	"boot.kernel":  {doc: "Linux kernel: a bzImage, or an ELF vmlinux with a PVH entry. The default is the one that a boot loader would start from the first disk, with its initial RAM disk and its root.", path: true},
	"boot.initrd":  {doc: "Initial RAM disk.", path: true, optional: true},
	"boot.cmdline": {doc: "Kernel parameters, appended to calf's own and to those of a kernel from the first disk.", max: 2047, ascii: true},

	"run":         {doc: "A command to be run in the guest, whose first disk needs nothing for it. The exit code of calf is its own then."},
	"run.command": {doc: "The command and its arguments. Its streams are calf's."},
	"run.env":     {doc: "Environment variables, beside those that a login sets."},
	"run.workdir": {doc: "Directory of the guest in which it runs. The default is /.", max: 4095},
	"run.user":    {doc: "User of the guest that runs it, by name or number, with :GROUP if need be. The default is root.", max: 255},

	"vsock":      {doc: "Stream connections between guest and host without a network."},
	"vsock.path": {doc: "Unix socket to make, on which programs open connections to the guest: they write CONNECT PORT and a newline, and read OK. The guest's own connections to PORT of the host go to the socket path_PORT. Port 1000 is the one of the agent that calf puts into guests.", path: true, optional: true},
	"vsock.cid":  {doc: "Context ID of the guest. The default is 3; guests share nothing by it.", min: 3, max: 1<<32 - 2},

	"disk":              {doc: "The disks, in order: vda, vdb and so on; at most 31."},
	"disk.path":         {doc: "The image.", path: true, required: "every disk needs the path of an image"},
	"disk.format":       {doc: "Format of the image. It may be left out if the name ends in .qcow2; it is never guessed from content.", values: []string{FormatQCOW2, FormatRaw}},
	"disk.readonly":     {doc: "Whether the guest is kept from writing."},
	"disk.snapshot":     {doc: "Whether writes go to a throw-away overlay in $TMPDIR, so that the image stays as it is. The default is that they do if there is a command."},
	"disk.queues":       {doc: "Number of request queues. The default is one per virtual CPU.", min: 1, max: maxQueues},
	"disk.queue_size":   {doc: "Descriptors per request queue.", min: 4, max: 1024, powerOfTwo: true},
	"disk.cache":        {doc: "When writes are durable: writeback, when the guest has flushed them; writethrough, when they complete; none, as writeback, but past the host's page cache (O_DIRECT); unsafe, never, so that a crash of the host may take the image with it.", values: []string{CacheWriteback, CacheWritethrough, CacheNone, CacheUnsafe}},
	"disk.engine":       {doc: "How requests reach the host.", values: []string{"auto", "sync"}, later: []string{"io_uring"}},
	"disk.discard":      {doc: "Whether the guest can give space back to the host. Without it, what the guest zeroes stays allocated too."},
	"disk.on_error":     {doc: "What to do when the host cannot carry out a request: report, answer it with an I/O error; stop, let the guest wait for this disk until calf gets SIGCONT, and then try again.", values: []string{OnErrorReport, OnErrorStop}},
	"disk.byte_rate":    {doc: "Most bytes per second that the guest may read and write, all queues together. The default is no limit.", min: 1 << 10, max: 1 << 50},
	"disk.byte_burst":   {doc: "Bytes that the guest may read and write at once after it has been idle. The default is a tenth of byte_rate.", min: 512, max: 1 << 50},
	"disk.op_rate":      {doc: "Most requests per second that the guest may make, all queues together. The default is no limit.", min: 1, max: 1 << 30},
	"disk.op_burst":     {doc: "Requests that the guest may make at once after it has been idle. The default is a tenth of op_rate.", min: 1, max: 1 << 30},
	"disk.serial":       {doc: "Serial number that the guest sees.", max: 20, ascii: true},
	"disk.backing_dirs": {doc: "Directories in which backing files may lie, besides the directory of the image that names them.", path: true},
	"disk.data_file":    {doc: "What to do with a QCOW2 image that keeps its data in another file, which it names: refuse it, or allow that if the file lies where a backing file may. Allow it for images that you trust.", values: []string{DataFileRefuse, DataFileAllow}},
	"disk.l2_cache":     {doc: "Memory for the tables of a QCOW2 image. The default suits the image.", min: 64 << 10, max: 1 << 40},

	"copy":      {doc: "Files and trees that go to the guest before the command runs, in order. A tree becomes the directory to; a file becomes the file to, or goes into it if it is a directory or ends in a slash."},
	"copy.from": {doc: "File or directory of the host.", path: true, required: "every copy needs a path of the host"},
	"copy.to":   {doc: "Where it goes in the guest. Directories above are made.", guest: true, required: "every copy needs a path of the guest"},

	"artifact":      {doc: "Files and trees that come from the guest after the command has run, also if it failed, in order."},
	"artifact.from": {doc: "File or directory of the guest.", guest: true, required: "every artifact needs a path of the guest"},
	"artifact.to":   {doc: "Where it goes on the host, as to of a copy. The default is the last name of from, in the directory of this file.", path: true, slash: true},

	"target":      {doc: "A matrix: the guests of a run, one for each. What a target says merges over the tables above it key by key, and run.env variable by variable; an array replaces the one above. In a path of the host, {target} stands for the name."},
	"target.name": {doc: "Name of the target, for messages and files. No two have the same.", max: 64, fileName: true, required: "every target needs a name"},
}

// field is a key of a table together with the struct field behind it.
type field struct {
	key   string
	name  string // with that of the table, as the rules know it
	index int
	rule  rule
}

// fieldsOf returns the keys of the table whose struct is t, in order. table is its
// name, or "" for the top.
func fieldsOf(t reflect.Type, table string) []field {
	var fields []field
	for i := range t.NumField() {
		if key, _, _ := strings.Cut(t.Field(i).Tag.Get("toml"), ","); key != "" && key != "-" {
			name := join(table, key)
			fields = append(fields, field{key: key, name: name, index: i, rule: rules[name]})
		}
	}
	return fields
}

// targetFields returns the keys of a table [[target]], which merges over a Config: a
// name, and every table but the targets.
func targetFields() []field {
	top := reflect.TypeFor[Config]()
	name, _ := top.FieldByName("Target")
	fields := []field{{key: "name", name: "target.name", index: name.Index[0], rule: rules["target.name"]}}
	return append(fields, slices.DeleteFunc(fieldsOf(top, ""), func(f field) bool { return f.key == "target" })...)
}

// join returns the dotted name of a key of a table, which is "" for the top.
func join(table, key string) string {
	if table == "" {
		return key
	}
	return table + "." + key
}

// isTables reports whether t is that of an array of tables.
func isTables(t reflect.Type) bool {
	return t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct
}

func keysOf(fields []field) []string {
	keys := make([]string, len(fields))
	for i, f := range fields {
		keys[i] = f.key
	}
	return keys
}

// accepts says what a value of type t has to be, as in "must be …".
func (r rule) accepts(t reflect.Type) string {
	switch t {
	case reflect.TypeFor[bool](), reflect.TypeFor[*bool]():
		return "true or false"
	case reflect.TypeFor[int]():
		if r.powerOfTwo {
			return fmt.Sprintf("a power of two from %d to %d", r.min, r.max)
		}
		return fmt.Sprintf("an integer from %d to %d", r.min, r.max)
	case reflect.TypeFor[Size]():
		s := fmt.Sprintf("a size from %v to %v", Size(r.min), Size(r.max))
		if r.multipleOf > 0 {
			s += fmt.Sprintf(", a multiple of %v", Size(r.multipleOf))
		}
		return s
	case reflect.TypeFor[time.Duration]():
		return `a duration such as "90s" or "10m"`
	case reflect.TypeFor[[]string]():
		if r.path {
			return "an array of paths"
		}
		return "an array of strings"
	case reflect.TypeFor[map[string]string]():
		return "a table of strings"
	}
	switch {
	case len(r.values) > 0:
		return list(quoted(r.values), "or")
	case r.path:
		return "a path"
	case r.guest:
		return "an absolute path of the guest"
	}
	s := "a string"
	if r.fileName {
		s = "a name without slashes and braces,"
	}
	if r.max > 0 {
		s += fmt.Sprintf(" of at most %d bytes", r.max)
	}
	if r.ascii {
		return s + " of printable ASCII"
	}
	return s + " without control characters"
}

// allows reports whether v, of a type that accepts knows, keeps the rule.
func (r rule) allows(v any) bool {
	switch v := v.(type) {
	case int:
		return v >= 0 && r.inRange(uint64(v))
	case Size:
		return r.inRange(uint64(v))
	case time.Duration:
		return v >= 0
	case []string:
		return !slices.ContainsFunc(v, func(s string) bool { return r.path && !r.allows(s) || strings.ContainsRune(s, 0) })
	case map[string]string:
		for name, value := range v {
			if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
				return false
			}
		}
	case string:
		switch {
		case len(r.values) > 0:
			return slices.Contains(r.values, v)
		case r.guest:
			return path.IsAbs(v) && len(v) < maxGuestPath && utf8.ValidString(v) && !strings.ContainsRune(v, 0)
		case r.path:
			return v != "" && utf8.ValidString(v) && !strings.ContainsRune(v, 0)
		}
		if r.fileName && (strings.Trim(v, ".") == "" || strings.ContainsAny(v, "/{}")) {
			return false
		}
		return (r.max == 0 || uint64(len(v)) <= r.max) && utf8.ValidString(v) && !strings.ContainsFunc(v, func(c rune) bool {
			return unicode.IsControl(c) || r.ascii && c > unicode.MaxASCII
		})
	}
	return true
}

func (r rule) inRange(n uint64) bool {
	return n >= r.min && n <= r.max &&
		(!r.powerOfTwo || bits.OnesCount64(n) == 1) &&
		(r.multipleOf == 0 || n%r.multipleOf == 0)
}

// refusal says why value, as a file holds it, is not accepted for a field of
// type t. The message lacks its subject.
func (r rule) refusal(t reflect.Type, value any) string {
	s, isString := value.(string)
	if isString && slices.Contains(r.later, s) {
		return fmt.Sprintf("value %q is not supported by this version of calf: use %s", s, r.accepts(t))
	}
	msg := fmt.Sprintf("must be %s, not %s", r.accepts(t), describe(value))
	if isString {
		if word := nearest(s, r.values); word != "" {
			msg += fmt.Sprintf(": did you mean %q?", word)
		}
	}
	return msg
}

// describe returns a decoded TOML value as a message shows it.
func describe(value any) string {
	switch v := value.(type) {
	case string:
		const limit = 60 // bytes
		if len(v) > limit {
			return fmt.Sprintf("a string of %d bytes", len(v))
		}
		return strconv.Quote(v)
	case map[string]any:
		return "a table"
	case []any:
		return "an array"
	case []map[string]any:
		return "an array of tables"
	case time.Time:
		return "a date or time"
	}
	return fmt.Sprint(value)
}

func quoted(words []string) []string {
	q := make([]string, len(words))
	for i, w := range words {
		q[i] = strconv.Quote(w)
	}
	return q
}
