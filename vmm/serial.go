package vmm

import "sync"

// Registers of a 16550A and their bits (National Semiconductor PC16550D).
const (
	uartData = 0 // RBR, THR; DLL where LCR.DLAB is set
	uartIER  = 1 // DLM where LCR.DLAB is set
	uartIIR  = 2 // FCR when written
	uartLCR  = 3
	uartMCR  = 4
	uartLSR  = 5
	uartMSR  = 6
	uartSCR  = 7

	ierReceive    = 1 << 0
	ierTransmit   = 1 << 1
	ierLineStatus = 1 << 2
	ierMask       = 0x0F

	iirNone     = 0x01
	iirTransmit = 0x02
	iirReceive  = 0x04
	iirFIFO     = 0xC0

	fcrEnable = 1 << 0
	lcrDLAB   = 1 << 7
	mcrLoop   = 1 << 4

	lsrData  = 1 << 0
	lsrEmpty = 1<<5 | 1<<6 // holding register and transmitter

	msrIdle = 1<<4 | 1<<5 | 1<<7 // CTS, DSR, DCD
)

// serial is a 16550A whose transmitter is always empty and whose receiver is
// fed from the console.
type serial struct {
	in  *consoleInput
	out *consoleOutput
	// interrupt raises the port's edge-triggered interrupt.
	interrupt func()
	// opened is called when the guest first asks for receive and line-status
	// interrupts but not for transmit ones, which is how Linux starts the port
	// when it is opened: by the kernel itself, for the first process. (A driver
	// that probes the port sets every bit.)
	opened func()

	mu          sync.Mutex // guards what follows
	ier, fcr    byte
	lcr, mcr    byte
	scratch     byte
	dll, dlm    byte
	transmitted bool // a transmit interrupt is due
	raised      bool // an interrupt has been raised and its cause remains
	wasOpened   bool
}

func (s *serial) causeLocked() byte {
	switch {
	case s.ier&ierReceive != 0 && s.in.ready():
		return iirReceive
	case s.ier&ierTransmit != 0 && s.transmitted:
		return iirTransmit
	}
	return iirNone
}

// updateLocked raises an interrupt for each cause that comes up.
func (s *serial) updateLocked() {
	pending := s.causeLocked() != iirNone
	if pending && !s.raised {
		s.interrupt()
	}
	s.raised = pending
}

// arrived tells the port of input.
func (s *serial) arrived() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.updateLocked()
}

// The registers are a byte wide: a wider access is one to each in turn.

func (s *serial) readPIO(port uint16, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range p {
		p[i] = s.readLocked(port - portCOM1 + uint16(i))
	}
	s.updateLocked()
}

func (s *serial) writePIO(port uint16, p []byte) {
	if port == portCOM1 {
		s.mu.Lock()
		data := s.lcr&lcrDLAB == 0 && s.mcr&mcrLoop == 0
		s.mu.Unlock()
		if data {
			s.out.write(p[:1]) // may wait, so not under the lock
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, v := range p {
		s.writeLocked(port-portCOM1+uint16(i), v)
	}
	s.updateLocked()
}

func (s *serial) readLocked(reg uint16) byte {
	dlab := s.lcr&lcrDLAB != 0
	switch reg {
	case uartData:
		if dlab {
			return s.dll
		}
		return s.in.next()
	case uartIER:
		if dlab {
			return s.dlm
		}
		return s.ier
	case uartIIR:
		cause := s.causeLocked()
		if cause == iirTransmit {
			s.transmitted = false // reading its cause ends it
		}
		if s.fcr&fcrEnable != 0 {
			cause |= iirFIFO
		}
		return cause
	case uartLCR:
		return s.lcr
	case uartMCR:
		return s.mcr
	case uartLSR:
		if s.in.ready() {
			return lsrEmpty | lsrData
		}
		return lsrEmpty
	case uartMSR:
		return s.modemStatusLocked()
	case uartSCR:
		return s.scratch
	}
	return 0xFF
}

// modemStatusLocked reflects the control outputs in loop-back, by which a
// driver tells a real port from a hole.
func (s *serial) modemStatusLocked() byte {
	if s.mcr&mcrLoop == 0 {
		return msrIdle
	}
	m := s.mcr
	return m&1<<5 | m&2<<3 | m&4<<4 | m&8<<4 // DTR→DSR, RTS→CTS, OUT1→RI, OUT2→DCD
}

func (s *serial) writeLocked(reg uint16, v byte) {
	dlab := s.lcr&lcrDLAB != 0
	switch reg {
	case uartData:
		if dlab {
			s.dll = v
			return
		}
		s.transmitted = true
	case uartIER:
		if dlab {
			s.dlm = v
			return
		}
		if v&ierTransmit != 0 && s.ier&ierTransmit == 0 {
			s.transmitted = true
		}
		s.ier = v & ierMask
		const opening = ierReceive | ierLineStatus
		if s.ier&(opening|ierTransmit) == opening && !s.wasOpened {
			s.wasOpened = true
			s.opened()
		}
	case uartIIR:
		s.fcr = v
	case uartLCR:
		s.lcr = v
	case uartMCR:
		s.mcr = v
	case uartSCR:
		s.scratch = v
	}
}
