package matrix

import (
	"encoding/xml"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/cmd/internal/progress"
)

// The elements of JUnit's XML, in the order in which its schemas want them.
type (
	junitSuites struct {
		XMLName xml.Name `xml:"testsuites"`
		junitCounts
		Suite junitSuite `xml:"testsuite"`
	}
	junitSuite struct {
		junitCounts
		Timestamp string      `xml:"timestamp,attr"`
		Cases     []junitCase `xml:"testcase"`
	}
	junitCounts struct {
		Name     string `xml:"name,attr"`
		Tests    int    `xml:"tests,attr"`
		Failures int    `xml:"failures,attr"`
		Errors   int    `xml:"errors,attr"`
		Skipped  int    `xml:"skipped,attr"`
		Time     string `xml:"time,attr"`
	}
	junitCase struct {
		Name    string       `xml:"name,attr"`
		Class   string       `xml:"classname,attr"`
		Time    string       `xml:"time,attr"`
		Skipped *junitReason `xml:"skipped"`
		Error   *junitReason `xml:"error"`
		Failure *junitReason `xml:"failure"`
		Out     string       `xml:"system-out,omitempty"`
		Err     string       `xml:"system-err,omitempty"`
	}
	junitReason struct {
		Message string `xml:"message,attr"`
		Type    string `xml:"type,attr,omitempty"`
		Text    string `xml:",chardata"` // the message again, for readers that show only this
	}
)

// Single is the report of one run, which is no matrix.
func Single(name string, r launch.Result) Report {
	return Report{Targets: []Outcome{{Name: name, Result: r}}, ExitCode: r.ExitCode, Seconds: r.Seconds}
}

// JUnit writes r to w as a suite of tests with the given name: each target is a test,
// which failed if its command did, and has an error if calf or the guest is at fault.
func (r Report) JUnit(w io.Writer, name string) error {
	began := time.Now().Add(-time.Duration(r.Seconds * float64(time.Second)))
	s := junitSuite{
		junitCounts: junitCounts{Name: name, Tests: len(r.Targets), Time: junitTime(r.Seconds)},
		Timestamp:   began.UTC().Format("2006-01-02T15:04:05"),
	}
	for _, t := range r.Targets {
		c := t.junit()
		switch {
		case c.Skipped != nil:
			s.Skipped++
		case c.Error != nil:
			s.Errors++
		case c.Failure != nil:
			s.Failures++
		}
		s.Cases = append(s.Cases, c)
	}
	text, err := xml.MarshalIndent(junitSuites{junitCounts: s.junitCounts, Suite: s}, "", "  ")
	if err != nil {
		return err
	}
	_, err = io.WriteString(w, xml.Header+legible.Replace(string(text))+"\n")
	return err
}

// legible undoes what the encoder does to text beyond need. There is neither in an
// attribute.
var legible = strings.NewReplacer("&#xA;", "\n", "&#x9;", "\t")

// junit is the test that t is.
func (t Outcome) junit() junitCase {
	c := junitCase{Name: t.Name, Class: "calf", Time: junitTime(t.Seconds)}
	why := &junitReason{Message: oneLine(t.Message), Type: t.Outcome}
	switch {
	case t.Skipped():
		c.Skipped = &junitReason{Message: oneLine(t.Message)}
	case t.ExitCode == 0:
	case t.Command != nil && t.Command.Status == t.ExitCode:
		why.Message = strings.TrimPrefix(why.Message+"; ", "; ") + fmt.Sprintf("the command ended with exit code %d", t.ExitCode)
		c.Failure = why
	default:
		c.Error = why
	}
	why.Text = why.Message
	c.Out, c.Err = junitText(t.log.of(stdout)), junitText(t.log.of(stderr, message))
	if n := t.log.dropped; n > 0 {
		c.Out = fmt.Sprintf("[the first %d lines of the output are left out]\n", n) + c.Out
	}
	return c
}

// junitText is s without what no reader of XML has a use for. What is no character of
// XML at all is replaced by the encoder.
func junitText(s string) string {
	return progress.Unescaped(strings.ReplaceAll(s, "\r\n", "\n"))
}

func junitTime(seconds float64) string { return fmt.Sprintf("%.3f", seconds) }
