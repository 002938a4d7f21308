package image

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/calfvm/calf/qcow2"
)

// createOption is one key of -o for one or both formats.
type createOption struct {
	key, doc string
	raw      bool // raw images have it too
	set      func(o *CreateOptions, value string) error
}

// createOptions are the keys of -o, by name.
var createOptions = []createOption{
	{"backing_file", "image to lie over", false, func(o *CreateOptions, v string) error { o.BackingFile = v; return nil }},
	{"backing_fmt", "format of the backing file", false, func(o *CreateOptions, v string) error { o.BackingFormat = v; return nil }},
	{"cluster_size", "unit of allocation, 512 to 2M", false, func(o *CreateOptions, v string) error { return setSize(&o.ClusterSize, v) }},
	{"compat", "version of the format: 0.10 (or v2) or 1.1 (or v3)", false, setCompat},
	{"compression_type", "zlib or zstd", false, func(o *CreateOptions, v string) error { o.CompressionType = v; return nil }},
	{"data_file", "file for the data of the disk", false, func(o *CreateOptions, v string) error { o.DataFile = v; return nil }},
	{"data_file_raw", "on keeps the data file readable as a raw image", false, func(o *CreateOptions, v string) error { return setBool(&o.DataFileRaw, v) }},
	{"extended_l2", "on divides each cluster into 32 subclusters", false, func(o *CreateOptions, v string) error { return setBool(&o.ExtendedL2, v) }},
	{"lazy_refcounts", "on lets reference counts be put off", false, func(o *CreateOptions, v string) error { return setBool(&o.LazyRefcounts, v) }},
	{"preallocation", "off, metadata (not for raw), falloc or full", true, setPreallocation},
	{"refcount_bits", "width of the reference counts, 1 to 64", false, setRefcountBits},
	{"size", "size of the disk", true, func(o *CreateOptions, v string) error { return setSize(&o.Size, v) }},
}

func setSize(to *int64, v string) (err error) {
	*to, err = ParseSize(v)
	return err
}

func setBool(to *bool, v string) error {
	switch v {
	case "on", "yes", "true", "y":
		*to = true
	case "off", "no", "false", "n":
		*to = false
	default:
		return fmt.Errorf("%q is not one of on and off", v)
	}
	return nil
}

func setCompat(o *CreateOptions, v string) error {
	switch v {
	case "0.10", "v2":
		o.Version = 2
	case "1.1", "v3":
		o.Version = 3
	default:
		return fmt.Errorf("%q is not one of 0.10 and 1.1", v)
	}
	return nil
}

func setRefcountBits(o *CreateOptions, v string) (err error) {
	if o.RefcountBits, err = strconv.Atoi(v); err != nil {
		return fmt.Errorf("%q is no number of bits", v)
	}
	return nil
}

func setPreallocation(o *CreateOptions, v string) (err error) {
	o.Preallocation, err = ParsePreallocation(v)
	return err
}

// ParsePreallocation reads a preallocation by its name.
func ParsePreallocation(s string) (qcow2.Preallocation, error) {
	for p := qcow2.PreallocateOff; p <= qcow2.PreallocateFull; p++ {
		if p.String() == s {
			return p, nil
		}
	}
	return 0, fmt.Errorf("%q is not one of off, metadata, falloc and full", s)
}

// Set sets the keys of list, which has the form key=value,key=value; a comma in a
// value is written twice. format is that of the new image.
func (o *CreateOptions) Set(format, list string) error {
	for _, pair := range SplitOptions(list) {
		key, value, _ := strings.Cut(pair, "=")
		i := slices.IndexFunc(createOptions, func(c createOption) bool { return c.key == key })
		if i < 0 || format == Raw && !createOptions[i].raw {
			return fmt.Errorf("the option %q is not supported for format %s: there are %s", key, format, strings.Join(keys(format), ", "))
		}
		if err := createOptions[i].set(o, value); err != nil {
			return fmt.Errorf("option %s: %w", key, err)
		}
	}
	return nil
}

// SplitOptions splits a list of options at its single commas and makes double ones single.
func SplitOptions(list string) []string {
	const comma = "\x00" // no path has it
	parts := strings.Split(strings.ReplaceAll(list, ",,", comma), ",")
	for i := range parts {
		parts[i] = strings.ReplaceAll(parts[i], comma, ",")
	}
	return slices.DeleteFunc(parts, func(s string) bool { return s == "" })
}

// keys returns the names of the options for a format.
func keys(format string) []string {
	var names []string
	for _, c := range createOptions {
		if format != Raw || c.raw {
			names = append(names, c.key)
		}
	}
	return names
}

// HelpOptions describes the options for a format, a line for each.
func HelpOptions(format string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Options of -o for format %s:\n", format)
	for _, c := range createOptions {
		if format != Raw || c.raw {
			fmt.Fprintf(&b, "  %-18s %s\n", c.key, c.doc)
		}
	}
	return b.String()
}
