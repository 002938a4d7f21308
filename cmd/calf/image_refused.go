package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// refusedFlag is a flag of a verb of qemu-img that ours does not have. Whoever
// uses it is told what to do instead.
type refusedFlag struct {
	name, short string
	takesValue  bool
	instead     string
}

// refusedFlags are the flags of each verb that are refused by name; those of all
// verbs are under "". A verb that has a flag is not refused it.
var refusedFlags = map[string][]refusedFlag{
	"": {
		{"image-opts", "", false, "name the file, with its format by -f"},
		{"object", "", true, "nothing here takes an object of QEMU: encrypted images are not supported"},
		{"trace", "", true, "there are no trace points"},
		{"version", "V", false, "run: calf version"},
	},
	"io": {
		{"native-aio", "k", false, "leave it out, because data is moved by threads"},
		{"trace", "T", true, "there are no trace points"},
	},
	"convert": {
		{"target-image-opts", "", false, "name the target, with its format by -O"},
	},
	"serve": {
		{"allocation-depth", "A", false, "calf image map tells which image of a chain has a range"},
		{"aio", "", true, "leave it out: there is one way to do input and output"},
		{"connect", "c", true, "connect the kernel's client to the address that is printed, by nbd-client"},
		{"detect-zeroes", "", true, "let the client make ranges zero by a request for that"},
		{"disconnect", "d", false, "use nbd-client -d"},
		{"fork", "", false, "start it in the background, and wait for the address that it prints"},
		{"list", "L", false, "to ask a server what it has, use nbdinfo --list"},
		{"offset", "o", true, "the disk is served as a whole"},
		{"partition", "P", true, "the disk is served as a whole"},
		{"selinux-label", "", true, "label the socket by chcon"},
		{"tls-authz", "", true, "there is no TLS: use a Unix socket, or a tunnel such as ssh -L"},
		{"tls-creds", "", true, "there is no TLS: use a Unix socket, or a tunnel such as ssh -L"},
	},
	"bench": {
		{"native", "n", false, "requests go to the host by preadv and pwritev alone"},
	},
	"rebase": {
		{"force-share", "U", false, "an image that changes is not shared: close the program that uses it"},
	},
}

// otherVerbs are the verbs of qemu-img that calf image does not have, with what
// to do instead.
var otherVerbs = map[string]string{
	"amend": "make an image with other options by calf image convert -o, or change its size by calf image resize and its backing file by calf image rebase",
	"dd":    "copy a whole image by calf image convert; the disk of a raw image is the file itself, of which dd copies any part",
}

// emptyFlags are the flags with an empty value that means something, by verb and name.
var emptyFlags = map[string]bool{
	"rebase backing":    true,
	"serve description": true,
	"serve export-name": true,
}

// refuseEmpty fails if a flag of verb has an empty value, as where a variable of a
// script is not set: that is another thing than a flag that is not given.
func refuseEmpty(verb *cobra.Command) (err error) {
	verb.Flags().Visit(func(f *pflag.Flag) {
		if f.Value.Type() == "string" && f.Value.String() == "" && !emptyFlags[verb.Name()+" "+f.Name] {
			err = fmt.Errorf("--%s is empty: leave it out, or give it a value", f.Name)
		}
	})
	return err
}

// refuseFlags defines the flags that verb refuses.
func refuseFlags(verb *cobra.Command) {
	flags := verb.Flags()
	for _, r := range append(refusedFlags[verb.Name()], refusedFlags[""]...) {
		if flags.Lookup(r.name) != nil {
			continue
		}
		if r.short != "" && flags.ShorthandLookup(r.short) != nil {
			r.short = ""
		}
		f := flags.VarPF(r, r.name, r.short, "")
		f.Hidden = true
		if !r.takesValue {
			f.NoOptDefVal = "true"
		}
	}
}

// newOtherVerb is the verb of qemu-img by the name, which does nothing.
func newOtherVerb(name, instead string) *cobra.Command {
	return &cobra.Command{
		Use: name, Hidden: true, DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return imageError(cmd, fmt.Errorf("calf image has no %s: %s", name, instead))
		},
	}
}

// refusal is the error of a flag that is refused.
type refusal struct{ refusedFlag }

func (r refusal) Error() string {
	return fmt.Sprintf("--%s is not supported: %s", r.name, r.instead)
}

// Set implements pflag.Value: it fails.
func (r refusedFlag) Set(string) error { return refusal{r} }
func (refusedFlag) String() string     { return "" }
func (refusedFlag) Type() string       { return "" }

// flagError is what is wrong with the flags of a verb. A flag that is refused
// says so itself, whatever its value.
func flagError(cmd *cobra.Command, err error) error {
	if r, ok := errors.AsType[refusal](err); ok {
		err = r
	}
	return imageError(cmd, err)
}
