package matrix

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/calfvm/calf/cmd/internal/progress"
)

// drawLocked shows the status of the targets, as far as the terminal has room.
func (s *screen) drawLocked() {
	_, rows := s.size()
	s.noteLocked(s.block.Draw(s.statusLocked(rows - 1)))
}

// statusLocked is the status in at most room lines.
func (s *screen) statusLocked(room int) []string {
	columns, _ := s.size()
	return status(s.rows, columns-1, room, time.Now())
}

// size is that of the terminal.
func (s *screen) size() (columns, rows int) {
	columns, rows, err := term.GetSize(int(s.terminal.Fd()))
	if err != nil || columns <= 0 || rows <= 0 {
		return 80, 24
	}
	return columns, rows
}

// status is a line for each target, as far as there is room: then those that run are
// shown first, and the last line counts the others.
func status(rows []*row, columns, room int, now time.Time) []string {
	show, others := rows, ""
	if len(rows) > room {
		show, others = choose(rows, max(0, room-1))
	}
	width := 0
	for _, r := range rows {
		width = max(width, utf8.RuneCountInString(r.name))
	}
	var lines []string
	for _, r := range show {
		line := fmt.Sprintf("%-*s  %-7s  %s", width, r.name, r.state, r.detail(now))
		lines = append(lines, strings.TrimRight(progress.Cut(line, columns), " "))
	}
	if others != "" {
		lines = append(lines, progress.Cut(others, columns))
	}
	return lines
}

// choose returns n of rows, in their order, and what the others are.
func choose(rows []*row, n int) (show []*row, others string) {
	rank := map[state]int{running: 0, booting: 0, failed: 1, passed: 2, waiting: 3, skipped: 4}
	order := make([]int, len(rows))
	for i := range rows {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return rank[rows[a].state] - rank[rows[b].state] })
	slices.Sort(order[:n])
	for _, i := range order[:n] {
		show = append(show, rows[i])
	}
	count := map[state]int{}
	for _, i := range order[n:] {
		count[rows[i].state]++
	}
	var parts []string
	for _, st := range []state{running, booting, failed, passed, waiting, skipped} {
		if count[st] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", count[st], st))
		}
	}
	return show, fmt.Sprintf("and %d more: %s", len(rows)-n, strings.Join(parts, ", "))
}

// detail is what the status says beside the state.
func (r *row) detail(now time.Time) string {
	switch r.state {
	case booting, running:
		return fmt.Sprintf("%3.0f s  %s", now.Sub(r.began).Seconds(), r.latest)
	case passed:
		return seconds(r.result.Seconds)
	case failed:
		return fmt.Sprintf("%d in %s  %s", r.result.ExitCode, seconds(r.result.Seconds), oneLine(r.result.Message))
	}
	return ""
}
