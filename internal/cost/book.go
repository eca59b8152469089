package cost

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Entry says that from From on, until a later entry of the same class, a
// device of Class costs Rate.
type Entry struct {
	Class string // GPU class as the app spells it, such as "A100-80GB"
	From  time.Time
	Rate  Rate
}

// Book is a rate card: effective-dated rates by GPU class. The zero Book knows
// no rates. A Book does not change and may be shared.
type Book struct {
	byClass map[string][]Entry // ascending by From
}

// NewBook makes a book of entries in any order. It joins everything that is
// wrong with them: a class without a name, a rate below zero, two rates of one
// class from the same instant.
func NewBook(entries ...Entry) (Book, error) {
	var errs []error
	byClass := make(map[string][]Entry)
	for i, e := range entries {
		if e.Class == "" {
			errs = append(errs, fmt.Errorf("rate %d: no GPU class", i+1))
		}
		if e.Rate.PerHour < 0 {
			errs = append(errs, fmt.Errorf("rate %d: %s at %s an hour is below zero", i+1, e.Class, e.Rate.PerHour))
		}
		byClass[e.Class] = append(byClass[e.Class], e)
	}
	for class, es := range byClass {
		slices.SortStableFunc(es, func(a, b Entry) int { return a.From.Compare(b.From) })
		for i := 1; i < len(es); i++ {
			if es[i].From.Equal(es[i-1].From) {
				errs = append(errs, fmt.Errorf("two rates for %s from %s", class, es[i].From.UTC().Format(time.RFC3339Nano)))
			}
		}
	}
	if len(errs) > 0 {
		slices.SortStableFunc(errs, func(a, b error) int { return cmp.Compare(a.Error(), b.Error()) })
		return Book{}, errors.Join(errs...)
	}
	return Book{byClass: byClass}, nil
}

// At is the rate of class at t. It is false when the book has no rate that
// early: a device without a price must not be lent, not be lent for nothing.
func (b Book) At(class string, t time.Time) (Rate, bool) {
	es := b.byClass[class]
	after, found := slices.BinarySearchFunc(es, t, func(e Entry, t time.Time) int { return e.From.Compare(t) })
	if found {
		return es[after].Rate, true
	}
	if after == 0 {
		return Rate{}, false
	}
	return es[after-1].Rate, true
}

// Classes names every class that has a rate at t, sorted.
func (b Book) Classes(t time.Time) []string {
	var names []string
	for class := range b.byClass {
		if _, ok := b.At(class, t); ok {
			names = append(names, class)
		}
	}
	slices.Sort(names)
	return names
}
