package matrix

import (
	"encoding/json"
	"encoding/xml"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/calfvm/calf/cmd/internal/launch"
)

// sample is a report with a target of each kind.
func sample() Report {
	talk := log{dropped: 3}
	talk.add(line{stream: stdout, text: "FAIL: <a> & \"b\"\x00\xff ]]>\r\n"})
	talk.add(line{stream: stderr, text: "\x1b[31mred\x1b[0m\n"})
	talk.add(line{stream: message, text: "calf: lost"})
	outcome7 := outcome(7)
	outcome7.Message = `artifact "x" is not there`
	return Report{ExitCode: 7, Seconds: 4.5, Targets: []Outcome{
		{Name: "good", Result: outcome(0)},
		{Name: "bad <&>", Result: outcome7, log: talk},
		{Name: "late", Result: launch.Result{Outcome: "timeout", ExitCode: 124, Message: "timeout: the run had not ended", Seconds: 2}},
		// The command ended well, and calf did not.
		{Name: "half", Result: launch.Result{Outcome: "exited", ExitCode: 125, Message: "not everything", Command: &launch.CommandResult{}}},
		{Name: "none", Result: launch.NotStarted(2)},
	}}
}

func junit(t *testing.T, r Report) string {
	t.Helper()
	var s strings.Builder
	if err := r.JUnit(&s, "ci.toml"); err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`timestamp="\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"`).ReplaceAllString(s.String(), `timestamp=""`)
}

func TestJUnit(t *testing.T) {
	const want = `<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="ci.toml" tests="5" failures="1" errors="2" skipped="1" time="4.500">
  <testsuite name="ci.toml" tests="5" failures="1" errors="2" skipped="1" time="4.500" timestamp="">
    <testcase name="good" classname="calf" time="1.250"></testcase>
    <testcase name="bad &lt;&amp;&gt;" classname="calf" time="1.250">
      <failure message="artifact &#34;x&#34; is not there; the command ended with exit code 7" type="exited">artifact &#34;x&#34; is not there; the command ended with exit code 7</failure>
      <system-out>[the first 3 lines of the output are left out]
FAIL: &lt;a&gt; &amp; &#34;b&#34;�� ]]&gt;
</system-out>
      <system-err>red
calf: lost</system-err>
    </testcase>
    <testcase name="late" classname="calf" time="2.000">
      <error message="timeout: the run had not ended" type="timeout">timeout: the run had not ended</error>
    </testcase>
    <testcase name="half" classname="calf" time="0.000">
      <error message="not everything" type="exited">not everything</error>
    </testcase>
    <testcase name="none" classname="calf" time="0.000">
      <skipped message="signal 2 (interrupt) came before its turn"></skipped>
    </testcase>
  </testsuite>
</testsuites>
`
	got := junit(t, sample())
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("it differs:\n%s", diff)
	}
	if err := xml.Unmarshal([]byte(got), &junitSuites{}); err != nil {
		t.Error(err)
	}
	if out, err := exec.Command("xmllint", "--version").CombinedOutput(); err != nil {
		t.Logf("without xmllint: %v %s", err, out)
		return
	}
	lint := exec.Command("xmllint", "--noout", "-")
	lint.Stdin = strings.NewReader(got)
	if out, err := lint.CombinedOutput(); err != nil {
		t.Errorf("xmllint: %v\n%s", err, out)
	}
}

// One run is a suite of one test, without output, which went elsewhere.
func TestJUnitOfOneRun(t *testing.T) {
	r := Single("debian.qcow2", launch.Result{Outcome: "panic", ExitCode: 255, Message: "the guest's kernel panicked", Seconds: 3})
	if got := junit(t, r); !strings.Contains(got, `tests="1" failures="0" errors="1"`) ||
		!strings.Contains(got, `<testcase name="debian.qcow2" classname="calf" time="3.000">`) || strings.Contains(got, "system-") {
		t.Errorf("got %s", got)
	}
}

// A target has the keys of a single result, and its name.
func TestReportAsJSON(t *testing.T) {
	text, err := json.Marshal(sample())
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	targets := got["targets"].([]any)
	want := map[string]any{
		"name": "bad <&>", "outcome": "exited", "exit_code": 7.0, "message": `artifact "x" is not there`, "duration_seconds": 1.25,
		"command": map[string]any{"status": 7.0, "kernel": ""},
	}
	if diff := cmp.Diff(want, targets[1]); diff != "" || len(targets) != 5 || got["exit_code"] != 7.0 || got["duration_seconds"] != 4.5 {
		t.Errorf("got %s; the second target differs:\n%s", text, diff)
	}
}
