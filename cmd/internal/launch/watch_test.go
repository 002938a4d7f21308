package launch

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// buttons records what signals did to a machine.
type buttons []string

func (b *buttons) PowerButton() error { *b = append(*b, "power"); return nil }
func (b *buttons) ResumeDisks()       { *b = append(*b, "resume") }

// TestSignalsReachTheMachine checks what each signal of a sequence does to a
// machine, and which one ends the run.
func TestSignalsReachTheMachine(t *testing.T) {
	for _, tt := range []struct {
		name    string
		signals []unix.Signal
		want    []string
		ends    bool
	}{
		{"continue", []unix.Signal{unix.SIGCONT, unix.SIGCONT}, []string{"resume", "resume"}, false},
		{"one interrupt", []unix.Signal{unix.SIGCONT, unix.SIGINT, unix.SIGCONT}, []string{"resume", "power", "resume"}, false},
		{"two", []unix.Signal{unix.SIGTERM, unix.SIGTERM}, []string{"power"}, true},
		{"quit", []unix.Signal{unix.SIGQUIT}, nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, s := watch(&bytes.Buffer{}, 0, nil)
			defer s.release()
			w.handle(unix.SIGCONT) // before there is a machine
			var got buttons
			w.control(&got, nil)
			for _, sig := range tt.signals {
				w.handle(sig)
			}
			if !slices.Equal(got, tt.want) || w.Err() != nil != tt.ends {
				t.Errorf("did %v, ended with %v; want %v, %v", got, w.Err(), tt.want, tt.ends)
			}
		})
	}
}

// TestSignalsOfAnother runs several watches beside each other, each with signals of its
// own, which the process does not get.
func TestSignalsOfAnother(t *testing.T) {
	var said [2]bytes.Buffer
	var runs [2]*watched
	var to [2]chan os.Signal
	for i := range runs {
		to[i] = make(chan os.Signal)
		w, s := watch(&said[i], 0, to[i])
		defer s.release()
		w.control(&buttons{}, nil)
		runs[i] = w
	}
	to[0] <- unix.SIGTERM
	to[0] <- unix.SIGTERM
	<-runs[0].Done()
	if n := strings.Count(said[0].String(), "\n"); n != 1 || said[1].Len() > 0 || runs[1].Err() != nil {
		t.Errorf("the runs said %q and %q, and the second one ended with %v", &said[0], &said[1], runs[1].Err())
	}
	to[1] <- unix.SIGTERM
	to[1] <- unix.SIGTERM
	<-runs[1].Done()
}
