package qcow2

import (
	"fmt"
	"math"
)

// Info is what an image says of itself, and the names of other files in it.
type Info struct {
	Version      int   // of the format, 2 or 3
	Size         int64 // of the disk, in bytes
	ClusterSize  int64 // in bytes
	RefcountBits int
	// CompressionType is "zlib" or "zstd".
	CompressionType string
	LazyRefcounts   bool
	ExtendedL2      bool
	// Dirty images were not closed cleanly, Corrupt ones need a Repair.
	Dirty, Corrupt bool
	// Encryption is "aes" or "luks", empty if the image has none.
	Encryption string
	// BackingFile and BackingFormat are empty if there is none, or if the
	// image does not say.
	BackingFile, BackingFormat string
	// ExternalData says that the data lies in another file, DataFile if the
	// image says which. If DataFileRaw is set, that is a raw image of the disk.
	ExternalData bool
	DataFile     string
	DataFileRaw  bool
	// UnknownFeatures are the incompatible features that this package does not
	// know, by the names that the image gives them.
	UnknownFeatures []string
	Snapshots       []Snapshot
	Bitmaps         []Bitmap // those that are not void
}

// Inspect returns what the image at path says of itself, also if it has features
// that Open refuses. It opens nothing but the image, and locks it like a reader.
func Inspect(path string) (*Info, error) { return inspectFile(path, accessRead) }

// InspectShared is Inspect for an image that another process may be writing to: see
// Options.ForceShare.
func InspectShared(path string) (*Info, error) { return inspectFile(path, accessForced) }

func inspectFile(path string, a access) (*Info, error) {
	x, err := examineFile(path, a)
	if err != nil {
		return nil, err
	}
	if len(x.Faults) > 0 {
		return nil, x.Faults[0]
	}
	return &x.Info, nil
}

// info is what the header and its extensions say.
func (h *header) info(ext extensions) *Info {
	i := &Info{
		Version:         int(h.version),
		Size:            int64(min(h.size, math.MaxInt64)),
		ClusterSize:     1 << h.clusterBits,
		RefcountBits:    1 << h.refcountOrder,
		CompressionType: map[uint8]string{compressionDeflate: "zlib", compressionZstd: "zstd"}[h.compression],
		LazyRefcounts:   h.compatible>>compatLazyRefcounts&1 != 0,
		ExtendedL2:      h.incompat(incompatExtendedL2),
		Dirty:           h.incompat(incompatDirty),
		Corrupt:         h.incompat(incompatCorrupt),
		Encryption:      map[uint32]string{0: "", 1: "aes", 2: "luks"}[h.crypt],
		BackingFormat:   ext.backingFormat,
		ExternalData:    h.incompat(incompatDataFile),
		DataFile:        ext.dataFile,
	}
	i.DataFileRaw = i.ExternalData && h.autoclear>>autoclearRawData&1 != 0
	i.UnknownFeatures = ext.features.all(featureIncompatible, h.incompatible&^knownIncompatible)
	if h.compression > compressionZstd {
		i.UnknownFeatures = append(i.UnknownFeatures, fmt.Sprintf("compression type %d", h.compression))
	}
	if h.crypt > 2 {
		i.UnknownFeatures = append(i.UnknownFeatures, fmt.Sprintf("encryption method %d", h.crypt))
	}
	return i
}
