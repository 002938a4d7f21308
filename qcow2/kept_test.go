package qcow2

import (
	"bytes"
	"context"
	"fmt"
)

// kept is an internal snapshot of a run's image.
type kept struct {
	exists history // 1 or 0
	disk   []byte  // what it has
}

// mostKept is how many snapshots a workload makes before it deletes some.
const mostKept = 3

// snapshot makes, applies or deletes an internal snapshot. Nothing else runs, so
// that it is known what a new one has.
func (w *worker) snapshot() error {
	m := w.run.m
	all, err := m.Snapshots()
	if err != nil {
		return err
	}
	how := w.r.IntN(3)
	if len(all) == 0 || how == 0 && len(all) < mostKept {
		return w.keep(fmt.Sprintf("s%d", w.run.seq.Add(1)))
	}
	name := all[w.r.IntN(len(all))].Name
	if how == 1 {
		return w.apply(name)
	}
	return w.exists(name, 0, func() error { return m.DeleteSnapshot(context.Background(), name) })
}

// keep makes a snapshot.
func (w *worker) keep(name string) error {
	run := w.run
	disk := make([]byte, run.m.Size())
	if err := run.m.ReadvAt([][]byte{disk}, 0); err != nil {
		return err
	}
	run.kept[name] = &kept{exists: newHistory(0), disk: disk}
	return w.exists(name, 1, func() error {
		_, err := run.m.CreateSnapshot(context.Background(), name)
		return err
	})
}

// exists does something after which a snapshot exists or not.
func (w *worker) exists(name string, value uint64, do func() error) error {
	run := w.run
	c := run.begin(value)
	h := &run.kept[name].exists
	h.changes = append(h.changes, c)
	err := do()
	run.end(c, err)
	if err == nil {
		run.durable(true)
	}
	return err
}

// apply makes the disk what a snapshot has.
func (w *worker) apply(name string) error {
	run := w.run
	disk := run.kept[name].disk
	n := len(disk) / sector
	length := run.begin(uint64(n))
	run.length.changes = append(run.length.changes, length)
	changes := []*change{length}
	for len(run.sectors) < n {
		run.sectors = append(run.sectors, newHistory(0))
	}
	for lba := range run.sectors {
		value := uint64(0) // beyond its end
		if lba < n {
			value, _ = readStamp(disk[lba*sector:], uint64(lba)) // judged when it was read
		}
		c := *length
		c.value = value
		changes = append(changes, &c)
		run.sectors[lba].changes = append(run.sectors[lba].changes, &c)
	}
	err := run.m.ApplySnapshot(context.Background(), name)
	for _, c := range changes {
		run.end(c, err)
	}
	if err == nil {
		run.durable(false)
	}
	return err
}

// keptIn returns the names of the snapshots of the image in s, none if it has no
// sound table of them.
func (run *crashRun) keptIn(s state) []string {
	if len(run.kept) == 0 {
		return nil
	}
	m, err := run.openIn(s.file(), Options{ReadOnly: true})
	if err != nil {
		return nil
	}
	defer m.Close()
	all, err := m.Snapshots()
	if err != nil {
		return nil
	}
	var names []string
	for _, s := range all {
		names = append(names, s.Name)
	}
	return names
}

// judgeKept judges the snapshots of the image in f after a power cut.
func (run *crashRun) judgeKept(f *memFile, m *Image, at int) error {
	if len(run.kept) == 0 {
		return nil
	}
	all, err := m.Snapshots()
	if err != nil {
		return err
	}
	there := map[string]uint64{}
	for _, s := range all {
		there[s.Name] = 1
		if run.kept[s.Name] == nil {
			return fmt.Errorf("there is a snapshot %q that nobody made", s.Name)
		}
	}
	_, from := run.flushed(at)
	for name, k := range run.kept {
		if err := k.exists.may(there[name], from, at); err != nil {
			return fmt.Errorf("the existence of snapshot %s %w", name, err)
		}
		if there[name] == 0 {
			continue
		}
		if err := run.judgeSnapshot(f, name, k.disk); err != nil {
			return fmt.Errorf("snapshot %s: %w", name, err)
		}
	}
	return nil
}

// judgeSnapshot reads a snapshot, which has the given contents.
func (run *crashRun) judgeSnapshot(f *memFile, name string, disk []byte) error {
	m, err := run.openIn(f, Options{ReadOnly: true, Snapshot: name})
	if err != nil {
		return err
	}
	got := make([]byte, m.Size())
	if err := m.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got, disk) {
		return fmt.Errorf("has other contents (%w)", err)
	}
	return m.Close()
}
