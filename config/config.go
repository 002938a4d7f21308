// Package config is the description of a guest: a tree of plain structs, the
// TOML file that fills it, the flags that override the file, and the rules that
// both must keep. It knows nothing of KVM and opens no file but the one it is
// asked to load: whether a kernel or an image exists is for others to find out.
//
// The file is read strictly. An unknown key, a value of the wrong type and a
// value that cannot be are errors with file, line and column; all errors of a
// file are reported, in the order of the file. Every key is described once, in
// rules.go: reading, checking, overriding and the JSON schema follow from it.
//
// A Config is not safe for concurrent use while it is being changed.
package config

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// Config describes one guest. A zero field means the default; Effective fills
// the defaults in.
type Config struct {
	VM    VM     `toml:"vm"`
	Boot  Boot   `toml:"boot,omitempty"`
	Vsock Vsock  `toml:"vsock,omitempty"`
	Run   Run    `toml:"run,omitempty"`
	Disks []Disk `toml:"disk"` // in order: vda, vdb, …

	Copies    []Copy     `toml:"copy,omitempty"`
	Artifacts []Artifact `toml:"artifact,omitempty"`

	// Target is the name of the target that this is the configuration of, if it is
	// that of one.
	Target string `toml:"-"`

	// targets are the configurations of the targets, whole.
	targets []*Config `toml:"target"`

	// dir is the directory of the file, where a path begins that is not given.
	dir string
	// origins says where values came from, by path ("vm.cpus",
	// "disk[0].path"), so that an error found later can still name the place.
	// The path "" stands for the file as a whole, or the table of the target.
	origins map[string]origin
}

// VM is the table [vm]: the machine itself.
type VM struct {
	Name        string        `toml:"name,omitempty"`
	CPUs        int           `toml:"cpus"`
	Memory      Size          `toml:"memory"`
	Timeout     time.Duration `toml:"timeout,omitzero"`      // of the whole run; 0 = none
	BootTimeout time.Duration `toml:"boot_timeout,omitzero"` // until the guest is up; 0 = none
}

// Boot is the table [boot]: what the guest runs first.
type Boot struct {
	Kernel  string `toml:"kernel,omitempty"` // "" = the one found on the first disk
	Initrd  string `toml:"initrd,omitempty"`
	Cmdline string `toml:"cmdline,omitempty"` // appended to calf's own command line
}

// Run is the table [run]: a command to be run in the guest, with the agent that calf
// brings along.
type Run struct {
	Command []string          `toml:"command,omitempty"` // none: the image's own init runs
	Env     map[string]string `toml:"env,omitempty"`
	Workdir string            `toml:"workdir,omitempty"` // "" = /
	User    string            `toml:"user,omitempty"`    // "" = root
}

// Vsock is the table [vsock]: the socket device, which the guest has if there is a
// path.
type Vsock struct {
	Path string `toml:"path,omitempty"` // of a Unix socket to be made
	CID  int    `toml:"cid,omitzero"`   // 0 = the first one that a guest can have
}

// Disk is a table [[disk]]: an image that the guest sees as a virtio disk.
type Disk struct {
	Path        string   `toml:"path"`
	Format      string   `toml:"format"` // FormatQCOW2 or FormatRaw
	ReadOnly    bool     `toml:"readonly"`
	Snapshot    bool     `toml:"snapshot"` // writes go to a throw-away overlay; as a default, if there is a command
	Queues      int      `toml:"queues"`
	QueueSize   int      `toml:"queue_size"` // descriptors per queue
	Cache       string   `toml:"cache"`
	Engine      string   `toml:"engine"`
	Discard     *bool    `toml:"discard"` // nil = true: the guest can give space back
	OnError     string   `toml:"on_error"`
	ByteRate    Size     `toml:"byte_rate,omitzero"`  // per second; 0 = any
	ByteBurst   Size     `toml:"byte_burst,omitzero"` // 0 = a tenth of a second's
	OpRate      int      `toml:"op_rate,omitzero"`    // requests per second; 0 = any
	OpBurst     int      `toml:"op_burst,omitzero"`   // 0 = a tenth of a second's
	Serial      string   `toml:"serial,omitempty"`
	BackingDirs []string `toml:"backing_dirs,omitempty"`
	DataFile    string   `toml:"data_file,omitempty"` // "" = DataFileRefuse
	L2Cache     Size     `toml:"l2_cache,omitzero"`   // 0 = the image engine decides
}

// Copy is a table [[copy]]: a file or tree that goes to the guest before its command
// runs. A tree becomes the directory To; a file becomes the file To, or goes into it
// if it is a directory or ends in a slash.
type Copy struct {
	From string `toml:"from"` // path of the host
	To   string `toml:"to"`   // path of the guest
}

// Artifact is a table [[artifact]]: a file or tree that comes from the guest after its
// command has run, also if that failed. It becomes To as a Copy does.
type Artifact struct {
	From string `toml:"from"` // path of the guest
	To   string `toml:"to"`   // path of the host; "" = the last name of From, beside the file
}

// What becomes of an image that names an external data file.
const (
	DataFileRefuse = "refuse"
	DataFileAllow  = "allow" // if the file lies where a backing file may
)

// The formats of a disk.
const (
	FormatQCOW2 = "qcow2"
	FormatRaw   = "raw"
)

// The cache modes of a disk.
const (
	CacheWriteback    = "writeback"    // what the guest has written is durable when it has flushed
	CacheWritethrough = "writethrough" // or when the write has completed
	CacheNone         = "none"         // as writeback, but past the host's page cache
	CacheUnsafe       = "unsafe"       // nothing is made durable
)

// What to do when a disk fails.
const (
	OnErrorReport = "report" // tell the guest
	OnErrorStop   = "stop"   // let the guest wait until the user says to go on
)

const (
	maxDisks         = 31 // slots of the PCI bus
	maxQueues        = 64
	defaultQueueSize = 256
	defaultMemory    = 512 << 20 // bytes
)

// Default returns what holds for a guest of which nothing is said.
func Default() *Config { return new(Config).Effective() }

// Expand returns the configurations of a run of c: one for each target, in the order
// of the file, or c alone if there is none. They share no value, and they are what
// c.Validate and c.TOML are about, so flags are to be applied to each of them.
func (c *Config) Expand() []*Config {
	if len(c.targets) == 0 {
		return []*Config{c}
	}
	return c.targets
}

// Select leaves, of the targets of c, those that flag names.
func (c *Config) Select(flag string, names ...string) error {
	var all []string
	for _, t := range c.targets {
		all = append(all, t.Target)
	}
	for _, name := range names {
		switch word := nearest(name, all); {
		case len(all) == 0:
			return Errors{origin{}.errorf("%s %s: there are no targets to choose from", flag, name)}
		case slices.Contains(all, name):
		case word != "":
			return Errors{origin{}.errorf("%s %s: there is no such target: did you mean %q? (there are: %s)", flag, name, word, list(all, "and"))}
		default:
			return Errors{origin{}.errorf("%s %s: there is no such target (there are: %s)", flag, name, list(all, "and"))}
		}
	}
	c.targets = slices.DeleteFunc(slices.Clone(c.targets), func(t *Config) bool { return !slices.Contains(names, t.Target) })
	return nil
}

// Effective returns a copy of c with every default filled in, and in every path of
// the host the name of the target for "{target}": what a run of c means.
func (c *Config) Effective() *Config {
	e := c.clone()
	e.VM.CPUs = orDefault(c.VM.CPUs, 1)
	e.VM.Memory = orDefault(c.VM.Memory, defaultMemory)
	for i := range e.Disks {
		d := &e.Disks[i]
		d.Format = orDefault(d.Format, formatOf(d.Path))
		d.Snapshot = c.snapshot(i)
		d.Queues = orDefault(d.Queues, min(e.VM.CPUs, maxQueues))
		d.QueueSize = orDefault(d.QueueSize, defaultQueueSize)
		d.Cache = orDefault(d.Cache, CacheWriteback)
		d.Engine = orDefault(d.Engine, "auto")
		yes := true
		d.Discard = orDefault(d.Discard, &yes)
		d.OnError = orDefault(d.OnError, OnErrorReport)
	}
	for i := range e.Artifacts {
		a := &e.Artifacts[i]
		a.To = orDefault(a.To, filepath.Join(e.dir, lastName(a.From)))
	}
	e.fillTarget()
	for i := range e.targets {
		e.targets[i] = e.targets[i].Effective()
	}
	return e
}

// targetMark stands for the name of the target in paths.
const targetMark = "{target}"

// Own returns a path with the name of the target for "{target}", if c is the
// configuration of one.
func (c *Config) Own(path string) string {
	if c.Target == "" {
		return path
	}
	return strings.ReplaceAll(path, targetMark, c.Target)
}

// fillTarget puts the name of the target into the paths of c, if c is that of one.
func (c *Config) fillTarget() {
	fill := func(v reflect.Value) { v.SetString(c.Own(v.String())) }
	for _, t := range c.tables() {
		for _, f := range fieldsOf(t.value.Type(), t.name) {
			v := t.value.Field(f.index)
			switch {
			case !f.rule.path:
			case v.Kind() == reflect.Slice:
				for i := range v.Len() {
					fill(v.Index(i))
				}
			default:
				fill(v)
			}
		}
	}
}

// clone returns a copy of c that shares nothing with it.
func (c *Config) clone() *Config {
	e := *c
	e.origins = maps.Clone(c.origins)
	e.Run.Command, e.Run.Env = slices.Clone(c.Run.Command), maps.Clone(c.Run.Env)
	e.Disks, e.Copies, e.Artifacts = slices.Clone(c.Disks), slices.Clone(c.Copies), slices.Clone(c.Artifacts)
	for i := range e.Disks {
		d := &e.Disks[i]
		d.BackingDirs = slices.Clone(d.BackingDirs)
		if d.Discard != nil {
			d.Discard = new(*d.Discard)
		}
	}
	e.targets = slices.Clone(c.targets)
	for i := range e.targets {
		e.targets[i] = e.targets[i].clone()
	}
	return &e
}

// lastName returns the last part of a path of the guest, or "" if it has none.
func lastName(guestPath string) string {
	name := path.Base(path.Clean(guestPath))
	if name == "." || name == "/" {
		return ""
	}
	return name
}

// snapshot reports whether the writes of disk i go to a throw-away overlay: those of a
// run with a command do, unless the file or a flag says otherwise.
func (c *Config) snapshot(i int) bool {
	return c.Disks[i].Snapshot || len(c.Run.Command) > 0 && !c.given(itemPath("disk", i)+".snapshot")
}

// orDefault returns v, or def if v is not set.
func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

// formatOf returns the format that a file name stands for, or "" if it stands
// for none. Nothing but .qcow2 does, and the content is never asked: a guest
// may have written it.
func formatOf(path string) string {
	if strings.EqualFold(filepath.Ext(path), ".qcow2") {
		return FormatQCOW2
	}
	return ""
}

// target is the whole of a configuration as a table [[target]].
type target struct {
	Name string `toml:"name"`
	*Config
}

// TOML returns the effective configuration as a file that says the same. Targets
// are written whole, so that nothing is left to be merged; what this returns for each
// of c.Expand makes such a file too, one after the other.
func (c *Config) TOML() ([]byte, error) {
	var buf bytes.Buffer
	enc := toml.NewEncoder(&buf)
	enc.Indent = ""
	for _, t := range c.Expand() {
		var doc any = t.Effective()
		if t.Target != "" {
			doc = map[string][]target{"target": {{t.Target, t.Effective()}}}
		}
		if err := enc.Encode(doc); err != nil {
			return nil, fmt.Errorf("config: encode: %w", err)
		}
	}
	return buf.Bytes(), nil
}

// Load reads the file at path. Paths in it are relative to its directory. An
// error about the content is of type Errors.
func Load(path string) (*Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	return Parse(path, dir, data)
}
