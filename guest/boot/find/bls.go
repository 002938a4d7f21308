package find

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// specified is an entry of the Boot Loader Specification (type 1).
type specified struct {
	entry
	id string // the name of its file, without .conf
}

// specification returns the default entry of a volume by the Boot Loader
// Specification alone; nil if it has none.
func specification(_ []*volume, v *volume) (*entry, error) {
	for _, dir := range []string{"loader", "boot/loader"} {
		entries := readSpecification(v, dir+"/entries", func(string) string { return "" })
		if len(entries) == 0 {
			continue
		}
		if pattern := loaderDefault(v, dir+"/loader.conf"); pattern != "" {
			for _, e := range entries {
				if ok, err := path.Match(strings.TrimSuffix(pattern, ".conf"), e.id); err == nil && ok {
					return &e.entry, nil
				}
			}
		}
		return &entries[0].entry, nil
	}
	return nil, nil
}

// loaderDefault is the pattern for the default entry that loader.conf has.
func loaderDefault(v *volume, name string) string {
	b, err := v.readFile(name, maxConfig)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if key, value := cutField(line); key == "default" {
			return value
		}
	}
	return ""
}

// readSpecification returns the entries of a directory that can be started, the
// newest first. Variables of a boot loader in them are replaced.
func readSpecification(v *volume, dir string, variable func(string) string) []specified {
	if v.files == nil {
		return nil
	}
	list, err := fs.ReadDir(v.files, clean(dir))
	if err != nil {
		return nil
	}
	var entries []specified
	for _, file := range list[:min(len(list), maxNames)] {
		id, ok := strings.CutSuffix(file.Name(), ".conf")
		if !ok || len(entries) == maxEntries {
			continue
		}
		if e, err := readSpecified(v, dir+"/"+file.Name(), variable); err == nil {
			entries = append(entries, specified{*e, id})
		}
	}
	slices.SortStableFunc(entries, func(a, b specified) int { return compareVersions(b.id, a.id) })
	return entries
}

// readSpecified reads one entry.
func readSpecified(v *volume, name string, variable func(string) string) (*entry, error) {
	b, err := v.readFile(name, maxConfig)
	if err != nil {
		return nil, err
	}
	e := &entry{}
	if e.config, err = v.openFile(name); err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		key, value := cutField(line)
		switch value = replaceVariables(value, variable); key {
		case "title":
			e.title = value
		case "linux":
			if e.kernel, err = openBeside(v, value); err != nil {
				return nil, err
			}
		case "initrd":
			for initrd := range strings.FieldsSeq(value) {
				f, err := openBeside(v, initrd)
				if err != nil {
					return nil, err
				}
				e.initrds = append(e.initrds, f)
			}
		case "options":
			e.args = append(e.args, strings.Fields(value)...)
		}
	}
	if e.kernel == nil {
		return nil, fmt.Errorf("%v names no kernel", e.config)
	}
	return e, nil
}

// openBeside opens a file that an entry names: from the root of its file system, or
// from the directory boot where that is no file system of its own.
func openBeside(v *volume, name string) (*File, error) {
	f, err := v.openFile(name)
	if err != nil && v.has("boot/"+name) {
		return v.openFile("boot/" + name)
	}
	return f, err
}

// cutField splits a line into its first word and the rest; a comment is nothing.
func cutField(line string) (key, value string) {
	line = strings.TrimSpace(line)
	if strings.HasPrefix(line, "#") {
		return "", ""
	}
	i := strings.IndexAny(line, " \t")
	if i < 0 {
		return line, ""
	}
	return line[:i], strings.TrimSpace(line[i:])
}

// replaceVariables replaces $name and ${name}.
func replaceVariables(s string, variable func(string) string) string {
	var b strings.Builder
	for {
		before, rest, ok := strings.Cut(s, "$")
		b.WriteString(before)
		if !ok || b.Len() > maxValue {
			return b.String()
		}
		name, rest := variableName(rest)
		if name == "" {
			b.WriteByte('$')
		}
		b.WriteString(variable(name))
		s = rest
	}
}
