package config

import (
	"encoding/json"
	"flag"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

// keysInStructs returns every key that the struct tree has, dotted.
func keysInStructs(t reflect.Type, table string) []string {
	var keys []string
	for _, f := range fieldsOf(t, table) {
		keys = append(keys, f.name)
		ft := t.Field(f.index).Type
		if isTables(ft) {
			ft = ft.Elem()
		}
		if ft.Kind() == reflect.Struct {
			keys = append(keys, keysInStructs(ft, f.name)...)
		}
	}
	return keys
}

func TestEveryKeyHasARule(t *testing.T) {
	seen := map[string]bool{}
	for _, key := range append(keysInStructs(reflect.TypeFor[Config](), ""), targetFields()[0].name) {
		seen[key] = true
		if rules[key].doc == "" {
			t.Errorf("%s has no rule", key)
		}
	}
	for key := range rules {
		if !seen[key] {
			t.Errorf("rule %s has no field", key)
		}
	}
}

func TestDefaultsKeepTheRules(t *testing.T) {
	c := (&Config{Boot: Boot{Kernel: "k"}, Disks: []Disk{{Path: "a.qcow2"}}}).Effective()
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
}

func TestSchemaCoversEveryKey(t *testing.T) {
	text, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	if f := flag.Lookup("update"); f.Value.String() == "true" {
		if err := os.WriteFile("testdata/schema.json", text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/schema.json")
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != string(text) {
		t.Errorf("schema differs from testdata/schema.json:\n%s", text)
	}
	var schema struct {
		Properties map[string]struct {
			Properties map[string]any
			Items      struct{ Properties map[string]any }
		}
	}
	if err := json.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	for key := range rules {
		table, name, dotted := strings.Cut(key, ".")
		p, ok := schema.Properties[table]
		if !ok {
			t.Errorf("schema lacks %s", table)
		}
		if dotted && p.Properties[name] == nil && p.Items.Properties[name] == nil {
			t.Errorf("schema lacks %s", key)
		}
	}
}

// TestSchemaPatternsMatchTheParsers holds the patterns of the schema against
// what the parsers take.
func TestSchemaPatternsMatchTheParsers(t *testing.T) {
	duration := regexp.MustCompile(durationPattern)
	for _, s := range []string{"0", "1s", "1h2m3.5s", "+5m", ".5s", "1.s", "3µs", "3μs", "7ns", "", "10", "1 s", "s", "1d", "x1s", "-1s", "1s-"} {
		d, err := time.ParseDuration(s)
		if want := err == nil && d >= 0; duration.MatchString(s) != want {
			t.Errorf("pattern matches duration %q: %v, want %v", s, !want, want)
		}
	}
}
