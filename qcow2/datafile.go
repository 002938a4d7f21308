package qcow2

import (
	"errors"
	"fmt"
	"os"
)

// openData opens the external data file of the image with header h, whose name is
// name, by the rule of backing files. Guest data lies in it at the guest's own
// offsets and is not counted; nothing but guest data does.
func (m *Image) openData(h *header, name string, opts Options, c *chain) error {
	m.raw = h.autoclear>>autoclearRawData&1 != 0
	switch {
	case name == "":
		return &Error{
			Kind: ErrUnsupported, What: "the image has an external data file but does not say which",
			Mend: fmt.Sprintf("say it with: qemu-img amend -o data_file=FILE %s", shellWord(m.path)),
		}
	case !opts.DataFile:
		return &Error{
			Kind: ErrBackingRefused, What: fmt.Sprintf("the image has the external data file %s, and data files are not allowed here", shown(name)),
			Mend: "allow it with data_file = \"allow\" if the image is yours, or make one without: calf image convert -f qcow2 -O qcow2 FILE NEW",
		}
	case hasProtocol(name):
		return &Error{Kind: ErrBackingRefused, What: fmt.Sprintf("the external data file %q is not the plain name of a file", name)}
	case m.raw && h.backingOffset != 0:
		return corruptf("the image has a backing file, which its raw external data file cannot show")
	}
	flags := os.O_RDWR
	if m.readOnly {
		flags = os.O_RDONLY
	}
	target := besideImage(m.path, name)
	f, err := c.openTrusted("external data file", m.path, target, flags)
	if err != nil {
		return err
	}
	dir := c.dir
	err = c.enter(f, target)
	c.dir = dir // the image's, from which the name of its backing file counts
	if err == nil {
		opts.ReadOnly = m.readOnly
		err = lockImage(f, target, accessOf(opts))
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	hf, err := newFile(f, target, opts)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	m.data, m.dataPath = hf, target
	return nil
}
