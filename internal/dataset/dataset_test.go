package dataset_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"testing/iotest"

	"lorayard/internal/dataset"
)

func validate(t *testing.T, content string, o dataset.Options) *dataset.Report {
	t.Helper()
	r, err := dataset.Validate(strings.NewReader(content), o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestTheDemoFileIsGoodAndItsFiguresAreRight(t *testing.T) {
	raw, err := os.ReadFile(demo)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	r := validate(t, string(raw), dataset.Options{Normalised: &out})
	if !r.OK || r.Format != dataset.BrightRun || r.Examples != 42 || r.Bytes != int64(len(raw)) || r.Lines != 43 {
		t.Fatalf("%+v", r)
	}
	if r.TrainingPairs+r.ValidationPairs != 42 || r.ValidationPairs == 0 {
		t.Errorf("split %d and %d", r.TrainingPairs, r.ValidationPairs)
	}
	if r.Roles["assistant"] == 0 || r.Roles["system"] != 42 {
		t.Errorf("roles %v", r.Roles)
	}
	if l := r.Lengths; l.P50 < 200 || l.P50 > l.P90 || l.P90 > l.P99 || l.P99 > l.Max {
		t.Errorf("lengths %+v", l)
	}
	var sum int64
	for _, b := range r.Lengths.Buckets {
		sum += b.Examples
	}
	if sum != 42 {
		t.Errorf("the bars of the histogram hold %d examples", sum)
	}
	if len(r.Samples) != 3 || r.Samples[0].ConversationID == r.Samples[1].ConversationID {
		t.Errorf("samples %+v", r.Samples)
	}
	digest := sha256.Sum256(out.Bytes())
	if want := (dataset.File{SHA256: hex.EncodeToString(digest[:]), Bytes: int64(out.Len()), Lines: r.Lines}); *r.Normalised != want {
		t.Errorf("normalised is %+v, the file is %+v", *r.Normalised, want)
	}
	// The normalised file says the same, and normalising it changes nothing.
	var again bytes.Buffer
	n := validate(t, out.String(), dataset.Options{Normalised: &again})
	if !n.OK || n.Format != dataset.Chat || n.Tokens != r.Tokens || n.ValidationPairs != r.ValidationPairs || n.Turns != r.Turns {
		t.Errorf("normalised: %+v", n)
	}
	if !bytes.Equal(again.Bytes(), out.Bytes()) {
		t.Error("normalising twice changes the file")
	}
}

func TestTheRepeatedQuestionIsAskedOnce(t *testing.T) {
	for _, history := range []string{
		`[{"role":"user","content":"w\u0068y?"}]`,
		`[{"role":"user","content":[{"type":"text","text":"w"},{"type":"text","text":"hy?"}]}]`,
	} {
		var out strings.Builder
		validate(t, `{"conversation_history":`+history+`,"current_user_input":"why?","target_response":"so"}`, dataset.Options{Normalised: &out})
		want := `{"conversation_id":"line 1","messages":[{"role":"user","content":"why?"},{"role":"assistant","content":"so"}]}` + "\n"
		if out.String() != want {
			t.Errorf("%s became %s", history, out.String())
		}
	}
}

func TestWhatEachFormatBecomes(t *testing.T) {
	for in, want := range map[string]string{
		`{"conversation_id":"a","turns":[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}`:                                                                            `{"conversation_id":"a","messages":[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}`,
		`{"conversation_id":7,"turns":[{"role":"assistant","content":"r"}]}`:                                                                                                            `{"conversation_id":"7","messages":[{"role":"assistant","content":"r"}]}`,
		`{"messages":[{"role":"developer","content":"d"},{"role":"user","content":"q"},{"role":"assistant","content":"x","weight":0},{"role":"assistant","content":"r\n","weight":1}]}`: `{"messages":[{"role":"system","content":"d"},{"role":"user","content":"q"},{"role":"assistant","content":"x","weight":0},{"role":"assistant","content":"r\n"}]}`,
		`{"tools":[{"type":"function"}],"messages":[{"role":"user","content":"q"},{"role":"assistant","content":null,"tool_calls":[{"id":"c","function":{"name":"f","arguments":"{\"a\":1}"}}]},{"role":"tool","tool_call_id":"c","content":"1"},{"role":"assistant","content":"r"}]}`: `{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"","tool_calls":[{"id":"c","function":{"name":"f","arguments":"{\"a\":1}"}}]},{"role":"tool","content":"1","tool_call_id":"c"},{"role":"assistant","content":"r"}],"tools":[{"type":"function"}]}`,
		`{"system":"s","conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"r"}]}`: `{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}`,
		`{"instruction":"i","input":"x","output":"o"}`:                                             `{"messages":[{"role":"user","content":"i\n\nx"},{"role":"assistant","content":"o"}]}`,
		`{"instruction":"i","input":" ","output":"o"}`:                                             `{"messages":[{"role":"user","content":"i"},{"role":"assistant","content":"o"}]}`,
		`{"prompt":"p","completion":" c"}`:                                                         `{"messages":[{"role":"user","content":"p"},{"role":"assistant","content":" c"}]}`,
		`{"text":"t"}`:                                                                             `{"conversation_id":"line 1","text":"t"}`,
	} {
		var out strings.Builder
		r := validate(t, in, dataset.Options{Normalised: &out})
		if out.String() != want+"\n" {
			t.Errorf("%s\nbecame %swanted %s\n%v", in, out.String(), want, r.Problems)
		}
	}
}

func chat(question, answer string) string {
	q, _ := json.Marshal(question)
	a, _ := json.Marshal(answer)
	return fmt.Sprintf(`{"messages":[{"role":"user","content":%s},{"role":"assistant","content":%s}]}`, q, a)
}

func TestFindings(t *testing.T) {
	key := strings.Repeat("a1B2", 6)
	for text, code := range map[string]dataset.Code{
		"write to jan.doe+x@mail.example.org now":                        dataset.Email,
		"call +44 20 7946 0958 today":                                    dataset.Phone,
		"call (555) 123-4567":                                            dataset.Phone,
		"pay with 4111 1111 1111 1111 please":                            dataset.Card,
		"pay with 4111111111111111":                                      dataset.Card,
		"account GB82 WEST 1234 5698 7654 32.":                           dataset.IBAN,
		"account DE89370400440532013000":                                 dataset.IBAN,
		"the host 203.0.113.77 is down":                                  dataset.IPAddress,
		"key AKIAIOSFODNN7EXAMPLE here":                                  dataset.AWSKey,
		"key sk-" + key:                                                  dataset.APIKey,
		"key sk-proj-" + key:                                             dataset.APIKey,
		"key ghp_" + key:                                                 dataset.APIKey,
		"key github_pat_" + key:                                          dataset.APIKey,
		"bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlMQ": dataset.JWT,
		"-----BEGIN RSA PRIVATE KEY-----\nMII":                           dataset.PrivateKey,
		"stop <|im_end|> here":                                           dataset.SpecialToken,
	} {
		r := validate(t, chat("hello", "well")+"\n"+chat(text, "well"), dataset.Options{})
		found := false
		for _, f := range r.Findings {
			if f.Code == code {
				found = true
				if f.Count != 1 || len(f.Lines) != 1 || f.Lines[0] != 2 {
					t.Errorf("%s: %+v", code, f)
				}
			}
		}
		if !found {
			t.Errorf("%s was not found: %+v", code, r.Findings)
		}
	}
	for _, text := range []string{
		"on 2024-01-15 10:00 we met", "order 4111111111111112", "version 1.2.3.4.5", "id 8c856815-f3e7-5e58-ab58-6742a4e24f9d", "at 12 1/16 inches",
		"user@localhost", "@name", "1.2.3", "300.1.1.1", "a long number 12345678901234567890123", "Привет мир 5551234567", "risk-free and task-oriented-long-words-here",
		"GB82WEST12345698765433", "tel 5551234567", "sk-short", "eyJhbGciOiJIUzI1NiJ9 alone", "a <| b |> c",
	} {
		r := validate(t, strings.Repeat(chat("hello", "well")+"\n", 9)+chat(text, "well"), dataset.Options{})
		for _, f := range r.Findings {
			if f.Code != dataset.Duplicate {
				t.Errorf("%q was taken for %s", text, f.Code)
			}
		}
	}
}

func TestDuplicatesAndLeaks(t *testing.T) {
	turns := func(id, q string) string {
		return fmt.Sprintf(`{"conversation_id":%q,"turns":[{"role":"user","content":%q},{"role":"assistant","content":"r"}]}`+"\n", id, q)
	}
	r := validate(t, turns("a", "1")+turns("a", "1")+turns("b", "2")+turns("c", "2")+turns("d", "3"), dataset.Options{})
	got := map[dataset.Code][]int64{}
	for _, f := range r.Findings {
		got[f.Code] = f.Lines
	}
	if fmt.Sprint(got[dataset.Duplicate], got[dataset.Leak]) != "[2 4] [4]" {
		t.Errorf("duplicates in lines %v, leaks in lines %v", got[dataset.Duplicate], got[dataset.Leak])
	}
}

func TestEveryBadLineIsCountedAndTheFirstThousandKept(t *testing.T) {
	r := validate(t, strings.Repeat("x\n", 2500), dataset.Options{})
	if r.BadLines != 2500 || len(r.Problems) != dataset.MostProblems || r.ByCode[dataset.BadJSON] != 2500 || r.OK {
		t.Errorf("%d bad lines, %d kept, by code %v", r.BadLines, len(r.Problems), r.ByCode)
	}
	if last := r.Problems[999]; last.Line != 1000 {
		t.Errorf("the last one kept is of line %d", last.Line)
	}
}

func TestLimits(t *testing.T) {
	good := chat("q", "a") + "\n"
	long := chat("q", strings.Repeat("a", 2000)) + "\n"
	r := validate(t, good+long+good, dataset.Options{MostLineBytes: 1000})
	if len(r.Problems) != 1 || r.Problems[0].Code != dataset.LineTooLong || r.Problems[0].Line != 2 || r.Examples != 2 {
		t.Errorf("%+v", r)
	}
	r = validate(t, strings.Repeat(good, 1000), dataset.Options{MostBytes: 1000})
	if r.OK || r.Problems[0].Code != dataset.FileTooLarge {
		t.Errorf("%+v", r.Problems)
	}
	// A line may be exactly as long as the limit.
	if r = validate(t, good, dataset.Options{MostLineBytes: len(good) - 1}); !r.OK {
		t.Errorf("%+v", r.Problems)
	}
	// A small compressed file that is large inside.
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	if _, err := z.Write(bytes.Repeat([]byte(" "), 4<<20)); err != nil {
		t.Fatal(err)
	}
	z.Close()
	r = validate(t, bomb.String(), dataset.Options{MostBytes: 1 << 20, MostLineBytes: 1 << 10})
	if r.OK || r.Problems[0].Code != dataset.FileTooLarge || r.Bytes > 2<<20 {
		t.Errorf("%+v after %d bytes", r.Problems, r.Bytes)
	}
}

func TestABrokenReaderIsNoVerdict(t *testing.T) {
	broken := errors.New("cut")
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, _ = io.WriteString(z, strings.Repeat(chat("q", "a")+"\n", 5))
	z.Close()
	for _, start := range []string{"", chat("q", "a") + "\n", zipped.String()[:40]} {
		_, err := dataset.Validate(io.MultiReader(strings.NewReader(start), iotest.ErrReader(broken)), dataset.Options{})
		if !errors.Is(err, broken) {
			t.Errorf("after %d bytes: %v", len(start), err)
		}
	}
	if _, err := dataset.Validate(strings.NewReader(chat("q", "a")), dataset.Options{Normalised: full{}}); err == nil {
		t.Error("a full disk is no error")
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("no space") }

func TestReadingInSmallPiecesChangesNothing(t *testing.T) {
	raw, err := os.ReadFile(demo)
	if err != nil {
		t.Fatal(err)
	}
	whole := validate(t, string(raw), dataset.Options{Normalised: io.Discard})
	pieces, err := dataset.Validate(iotest.OneByteReader(bytes.NewReader(raw)), dataset.Options{Normalised: io.Discard})
	if err != nil || *pieces.Normalised != *whole.Normalised || pieces.Tokens != whole.Tokens {
		t.Errorf("%+v, %v", pieces, err)
	}
}

// TestNothingOfTheFileStandsInAReport puts a marker into every place of lines
// that are bad in every way, names included.
func TestNothingOfTheFileStandsInAReport(t *testing.T) {
	const marker = "canary7f"
	bad := []string{
		`{"canary7f":{"canary7f":1,"canary7f":2}}`, `{"messages":[{"role":"canary7f","content":"x"}]}`, `canary7f`, `{"canary7f":canary7f}`,
		`{"turns":"canary7f"}`, `{"messages":[{"role":"user","content":"canary7f@example.org"}]}`, `{"messages":[{"role":"user","content":"canary7f"},{"role":"assistant","weight":"canary7f","content":"a"}]}`,
		"{\"canary7f\":\"\xff\"}", `{"a":{"canary7f":"\ud800canary7f"}}`, `{"messages":[{"role":"assistant","content":"canary7f","tool_calls":[{"function":{"name":"canary7f"}}]}]}`, `{"canary7f":"canary7f`,
	}
	r := validate(t, strings.Join(bad, "\n"), dataset.Options{})
	if int(r.BadLines) != len(bad) {
		t.Errorf("%d of %d lines are bad", r.BadLines, len(bad))
	}
	raw, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(raw), marker) {
		t.Errorf("%s", raw)
	}
}

// TestTheSplitIsTheTrainers has the figures of scripts/train/tests/test_data.py.
func TestTheSplitIsTheTrainers(t *testing.T) {
	raw, err := os.ReadFile(demo)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		fraction float64
		seed     int64
		held     int64
	}{{0.05, 42, 3}, {0.2, 1, 9}, {0.5, 7, 21}, {0, 42, 0}} {
		r := validate(t, string(raw), dataset.Options{Fraction: &c.fraction, Seed: &c.seed})
		if r.ValidationPairs != c.held || r.TrainingPairs != 42-c.held {
			t.Errorf("fraction %v, seed %d: %d are held back, not %d", c.fraction, c.seed, r.ValidationPairs, c.held)
		}
	}
}

func TestEveryCodeIsExplained(t *testing.T) {
	raw, err := os.ReadFile("../../docs/datasets.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range append(dataset.Codes(), dataset.Findings()...) {
		if !strings.Contains(string(raw), "\n| `"+string(c)+"` |") {
			t.Errorf("docs/datasets.md does not explain %s", c)
		}
	}
}
