package pid1

import (
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// mountFlags are the options of mount(8) and fstab that are flags of mount(2).
var mountFlags = map[string]uintptr{
	"ro": unix.MS_RDONLY, "nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC,
	"sync": unix.MS_SYNCHRONOUS, "dirsync": unix.MS_DIRSYNC, "noatime": unix.MS_NOATIME, "nodiratime": unix.MS_NODIRATIME,
	"relatime": unix.MS_RELATIME, "strictatime": unix.MS_STRICTATIME, "lazytime": unix.MS_LAZYTIME, "silent": unix.MS_SILENT,
}

// opposites are options that take flags away.
var opposites = map[string]string{
	"rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec", "async": "sync", "atime": "noatime",
	"diratime": "nodiratime", "norelatime": "relatime", "nostrictatime": "strictatime", "nolazytime": "lazytime", "loud": "silent",
}

// othersOptions are those of programs that read fstab.
var othersOptions = []string{
	"defaults", "auto", "noauto", "nofail", "user", "nouser", "users", "owner", "group", "_netdev",
}

// parseOptions splits options of a mount into flags and what the file system is told.
func parseOptions(options string) (flags uintptr, data string) {
	var rest []string
	for option := range strings.SplitSeq(options, ",") {
		switch {
		case option == "" || strings.HasPrefix(option, "x-") || strings.HasPrefix(option, "comment=") || slices.Contains(othersOptions, option):
		case mountFlags[option] != 0:
			flags |= mountFlags[option]
		case opposites[option] != "":
			flags &^= mountFlags[opposites[option]]
		default:
			rest = append(rest, option)
		}
	}
	return flags, strings.Join(rest, ",")
}
