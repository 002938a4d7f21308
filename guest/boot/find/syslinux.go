package find

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// syslinuxConfigs are where extlinux and syslinux are configured.
var syslinuxConfigs = []string{
	"boot/extlinux/extlinux.conf", "extlinux/extlinux.conf", "boot/extlinux.conf", "extlinux.conf",
	"boot/syslinux/syslinux.cfg", "syslinux/syslinux.cfg", "boot/syslinux/extlinux.conf", "syslinux/extlinux.conf",
}

// label is an entry of syslinux.
type label struct {
	name, title, kernel, initrd string
	args                        []string
	isDefault                   bool
}

// syslinux returns the default entry of a configuration of extlinux or syslinux;
// nil if the volume has none.
func syslinux(_ []*volume, v *volume) (*entry, error) {
	for _, name := range syslinuxConfigs {
		if !v.has(name) {
			continue
		}
		b, err := v.readFile(name, maxConfig)
		if err != nil {
			return nil, err
		}
		config, err := v.openFile(name)
		if err != nil {
			return nil, err
		}
		l := defaultLabel(string(b))
		if l == nil {
			return nil, fmt.Errorf("%v starts no Linux", config)
		}
		e, err := l.open(v, path.Dir(name))
		if err != nil {
			return nil, fmt.Errorf("%v: %w", config, err)
		}
		e.config = config
		return e, nil
	}
	return nil, nil
}

// defaultLabel returns the entry that is started if nobody chooses one; nil if there
// is none.
func defaultLabel(config string) *label {
	var (
		labels   []*label
		chosen   string
		appended []string // for labels without their own
	)
	for line := range strings.Lines(config) {
		key, value := cutField(line)
		key = strings.ToLower(key)
		if key == "menu" {
			key, value = cutField(value)
			key = "menu " + strings.ToLower(key)
		}
		switch key {
		case "default":
			chosen = value
		case "label":
			if len(labels) == maxEntries {
				return nil
			}
			labels = append(labels, &label{name: value, title: value, args: appended})
			continue
		case "append":
			if len(labels) == 0 {
				appended = strings.Fields(value)
			}
		}
		if len(labels) > 0 {
			labels[len(labels)-1].set(key, value)
		}
	}
	labels = slices.DeleteFunc(labels, func(l *label) bool { return l.kernel == "" })
	for _, l := range labels {
		if l.isDefault || chosen != "" && strings.EqualFold(l.name, chosen) {
			return l
		}
	}
	if len(labels) == 0 {
		return nil
	}
	return labels[0]
}

// set takes over what a line of the entry says.
func (l *label) set(key, value string) {
	switch key {
	case "menu label":
		l.title = strings.ReplaceAll(value, "^", "")
	case "menu default":
		l.isDefault = true
	case "kernel", "linux":
		l.kernel = value
	case "initrd":
		l.initrd = value
	case "append":
		l.args = strings.Fields(value)
		if value == "-" {
			l.args = nil
		}
	}
}

// open opens the files of the entry, whose names count from dir if they are
// relative.
func (l *label) open(v *volume, dir string) (*entry, error) {
	open := func(name string) (*File, error) {
		if !path.IsAbs(name) {
			name = dir + "/" + name
		}
		return openBeside(v, name)
	}
	e := &entry{title: l.title, args: l.args}
	var err error
	if e.kernel, err = open(l.kernel); err != nil {
		return nil, err
	}
	initrds := l.initrd
	for _, arg := range l.args {
		if value, ok := strings.CutPrefix(arg, "initrd="); ok && initrds == "" {
			initrds = value
		}
	}
	for name := range strings.FieldsFuncSeq(initrds, func(r rune) bool { return r == ',' || r == ' ' }) {
		f, err := open(name)
		if err != nil {
			return nil, err
		}
		e.initrds = append(e.initrds, f)
	}
	return e, nil
}
