// Package boards makes Grafana's dashboards: deploy/grafana/dashboards is what it
// writes, and a test fails when the two differ. A panel here is a question with
// its unit and the words that explain it; how Grafana wants to be told stands in
// json.go alone.
package boards

// Board is one dashboard.
type Board struct {
	UID, Title, About string
	Vars              []Var
	Rows              []Row
}

// Var is a choice at the top of a board.
type Var struct {
	Name, Label string
	Metric      string // Prometheus: the values of Of on this selector
	Of          string
	SQL         string // Postgres instead
	All         bool   // several may be chosen, or all
}

// Row is a titled line of panels.
type Row struct {
	Title  string
	Panels []Panel
}

// Kind is how a panel draws.
type Kind string

// The kinds, by Grafana's names.
const (
	Graph    Kind = "timeseries"
	Stat     Kind = "stat"
	Table    Kind = "table"
	Timeline Kind = "state-timeline"
	Curve    Kind = "trend" // over a number instead of time
	Bars     Kind = "bargauge"
)

// Panel is one question.
type Panel struct {
	Title, About string
	Kind         Kind
	Unit         string // Grafana's name of it
	Width        int    // of 24
	Height       int    // 0: 8
	Stacked      bool
	Max          float64 // of the axis; 0: as it comes
	Alarm        float64 // red from here on; 0: never
	Low          bool    // red below Alarm instead
	Asks         []Ask
	X            string            // of a Curve: the column across
	Units        map[string]string // of columns of a table
	Drill        string            // UID of the board that a row or a series leads to
	DrillBy      string            // with this variable set
	States       map[int]State     // of a Timeline
}

// State is how a Timeline shows a number.
type State struct{ Name, Colour string }

// Ask is one query; either of Prometheus or of Postgres.
type Ask struct {
	Expr   string
	Legend string // with {{label}}
	Now    bool   // the newest value alone

	SQL  string
	Time bool // the SQL's rows are a time series: time, metric, value
}

// All lists the boards.
func All() []Board {
	return []Board{fleet(), queue(), host(), job(), cost()}
}

// UIDs of the boards; links name them.
const (
	uidFleet = "lorayard-fleet"
	uidQueue = "lorayard-queue"
	uidHost  = "lorayard-host"
	uidJob   = "lorayard-job"
	uidCost  = "lorayard-cost"
)

func p(expr, legend string) Ask { return Ask{Expr: expr, Legend: legend} }

func now(expr, legend string) Ask { return Ask{Expr: expr, Legend: legend, Now: true} }

func table(sql string) Ask { return Ask{SQL: sql} }

func series(sql string) Ask { return Ask{SQL: sql, Time: true} }
