package tomlpos

import (
	"errors"
	"math"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
)

// documents are the corner cases of the grammar; they seed the fuzz target.
var documents = []string{
	"",
	"# only a comment",
	"a = 1\nb = 'x' # end\n",
	"a=1\r\n[b]\r\nc=2\r\n",
	"[a.b.c]\nd = 1\n[a]\ne = 2\n[a.b]\nf = 3",
	"[[a]]\nx = 1\n[[a]]\nx = 2\n[a.sub]\ny = 3\n[[a.list]]\nz = 4\n[[a.list]]\n[[a]]\n",
	"a.b.c = 1\na.b.d = 2\n[t]\nu . v = 3",
	`"quoted key" = 1` + "\n" + `'literal.key'.x = 2` + "\n" + `"esc\u0061ped\t" = 3` + "\n" + `"" = 4`,
	"[ spaced . 'out' ]\nk = 1\n[[ also . \"this\" ]]\nk = 2",
	`s = """` + "\n[not.a.table]\nnot = 'a key'\n# no comment\n" + `"""` + "\nafter = 1",
	`s = """two quotes: """""` + "\nafter = 1",
	`s = '''two quotes: '''''` + "\nafter = 1",
	`s = """escaped \""" still in it"""` + "\nafter = 1",
	`s = "a # no comment \" = ] } \\"` + "\nafter = 1",
	`s = 'back\'` + "\nafter = 1",
	`s = ""` + "\n" + `t = ''` + "\n" + `u = """"""` + "\nafter = 1",
	"a = [1, 2, [3, 'x]'], # comment ]\n 4,\n]\nb = []",
	"a = [ {x = 1}, {x = 2, y.z = [3]} ]",
	"a = {b = {c = 1}, d.e = 2, 'f' = {}}\ng = 1",
	"a = {\n  b = 1, # comment }\n  c = 2,\n}\nd = 1",
	"d = 1979-05-27 07:32:00 # with a space\ne = 1979-05-27T07:32:00Z\nf = 07:32",
	"a = +1_000\nb = 0x_f\nc = -inf\nd = 1e-3\ne = true",
	"\t a\t=\t1 \t\n",
	"é = 1",
	"'é' = 'ü'\nb = 2",
}

// TestIndexHasTheShapeOfTheDocument compares the two trees on documents that
// are known to be valid, so that a corpus of rejected ones cannot pass.
func TestIndexHasTheShapeOfTheDocument(t *testing.T) {
	valid := 0
	for _, src := range documents {
		if compare(t, src) {
			valid++
		}
	}
	if valid < len(documents)-2 {
		t.Errorf("only %d of %d documents are valid TOML", valid, len(documents))
	}
}

func TestIndexRefusesKeysDefinedTwice(t *testing.T) {
	for _, src := range []string{
		"a.b = 0\na = 0", "a = 0\na.b = 0", "a = {b = 1}\na = 2", "a = 1\n[a]\n", "[[a]]\n[a]\n", "[a]\n[[a]]\n",
		"x = {b = 1, b = 2}",
	} {
		root, err := Index(src)
		var e *Error
		if !errors.As(err, &e) || !strings.HasSuffix(e.Message, "is defined twice") || root != nil {
			t.Errorf("Index(%q) = %v, %v; want a key defined twice", src, root, err)
		} else if c := src[e.Offset]; c != 'a' && c != 'b' {
			t.Errorf("Index(%q): error at %q", src, src[e.Offset:])
		}
	}
}

func FuzzIndex(f *testing.F) {
	for _, src := range documents {
		f.Add(src)
	}
	f.Fuzz(func(t *testing.T, src string) { compare(t, src) })
}

// compare reports whether src is TOML, and fails if the index of valid TOML
// differs in any table, array or value from what the library decodes.
func compare(t *testing.T, src string) bool {
	t.Helper()
	if !utf8.ValidString(src) || len(src) >= 3 && src[:3] == "\ufeff" {
		return false // callers refuse the one and strip the other
	}
	var want map[string]any
	_, decodeErr := toml.Decode(src, &want)
	root, err := Index(src)
	if decodeErr != nil {
		return false // only that Index returns matters
	}
	if err != nil {
		if strings.HasSuffix(err.Error(), "is defined twice") {
			return false // the library lets some of these pass
		}
		t.Fatalf("Index: %v\n%s", err, src)
	}
	compareTable(t, src, "", want, root)
	return true
}

func compareTable(t *testing.T, src, path string, want map[string]any, node *Node) {
	t.Helper()
	if node.Fields == nil {
		t.Fatalf("%s: index has no table\n%s", path, src)
	}
	for name := range node.Fields {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: index has a key %q that the document lacks\n%s", path, name, src)
		}
	}
	for name, v := range want {
		child := node.Fields[name]
		if child == nil {
			t.Fatalf("%s: index lacks key %q\n%s", path, name, src)
		}
		s := &scanner{src: src, pos: child.Key}
		parts, err := s.key()
		if err != nil || parts[0].name != name {
			t.Errorf("%s: key %q is said to stand at %q\n%s", path, name, src[child.Key:], src)
		}
		compareValue(t, src, path+"."+name, v, child)
	}
}

func compareValue(t *testing.T, src, path string, want any, node *Node) {
	t.Helper()
	switch want := want.(type) {
	case map[string]any:
		compareTable(t, src, path, want, node)
	case []map[string]any:
		items := make([]any, len(want))
		for i := range want {
			items[i] = want[i]
		}
		compareValue(t, src, path, items, node)
	case []any:
		if len(node.Items) != len(want) {
			t.Fatalf("%s: index has %d elements, want %d\n%s", path, len(node.Items), len(want), src)
		}
		for i := range want {
			compareValue(t, src, path+"[]", want[i], node.Items[i])
		}
	default:
		var doc struct{ V any }
		text := src[node.Value:node.End]
		if _, err := toml.Decode("V = "+text, &doc); err != nil {
			t.Fatalf("%s: %q is no value: %v\n%s", path, text, err, src)
		}
		equalFloats := cmp.Comparer(func(a, b float64) bool { return math.Float64bits(a) == math.Float64bits(b) })
		if diff := cmp.Diff(want, doc.V, equalFloats); diff != "" {
			t.Errorf("%s: value at %q differs (-want +got):\n%s\n%s", path, text, diff, src)
		}
	}
}
