package exercise

import (
	"fmt"
	"io"
	"strings"
)

// getopt reads the options of a command as getopt(3) does: letters lists them, each
// with a colon if it takes a value; they may stand behind other arguments, and --
// ends them. It calls set for each, which may end it with an error, and returns the
// other arguments. What is wrong with an option it says to messages.
func getopt(messages io.Writer, args []string, letters string, set func(letter byte, value string) error) ([]string, error) {
	name, args := args[0], args[1:]
	var rest []string
	for ; len(args) > 0; args = args[1:] {
		word := args[0]
		if word == "--" {
			return append(rest, args[1:]...), nil
		}
		if len(word) < 2 || word[0] != '-' {
			rest = append(rest, word)
			continue
		}
		for word = word[1:]; word != ""; {
			letter := word[0]
			word = word[1:]
			at := strings.IndexByte(letters, letter)
			if at < 0 || letter == ':' {
				_, _ = fmt.Fprintf(messages, "%s: invalid option -- '%c'\n", name, letter)
				return nil, errUsage
			}
			value := ""
			if strings.HasPrefix(letters[at+1:], ":") {
				if value, word = word, ""; value == "" {
					if len(args) == 1 {
						_, _ = fmt.Fprintf(messages, "%s: option requires an argument -- '%c'\n", name, letter)
						return nil, errUsage
					}
					args = args[1:]
					value = args[0]
				}
			}
			if err := set(letter, value); err != nil {
				return nil, err
			}
		}
	}
	return rest, nil
}
