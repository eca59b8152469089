package dataset

import (
	"bytes"
	"slices"
)

// What is worth a look but makes no file unusable.
const (
	Duplicate    Code = "duplicate"
	Leak         Code = "leak"
	BlankAnswer  Code = "blank_answer"
	LastIsUser   Code = "last_is_not_answer"
	FewExamples  Code = "few_examples"
	SpecialToken Code = "special_token"
	Email        Code = "email"
	Phone        Code = "phone_number"
	Card         Code = "card_number"
	IBAN         Code = "iban"
	IPAddress    Code = "ip_address"
	PrivateKey   Code = "private_key"
	AWSKey       Code = "aws_key"
	APIKey       Code = "api_key"
	JWT          Code = "jwt"
)

// findingWords say what each finding means and what to do.
var findingWords = map[Code][2]string{
	Duplicate:    {"The same conversation stands in the file more than once.", "Remove the copies, unless they are meant to weigh more."},
	Leak:         {"The same conversation stands in the file under two conversation ids, or without one. One copy may be trained on while the other is used to measure, and the validation loss then looks better than it is.", "Remove the copies, or give them one conversation_id."},
	BlankAnswer:  {"An answer of the assistant is empty.", "Write the answer or remove the message."},
	LastIsUser:   {"The conversation does not end with an answer of the assistant; what follows the last answer is not trained on.", "Remove what follows the last answer, or add an answer."},
	FewExamples:  {"The file has fewer than ten examples.", "Add examples: below ten a model learns them by heart; fifty are a start."},
	SpecialToken: {"A text contains a marker that models use to separate messages.", "Remove the marker: it can end a message in the middle."},
	Email:        {"E-mail addresses.", "Replace them if they belong to real people: a model can repeat them."},
	Phone:        {"Telephone numbers.", "Replace them if they belong to real people: a model can repeat them."},
	Card:         {"Numbers of payment cards.", "Remove them: a model can repeat them."},
	IBAN:         {"Numbers of bank accounts.", "Remove them: a model can repeat them."},
	IPAddress:    {"IP addresses.", "Replace them if they belong to real machines."},
	PrivateKey:   {"Private keys.", "Remove them and replace the keys: a model can repeat them."},
	AWSKey:       {"Access keys of AWS.", "Remove them and replace the keys: a model can repeat them."},
	APIKey:       {"API keys.", "Remove them and replace the keys: a model can repeat them."},
	JWT:          {"Signed tokens (JWT).", "Remove them: a model can repeat them."},
}

// finding numbers them for counting.
type finding int

const (
	duplicate finding = iota
	leak
	blankAnswer
	lastIsUser
	fewExamples
	specialToken
	email
	phone
	card
	iban
	ipAddress
	privateKey
	awsKey
	apiKey
	jwt
	findingCount
)

var findingCodes = [findingCount]Code{
	Duplicate, Leak, BlankAnswer, LastIsUser, FewExamples, SpecialToken, Email, Phone, Card, IBAN, IPAddress, PrivateKey, AWSKey, APIKey, JWT,
}

// seen counts what was found in one line.
type seen [findingCount]int32

// Kinds of bytes at which a look is worth its time. All that is searched for
// has one of them inside, and prose has few.
const (
	nothing byte = iota
	digit
	atSign
	hyphen
	underscore
	capitalJ
	capitalK
	bar
	backslash
	high // part of a character beyond ASCII
)

var triggers = func() (t [256]byte) {
	for c := '0'; c <= '9'; c++ {
		t[c] = digit
	}
	t['@'], t['-'], t['_'], t['J'], t['K'], t['|'], t['\\'] = atSign, hyphen, underscore, capitalJ, capitalK, bar, backslash
	for c := 0x80; c < 0x100; c++ {
		t[c] = high
	}
	return t
}()

// scan looks through a raw text once: for secrets and personal data, and for
// how long it is, in characters of ASCII and in other bytes. Escapes are
// stepped over, so the digits of \u00e9 are no number; only where one hides a
// character of ASCII is the text made plain first.
func scan(raw []byte, s *seen) (ascii, other int) {
	before := *s
	ascii, other, hides := look(raw, true, s)
	if hides {
		*s, ascii, other = before, 0, 0
		for len(raw) > 0 { // in pieces: a text may have 8 MiB
			piece := whole(raw, keptBytes)
			raw = raw[len(piece):]
			a, o, _ := look(plain(piece), false, s)
			ascii, other = ascii+a, other+o
		}
	}
	return ascii, other
}

func look(raw []byte, escaped bool, s *seen) (ascii, other int, hides bool) {
	ascii = len(raw)
	for i := 0; i < len(raw); {
		switch triggers[raw[i]] {
		case nothing:
			i++
			for i < len(raw) && triggers[raw[i]] == nothing {
				i++
			}
		case high:
			from := i
			for i++; i < len(raw) && raw[i] >= 0x80; i++ {
			}
			other += i - from
			ascii -= i - from
		case backslash:
			switch {
			case !escaped:
				i++
			case raw[i+1] != 'u':
				ascii, i = ascii-1, i+2
			case raw[i+2] == '0' && raw[i+3] == '0' && raw[i+4] < '8':
				return 0, 0, true
			default:
				ascii, other, i = ascii-6, other+3, i+6
			}
		case digit:
			i = number(raw, i, s)
		case atSign:
			i = address(raw, i, s)
		case capitalJ:
			i = token(raw, i, s)
		case capitalK:
			if word(raw, i-1, "AKIA") && run(raw, i+3, 17, isUpperOrDigit) == 16 {
				s[awsKey]++
			}
			i++
		case hyphen:
			switch {
			case key(raw, i, "sk", 20), key(raw, i, "glpat", 20), key(raw, i, "xoxb", 20), key(raw, i, "xoxp", 20):
				s[apiKey]++
			case word(raw, i, "-----BEGIN "):
				if end := raw[i+11 : min(len(raw), i+50)]; bytes.Contains(end, []byte("PRIVATE KEY-----")) {
					s[privateKey]++
				}
			}
			i++
		case underscore:
			for _, prefix := range [...]string{"ghp", "gho", "ghs", "github_pat", "sk_live", "rk_live", "sb_secret", "hf"} {
				if key(raw, i, prefix, 20) {
					s[apiKey]++
					break
				}
			}
			i++
		case bar:
			if i > 0 && raw[i-1] == '<' {
				if n := run(raw, i+1, 40, isName); n > 0 && word(raw, i+1+n, "|>") {
					s[specialToken]++
				}
			}
			i++
		}
	}
	return ascii, other, false
}

func isDigit(c byte) bool        { return '0' <= c && c <= '9' }
func isUpper(c byte) bool        { return 'A' <= c && c <= 'Z' }
func isUpperOrDigit(c byte) bool { return isUpper(c) || isDigit(c) }
func isAlnum(c byte) bool        { return isDigit(c) || isUpper(c&^0x20) }
func isName(c byte) bool         { return isAlnum(c) || c == '_' || c == '-' }
func isLocal(c byte) bool {
	return isAlnum(c) || c == '.' || c == '_' || c == '%' || c == '+' || c == '-'
}

// run counts the bytes from i on that are, up to most.
func run(raw []byte, i, most int, are func(byte) bool) (n int) {
	for n < most && i+n < len(raw) && are(raw[i+n]) {
		n++
	}
	return n
}

func word(raw []byte, i int, w string) bool {
	return i >= 0 && len(raw)-i >= len(w) && string(raw[i:i+len(w)]) == w
}

// key says whether prefix stands before i, at the beginning of a word, and at
// least n characters of a key after it.
func key(raw []byte, i int, prefix string, n int) bool {
	from := i - len(prefix)
	return word(raw, from, prefix) && (from == 0 || !isAlnum(raw[from-1])) && run(raw, i+1, n, isName) == n
}

func address(raw []byte, i int, s *seen) int {
	if i == 0 || !isLocal(raw[i-1]) {
		return i + 1
	}
	dotted, label := false, 0
	j := i + 1
	for ; j < len(raw); j++ {
		switch c := raw[j]; {
		case isAlnum(c) || c == '-' && label > 0:
			label++
			continue
		case c == '.' && label > 0 && j+1 < len(raw) && isAlnum(raw[j+1]):
			dotted, label = true, 0
			continue
		}
		break
	}
	if dotted && label >= 2 {
		s[email]++
	}
	return j
}

func token(raw []byte, i int, s *seen) int {
	if !word(raw, i-2, "eyJ") || i >= 3 && isAlnum(raw[i-3]) {
		return i + 1
	}
	end := i + 1
	for dots := 0; ; dots++ {
		n := run(raw, end, 1<<13, isName)
		end += n
		if n < 8 || dots == 2 {
			if n >= 8 {
				s[jwt]++
			}
			return end
		}
		if end >= len(raw) || raw[end] != '.' {
			return end
		}
		end++
	}
}

// number looks at a run of digits, with what separates groups of them.
func number(raw []byte, i int, s *seen) int {
	if i >= 2 && isUpper(raw[i-1]) && isUpper(raw[i-2]) && (i == 2 || !isAlnum(raw[i-3])) {
		if end := account(raw, i-2); end > i {
			s[iban]++
			return end
		}
	}
	var digits [20]byte
	var groups [8]int // how many digits each has
	n, g, j, dots := 0, 0, i, 0
	for j < len(raw) {
		c := raw[j]
		if isDigit(c) {
			if n < len(digits) {
				digits[n] = c - '0'
			}
			n++
			if g < len(groups) {
				groups[g]++
			}
			j++
			continue
		}
		// One separator, or ") ", and then a digit.
		step := 1
		if c == ')' && j+1 < len(raw) && (raw[j+1] == ' ' || raw[j+1] == '-') {
			step = 2
		}
		if c != ' ' && c != '-' && c != '.' && c != ')' || j+step >= len(raw) || !isDigit(raw[j+step]) {
			break
		}
		if c == '.' {
			dots++
		}
		j += step
		g++
	}
	g++
	if i > 0 && (isAlnum(raw[i-1]) || raw[i-1] == '_' || raw[i-1] == '-') || j < len(raw) && (isAlnum(raw[j]) || raw[j] == '_') {
		return j // part of a name, an id or a longer number
	}
	plus := i > 0 && raw[i-1] == '+'
	switch {
	case n >= 13 && n <= 19 && dots == 0 && digits[0] >= 3 && digits[0] <= 6 && luhn(digits[:n]) && (g == 1 || g == 4 || g == 3 || g == 5):
		s[card]++
	case plus && n >= 8 && n <= 15:
		s[phone]++
	case g == 3 && groups[0] == 3 && groups[1] == 3 && groups[2] == 4, g == 4 && groups[0] == 1 && groups[1] == 3 && groups[2] == 3 && groups[3] == 4:
		s[phone]++
	case g == 4 && dots == 3 && octets(digits[:min(n, 20)], groups[:4]):
		s[ipAddress]++
	}
	return j
}

func octets(digits []byte, groups []int) bool {
	for _, g := range groups {
		v := 0
		if g == 0 || g > 3 || g > len(digits) {
			return false
		}
		for _, d := range digits[:g] {
			v = 10*v + int(d)
		}
		if v > 255 {
			return false
		}
		digits = digits[g:]
	}
	return true
}

func luhn(digits []byte) bool {
	sum := 0
	for i, d := range digits {
		v := int(d)
		if (len(digits)-i)%2 == 0 {
			if v *= 2; v > 9 {
				v -= 9
			}
		}
		sum += v
	}
	return sum%10 == 0
}

// account returns where an IBAN that begins at i ends, or 0: 15 to 34
// characters, in groups or not, whose remainder by 97 is 1.
func account(raw []byte, i int) int {
	var chars [34]byte
	n, j, end := 0, i, 0
	for ; j < len(raw) && n < len(chars); j++ {
		c := raw[j]
		if c == ' ' && n%4 == 0 {
			continue
		}
		if !isUpperOrDigit(c) {
			break
		}
		chars[n] = c
		n++
		end = j + 1
	}
	if n < 15 {
		return 0
	}
	rest := 0
	for k := range n {
		switch c := chars[(k+4)%n]; {
		case isDigit(c):
			rest = (rest*10 + int(c-'0')) % 97
		default:
			rest = (rest*100 + int(c-'A') + 10) % 97
		}
	}
	if rest != 1 {
		return 0
	}
	return end
}

// Findings lists the code of everything that is worth a look.
func Findings() []Code { return slices.Clone(findingCodes[:]) }
