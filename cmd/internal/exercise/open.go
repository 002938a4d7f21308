package exercise

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/calfvm/calf/cmd/internal/image"
)

// Options say how to open an image.
type Options struct {
	Path, Format  string
	ReadOnly      bool
	ForceShare    bool // beside a program that writes to it
	Scratch       bool // under a throw-away overlay, which takes the writes
	CopyOnRead    bool // what is read of a backing file is kept in the image
	KeepDiscarded bool // discards do nothing
	Cache         string
	BackingDirs   []string // see image.OpenOptions
	L2CacheBytes  int64
}

// openOptions are the options for package image.
func (o Options) openOptions() image.OpenOptions {
	return image.OpenOptions{
		Format: o.Format, ReadOnly: o.ReadOnly, ForceShare: o.ForceShare, Scratch: o.Scratch,
		Cache: o.Cache, BackingDirs: o.BackingDirs, L2CacheBytes: o.L2CacheBytes,
	}
}

// SetCache sets the cache mode.
func (o *Options) SetCache(mode string) error {
	switch mode {
	case image.CacheWriteback, image.CacheWritethrough, image.CacheNone, image.CacheDirectsync, image.CacheUnsafe:
		o.Cache = mode
	case "off":
		o.Cache = image.CacheNone
	default:
		return quotef("Invalid cache option: %s", mode)
	}
	return nil
}

// SetDiscard says what discards do.
func (o *Options) SetDiscard(mode string) error {
	switch mode {
	case "unmap", "on":
		o.KeepDiscarded = false
	case "ignore", "off":
		o.KeepDiscarded = true
	default:
		return quotef("Invalid discard option: %s", mode)
	}
	return nil
}

// SetAIO accepts the one way in which calf moves data for these commands.
func (o *Options) SetAIO(mode string) error {
	switch mode {
	case "threads":
		return nil
	case "native", "io_uring":
		return fmt.Errorf("the aio mode %s is not supported: use threads", mode)
	}
	return quotef("Invalid aio option: %s", mode)
}

// SetList sets the options of a list KEY=VALUE,…, by QEMU's names for them.
func (o *Options) SetList(list string) error {
	direct := o.Cache == image.CacheNone || o.Cache == image.CacheDirectsync
	through := o.Cache == image.CacheWritethrough || o.Cache == image.CacheDirectsync
	unsafe := o.Cache == image.CacheUnsafe
	protocol := "file"
	for _, pair := range image.SplitOptions(list) {
		key, value, found := strings.Cut(pair, "=")
		if !found {
			value = "on"
		}
		var err error
		switch key {
		case "driver":
			if value == "file" { // as it is, without a format
				value = image.Raw
			}
			o.Format = value
		case "file.driver":
			protocol = value
		case "filename", "file.filename":
			o.Path = value
		case "read-only":
			err = setSwitch(&o.ReadOnly, value)
		case "force-share":
			err = setSwitch(&o.ForceShare, value)
		case "cache.direct":
			err = setSwitch(&direct, value)
		case "cache.no-flush":
			err = setSwitch(&unsafe, value)
		case "discard":
			err = o.SetDiscard(value)
		case "l2-cache-size":
			o.L2CacheBytes, err = image.ParseSize(value)
		default:
			err = fmt.Errorf("the option %q is not supported: there are driver, file.driver, file.filename, read-only, force-share, cache.direct, cache.no-flush, discard and l2-cache-size", key)
		}
		if err != nil {
			return err
		}
	}
	switch {
	case protocol != "file":
		return fmt.Errorf("the driver %q for file is not supported: use file", protocol)
	case unsafe && (direct || through):
		return errors.New("cache.no-flush goes with no other mode of the cache")
	case unsafe:
		o.Cache = image.CacheUnsafe
	case direct && through:
		o.Cache = image.CacheDirectsync
	case direct:
		o.Cache = image.CacheNone
	case !through:
		o.Cache = image.CacheWriteback
	}
	return nil
}

// setSwitch sets what is on or off.
func setSwitch(to *bool, value string) error {
	switch value {
	case "on":
		*to = true
	case "off":
		*to = false
	default:
		return fmt.Errorf("%q is not one of on and off", value)
	}
	return nil
}

// check returns an error for what cannot be together.
func (o Options) check() error {
	switch {
	case o.Path == "":
		return errors.New("the name of a file is missing")
	case o.ForceShare && !o.ReadOnly:
		return errors.New("force-share=on can only be used with read-only images")
	case o.CopyOnRead && o.ReadOnly:
		return quotef("Can't use copy-on-read on read-only device")
	}
	return nil
}

// OpenFile opens the image that o describes for the commands that follow.
func (s *Session) OpenFile(o Options) error {
	if s.disk != nil {
		return errors.New("file open already, try 'help close'")
	}
	err := o.check()
	if err == nil {
		s.disk, err = s.Open(o)
	}
	if err != nil {
		device := ""
		if o.Path != "" {
			device = " device " + o.Path
		}
		return fmt.Errorf("can't open%s: %w", device, err)
	}
	s.options = o
	return nil
}

// open is the command open.
func (s *Session) open(_ context.Context, words []string) error {
	o := Options{BackingDirs: s.BackingDirs}
	rest, err := s.getopt(words, "snCro:ki:t:d:U", func(letter byte, value string) error {
		switch letter {
		case 's':
			o.Scratch = true
		case 'n':
			return o.SetCache(image.CacheNone)
		case 'C':
			o.CopyOnRead = true
		case 'r':
			o.ReadOnly = true
		case 'k':
			return o.SetAIO("native")
		case 'i':
			return o.SetAIO(value)
		case 't':
			return o.SetCache(value)
		case 'd':
			return o.SetDiscard(value)
		case 'U':
			o.ForceShare = true
		case 'o':
			if s.ImageOpts {
				return answer("--image-opts and 'open -o' are mutually exclusive")
			}
			return o.SetList(value)
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case len(rest) > 1:
		return errUsage
	case len(rest) == 1 && s.ImageOpts:
		err = o.SetList(rest[0])
	case len(rest) == 1:
		o.Path = rest[0]
	}
	if err != nil {
		return err
	}
	return s.OpenFile(o)
}

// close is the command close.
func (s *Session) close(context.Context, []string) error {
	s.settle()
	return s.closeDisk()
}

// reopen is the command reopen.
func (s *Session) reopen(_ context.Context, words []string) error {
	o := s.options
	var mode, cached bool
	var lists []string
	rest, err := s.getopt(words, "c:o:rw", func(letter byte, value string) error {
		switch letter {
		case 'c':
			cached = true
			return o.SetCache(value)
		case 'o':
			lists = append(lists, value)
			return nil
		}
		if mode {
			return quotef("Only one -r/-w option may be given")
		}
		mode, o.ReadOnly = true, letter == 'r'
		return nil
	})
	if err != nil {
		return err
	}
	if len(rest) > 0 {
		return errUsage
	}
	for _, list := range lists {
		if err := o.setAgain(list, mode, cached); err != nil {
			return err
		}
	}
	s.settle()
	return s.change(o)
}

// setAgain is SetList for an image that is open. mode and cached say what else is
// set already.
func (o *Options) setAgain(list string, mode, cached bool) error {
	for _, pair := range image.SplitOptions(list) {
		key, _, _ := strings.Cut(pair, "=")
		switch {
		case key == "read-only" && mode:
			return quotef("Cannot set both -r/-w and 'read-only'")
		case strings.HasPrefix(key, "cache.") && cached:
			return quotef("Cannot set both -c and the cache options")
		case slices.Contains([]string{"driver", "file.driver", "filename", "file.filename", "force-share"}, key):
			return quotef("Cannot change the option '%s'", key)
		}
	}
	return o.SetList(list)
}

// change opens the file anew with the options o, or, if that cannot be done, as it
// was. A throw-away overlay would be lost so; it stays open.
func (s *Session) change(o Options) error {
	if err := o.check(); err != nil {
		return err
	}
	old := s.options
	if old.Scratch {
		if o.Cache != old.Cache || o.KeepDiscarded != old.KeepDiscarded || o.L2CacheBytes != old.L2CacheBytes {
			return errors.New("a throw-away overlay can only become read-only and back")
		}
		s.options = o
		return nil
	}
	if err := s.closeDisk(); err != nil {
		return err
	}
	err := s.OpenFile(o)
	if err == nil {
		return nil
	}
	return errors.Join(err, s.OpenFile(old))
}
