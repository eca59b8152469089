// Package internal_test holds the plan of the house and fails on an arrow
// that it does not show.
package internal_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// uses says which rooms a room may import. A room that is not listed, or an
// arrow that is not drawn here, fails.
var uses = map[string]string{
	// The ground floor imports nothing of ours.
	"auth": "", "job": "", "wire": "", "cost": "", "config": "", "daemon": "", "metrics": "", "proc": "", "spool": "", "storage": "", "dataset": "",
	// One table of GPU classes serves devices, wishes and placement.
	"gpu": "job", "place": "job",
	// Each of these knows one outside thing.
	"gpu/nvml": "gpu",
	"store":    "job",
	"queue":    "job",
	"presence": "job",
	"trace":    "job",
	// The hand-over as one pure function, for tests and the simulation.
	"proto": "job",
	// The agent's story.
	"trainer": "job proc wire",
	"ship":    "job metrics spool wire",
	"attempt": "job metrics presence proc ship spool storage store trace trainer wire", // presence: what a shim reports; proc: its clock
	"agent":   "attempt gpu job metrics store trace",
	// The dispatcher's.
	"dispatch": "job metrics place queue store trace", // presence is joined to it in cmd
	"grant":    "metrics storage store",
	"retain":   "metrics storage store",
	"vet":      "dataset metrics queue storage store",
	"boards":   "metrics",                 // dashboards; only its JSON is shipped
	"watch":    "job metrics store trace", // what the database knows, as metrics
	// Support, never linked into a shipped binary.
	"gpu/fakenvml":      "", // a stand-in for the driver's library, which breaks
	"storage/local":     "",
	"devstack/services": "",
	"devstack":          "devstack/services storage storage/local store",
	"cmd/devstack":      "config daemon devstack",
	"cmd/fakegpu":       "gpu/fakenvml",
	"storetest":         "devstack/services store",
	"fleet":             "agent attempt dispatch gpu job metrics place queue store",
	"queue/queuebench":  "job queue",
	// Measures the whole; only joins what others made.
	"cmd/bench": "daemon dataset devstack devstack/services dispatch fleet job queue/queuebench storage storage/local store storetest",
	// The real dispatcher and agent on fakes; the fake database is proto's.
	"sim": "agent attempt cost dispatch gpu job metrics place proto queue store",
}

// owner names the rooms that may import an outside thing; support rooms are
// listed where they stand in for the outside.
var owner = map[string]string{
	"github.com/jackc/pgx":                     "store storetest devstack devstack/services cmd/devstack cmd/bench",
	"github.com/hibiken/asynq":                 "queue queue/queuebench",
	"github.com/redis/go-redis":                "queue queue/queuebench devstack/services",
	"github.com/alicebob/miniredis":            "devstack/services",
	"github.com/NVIDIA/go-nvml":                "gpu/nvml",
	"github.com/supabase-community/storage-go": "storage",
	"github.com/prometheus/client_golang":      "metrics",
	"go.opentelemetry.io":                      "trace",
	"github.com/golang-jwt/jwt":                "auth storage/local devstack",
	"github.com/MicahParks":                    "auth",
	"github.com/go-json-experiment/json":       "dataset",
	"os/exec":                                  "proc devstack devstack/services cmd/devstack cmd/bench gpu/fakenvml",
}

type pkg struct {
	ImportPath string
	Imports    []string
}

func list(t *testing.T, env []string, args ...string) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,Imports"}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %v: %v", args, err)
	}
	var ps []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return ps
		} else if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
}

func has(words, word string) bool { return strings.Contains(" "+words+" ", " "+word+" ") }

func TestRoomsImportOnlyWhatThePlanShows(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range list(t, nil, "lorayard/internal/...") {
		room := strings.TrimPrefix(p.ImportPath, "lorayard/internal/")
		if room == p.ImportPath || room == "e2e" { // no code but tests
			continue
		}
		allowed, drawn := uses[room]
		if !drawn {
			t.Errorf("room %s is not on the plan", room)
			continue
		}
		seen[room] = true
		for _, imp := range p.Imports {
			if to, ours := strings.CutPrefix(imp, "lorayard/internal/"); ours {
				if !has(allowed, to) {
					t.Errorf("%s imports %s; the plan shows only %q", room, to, allowed)
				}
				continue
			}
			for thing, rooms := range owner {
				if strings.HasPrefix(imp, thing) && !has(rooms, room) {
					t.Errorf("%s imports %s; only %s may", room, imp, rooms)
				}
			}
		}
	}
	for room := range uses {
		if !seen[room] {
			t.Errorf("the plan shows room %s, which is not there", room)
		}
	}
}

func TestBinariesCarryOnlyTheirHalf(t *testing.T) {
	support := []string{"lorayard/internal/devstack", "lorayard/internal/storetest", "lorayard/internal/fleet", "lorayard/internal/storage/local", "lorayard/internal/queue/queuebench", "github.com/alicebob/miniredis"}
	for bin, bad := range map[string][]string{
		"lorayard/cmd/dispatcher": {"lorayard/internal/gpu", "lorayard/internal/trainer", "lorayard/internal/attempt", "github.com/NVIDIA/go-nvml"},
		"lorayard/cmd/agent":      {"lorayard/internal/api", "lorayard/internal/dispatch", "lorayard/internal/grant", "lorayard/internal/retain", "lorayard/internal/watch", "lorayard/internal/place", "lorayard/deploy"},
	} {
		for _, p := range list(t, nil, "-deps", bin) {
			for _, b := range append(bad, support...) {
				if p.ImportPath == b || strings.HasPrefix(p.ImportPath, b+"/") {
					t.Errorf("%s links %s", bin, p.ImportPath)
				}
			}
		}
	}
}

func TestTheDispatcherBuildsWithoutCgo(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", t.TempDir()+"/dispatcher", "lorayard/cmd/dispatcher")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for _, p := range list(t, []string{"CGO_ENABLED=0"}, "-deps", "lorayard/cmd/dispatcher") {
		if p.ImportPath == "runtime/cgo" {
			t.Error("the dispatcher links cgo")
		}
	}
}
