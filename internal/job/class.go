package job

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Class is one row of the table of GPU classes: what a job may ask for, what a
// device counts as, and what its time costs are all told in these names.
type Class struct {
	Name string
	// Words are all in the driver's name of such a device, in lower case.
	Words []string
	// LeastGiB of memory tells two sizes of one name apart, and a whole device
	// from the slice that a cloud rents out under the same name (an A10-4Q).
	// Drivers report up to 7 % less than the label says.
	LeastGiB int64
	// GB of memory that the label promises.
	GB int
}

// Classes is the table: the app's four names first, then what else is rented
// out. The first row that fits a device is its class. Sizes are those of the
// vendor's data sheets.
func Classes() []Class { return slices.Clone(classes) }

var classes = []Class{
	{"A100-80GB", []string{"a100"}, 60, 80},
	{"A100-40GB", []string{"a100"}, 30, 40},
	{"H100", []string{"h100"}, 70, 80},
	{"V100-32GB", []string{"v100"}, 28, 32},
	{"V100-16GB", []string{"v100"}, 14, 16},
	{"H200", []string{"h200"}, 130, 141},
	{"GH200", []string{"gh200"}, 88, 96},
	{"B200", []string{"b200"}, 160, 180},
	{"L40S", []string{"l40s"}, 40, 48},
	{"L40", []string{"l40"}, 40, 48},
	{"L4", []string{"l4"}, 20, 24},
	{"A10G", []string{"a10g"}, 20, 24},
	{"A10", []string{"a10"}, 20, 24},
	{"A40", []string{"a40"}, 40, 48},
	{"RTX-A6000", []string{"a6000"}, 40, 48},
	{"RTX-6000-Ada", []string{"rtx", "6000", "ada"}, 40, 48},
	{"RTX-4090", []string{"4090"}, 20, 24},
	{"RTX-3090", []string{"3090"}, 20, 24},
	{"RTX-5090", []string{"5090"}, 28, 32},
	{"T4", []string{"t4"}, 13, 16},
}

// Wish says which devices a job takes: any of the classes, or any device of a
// class of the table with memory in the range. The zero Wish takes every class
// of the table. MIG instances are taken only by their name (MIG-9GB): neither
// "any" nor a range means a slice of a GPU. A device whose name the table does
// not know is never taken: nobody can say what it would cost.
type Wish struct {
	Classes []string // in the table's order
	MinGB   int      // of the range, by the label; 0: no least
	MaxGB   int      // 0: no most
}

// Any reports whether every class of the table will do.
func (w Wish) Any() bool { return len(w.Classes) == 0 && !w.ranged() }

func (w Wish) ranged() bool { return w.MinGB > 0 || w.MaxGB > 0 }

// Matches reports whether a device of class with memoryBytes will do; 0 bytes
// stand for what the label promises.
func (w Wish) Matches(class string, memoryBytes int64) bool {
	if slices.Contains(w.Classes, class) {
		return true
	}
	i := slices.IndexFunc(classes, func(c Class) bool { return c.Name == class })
	if i < 0 || !w.ranged() {
		return i >= 0 && w.Any()
	}
	// Some classes are sold larger than their row says: an H100 NVL has 94 GB.
	gb := max(classes[i].GB, int(math.Round(float64(memoryBytes)/(1<<30))))
	return gb >= w.MinGB && (w.MaxGB == 0 || gb <= w.MaxGB)
}

// Admits lists the classes on which a job with this wish may land, in the
// table's order; MIG instances last.
func (w Wish) Admits() []string {
	var out []string
	for _, c := range classes {
		if w.Matches(c.Name, 0) {
			out = append(out, c.Name)
		}
	}
	for _, c := range w.Classes {
		if !slices.Contains(out, c) {
			out = append(out, c)
		}
	}
	return out
}

// labelGB is the memory that the name of a class promises, 0 if unknown.
func labelGB(name string) int {
	for _, c := range classes {
		if c.Name == name {
			return c.GB
		}
	}
	if m := mig.FindStringSubmatch(strings.ToLower(name)); m != nil {
		gb, _ := strconv.Atoi(m[1]) // three digits
		return gb
	}
	return 0
}

// String is the wish in the grammar of ParseWish: "A100-80GB|H100|48GB..".
func (w Wish) String() string {
	parts := slices.Clone(w.Classes)
	switch {
	case w.Any():
		return "any"
	case w.MinGB > 0 && w.MinGB == w.MaxGB:
		parts = append(parts, fmt.Sprintf("%dGB", w.MinGB))
	case w.MinGB > 0 && w.MaxGB > 0:
		parts = append(parts, fmt.Sprintf("%dGB..%dGB", w.MinGB, w.MaxGB))
	case w.MinGB > 0:
		parts = append(parts, fmt.Sprintf("%dGB..", w.MinGB))
	case w.MaxGB > 0:
		parts = append(parts, fmt.Sprintf("..%dGB", w.MaxGB))
	}
	return strings.Join(parts, "|")
}

// MarshalText gives the wish as String does.
func (w Wish) MarshalText() ([]byte, error) { return []byte(w.String()), nil }

// UnmarshalText reads what MarshalText gave. A class that has left the table
// since is kept: the job waits and says so, instead of blocking all others.
func (w *Wish) UnmarshalText(text []byte) error {
	read, unknown, err := parseWish(string(text))
	if err != nil {
		return err
	}
	read.Classes = append(read.Classes, unknown...)
	*w = read
	return nil
}

// ParseWish reads a wish as a person writes it. Names of the table in any case
// and with any of "-", "_", " " or nothing between the words ("a100_80gb"), with
// the vendor before them ("nvidia:H100"), with the size behind them
// ("H100-80GB"), or of a family in all its sizes ("A100"); "MIG-9GB"; "any";
// memory as "24GB..", "24GB+", "24GB..48GB", "..48GB"; and several of these with
// "|" or "," between them, any of which will do. A bare "40GB" means 40 and not
// more: at least has a spelling of its own, and nobody pays for a larger device
// than the one that they named.
func ParseWish(text string) (Wish, error) {
	w, unknown, err := parseWish(text)
	if err == nil && len(unknown) > 0 {
		err = fmt.Errorf("%q is not known: choose from %s, any, or memory as 24GB.. or 24GB..48GB", unknown[0], strings.Join(names(), ", "))
	}
	if err != nil {
		return Wish{}, err
	}
	return w, nil
}

func names() (out []string) {
	for _, c := range classes {
		out = append(out, c.Name)
	}
	return out
}

var (
	memory = regexp.MustCompile(`^(?:([1-9]\d{0,3})(?:g|gb|gib)?)?\.\.(?:([1-9]\d{0,3})(?:g|gb|gib)?)?$`)
	exact  = regexp.MustCompile(`^([1-9]\d{0,3})(?:g|gb|gib)(\+?)$`)
	mig    = regexp.MustCompile(`^mig-(\d{1,3})gb$`)
	gap    = strings.NewReplacer("-", "", "_", "", " ", "")
)

// parseWish also returns the names that it does not know, as they were given.
func parseWish(text string) (w Wish, unknown []string, err error) {
	if len(text) > 500 {
		return Wish{}, nil, errors.New("the text is too long: give at most 500 bytes")
	}
	everything := false
	for part := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == '|' || r == ',' }) {
		part = strings.TrimSpace(part)
		low := strings.ToLower(part)
		low = strings.TrimSpace(strings.TrimPrefix(strings.TrimPrefix(low, "nvidia:"), "nvidia "))
		low, _ = strings.CutPrefix(low, "nvidia-")
		tight := strings.ReplaceAll(low, " ", "")
		lo, hi, isRange := readRange(tight)
		switch {
		case low == "any":
			everything = true
		case isRange && w.ranged():
			return Wish{}, nil, fmt.Errorf("%q names memory twice: give one range", text)
		case isRange && hi > 0 && lo > hi:
			return Wish{}, nil, fmt.Errorf("%q goes from %d down to %d: give the smaller one first", part, lo, hi)
		case isRange && lo == 0 && hi == 0:
			everything = true
		case isRange:
			w.MinGB, w.MaxGB = lo, hi
		case mig.MatchString(tight):
			w.Classes = append(w.Classes, "MIG-"+strings.ToUpper(strings.TrimPrefix(tight, "mig-")))
		case low != "":
			found := named(gap.Replace(low))
			if len(found) == 0 {
				unknown = append(unknown, part)
			}
			w.Classes = append(w.Classes, found...)
		}
	}
	if !everything && len(w.Classes)+len(unknown) == 0 && !w.ranged() {
		return Wish{}, nil, fmt.Errorf("%q names no GPU: choose from %s, or any", text, strings.Join(names(), ", "))
	}
	if everything {
		// "any" swallows the rest. Whoever would also take MIG instances says
		// "MIG-9GB|1GB..".
		return Wish{}, unknown, nil
	}
	order := func(name string) int {
		if i := slices.Index(names(), name); i >= 0 {
			return i
		}
		return len(classes)
	}
	slices.SortFunc(w.Classes, func(a, b string) int {
		return cmp.Or(cmp.Compare(order(a), order(b)), cmp.Compare(labelGB(a), labelGB(b)), cmp.Compare(a, b))
	})
	w.Classes = slices.Compact(w.Classes)
	return w, unknown, nil
}

func readRange(text string) (lo, hi int, ok bool) {
	if m := memory.FindStringSubmatch(text); m != nil {
		lo, _ = strconv.Atoi(m[1]) // at most four digits; none is 0
		hi, _ = strconv.Atoi(m[2])
		return lo, hi, true
	}
	if m := exact.FindStringSubmatch(text); m != nil {
		lo, _ = strconv.Atoi(m[1])
		if m[2] == "" {
			hi = lo
		}
		return lo, hi, true
	}
	return 0, 0, false
}

// named gives the classes that a name without gaps stands for: one class, or a
// family of them that differ in size only.
func named(tight string) (family []string) {
	for _, c := range classes {
		name := gap.Replace(strings.ToLower(c.Name))
		if tight == name || tight == fmt.Sprintf("%s%dgb", name, c.GB) {
			return []string{c.Name}
		}
		if tight == strings.Join(c.Words, "") {
			family = append(family, c.Name)
		}
	}
	return family
}
