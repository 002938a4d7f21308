package exercise

import "context"

// What help says of commands beyond their line.
const (
	helpRead = ` -C   print the report in a form for programs
 -P   verify that what was read consists of this byte
 -q   print no report
 -v   print what was read
`
	helpVerify = ` -s   verify only what lies behind this offset (with -P)
 -l   verify only so many bytes (with -P)
 -p   is ignored
 -b   is not supported: calf uses no VM state
`
	helpWrite = ` -C   print the report in a form for programs
 -P   write this byte, instead of 0xcd
 -f   make what was written stable before reporting it
 -q   print no report
 -z   write zeroes, in the best way that the image has
 -u   give up room for them (with -z)
`
	helpSource = ` -c   compress: whole clusters, or what is left of the disk
 -n   fail if zeros would have to be written out (with -z)
 -s   write what this file holds, over and over
 -p   is ignored
 -b   is not supported: calf uses no VM state
`
	helpVector = ` One request with a buffer for each length.
`
	helpAsync = ` The command begins the request and succeeds. The report comes when the request is
 over; aio_flush waits for all. Nothing is ordered between them.
 -i   count an invalid request, which does nothing here
`
	helpDiscard = ` Gives up what whole clusters hold. They read as zero then.
 -C   print the report in a form for programs
 -q   print no report
`
	helpOpen = ` -r   for reading only
 -s   under a throw-away overlay
 -C   keep in the image what is read of its backing file
 -n   the same as -t none
 -U   beside a program that writes to it, with -r
 -t   cache mode: writeback, writethrough, none, directsync or unsafe
 -d   what discards do: unmap or ignore
 -i   threads; -k is not supported
 -o   options: driver, file.filename, read-only, force-share, cache.direct,
      cache.no-flush, discard, l2-cache-size
`
	helpReopen = ` -r   for reading only
 -w   for writing, too
 -c   with another cache mode
 -o   with other options, see open
`
	helpSigraise = ` Sends calf the signal of a number. The image is left as it is: what was not flushed
 may be lost.
`
	helpBreak = ` Images have no breakpoints; this fails.
`
)

// help is the command help.
func (s *Session) help(_ context.Context, words []string) error {
	if len(words) == 1 {
		for _, c := range commands() {
			s.printf("%s\n", c.usage(c.name))
		}
		s.printf("\nUse 'help commandname' for extended help.\n")
		return nil
	}
	c := find(words[1])
	if c == nil {
		return answerf("command %s not found", words[1])
	}
	s.printf("%s\n", c.usage(words[1]))
	if c.help != "" {
		s.printf("\n%s\n", c.help)
	}
	return nil
}
