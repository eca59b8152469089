package spool_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"lorayard/internal/spool"
)

func open(t interface{ Fatal(...any) }, dir string) *spool.Spool {
	s, err := spool.Open(dir, 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Whatever is appended comes out in order, at least once, over any number of
// restarts; what was acknowledged does not come again.
func TestOrderAndAtLeastOnce(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "spool")
		if err != nil {
			rt.Fatal(err)
		}
		s := open(rt, dir)
		next, acked := uint64(1), uint64(0)
		for range rapid.IntRange(1, 60).Draw(rt, "actions") {
			switch rapid.IntRange(0, 3).Draw(rt, "action") {
			case 0, 1:
				size := rapid.SampledFrom([]int{0, 10, 5000, 400_000}).Draw(rt, "size")
				seq, err := s.Append([]byte(fmt.Sprintf("%d:", next) + strings.Repeat("x", size)))
				if err != nil || seq != next {
					rt.Fatalf("append: %d, %v; want %d", seq, err, next)
				}
				next++
			case 2:
				recs, err := s.Read(acked, rapid.IntRange(1, 10).Draw(rt, "most"))
				if err != nil {
					rt.Fatal(err)
				}
				for i, r := range recs {
					if r.Seq != acked+1+uint64(i) || !strings.HasPrefix(string(r.Data), fmt.Sprintf("%d:", r.Seq)) {
						rt.Fatalf("record %d holds %.20q", r.Seq, r.Data)
					}
				}
				if len(recs) == 0 && acked != next-1 {
					rt.Fatalf("records %d to %d are missing", acked+1, next-1)
				}
				if len(recs) > 0 && rapid.Bool().Draw(rt, "ack") {
					acked = recs[len(recs)-1].Seq
					if err := s.Ack(acked); err != nil {
						rt.Fatal(err)
					}
				}
			case 3:
				if err := s.Close(); err != nil {
					rt.Fatal(err)
				}
				s = open(rt, dir)
			}
			if s.Last() != next-1 || s.Acked() != acked {
				rt.Fatalf("last %d acked %d, want %d %d", s.Last(), s.Acked(), next-1, acked)
			}
		}
		if err := s.Close(); err != nil {
			rt.Fatal(err)
		}
	})
}

// A crash may cut the file anywhere: everything before the cut is kept, and
// the log goes on.
func TestATornTailIsCut(t *testing.T) {
	whole := t.TempDir()
	s := open(t, whole)
	for i := range 5 {
		if _, err := s.Append([]byte(fmt.Sprintf("record %d", i+1))); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("%020d.seg", 1)
	raw, err := os.ReadFile(filepath.Join(whole, name))
	if err != nil {
		t.Fatal(err)
	}
	each := len(raw) / 5
	for cut := range raw {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, name), raw[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir)
		kept := uint64(cut / each)
		if s.Last() != kept {
			t.Fatalf("cut at %d: %d records are left, want %d", cut, s.Last(), kept)
		}
		if seq, err := s.Append([]byte("next")); err != nil || seq != kept+1 {
			t.Fatalf("cut at %d: append gave %d, %v", cut, seq, err)
		}
		if recs, err := s.Read(0, 10); err != nil || len(recs) != int(kept)+1 {
			t.Fatalf("cut at %d: read %d, %v", cut, len(recs), err)
		}
		s.Close()
	}
}

func TestAFullSpoolTakesNothingAndLosesNothing(t *testing.T) {
	s, err := spool.Open(t.TempDir(), 100)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	n := 0
	for ; err == nil; n++ {
		_, err = s.Append([]byte("0123456789"))
	}
	if !errors.Is(err, spool.ErrFull) {
		t.Fatal(err)
	}
	if recs, err := s.Read(0, 100); err != nil || len(recs) != n-1 {
		t.Errorf("read %d of %d, %v", len(recs), n-1, err)
	}
}

func FuzzOpen(f *testing.F) {
	f.Add([]byte("x"), []byte("7"))
	f.Fuzz(func(t *testing.T, seg, acked []byte) {
		dir := t.TempDir()
		if os.WriteFile(filepath.Join(dir, fmt.Sprintf("%020d.seg", 1)), seg, 0o600) != nil || os.WriteFile(filepath.Join(dir, "acked"), acked, 0o600) != nil {
			t.Skip()
		}
		s := open(t, dir)
		defer s.Close()
		seq, err := s.Append([]byte("new"))
		if err != nil {
			t.Fatal(err)
		}
		recs, err := s.Read(seq-1, 1)
		if err != nil || len(recs) != 1 || string(recs[0].Data) != "new" {
			t.Fatalf("%v, %v", recs, err)
		}
	})
}
