package acpi

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const testBase = 0xE0000

func testConfig(cpus int) Config {
	return Config{
		CPUs: cpus, LocalAPIC: 0xFEE0_0000, IOAPIC: 0xFEC0_0000,
		ECAM: 0xE000_0000, PCIWindow: 0xC000_0000, PCIWindowSize: 0x2000_0000,
		SCI: 9, PM1Event: 0x600, PM1Control: 0x604, SleepTypeS5: 5,
		ResetPort: 0xCF9, ResetValue: 6, Serial: 0x3F8, SerialIRQ: 4, PVPanic: 0x505,
		INTA: []uint32{16, 17, 18},
	}
}

// tablesOf walks the tables as a kernel does: from the root pointer, by
// address, checking signatures, lengths and checksums.
func tablesOf(t *testing.T, blob []byte) map[string][]byte {
	t.Helper()
	le := binary.LittleEndian
	at := func(addr uint64) []byte {
		if addr < testBase || addr >= testBase+uint64(len(blob)) {
			t.Fatalf("a table at %#x, outside the tables", addr)
		}
		return blob[addr-testBase:]
	}
	if string(blob[:8]) != "RSD PTR " || checksum(blob[:20]) != 0 || checksum(blob[:36]) != 0 {
		t.Fatalf("bad root pointer % x", blob[:36])
	}
	tables := make(map[string][]byte)
	take := func(addr uint64) []byte {
		b := at(addr)
		b = b[:le.Uint32(b[4:])]
		if checksum(b) != 0 {
			t.Errorf("%s: bad checksum", b[:4])
		}
		tables[string(b[:4])] = b
		return b
	}
	xsdt := take(le.Uint64(blob[24:]))
	for p := xsdt[headerSize:]; len(p) > 0; p = p[8:] {
		take(le.Uint64(p))
	}
	fadt := tables["FACP"]
	take(le.Uint64(fadt[140:]))
	if facs := at(uint64(le.Uint32(fadt[36:]))); string(facs[:4]) != "FACS" || le.Uint32(fadt[36:])%64 != 0 {
		t.Errorf("FACS at %#x is %q", le.Uint32(fadt[36:]), facs[:4])
	}
	return tables
}

func TestTables(t *testing.T) {
	for _, cpus := range []int{1, 2, 16, 254} {
		tables := tablesOf(t, Build(testBase, testConfig(cpus)))
		for _, name := range []string{"XSDT", "FACP", "DSDT", "APIC", "MCFG"} {
			if tables[name] == nil {
				t.Errorf("%d CPUs: no %s", cpus, name)
			}
		}
		apics := 0
		for p := tables["APIC"][headerSize+8:]; len(p) > 0; p = p[p[1]:] {
			if p[0] == 0 {
				if int(p[3]) != apics || p[4] != 1 {
					t.Errorf("local APIC entry %d is % x", apics, p[:8])
				}
				apics++
			}
		}
		if apics != cpus {
			t.Errorf("the MADT lists %d processors, want %d", apics, cpus)
		}
	}
}

// TestDisassemble has ACPICA's own compiler read every table and compile what
// it read again, without an error.
func TestDisassemble(t *testing.T) {
	iasl, err := exec.LookPath("iasl")
	if err != nil {
		t.Skip("iasl (acpica-tools) is not installed")
	}
	dir := t.TempDir()
	for name, b := range tablesOf(t, Build(testBase, testConfig(4))) {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file+".aml", b, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(iasl, "-d", file+".aml").CombinedOutput(); err != nil || strings.Contains(string(out), "Error") {
			t.Fatalf("iasl -d %s: %v\n%s", name, err, out)
		}
		if name == "XSDT" {
			continue // its compiler wants the tables it points at
		}
		if out, err := exec.Command(iasl, file+".dsl").CombinedOutput(); err != nil || !strings.Contains(string(out), "0 Errors") && name == "DSDT" {
			dsl, _ := os.ReadFile(file + ".dsl")
			t.Fatalf("iasl %s: %v\n%s\n%s", name, err, out, dsl)
		}
	}
}

func TestPackageLength(t *testing.T) {
	for _, n := range []int{0, 1, 62, 63, 64, 4093, 4094, 5000, 1 << 19} {
		b := pkg(term{0x10}, make([]byte, n))
		lead := b[1]
		extra := int(lead >> 6)
		length := int(lead & 0x3F)
		if extra > 0 {
			length = int(lead & 0xF)
			for i := range extra {
				length |= int(b[2+i]) << (4 + 8*i)
			}
		}
		if length != len(b)-1 {
			t.Errorf("a body of %d bytes: length says %d, want %d", n, length, len(b)-1)
		}
	}
}
