package find

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// grubConfigs are where grub.cfg is, on a root and on a file system for /boot.
var grubConfigs = []string{"boot/grub/grub.cfg", "boot/grub2/grub.cfg", "grub/grub.cfg", "grub2/grub.cfg"}

// grub returns the entry that GRUB would start by a configuration of the volume;
// nil if there is none.
func grub(parts []*volume, v *volume) (*entry, error) {
	for _, name := range grubConfigs {
		if !v.has(name) {
			continue
		}
		g := &grubShell{
			parts: parts, steps: maxSteps, functions: make(map[string][]*statement), menu: &menu{},
			env: map[string]string{
				"root": v.device, "boot": v.device, "prefix": "(" + v.device + ")/" + path.Dir(name),
				"grub_platform": "pc", "grub_cpu": "i386",
				"feature_menuentry_id": "y", "feature_platform_search_hint": "y", "feature_200_final": "y",
				"feature_timeout_style": "y", "feature_default_font_path": "y", "feature_all_video_module": "y",
				// Ubuntu tries without an initial RAM disk first, unless this says that
				// it did not work.
				"initrdfail": "1",
			},
		}
		config, err := v.openFile(name)
		if err == nil {
			err = g.source(config.Path)
		}
		var e *entry
		if err == nil {
			e, err = g.choose()
		}
		if err != nil {
			return nil, fmt.Errorf("%v: /%s: %w", v.Partition, name, err)
		}
		if e.config == nil {
			e.config = config
		}
		return e, nil
	}
	return nil, nil
}

const (
	// maxSteps is how many commands a configuration may run.
	maxSteps = 20_000
	// maxEntries is how many entries a menu may have.
	maxEntries = 1024
	// maxValue is the length of the longest value of a variable, in bytes.
	maxValue = 1 << 12
	// maxArgs is how much the arguments of a command may hold, in bytes.
	maxArgs = 1 << 16
)

// grubShell runs a configuration of GRUB.
type grubShell struct {
	parts     []*volume
	env       map[string]string
	functions map[string][]*statement
	menu      *menu // the one that entries are added to
	steps     int   // how many commands may still be run
	depth     int
	chosen    entry // what linux and initrd of the entry that is run have said
}

// menu is a list of entries.
type menu struct {
	items []*item
}

// item is an entry of a menu, or a menu in it. Its body is run when it is chosen.
type item struct {
	title, id string
	body      []*statement
	args      []string // what the body sees as $1, $2 and so on: the title, and the rest
	isMenu    bool
	ready     *entry // instead of a body
}

var errSteps = errors.New("it does not come to an end")

// source runs a file.
func (g *grubShell) source(name string) error {
	v, name, err := g.locate(name)
	if err != nil {
		return err
	}
	b, err := v.readFile(name, maxConfig)
	if err != nil {
		return err
	}
	g.steps -= len(b) / 100 // a file that reads itself
	list, err := parse(string(b))
	if err != nil {
		return err
	}
	_, err = g.run(list)
	return err
}

// locate returns the volume and the path that a name of GRUB means: (device)/path,
// or a path on the device of the variable root.
func (g *grubShell) locate(name string) (*volume, string, error) {
	device := g.env["root"]
	if rest, ok := strings.CutPrefix(name, "("); ok {
		if device, name, ok = strings.Cut(rest, ")"); !ok {
			return nil, "", fmt.Errorf("there is no device %q", rest)
		}
	}
	for _, v := range g.parts {
		number := fmt.Sprintf("hd0,%d", v.Number)
		if device == v.device || v.Number > 0 && device == number {
			return v, name, nil
		}
	}
	return nil, "", fmt.Errorf("there is no device %q", device)
}

// run runs statements; it returns whether the last one succeeded.
func (g *grubShell) run(list []*statement) (ok bool, err error) {
	if g.depth++; g.depth > maxNesting {
		return false, errSteps
	}
	defer func() { g.depth-- }()
	ok = true
	for _, s := range list {
		if g.steps--; g.steps < 0 {
			return false, errSteps
		}
		if ok, err = g.statement(s); err != nil {
			return false, err
		}
	}
	return ok, nil
}

func (g *grubShell) statement(s *statement) (ok bool, err error) {
	switch keyword := s.words[0].literal(); keyword {
	case "if":
		for i, condition := range s.conditions {
			if ok, err = g.run(condition); ok || err != nil {
				if err == nil {
					ok, err = g.run(s.bodies[i])
				}
				return ok, err
			}
		}
		if len(s.bodies) > len(s.conditions) {
			return g.run(s.bodies[len(s.conditions)])
		}
		return true, nil
	case "while", "until":
		for {
			ok, err = g.run(s.conditions[0])
			if g.steps--; g.steps < 0 {
				err = errSteps
			}
			if err != nil || ok == (keyword == "until") {
				return true, err
			}
			if _, err = g.run(s.bodies[0]); err != nil {
				return false, err
			}
		}
	case "for":
		words := g.expand(s.words[1:])
		if len(words) < 2 || words[1] != "in" || len(s.bodies) == 0 {
			return false, errSyntax
		}
		for _, value := range words[2:] {
			g.set(words[0], value)
			if _, err := g.run(s.bodies[0]); err != nil {
				return false, err
			}
		}
		return true, nil
	}
	words := g.expand(s.words)
	if len(words) == 0 {
		return true, nil
	}
	return g.command(words[0], words[1:], s.bodies)
}

// set sets a variable. One that a configuration makes larger and larger stays as it
// is.
func (g *grubShell) set(name, value string) {
	if len(value) <= maxValue && (len(g.env) < maxEntries || g.env[name] != "") {
		g.env[name] = value
	}
}

// expand turns words into arguments: what an unquoted variable holds is split at
// blanks. Of arguments that are too large the rest is left out.
func (g *grubShell) expand(words []word) []string {
	var args []string
	left := maxArgs
	for _, w := range words {
		arg, is := "", false
		add := func(text string) {
			if left -= len(text) + 1; left >= 0 {
				arg, is = arg+text, true
			}
		}
		for _, p := range w {
			switch {
			case !p.variable:
				add(p.text)
			case p.quoted:
				add(g.env[p.text])
			default:
				for i, field := range strings.Fields(g.env[p.text]) {
					if i > 0 && is {
						args, arg, is = append(args, arg), "", false
					}
					add(field)
				}
			}
		}
		if is {
			args = append(args, arg)
		}
	}
	return args
}

// command runs a command. One that is not known changes nothing that matters here,
// and succeeds.
func (g *grubShell) command(name string, args []string, bodies [][]*statement) (ok bool, err error) {
	if body, ok := g.functions[name]; ok {
		g.setArgs(args)
		return g.run(body)
	}
	if variable, _, ok := strings.Cut(name, "="); ok {
		if _, rest := variableName(variable); rest == "" {
			name, args = "set", []string{name}
		}
	}
	switch name {
	case "set", "export":
		for _, arg := range args {
			if key, value, ok := strings.Cut(arg, "="); ok {
				g.set(key, value)
			}
		}
	case "unset":
		for _, arg := range args {
			delete(g.env, arg)
		}
	case "function":
		if len(args) == 1 && len(bodies) == 1 && len(g.functions) < maxEntries {
			g.functions[args[0]] = bodies[0]
		}
	case "[":
		return len(args) > 0 && g.test(args[:len(args)-1]), nil
	case "test":
		return g.test(args), nil
	case "!":
		if len(args) == 0 {
			return false, nil
		}
		ok, err = g.command(args[0], args[1:], bodies)
		return !ok, err
	case "false", "keystatus":
		return false, nil
	case "search", "search.fs_uuid", "search.fs_label", "search.file":
		return g.search(name, args), nil
	case "source", "configfile", ".":
		return len(args) > 0 && g.source(args[0]) == nil, g.spent()
	case "load_env":
		g.loadEnv(args)
	case "menuentry", "submenu":
		return true, g.addItem(name, args, bodies)
	case "blscfg":
		return g.blscfg(), nil
	case "linux", "linux16", "linuxefi", "initrd", "initrd16", "initrdefi":
		return true, g.load(name, args)
	}
	return true, nil
}

// setArgs makes $1 to $9 the arguments of a function or an entry.
func (g *grubShell) setArgs(args []string) {
	for i := range 9 {
		g.env[strconv.Itoa(i+1)] = ""
		if i < len(args) {
			g.set(strconv.Itoa(i+1), args[i])
		}
	}
}

// spent is errSteps if no command may be run any more.
func (g *grubShell) spent() error {
	if g.steps < 0 {
		return errSteps
	}
	return nil
}

// test is the command test: -a binds more tightly than -o.
func (g *grubShell) test(args []string) bool {
	if i := slices.Index(args, "-o"); i > 0 {
		return g.test(args[:i]) || g.test(args[i+1:])
	}
	if i := slices.Index(args, "-a"); i > 0 {
		return g.test(args[:i]) && g.test(args[i+1:])
	}
	negated := false
	for len(args) > 0 && args[0] == "!" {
		negated, args = !negated, args[1:]
	}
	return g.testOne(args) != negated
}

func (g *grubShell) testOne(args []string) bool {
	switch len(args) {
	case 1:
		return args[0] != ""
	case 2:
		switch args[0] {
		case "-n":
			return args[1] != ""
		case "-z":
			return args[1] == ""
		case "-e", "-f", "-s", "-d":
			v, name, err := g.locate(args[1])
			return err == nil && v.has(name)
		}
	case 3:
		a, b := args[0], args[2]
		switch args[1] {
		case "=", "==":
			return a == b
		case "!=":
			return a != b
		case "<":
			return a < b
		case ">":
			return a > b
		}
		x, err1 := strconv.Atoi(a)
		y, err2 := strconv.Atoi(b)
		if err1 != nil || err2 != nil {
			return false
		}
		return map[string]bool{"-eq": x == y, "-ne": x != y, "-lt": x < y, "-le": x <= y, "-gt": x > y, "-ge": x >= y}[args[1]]
	}
	return false
}

// search sets a variable to the device that has something.
func (g *grubShell) search(name string, args []string) bool {
	by, variable := strings.TrimPrefix(name, "search."), "root"
	var rest []string
	for i := 0; i < len(args); i++ {
		option, value, has := strings.Cut(args[i], "=")
		switch option {
		case "--fs-uuid", "-u":
			by = "fs_uuid"
		case "--label", "-l", "--fs-label":
			by = "fs_label"
		case "--file", "-f":
			by = "file"
		case "--set", "-s":
			if has {
				variable = value
			}
		case "--hint", "-h":
			if !has {
				i++ // its value
			}
		default:
			if !strings.HasPrefix(option, "--") {
				rest = append(rest, args[i])
			}
		}
	}
	if len(rest) == 0 {
		return false
	}
	if len(rest) > 1 { // search.fs_uuid UUID VARIABLE
		variable = rest[1]
	}
	for _, v := range g.parts {
		if by == "fs_uuid" && v.UUID != "" && strings.EqualFold(v.UUID, rest[0]) || by == "fs_label" && v.Label != "" && v.Label == rest[0] || by == "file" && v.has(rest[0]) {
			g.set(variable, v.device)
			return true
		}
	}
	return false
}

// onlyOnce are the variables of an environment block that a boot changes, which
// calf does not: what is to be tried once, and what has failed so far.
var onlyOnce = []string{"next_entry", "prev_entry", "initrdfail", "recordfail", "boot_counter"}

// loadEnv sets the variables that a file of them has: the environment block of
// 1024 bytes.
func (g *grubShell) loadEnv(args []string) {
	name := g.env["prefix"] + "/grubenv"
	for i, arg := range args {
		if arg == "-f" || arg == "--file" {
			name = slices.Concat(args[i+1:], []string{name})[0]
		} else if value, ok := strings.CutPrefix(arg, "--file="); ok {
			name = value
		}
	}
	v, name, err := g.locate(name)
	if err != nil {
		return
	}
	b, err := v.readFile(name, maxConfig)
	if err != nil {
		return
	}
	for line := range strings.Lines(string(b)) {
		key, value, ok := strings.Cut(strings.TrimRight(line, "\n"), "=")
		if ok && !strings.HasPrefix(line, "#") && !slices.Contains(onlyOnce, key) {
			g.set(key, strings.ReplaceAll(value, `\\`, `\`))
		}
	}
}

// addItem adds an entry to the menu, or a menu.
func (g *grubShell) addItem(kind string, args []string, bodies [][]*statement) error {
	if len(g.menu.items) >= maxEntries {
		return fmt.Errorf("it has more than %d entries", maxEntries)
	}
	it := &item{isMenu: kind == "submenu"}
	for i := 0; i < len(args); i++ {
		option, value, has := strings.Cut(args[i], "=")
		switch option {
		case "--id", "--class", "--users", "--hotkey", "--source":
			if !has && i+1 < len(args) {
				i++
				value = args[i]
			}
			if option == "--id" {
				it.id = value
			}
		default:
			if !strings.HasPrefix(option, "--") {
				it.args = append(it.args, args[i])
			}
		}
	}
	if len(it.args) > 0 {
		it.title = it.args[0]
	}
	if len(bodies) > 0 {
		it.body = bodies[0]
	}
	g.menu.items = append(g.menu.items, it)
	return nil
}

// choose returns the entry that the variable default names, which may lead through
// menus; what names none is the first one.
func (g *grubShell) choose() (*entry, error) {
	left := g.env["default"]
	for {
		if len(g.menu.items) == 0 {
			return nil, errors.New("it has no entries")
		}
		var it *item
		it, left = g.menu.find(left)
		if it.ready != nil {
			return it.ready, nil
		}
		g.menu, g.chosen = &menu{}, entry{title: it.title}
		g.setArgs(it.args)
		if _, err := g.run(it.body); err != nil {
			return nil, fmt.Errorf("entry %q: %w", it.title, err)
		}
		if it.isMenu {
			continue
		}
		if g.chosen.kernel == nil {
			return nil, fmt.Errorf("entry %q starts no Linux", it.title)
		}
		return &g.chosen, nil
	}
}

// find returns the item that a choice means, and what of the choice is about the
// menu in it. A title may hold the separator.
func (m *menu) find(choice string) (it *item, rest string) {
	for _, it := range m.items {
		for _, name := range []string{it.id, it.title} {
			if rest, ok := strings.CutPrefix(choice, name); ok && name != "" && (rest == "" || rest[0] == '>') {
				return it, strings.TrimPrefix(rest, ">")
			}
		}
	}
	first, rest, _ := strings.Cut(choice, ">")
	if n, err := strconv.Atoi(first); err == nil && n >= 0 && n < len(m.items) {
		return m.items[n], rest
	}
	return m.items[0], ""
}

// load takes note of what linux and initrd name.
func (g *grubShell) load(name string, args []string) error {
	open := func(name string) (*File, error) {
		v, name, err := g.locate(name)
		if err != nil {
			return nil, err
		}
		return v.openFile(name)
	}
	if len(args) == 0 {
		return nil
	}
	if strings.HasPrefix(name, "linux") {
		kernel, err := open(args[0])
		if err != nil {
			return err
		}
		g.chosen.kernel, g.chosen.args, g.chosen.initrds = kernel, args[1:], nil
		return nil
	}
	g.chosen.initrds = nil
	for _, arg := range args {
		if strings.HasPrefix(arg, "--") || strings.HasPrefix(arg, "newc:") {
			continue
		}
		initrd, err := open(arg)
		if err != nil {
			return err
		}
		g.chosen.initrds = append(g.chosen.initrds, initrd)
	}
	return nil
}

// blscfg adds the entries of the Boot Loader Specification to the menu.
func (g *grubShell) blscfg() bool {
	dir := g.env["blsdir"]
	if dir == "" {
		dir = "/loader/entries"
	}
	for _, device := range []string{g.env["boot"], g.env["root"]} {
		for _, name := range []string{dir, "/boot" + dir} {
			v, name, err := g.locate("(" + device + ")" + name)
			if err != nil {
				continue
			}
			entries := readSpecification(v, name, func(name string) string { return g.env[name] })
			for _, e := range entries[:min(len(entries), maxEntries-len(g.menu.items))] {
				g.menu.items = append(g.menu.items, &item{title: e.title, id: e.id, ready: &e.entry})
			}
			if len(entries) > 0 {
				return true
			}
		}
	}
	return false
}
