package qcow2

// AlignDirect makes direct I/O on m ask for more alignment than the host does.
func AlignDirect(m *Image, offset, memory int64) {
	f := m.file.(*directFile)
	f.offset, f.memory = offset, memory
}
