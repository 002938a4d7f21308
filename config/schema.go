package config

import (
	"encoding/json"
	"fmt"
	"reflect"
	"time"
)

// durationPattern is the form of the durations that a rule allows.
const durationPattern = `^\+?(0|([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+$`

// Schema returns the JSON schema of the file, for editors and other tools.
func Schema() ([]byte, error) {
	example := (&Config{Disks: []Disk{{}}, Copies: []Copy{{}}, Artifacts: []Artifact{{}}}).Effective()
	root := tableSchema("", reflect.ValueOf(example).Elem())
	root["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	root["title"] = "calf configuration"
	text, err := json.MarshalIndent(root, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("config: encode schema: %w", err)
	}
	return append(text, '\n'), nil
}

// tableSchema describes a table; defaults is the struct behind it, filled with
// what holds where nothing is said.
func tableSchema(table string, defaults reflect.Value) map[string]any {
	properties := map[string]any{}
	fields := fieldsOf(defaults.Type(), table)
	for _, f := range fields {
		v := defaults.Field(f.index)
		var s map[string]any
		switch {
		case v.Kind() == reflect.Struct:
			s = tableSchema(f.name, v)
		case f.key == "target":
			s = map[string]any{"type": "array", "items": targetSchema()}
		case isTables(v.Type()):
			s = map[string]any{"type": "array", "items": tableSchema(f.name, v.Index(0))}
		default:
			s = f.rule.schema(v.Type())
			if !v.IsZero() && f.key != "queues" { // whose default is the number of CPUs
				s["default"] = v.Interface()
			}
		}
		s["description"] = f.rule.doc
		properties[f.key] = s
	}
	return objectSchema(fields, properties)
}

// targetSchema describes a table [[target]], most of whose keys are those of the top.
func targetSchema() map[string]any {
	properties := map[string]any{}
	fields := targetFields()
	for _, f := range fields {
		s := map[string]any{"$ref": "#/properties/" + f.key}
		if f.key == "name" {
			s = f.rule.schema(reflect.TypeFor[string]())
			s["description"] = f.rule.doc
		}
		properties[f.key] = s
	}
	return objectSchema(fields, properties)
}

// objectSchema describes a table that has the given fields.
func objectSchema(fields []field, properties map[string]any) map[string]any {
	s := map[string]any{"type": "object", "properties": properties, "additionalProperties": false}
	var required []string
	for _, f := range fields {
		if f.rule.required != "" {
			required = append(required, f.key)
		}
	}
	if required != nil {
		s["required"] = required
	}
	return s
}

// schema describes a value of type t.
func (r rule) schema(t reflect.Type) map[string]any {
	switch t {
	case reflect.TypeFor[bool]():
		return map[string]any{"type": "boolean", "default": false}
	case reflect.TypeFor[*bool]():
		return map[string]any{"type": "boolean"}
	case reflect.TypeFor[int]():
		if !r.powerOfTwo {
			return map[string]any{"type": "integer", "minimum": r.min, "maximum": r.max}
		}
		var powers []uint64
		for n := r.min; n <= r.max; n *= 2 {
			powers = append(powers, n)
		}
		return map[string]any{"type": "integer", "enum": powers}
	case reflect.TypeFor[Size]():
		number := map[string]any{"type": "integer", "minimum": r.min, "maximum": r.max}
		if r.multipleOf > 0 {
			number["multipleOf"] = r.multipleOf
		}
		return map[string]any{"anyOf": []any{number, map[string]any{"type": "string", "pattern": sizePattern}}}
	case reflect.TypeFor[time.Duration]():
		return map[string]any{"type": "string", "pattern": durationPattern}
	case reflect.TypeFor[[]string]():
		return map[string]any{"type": "array", "items": r.schema(reflect.TypeFor[string]())}
	case reflect.TypeFor[map[string]string]():
		return map[string]any{"type": "object", "additionalProperties": map[string]any{"type": "string"}}
	}
	s := map[string]any{"type": "string"}
	switch {
	case len(r.values) > 0:
		s["enum"] = r.values
	case r.path:
		s["minLength"] = 1
	case r.guest:
		s["pattern"] = "^/"
	case r.fileName:
		s["pattern"], s["maxLength"] = `^[^/{}]*[^./{}][^/{}]*$`, r.max
	case r.max > 0:
		s["maxLength"] = r.max
	}
	return s
}
