package boards

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"lorayard/internal/metrics"
)

// Checker knows every metric of the house and what may be done with each.
type Checker struct{ families map[string]metrics.Family }

// NewChecker knows what agents and dispatchers export.
func NewChecker() Checker {
	c := Checker{map[string]metrics.Family{}}
	for _, f := range metrics.Catalog() {
		c.families[f.Name] = f
	}
	return c
}

var (
	selector = regexp.MustCompile(`([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(\{[^}]*\})?(\s*\[[^\]]+\])?`)
	matcher  = regexp.MustCompile(`([a-zA-Z_][a-zA-Z0-9_]*)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"`)
	grouping = regexp.MustCompile(`\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)`)
	quoted   = regexp.MustCompile(`"(?:[^"\\]|\\.)*"`)
	quantile = regexp.MustCompile(`histogram_quantile\s*\(`)
)

// others are series that are not ours: of Prometheus, of the Go runtime.
var others = []string{"ALERTS", "up", "process_resident_memory_bytes", "process_cpu_seconds_total", "go_goroutines"}

// Check says what is wrong with an expression: a metric or a label that does not
// exist, a value that no label has, a rate of what is no counter, a counter
// without a rate, a quantile of what is no histogram.
func (c Checker) Check(expr string) (faults []string) {
	say := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	labels := map[string]bool{"instance": true, "job": true, "le": true, "alertname": true, "severity": true}
	found := 0
	for _, m := range selector.FindAllStringSubmatchIndex(expr, -1) {
		name := expr[m[2]:m[3]]
		if !strings.HasPrefix(name, "lorayard") {
			continue
		}
		found++
		if strings.HasPrefix(name, "lorayard:") { // a recorded rule of ours
			continue
		}
		ranged := m[6] >= 0
		f, part, ok := c.family(name)
		if !ok {
			say("there is no metric %s", name)
			continue
		}
		for l := range f.Labels {
			labels[l] = true
		}
		if m[4] >= 0 {
			for _, l := range matcher.FindAllStringSubmatch(expr[m[4]:m[5]], -1) {
				values, known := f.Labels[l[1]]
				switch {
				case l[1] == "instance" || l[1] == "job" || l[1] == "le" && part == "_bucket":
				case !known:
					say("%s has no label %s", name, l[1])
				case values != nil && !strings.Contains(l[3], "$"):
					for v := range strings.SplitSeq(l[3], "|") {
						if !slices.Contains(values, v) {
							say("label %s of %s is never %q", l[1], name, v)
						}
					}
				}
			}
		}
		before := expr[:m[0]]
		call := lastCall(before)
		counts := f.Type == metrics.Counter || part != ""
		switch {
		case f.Type == metrics.Histogram && part == "":
			say("%s is a histogram: take _bucket, _sum or _count", name)
		case ranged && counts && !slices.Contains([]string{"rate", "increase", "irate"}, call):
			say("%s is a counter within %s", name, call)
		case ranged && !counts && slices.Contains([]string{"rate", "increase", "irate"}, call):
			say("%s of %s, which is a gauge", call, name)
		}
	}
	if found == 0 && !slices.ContainsFunc(others, func(o string) bool { return strings.Contains(expr, o) }) {
		say("no metric of ours in it")
	}
	for _, g := range grouping.FindAllStringSubmatch(quoted.ReplaceAllString(expr, ""), -1) {
		for l := range strings.SplitSeq(g[1], ",") {
			if l = strings.TrimSpace(l); l != "" && !labels[l] {
				say("no metric here has a label %s", l)
			}
		}
	}
	for range quantile.FindAllString(expr, -1) {
		if !strings.Contains(expr, "_bucket") || !regexp.MustCompile(`\bby\s*\([^)]*\ble\b`).MatchString(expr) {
			say("histogram_quantile needs _bucket, summed by le")
		}
	}
	return faults
}

// family is what a name is of: a histogram's parts have names of their own.
func (c Checker) family(name string) (f metrics.Family, part string, ok bool) {
	if f, ok = c.families[name]; ok {
		return f, "", true
	}
	for _, part := range []string{"_bucket", "_sum", "_count"} {
		if base, is := strings.CutSuffix(name, part); is {
			if f, ok := c.families[base]; ok && f.Type == metrics.Histogram {
				return f, part, true
			}
		}
	}
	return f, "", false
}

// lastCall is the function whose parenthesis was opened last.
func lastCall(before string) string {
	depth := 0
	for i := len(before) - 1; i >= 0; i-- {
		switch before[i] {
		case ')':
			depth++
		case '(':
			if depth > 0 {
				depth--
				continue
			}
			head := strings.TrimRight(before[:i], " ")
			return head[strings.LastIndexFunc(head, func(r rune) bool { return r != '_' && (r < 'a' || r > 'z') && (r < '0' || r > '9') })+1:]
		}
	}
	return ""
}

// Names lists every metric.
func (c Checker) Names() map[string]metrics.Family { return c.families }

// Label reports whether anything has a label of that name.
func (c Checker) Label(name string) bool {
	if name == "instance" {
		return true
	}
	for _, f := range c.families {
		if _, has := f.Labels[name]; has {
			return true
		}
	}
	return false
}
