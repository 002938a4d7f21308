// Package wire is what the agent in a guest and the program on the host that has
// started the guest say to each other, over stream connections of the guest's
// socket device.
//
// The guest opens all connections, to Port of the host. The first line of each is an
// Opening, which says what the connection is for. The one called Control carries
// messages, a line of JSON each: the guest begins with a Hello, the host answers with
// a Start, and at the end the guest sends an Exit and waits for the end of the
// connection. All others carry bytes.
package wire

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
)

// Port is the port of the host on which it waits for its guest's agent.
const Port = 1000

// What connections are for.
const (
	Control  = "control"
	Stdin    = "stdin"
	Stdout   = "stdout" // of a terminal: what comes out of it
	Stderr   = "stderr"
	Copy     = "copy"     // a tar archive from the host, which Opening.Index numbers
	Artifact = "artifact" // one to the host, likewise
)

// Opening is the first line on a connection.
type Opening struct {
	Stream string `json:"stream"`
	Index  int    `json:"index,omitempty"`
}

// ToHost is a message of the guest. One field is set.
type ToHost struct {
	Hello *Hello `json:"hello,omitempty"`
	// Started says that the command runs.
	Started bool `json:"started,omitempty"`
	// Ended says that it does not any more. Its artifacts and an Exit follow.
	Ended bool  `json:"ended,omitempty"`
	Exit  *Exit `json:"exit,omitempty"`
	// Problem is why a command could not be run, or what went wrong beside it.
	Problem *Problem `json:"problem,omitempty"`
}

// Hello says that the guest is up, with its root in place.
type Hello struct {
	Kernel string `json:"kernel"` // its release
	// Began is when the agent did, Ready when it was done with all that comes before
	// the command, in nanoseconds since the kernel began.
	Began int64 `json:"began,omitempty"`
	Ready int64 `json:"ready,omitempty"`
}

// Exit is how the command ended.
type Exit struct {
	Code   int `json:"code"`
	Signal int `json:"signal,omitempty"` // the number of the one that ended it, or 0
	// Artifacts is how many artifacts are on their way.
	Artifacts int `json:"artifacts,omitempty"`
}

// Problem is what went wrong in the guest.
type Problem struct {
	// Kind is one of the constants below.
	Kind string `json:"kind"`
	Text string `json:"text"`
	// Index is that of the artifact.
	Index int `json:"index,omitempty"`
}

// Kinds of problems.
const (
	NotFound      = "not-found"      // there is no such command
	NotExecutable = "not-executable" // the command cannot be executed
	Setup         = "setup"          // the user or the directory cannot be had
	Uncopied      = "copy"           // a file of the host cannot be had
	ArtifactLost  = "artifact"       // an artifact could not be read
	NotSettled    = "not-settled"    // a file system that is kept is not clean
)

// ToGuest is a message of the host. One field is set.
type ToGuest struct {
	Start  *Start `json:"start,omitempty"`
	Signal int    `json:"signal,omitempty"` // for the command
	Size   *Size  `json:"size,omitempty"`   // of the terminal, anew
}

// Size is that of a terminal, in characters.
type Size struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
}

// Start is what the guest is to run.
type Start struct {
	// Args are the command and its arguments. Without any, the init of the image
	// takes over, and Time and Hostname are all that is said.
	Args    Texts  `json:"args"`
	Env     Texts  `json:"env,omitempty"` // NAME=VALUE, over what a login sets
	Workdir Text   `json:"workdir,omitempty"`
	User    string `json:"user,omitempty"` // name or number, with :GROUP if need be
	// Terminal makes one for the command, of this size; Stdin and Stdout lead to
	// it, and there is no Stderr.
	Terminal *Size `json:"terminal,omitempty"`
	// Time is the host's, in nanoseconds since 1970.
	Time     int64  `json:"time"`
	Hostname string `json:"hostname,omitempty"`
	// Keep says that the root is kept: it is written back before the end.
	Keep bool `json:"keep,omitempty"`
	// Copies are the paths that archives are unpacked to before the command runs,
	// Artifacts those that are packed after it.
	Copies    Texts `json:"copies,omitempty"`
	Artifacts Texts `json:"artifacts,omitempty"`
}

// Text is a string that need not be Unicode, as those of JSON have to be: arguments
// and paths are any bytes. It goes as base64.
type Text string

// MarshalJSON implements json.Marshaler.
func (t Text) MarshalJSON() ([]byte, error) { return json.Marshal([]byte(t)) }

// UnmarshalJSON implements json.Unmarshaler.
func (t *Text) UnmarshalJSON(b []byte) error {
	var raw []byte
	err := json.Unmarshal(b, &raw)
	*t = Text(raw)
	return err
}

// Texts are strings of that kind.
type Texts []string

// MarshalJSON implements json.Marshaler.
func (t Texts) MarshalJSON() ([]byte, error) {
	texts := make([]Text, len(t))
	for i, s := range t {
		texts[i] = Text(s)
	}
	return json.Marshal(texts)
}

// UnmarshalJSON implements json.Unmarshaler.
func (t *Texts) UnmarshalJSON(b []byte) error {
	var texts []Text
	err := json.Unmarshal(b, &texts)
	*t = make(Texts, len(texts))
	for i, s := range texts {
		(*t)[i] = string(s)
	}
	return err
}

// MaxLine bounds what the host reads as a line of a guest, MaxStart what a guest
// reads as one of the host: arguments and environment of a command.
const (
	MaxLine  = 64 << 10
	MaxStart = 8 << 20
)

// maxProblem bounds the text of a Problem, of which JSON makes up to six times as
// much.
const maxProblem = 4 << 10

// Clip cuts a text down to what a Problem can have.
func Clip(text string) string {
	if len(text) <= maxProblem {
		return text
	}
	return text[:maxProblem] + "…"
}

// Write writes v as a line.
func Write(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// Read reads a line of at most the size of r's buffer into v.
func Read(r *bufio.Reader, v any) error {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if err := json.Unmarshal(line, v); err != nil {
		return fmt.Errorf("a line that cannot be understood: %w", err)
	}
	return nil
}
