package cost_test

import (
	"errors"
	"math"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"lorayard/internal/cost"
)

const year = 365 * 24 * time.Hour

func TestPriceIsExactAndRoundsDown(t *testing.T) {
	for _, tc := range []struct {
		perHour cost.MicroUSD
		d       time.Duration
		want    cost.MicroUSD
	}{
		{3_500_000, time.Hour, 3_500_000},
		{3_500_000, time.Second, 972}, // 972.2
		{4_200_000, 90 * time.Minute, 6_300_000},
		{1, time.Hour - 1, 0},
		{3_599, time.Second, 0},
		{3_600, time.Second, 1},
		{4_200_000, 290 * year, 10_669_680_000_000},
		{math.MaxInt64, math.MaxInt64, math.MaxInt64},
		{math.MaxInt64, time.Hour, math.MaxInt64},
		{math.MaxInt64, time.Hour + 1, math.MaxInt64},
		{math.MaxInt64, time.Hour - 1, 9_223_372_036_852_213_759},
		{3_500_000, -time.Hour, 0},
		{-3_500_000, time.Hour, 0},
		{0, time.Hour, 0},
	} {
		if got := cost.Price(cost.Rate{PerHour: tc.perHour}, tc.d); got != tc.want {
			t.Errorf("Price(%d an hour, %v) = %d, want %d", tc.perHour, tc.d, got, tc.want)
		}
	}
}

func rates() *rapid.Generator[cost.Rate] {
	return rapid.Custom(func(t *rapid.T) cost.Rate {
		return cost.Rate{PerHour: cost.MicroUSD(rapid.Int64Range(0, 1_000_000_000).Draw(t, "per hour"))}
	})
}

func durations() *rapid.Generator[time.Duration] {
	return rapid.Custom(func(t *rapid.T) time.Duration {
		return time.Duration(rapid.Int64Range(0, int64(100*year)).Draw(t, "duration"))
	})
}

func TestPriceAgreesWithBigIntegers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		perHour := rapid.Int64Range(0, math.MaxInt64).Draw(t, "per hour")
		d := rapid.Int64Range(0, math.MaxInt64).Draw(t, "duration")
		want := new(big.Int).Mul(big.NewInt(perHour), big.NewInt(d))
		want.Div(want, big.NewInt(int64(time.Hour)))
		if !want.IsInt64() {
			want.SetInt64(math.MaxInt64)
		}
		if got := cost.Price(cost.Rate{PerHour: cost.MicroUSD(perHour)}, time.Duration(d)); int64(got) != want.Int64() {
			t.Fatalf("Price(%d, %d) = %d, want %d", perHour, d, got, want)
		}
	})
}

func TestSplittingTimeLosesLessThanOneMicroDollarPerInterval(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rate := rates().Draw(t, "rate")
		parts := rapid.SliceOfN(rapid.Int64Range(0, int64(year)), 1, 50).Draw(t, "parts")
		var whole time.Duration
		var sum cost.MicroUSD
		for _, p := range parts {
			whole += time.Duration(p)
			sum += cost.Price(rate, time.Duration(p))
		}
		if total := cost.Price(rate, whole); sum > total || total-sum >= cost.MicroUSD(len(parts)) {
			t.Fatalf("%d parts cost %d, the whole %d", len(parts), sum, total)
		}
	})
}

func TestMoreTimeOrAHigherRateNeverCostsLess(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r1, r2 := rates().Draw(t, "r1"), rates().Draw(t, "r2")
		d1, d2 := durations().Draw(t, "d1"), durations().Draw(t, "d2")
		low, high := cost.Rate{PerHour: min(r1.PerHour, r2.PerHour)}, cost.Rate{PerHour: max(r1.PerHour, r2.PerHour)}
		short, long := min(d1, d2), max(d1, d2)
		if cost.Price(low, short) > cost.Price(low, long) {
			t.Fatalf("at %v, %v costs more than %v", low, short, long)
		}
		if cost.Price(low, short) > cost.Price(high, short) {
			t.Fatalf("%v costs more at %v than at %v", short, low, high)
		}
	})
}

func TestAmountsPrint(t *testing.T) {
	for _, tc := range []struct {
		amount  cost.MicroUSD
		text    string
		cents   int64
		numeric string
	}{
		{0, "$0.000000", 0, "0.00"},
		{1_234_567, "$1.234567", 123, "1.23"},
		{1_235_000, "$1.235000", 124, "1.24"},
		{1_234_999, "$1.234999", 123, "1.23"},
		{4_999, "$0.004999", 0, "0.00"},
		{5_000, "$0.005000", 1, "0.01"},
		{-4_999, "-$0.004999", 0, "0.00"},
		{-5_000, "-$0.005000", -1, "-0.01"},
		{-1_234_567, "-$1.234567", -123, "-1.23"},
		{math.MaxInt64, "$9223372036854.775807", 922337203685478, "9223372036854.78"},
		{math.MinInt64, "-$9223372036854.775808", -922337203685478, "-9223372036854.78"},
	} {
		if got := tc.amount.String(); got != tc.text {
			t.Errorf("String(%d) = %q, want %q", int64(tc.amount), got, tc.text)
		}
		if got := tc.amount.Cents(); got != tc.cents {
			t.Errorf("Cents(%d) = %d, want %d", int64(tc.amount), got, tc.cents)
		}
		if got := tc.amount.Numeric(); got != tc.numeric {
			t.Errorf("Numeric(%d) = %q, want %q", int64(tc.amount), got, tc.numeric)
		}
	}
}

func TestParsingReadsWhatPrintingWrites(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := cost.MicroUSD(rapid.Int64Range(-math.MaxInt64, math.MaxInt64).Draw(t, "amount"))
		got, err := cost.ParseUSD(strings.Replace(m.String(), "$", "", 1))
		if err != nil || got != m {
			t.Fatalf("ParseUSD of %s = %d, %v", m, got, err)
		}
	})
}

func TestParsingRefusesWhatIsNotAnAmount(t *testing.T) {
	for _, s := range []string{"", "-", ".", "1.", ".5", "$1", "1,5", "1e3", "+1", "1.2345678", "NaN", "0x10", " 1", "9223372036855", "--1"} {
		if got, err := cost.ParseUSD(s); !errors.Is(err, cost.ErrAmount) {
			t.Errorf("ParseUSD(%q) = %d, %v; want ErrAmount", s, got, err)
		}
	}
	for s, want := range map[string]cost.MicroUSD{"3.50": 3_500_000, "4": 4_000_000, "0.000001": 1, "-2.1": -2_100_000} {
		if got, err := cost.ParseUSD(s); err != nil || got != want {
			t.Errorf("ParseUSD(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
}

func TestBookKnowsTheRateOfItsDay(t *testing.T) {
	day := func(n int) time.Time { return time.Date(2026, 1, n, 0, 0, 0, 0, time.UTC) }
	book, err := cost.NewBook(
		cost.Entry{Class: "H100", From: day(10), Rate: cost.Rate{PerHour: 4_000_000}},
		cost.Entry{Class: "H100", From: day(1), Rate: cost.Rate{PerHour: 4_200_000}},
		cost.Entry{Class: "A100-80GB", From: day(5), Rate: cost.Rate{PerHour: 3_500_000}},
	)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		class string
		at    time.Time
		want  cost.MicroUSD
		ok    bool
	}{
		{"H100", day(1).Add(-1), 0, false},
		{"H100", day(1), 4_200_000, true},
		{"H100", day(10).Add(-1), 4_200_000, true},
		{"H100", day(10), 4_000_000, true},
		{"H100", day(30), 4_000_000, true},
		{"A100-80GB", day(4), 0, false},
		{"A100-80GB", day(6).In(time.FixedZone("", 3600)), 3_500_000, true},
		{"V100-32GB", day(6), 0, false},
	} {
		if got, ok := book.At(tc.class, tc.at); got.PerHour != tc.want || ok != tc.ok {
			t.Errorf("At(%s, %v) = %v, %v; want %v, %v", tc.class, tc.at, got.PerHour, ok, tc.want, tc.ok)
		}
	}
	if got := book.Classes(day(2)); !slices.Equal(got, []string{"H100"}) {
		t.Errorf("Classes = %q, want only H100", got)
	}
	if _, ok := (cost.Book{}).At("H100", day(1)); ok {
		t.Error("the zero book has a rate")
	}
}

func TestBookJoinsEverythingThatIsWrong(t *testing.T) {
	from := time.Unix(0, 0)
	_, err := cost.NewBook(
		cost.Entry{Class: "", From: from},
		cost.Entry{Class: "H100", From: from, Rate: cost.Rate{PerHour: -1}},
		cost.Entry{Class: "H100", From: from.UTC()},
	)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"rate 1: no GPU class", "rate 2: H100 at -$0.000001 an hour is below zero", "two rates for H100 from 1970-01-01T00:00:00Z"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q lacks %q", err, want)
		}
	}
}
