package acpi

import "encoding/binary"

// The few terms of AML that calf's DSDT is made of (ACPI 6.5, chapter 20.2).
// Each function returns the encoding of one term; terms nest by concatenation.

type term = []byte

func join(terms ...term) term {
	var t term
	for _, u := range terms {
		t = append(t, u...)
	}
	return t
}

// pkg prefixes body with its package length, which counts itself (20.2.4).
func pkg(op term, body term) term {
	n := len(body)
	var length []byte
	switch {
	case n+1 < 1<<6:
		length = []byte{byte(n + 1)}
	case n+2 < 1<<12:
		n += 2
		length = []byte{1<<6 | byte(n&0xF), byte(n >> 4)}
	case n+3 < 1<<20:
		n += 3
		length = []byte{2<<6 | byte(n&0xF), byte(n >> 4), byte(n >> 12)}
	default:
		panic("BUG: acpi: a package of over 1 MiB")
	}
	return join(op, length, body)
}

// path encodes a name of one to 255 segments, each padded to four characters.
// A leading backslash makes it absolute.
func path(root bool, segs ...string) term {
	var t term
	if root {
		t = append(t, '\\')
	}
	switch len(segs) {
	case 1:
	case 2:
		t = append(t, 0x2E)
	default:
		t = append(t, 0x2F, byte(len(segs)))
	}
	for _, s := range segs {
		t = append(t, (s + "____")[:4]...)
	}
	return t
}

func scope(name term, body ...term) term { return pkg(term{0x10}, join(name, join(body...))) }

func device(name string, body ...term) term {
	return pkg(term{0x5B, 0x82}, join(path(false, name), join(body...)))
}

func name(n string, value term) term { return join(term{0x08}, path(false, n), value) }

func rootName(n string, value term) term { return join(term{0x08}, path(true, n), value) }

func integer(v uint64) term {
	switch {
	case v == 0:
		return term{0x00}
	case v == 1:
		return term{0x01}
	case v <= 0xFF:
		return term{0x0A, byte(v)}
	case v <= 0xFFFF:
		return binary.LittleEndian.AppendUint16(term{0x0B}, uint16(v))
	case v <= 0xFFFFFFFF:
		return binary.LittleEndian.AppendUint32(term{0x0C}, uint32(v))
	}
	return binary.LittleEndian.AppendUint64(term{0x0E}, v)
}

func str(s string) term { return append(append(term{0x0D}, s...), 0) }

func packageOf(elems ...term) term {
	return pkg(term{0x12}, append(term{byte(len(elems))}, join(elems...)...))
}

func buffer(b []byte) term {
	return pkg(term{0x11}, append(integer(uint64(len(b))), b...))
}

// eisaID encodes an identifier such as PNP0501 (19.6.37).
func eisaID(s string) term {
	hex := func(c byte) uint32 {
		if c >= 'A' {
			return uint32(c-'A') + 10
		}
		return uint32(c - '0')
	}
	v := uint32(s[0]-0x40)<<26 | uint32(s[1]-0x40)<<21 | uint32(s[2]-0x40)<<16 |
		hex(s[3])<<12 | hex(s[4])<<8 | hex(s[5])<<4 | hex(s[6])
	// The identifier is stored big-endian in a little-endian integer.
	return binary.BigEndian.AppendUint32(term{0x0C}, v)
}

// resources makes a resource template, ended by an end tag without a checksum
// (6.4).
func resources(descriptors ...[]byte) term {
	return buffer(append(join(descriptors...), 0x79, 0x00))
}

// ioPorts is an I/O port descriptor of 16-bit decode (6.4.2.5).
func ioPorts(base, n uint16) []byte {
	b := []byte{0x47, 1}
	b = binary.LittleEndian.AppendUint16(b, base)
	b = binary.LittleEndian.AppendUint16(b, base)
	return append(b, 1, byte(n))
}

// irq is an edge-triggered, active-high interrupt descriptor (6.4.2.1).
func irq(n uint) []byte {
	return binary.LittleEndian.AppendUint16([]byte{0x22}, 1<<n)
}

// fixedMemory is a read-write range that does not move (6.4.3.4).
func fixedMemory(base, size uint32) []byte {
	b := []byte{0x86, 9, 0, 1}
	b = binary.LittleEndian.AppendUint32(b, base)
	return binary.LittleEndian.AppendUint32(b, size)
}

// Flags of address-space descriptors: both ends fixed, decoded positively by
// this bridge, which produces the range (6.4.3.5).
const producerFixed = 0x0C

// memoryWindow is an uncached read-write range that a bridge passes on
// (6.4.3.5.2).
func memoryWindow(base, size uint32) []byte {
	b := []byte{0x87, 23, 0, 0, producerFixed, 1} // tag, length, memory, flags, uncached read-write
	for _, v := range []uint32{0, base, base + size - 1, 0, size} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// busNumbers is the range of buses below a bridge (6.4.3.5.3).
func busNumbers(first, last uint16) []byte {
	b := []byte{0x88, 13, 0, 2, producerFixed, 0} // tag, length, bus numbers, flags
	for _, v := range []uint16{0, first, last, 0, last - first + 1} {
		b = binary.LittleEndian.AppendUint16(b, v)
	}
	return b
}
