package vmm

import "testing"

// uart is a serial port with the interrupts it raised.
func uart() (s *serial, interrupts *int) {
	interrupts = new(int)
	in := &consoleInput{}
	in.start(nil)
	return &serial{in: in, out: newConsoleOutput(nil), interrupt: func() { *interrupts++ }, opened: func() {}}, interrupts
}

func (s *serial) get(reg uint16) byte {
	p := []byte{0}
	s.readPIO(portCOM1+reg, p)
	return p[0]
}

func (s *serial) put(reg uint16, v byte) { s.writePIO(portCOM1+reg, []byte{v}) }

// TestUARTProbe does what Linux's 8250 driver does to tell a 16550A.
func TestUARTProbe(t *testing.T) {
	s, _ := uart()
	s.put(uartIER, 0x0F)
	if got := s.get(uartIER); got != 0x0F {
		t.Errorf("IER = %#x", got)
	}
	s.put(uartIER, 0)
	s.put(uartMCR, mcrLoop|0x0A)
	if got := s.get(uartMSR) & 0xF0; got != 0x90 {
		t.Errorf("MSR in loop-back = %#x, want 0x90", got)
	}
	s.put(uartMCR, 0)
	s.put(uartIIR, fcrEnable)
	if got := s.get(uartIIR) >> 6; got != 3 {
		t.Errorf("IIR's FIFO bits = %d, want 3", got)
	}
	s.put(uartSCR, 0xA5)
	if got := s.get(uartSCR); got != 0xA5 {
		t.Errorf("SCR = %#x", got)
	}
	s.put(uartLCR, lcrDLAB)
	s.put(uartData, 12)
	s.put(uartIER, 1)
	if s.get(uartData) != 12 || s.get(uartIER) != 1 {
		t.Error("the divisor latch does not hold")
	}
	s.put(uartLCR, 0)
	if got := s.get(uartIER); got != 0 {
		t.Errorf("IER behind the divisor latch = %#x", got)
	}
}

// TestUARTInterrupts: one edge for each cause, none twice, and transmit ends
// by reading its identification.
func TestUARTInterrupts(t *testing.T) {
	s, n := uart()
	s.put(uartIER, ierTransmit)
	if *n != 1 || s.get(uartIIR) != iirTransmit || s.get(uartIIR) != iirNone {
		t.Fatalf("enabling transmit raised %d interrupts", *n)
	}
	s.put(uartData, 'x')
	if *n != 2 || s.get(uartIIR) != iirTransmit {
		t.Errorf("a byte raised %d interrupts in all, want 2", *n)
	}
	s.put(uartIER, ierReceive)
	s.in.add([]byte("ab"))
	s.arrived()
	s.arrived()
	if *n != 3 || s.get(uartIIR) != iirReceive || s.get(uartLSR)&lsrData == 0 {
		t.Errorf("input raised %d interrupts in all, want 3", *n)
	}
	if a, b := s.get(uartData), s.get(uartData); a != 'a' || b != 'b' || s.get(uartIIR) != iirNone || s.get(uartLSR)&lsrData != 0 {
		t.Errorf("read %q, %q", a, b)
	}
	s.in.add([]byte("c"))
	s.arrived()
	if *n != 4 {
		t.Errorf("new input after the port was empty raised %d interrupts in all, want 4", *n)
	}
}
