// Package cost turns GPU time into money. It exists so that every price in the
// system comes from one piece of integer arithmetic: no float ever holds an
// amount, so a bill that is derived twice is the same bill. It is pure: it does
// no I/O and reads no clock.
package cost

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"time"
)

const (
	microsPerDollar = 1_000_000
	microsPerCent   = microsPerDollar / 100
)

// ErrAmount is wrapped by every error of ParseUSD.
var ErrAmount = errors.New("not an amount in dollars")

// MicroUSD is an amount of money in millionths of a US dollar.
type MicroUSD int64

// ParseUSD reads a decimal amount in dollars such as "3.50", as a rate card or
// a numeric column spells it. More than six decimals are refused and not
// rounded: a price that silently differs from the card is worse than an error.
func ParseUSD(s string) (MicroUSD, error) {
	digits, negative := strings.CutPrefix(s, "-")
	whole, fraction, dotted := strings.Cut(digits, ".")
	if !decimal(whole) || (dotted && !decimal(fraction)) || len(fraction) > 6 {
		return 0, fmt.Errorf("parse %q: %w", s, ErrAmount)
	}
	micros, err := strconv.ParseInt(whole+fraction+"000000"[len(fraction):], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("parse %q: out of range: %w", s, ErrAmount)
	}
	if negative {
		micros = -micros
	}
	return MicroUSD(micros), nil
}

func decimal(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// String is the exact amount for people and logs: "$1.234567".
func (m MicroUSD) String() string {
	sign, n := m.split()
	return fmt.Sprintf("%s$%d.%06d", sign, n/microsPerDollar, n%microsPerDollar)
}

// Cents rounds to whole cents, half away from zero, as Postgres rounds a
// numeric: for the amounts of a bill, which are never negative, half up.
func (m MicroUSD) Cents() int64 {
	sign, n := m.split()
	cents := int64((n + microsPerCent/2) / microsPerCent)
	if sign != "" {
		return -cents
	}
	return cents
}

// Numeric is the amount rounded to cents as a numeric(10,2) column takes it:
// "1.23". The column ends at 99999999.99; Numeric does not.
func (m MicroUSD) Numeric() string {
	sign, n := MicroUSD(m.Cents()).split()
	if n == 0 {
		sign = ""
	}
	return fmt.Sprintf("%s%d.%02d", sign, n/100, n%100)
}

// split gives the sign and the magnitude, which for the smallest int64 is one
// more than an int64 holds.
func (m MicroUSD) split() (string, uint64) {
	if m < 0 {
		return "-", -uint64(m)
	}
	return "", uint64(m)
}

// Rate is the price of one device.
type Rate struct {
	PerHour MicroUSD // for one hour of one device
}

// Price is rate times d, rounded down to a whole micro-dollar, so that a user
// is never charged for a part that was not used. The result is exact for any
// duration; an amount beyond MicroUSD stays at the largest one. Time or rates
// below zero cost nothing.
//
// Each call rounds once: price the whole time of an attempt where you can,
// since n intervals priced apart may come to n-1 micro-dollars less.
func Price(rate Rate, d time.Duration) MicroUSD {
	if rate.PerHour <= 0 || d <= 0 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(rate.PerHour), uint64(d))
	if hi >= uint64(time.Hour) {
		return math.MaxInt64
	}
	micros, _ := bits.Div64(hi, lo, uint64(time.Hour))
	return MicroUSD(min(micros, math.MaxInt64))
}
