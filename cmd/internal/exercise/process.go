package exercise

import (
	"context"
	"os/signal"
	"syscall"
	"time"
)

// maxSignal is the largest number that sigraise takes, C's NSIG.
const maxSignal = 65

// sleep is the command sleep. What finishes meanwhile is reported at once.
func (s *Session) sleep(ctx context.Context, words []string) error {
	ms, err := parseInteger(words[1])
	if err != nil || ms < 0 || ms > int64(1<<63-1)/int64(time.Millisecond) {
		return answerf("%s is not a valid number", words[1])
	}
	timer := time.NewTimer(time.Duration(ms) * time.Millisecond)
	defer timer.Stop()
	_, err = wait(ctx, s, timer.C)
	return err
}

// sigraise is the command sigraise. The open file is left as it is.
func (s *Session) sigraise(_ context.Context, words []string) error {
	n, err := parseNumber(words[1])
	switch {
	case err != nil:
		return err
	case n > maxSignal:
		return answerf("signal argument '%s' is too large to be a valid signal", words[1])
	}
	s.flush()
	return s.raise(syscall.Signal(n))
}

// abort is the command abort.
func (s *Session) abort(context.Context, []string) error {
	s.flush()
	return s.raise(syscall.SIGABRT)
}

// raise sends sig to this thread, with the action that a C program has for it.
func (s *Session) raise(sig syscall.Signal) error {
	if sig == 0 || sig == maxSignal {
		return nil
	}
	if !signal.Ignored(sig) {
		signal.Reset(sig)
		restoreDefault(sig)
	}
	return raise(sig)
}

// leave is the command quit.
func (s *Session) leave(context.Context, []string) error {
	s.quit = true
	return nil
}
