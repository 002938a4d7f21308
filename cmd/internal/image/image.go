// Package image does what the verbs of calf image do, over the engines for QCOW2
// and raw images: it knows options, results and their two forms, for people and as
// qemu-img's JSON. It knows no flags and ends no program.
package image

import (
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/docker/go-units"
)

// The formats of images.
const (
	QCOW2 = "qcow2"
	Raw   = "raw"
)

// FormatOf returns the format of the image at path: given if it is not empty,
// else what the name says. What the file holds decides nothing, because a guest
// may have written it.
func FormatOf(path, given string) (string, error) {
	switch strings.ToLower(given) {
	case QCOW2, Raw:
		return strings.ToLower(given), nil
	case "":
		if strings.EqualFold(filepath.Ext(path), ".qcow2") {
			return QCOW2, nil
		}
		return Raw, nil
	}
	return "", fmt.Errorf("the format %q is not supported: use %s or %s", given, QCOW2, Raw)
}

// ParseSize reads a size in qemu-img's form: a number of bytes, also hexadecimal, or
// one with a fraction and a unit from k to E, which are powers of 1024.
func ParseSize(s string) (int64, error) {
	n, err := parseSize(s)
	if err != nil || n < 0 || strings.ContainsAny(s, " +-_") {
		return 0, fmt.Errorf("%q is no size: write bytes, or a number with one of the units k, M, G, T, P, E", s)
	}
	return n, nil
}

func parseSize(s string) (int64, error) {
	// The library counts in floating point, and has no exabytes.
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return n, nil
	}
	if digits, ok := strings.CutPrefix(strings.ToLower(s), "0x"); ok {
		return strconv.ParseInt(digits, 16, 64)
	}
	if number, ok := strings.CutSuffix(strings.ToUpper(s), "E"); ok {
		n, err := units.RAMInBytes(number + "P")
		if n > math.MaxInt64>>10 {
			return 0, strconv.ErrRange
		}
		return n << 10, err
	}
	if strings.ContainsAny(s, "eE") { // an exponent
		return 0, strconv.ErrSyntax
	}
	return units.RAMInBytes(s)
}
