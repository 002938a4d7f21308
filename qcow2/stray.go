package qcow2

// stray is an L2 entry whose data lies in a cluster that holds metadata. A repair
// moves the data, whatever it is, to another cluster, which all entries for it
// share: the guest sees the same, and writes to it without harm.
type stray struct {
	at uint64 // where the entry is in the file
	e  uint64 // what it will be
}

// placeStrays copies the data of all strays to clusters that nobody uses, and
// counts these.
func (x *checker) placeStrays() ([]stray, error) {
	if x.strays == 0 {
		return nil, nil
	}
	var all []stray
	copies := map[uint64]uint64{} // where they are, by what they are of
	for _, c := range x.sortedTables() {
		if err := x.ctx.Err(); err != nil {
			return nil, err
		}
		table, err := x.loadTable(x.pointer(c), x.clusterSize)
		if err != nil {
			return nil, err
		}
		for i := 0; i < len(table); i += x.words() {
			e := table[i]
			host := e & entryOffset
			if e&entryCompressed != 0 || host == 0 || x.meta.at(host>>x.clusterBits) == metaNone {
				continue
			}
			if _, ok := copies[host]; !ok {
				if copies[host], err = x.copyStray(host); err != nil {
					return nil, err
				}
			}
			to := copies[host]
			if err := x.countStray(to, x.tables[c].refs); err != nil {
				return nil, err
			}
			// Whether it is shared, the next pass says.
			all = append(all, stray{at: x.pointer(c) + uint64(i)*8, e: e&^(entryOffset|entryCopied) | to})
		}
	}
	return all, nil
}

// countStray counts refs references to the copy at offset to.
func (x *checker) countStray(to uint64, refs uint32) error {
	if err := x.used.spend(extentCost); err != nil {
		return err
	}
	return x.used.add(to>>x.clusterBits, refs)
}

// copyStray copies the cluster at host to one that nobody uses, and returns where
// that is. It counts no reference to it.
func (x *checker) copyStray(host uint64) (uint64, error) {
	if err := x.used.spend(tableCost); err != nil {
		return 0, err
	}
	c, err := x.takeCounted(1)
	if err != nil {
		return 0, err
	}
	x.used.drop(c)
	data := make([]byte, x.clusterSize)
	if err := readFull(x.file, data, int64(host)); err != nil { //nolint:gosec // G115: masked
		return 0, err
	}
	return x.pointer(c), writeFull(x.file, data, x.offset(c))
}

// writeStrays makes the entries point to the copies, which are counted. The first
// barrier makes the copies durable.
func (x *checker) writeStrays(all []stray) error {
	if err := x.datasync(); err != nil {
		return err
	}
	for _, s := range all {
		if err := writeFull(x.file, encodeEntries(nil, []uint64{s.e}), int64(s.at)); err != nil { //nolint:gosec // G115: an offset
			return err
		}
	}
	return x.datasync()
}
