package exercise

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"time"
)

// maxTransfer is the length of the longest read or write: qemu-io's, which is the
// largest multiple of a sector in 31 bits.
const maxTransfer = 1<<31 - 512

const sectorSize = 512

// units are the suffixes of a number; each is 1024 times the one before.
const units = "bkmgtpe"

// parseNumber reads an offset or a length: a decimal number, with a fraction if a
// unit makes it whole, or a hexadecimal one. A unit is one letter.
func parseNumber(s string) (int64, error) {
	invalid := answerf("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- %s", s)
	large := answerf("Parsing error: argument too large -- %s", s)
	rest := strings.TrimPrefix(s, "+")
	base, digits := 10, "0123456789"
	if len(rest) > 1 && rest[0] == '0' && rest[1]|0x20 == 'x' {
		base, digits, rest = 16, "0123456789abcdefABCDEF", rest[2:]
	}
	whole, rest := span(rest, digits)
	if whole == "" {
		return 0, invalid
	}
	n, overflow := strconv.ParseUint(whole, base, 64)
	var fraction float64
	if base == 10 && strings.HasPrefix(rest, ".") {
		var decimals string
		decimals, rest = span(rest[1:], digits)
		f, _ := strconv.ParseFloat("0."+decimals+"0", 64) // digits only
		fraction = min(f, math.Nextafter(1, 0))
	}
	unit := 0
	if rest != "" {
		unit = strings.Index(units, strings.ToLower(rest[:1]))
		rest = rest[1:]
	}
	switch {
	case unit < 0 || rest != "" || unit == 0 && fraction != 0:
		return 0, invalid
	case overflow != nil:
		return 0, large
	}
	high, n := bits.Mul64(n, 1<<(10*unit))
	part, half := bits.Mul64(uint64(fraction*(1<<63)*2), 1<<(10*unit))
	n, carry := bits.Add64(n, part, half>>63)
	if high != 0 || carry != 0 || n > 1<<63-1 {
		return 0, large
	}
	return int64(n), nil
}

// span splits s where it ceases to consist of the given bytes.
func span(s, of string) (head, tail string) {
	tail = strings.TrimLeft(s, of)
	return s[:len(s)-len(tail)], tail
}

// parsePattern reads the value of a byte, as C writes integers.
func parsePattern(s string) (byte, error) {
	n, err := parseInteger(s)
	if err != nil || n < 0 || n > 255 {
		return 0, answerf("%s is not a valid pattern byte", s)
	}
	return byte(n), nil
}

// parseInteger reads an integer as C writes them: decimal, octal after 0 or
// hexadecimal after 0x.
func parseInteger(s string) (int64, error) {
	digits := strings.TrimLeft(s, "+-")
	if strings.ContainsAny(digits, "_oObB") && !strings.HasPrefix(strings.ToLower(digits), "0x") || strings.Contains(digits, "_") {
		return 0, strconv.ErrSyntax // only Go reads these
	}
	return strconv.ParseInt(s, 0, 64)
}

// size is a number of bytes for people.
func size(n float64) string {
	names := [...]string{"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	i := 0
	for ; n >= 1024 && i < len(names)-1; i++ {
		n /= 1024
	}
	s := fmt.Sprintf("%.3f", n)
	if i == 0 {
		s = fmt.Sprintf("%f", n)
	}
	if at := strings.Index(s, ".000"); at >= 0 {
		s = s[:at]
	}
	return s + " " + names[i]
}

// clock is a duration for people; with hours always if fixed is set.
func clock(d time.Duration, fixed bool) string {
	fraction := d.Seconds() - float64(int64(d.Seconds()))
	if s := int64(d.Seconds()); fixed || s > 0 {
		return fmt.Sprintf("%d:%02d:%05.2f", s/3600, s/60%60, float64(s%60)+fraction)
	}
	return fmt.Sprintf("%05.2f sec", fraction)
}
