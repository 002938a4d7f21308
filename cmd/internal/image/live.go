package image

import (
	"io"

	"github.com/calfvm/calf/qcow2"
)

// Info returns what the file of an open qcow2 image says of itself. A throw-away
// overlay has the options of a new image.
func (m *Image) Info() (*qcow2.Info, error) {
	if m.scratch {
		return &qcow2.Info{
			Version: 3, Size: m.Size(), ClusterSize: m.QCOW2.ClusterSize(), RefcountBits: 16, CompressionType: "zlib",
		}, nil
	}
	return qcow2.InspectShared(m.Path)
}

// SpecificText writes the lines of Info.Text on what only qcow2 images have.
func SpecificText(w io.Writer, q *qcow2.Info) error {
	p := printer{w: w}
	p.specific(specific(q))
	return p.err
}
