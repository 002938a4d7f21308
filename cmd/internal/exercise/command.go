package exercise

import (
	"context"
	"strings"
)

// command is one command of the language.
type command struct {
	name, short string
	min, max    int // how many arguments it takes; max is anyCount if there is no limit
	args, about string
	help        string // what else there is to say
	fileless    bool   // it needs no open file
	changes     bool   // it needs one that can be written
	run         func(s *Session, ctx context.Context, words []string) error
}

const anyCount = -1

// commands returns the language, by name.
func commands() []*command {
	return []*command{
		{name: "abort", about: "simulate a program crash using abort(3)", fileless: true, run: (*Session).abort},
		{name: "aio_flush", about: "completes all outstanding aio requests", run: (*Session).aioFlush},
		{
			name: "aio_read", min: 2, max: anyCount, args: "[-Ciqv] [-P pattern] off len [len..]",
			about: "asynchronously reads a number of bytes", help: helpAsync + helpRead, run: (*Session).aioRead,
		},
		{
			name: "aio_write", min: 2, max: anyCount, args: "[-Cfiquz] [-P pattern] off len [len..]",
			about: "asynchronously writes a number of bytes", help: helpAsync + helpWrite, changes: true, run: (*Session).aioWrite,
		},
		{name: "alloc", short: "a", min: 1, max: 2, args: "offset [count]", about: "checks if offset is allocated in the file", run: (*Session).alloc},
		{name: "break", min: 2, max: 2, args: "event tag", about: "sets a breakpoint on event and tags the stopped request as tag", help: helpBreak, run: noBreak("Could not set breakpoint")},
		{name: "close", short: "c", about: "close the current open file", run: (*Session).close},
		{
			name: "discard", short: "d", min: 2, max: anyCount, args: "[-Cq] off len",
			about: "discards a number of bytes at a specified offset", help: helpDiscard, changes: true, run: (*Session).discard,
		},
		{name: "flush", short: "f", about: "flush all in-core file state to disk", run: (*Session).flushDisk},
		{name: "help", short: "?", max: 1, args: "[command]", about: "help for one or all commands", fileless: true, run: (*Session).help},
		{name: "info", short: "i", about: "prints information about the current file", run: (*Session).info},
		{name: "length", short: "l", about: "gets the length of the current file", run: (*Session).length},
		{name: "map", about: "prints the allocated areas of a file", run: (*Session).mapDisk},
		{
			name: "open", short: "o", min: 1, max: anyCount, args: "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
			about: "open the file specified by path", help: helpOpen, fileless: true, run: (*Session).open,
		},
		{name: "quit", short: "q", max: anyCount, about: "exit the program", fileless: true, run: (*Session).leave},
		{
			name: "read", short: "r", min: 2, max: anyCount, args: "[-abCqv] [-P pattern [-s off] [-l len]] off len",
			about: "reads a number of bytes at a specified offset", help: helpRead + helpVerify, run: (*Session).read,
		},
		{
			name: "readv", min: 2, max: anyCount, args: "[-Cqv] [-P pattern] off len [len..]",
			about: "reads a number of bytes at a specified offset", help: helpVector + helpRead, run: (*Session).readv,
		},
		{name: "remove_break", min: 1, max: 1, args: "tag", about: "remove a breakpoint by tag", help: helpBreak, run: noBreak("Could not remove breakpoint TAG")},
		{
			name: "reopen", max: anyCount, args: "[(-r|-w)] [-c cache] [-o options]",
			about: "reopens an image with new options", help: helpReopen, run: (*Session).reopen,
		},
		{name: "resume", min: 1, max: 1, args: "tag", about: "resumes the request tagged as tag", help: helpBreak, run: noBreak("Could not resume request")},
		{name: "sigraise", min: 1, max: 1, args: "signal", about: "raises a signal", help: helpSigraise, fileless: true, run: (*Session).sigraise},
		{name: "sleep", min: 1, max: 1, about: "waits for the given value in milliseconds", fileless: true, run: (*Session).sleep},
		{
			name: "truncate", short: "t", min: 1, max: 3, args: "[-m prealloc_mode] off",
			about: "truncates the current file at the given offset", changes: true, run: (*Session).truncate,
		},
		{name: "wait_break", min: 1, max: 1, args: "tag", about: "waits for the suspension of a request", help: helpBreak, run: noBreak("Could not wait for request")},
		{
			name: "write", short: "w", min: 2, max: anyCount, args: "[-bcCfnquz] [-P pattern | -s source_file] off len",
			about: "writes a number of bytes at a specified offset", help: helpWrite + helpSource, changes: true, run: (*Session).write,
		},
		{
			name: "writev", min: 2, max: anyCount, args: "[-Cfq] [-P pattern] off len [len..]",
			about: "writes a number of bytes at a specified offset", help: helpVector + helpWrite, changes: true, run: (*Session).writev,
		},
	}
}

// find returns the command with a name, or nil.
func find(name string) *command {
	for _, c := range commands() {
		if c.name == name || c.short == name && name != "" {
			return c
		}
	}
	return nil
}

// Complete returns the names of commands that begin with prefix.
func Complete(prefix string) []string {
	var names []string
	for _, c := range commands() {
		if strings.HasPrefix(c.name, prefix) {
			names = append(names, c.name)
		}
	}
	return names
}

// usage is the line that says what the command, called by name, takes and does.
func (c *command) usage(name string) string {
	line := name
	if c.args != "" {
		line += " " + c.args
	} else if c.name == "map" {
		line += " " // so it is in qemu-io
	}
	return line + " -- " + c.about
}

// count returns an error unless the command, called by name, takes n arguments.
func (c *command) count(name string, n int) error {
	switch {
	case n >= c.min && (c.max == anyCount || n <= c.max):
		return nil
	case c.max == anyCount:
		return remarkf("bad argument count %d to %s, expected at least %d arguments", n, name, c.min)
	case c.min == c.max:
		return remarkf("bad argument count %d to %s, expected %d arguments", n, name, c.min)
	}
	return remarkf("bad argument count %d to %s, expected between %d and %d arguments", n, name, c.min, c.max)
}

// noBreak answers the commands of breakpoints, of which an image has none.
func noBreak(what string) func(s *Session, ctx context.Context, words []string) error {
	return func(_ *Session, _ context.Context, words []string) error {
		return answer(strings.ReplaceAll(what, "TAG", words[len(words)-1]) + ": Operation not supported")
	}
}
