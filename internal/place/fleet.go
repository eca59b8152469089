package place

import (
	"cmp"
	"encoding/binary"
	"maps"
	"math"
	"slices"
	"strconv"
	"time"
)

// state is one call under way. Everything in it is in a fixed order, so that
// the answer does not depend on the order of the input.
type state struct {
	Input
	result Result
	hosts  []host // by agent
	pools  []pool // by host, then class
	kinds  []kind
	users  map[string]*user

	demands map[string]*demand
	wishes  map[string][]int // wish and least memory → kinds
	models  map[string][]bool
	key     []byte // of the maps above, made anew for each job

	reservations []*reservation
	reserved     int // reservations that are no claims
	waits        []wait
	// ahead counts the devices that those who wait already ask for, by kind;
	// one who would take several kinds counts in parts.
	ahead []float64
}

// host is a Host during one call.
type host struct {
	*Host
	light int // attempts without devices
}

// kind is a sort of device that cannot be told from others of it.
type kind struct {
	class string
	gib   int64
	bytes int64 // the least of all
}

// pool is the devices of one kind on one host. A gang comes from one pool:
// GPUs of different classes train at the pace of the slowest, and cost
// differently.
type pool struct {
	host, kind int
	price, gib int64
	all        int         // with those that are not fit
	fault      string      // of one that is not
	devices    []*device   // fit ones, by UUID
	free       int         // open ones
	version    int         // grows with every change
	links      [][]int     // of the host
	times      []time.Time // when devices that are promised to nobody are expected free, earliest first
	timed      bool
}

// device is a fit device during one call.
type device struct {
	uuid string
	at   int          // in Host.Devices and Host.Links
	node int          // of its host's memory
	busy bool         // somebody has it
	run  *run         // that has it, nil if it is unknown or was just assigned
	ends time.Time    // when it is expected free, if busy; zero: unknown
	held *reservation // that it is promised to
}

func (d *device) open() bool { return !d.busy && d.held == nil }

// run is a Running during one call.
type run struct {
	*Running
	leaving bool
	pools   []*pool
}

// reservation is a promise made in this call.
type reservation struct {
	Reservation
	pool int
	free int // devices of it that are free at the moment
}

// demand is what jobs have in common that can be served by the same devices.
type demand struct {
	count  int
	model  string
	labels map[string]string
	kinds  []int
	pools  []candidate // that could serve it if nobody used them
	full   bool        // nothing free fits

	// What claim knows: what room in each pool would cost a job of roomsFor's
	// priority, and whether there is none.
	rooms    []room
	roomsFor int
	noRoom   bool

	tail     string      // see why
	releases []time.Time // see releasesOf
	told     bool
}

type candidate struct {
	pool  int
	lacks bool // the base model, which it would fetch
}

func (d *demand) takes(pool int) bool {
	_, ok := slices.BinarySearchFunc(d.pools, pool, func(c candidate, p int) int { return cmp.Compare(c.pool, p) })
	return ok
}

func newState(in Input) *state {
	s := &state{
		Input: in, result: Result{Waiting: make(map[string]Wait, len(in.Jobs))}, users: map[string]*user{},
		demands: map[string]*demand{}, wishes: map[string][]int{}, models: map[string][]bool{},
	}
	for i := range in.Hosts {
		s.hosts = append(s.hosts, host{Host: &in.Hosts[i]})
	}
	slices.SortFunc(s.hosts, func(a, b host) int { return cmp.Compare(a.Agent, b.Agent) })
	s.hosts = slices.CompactFunc(s.hosts, func(a, b host) bool { return a.Agent == b.Agent })
	at := s.poolDevices()
	s.ahead = make([]float64, len(s.kinds))

	for i := range in.Running {
		r := &run{Running: &in.Running[i], leaving: in.Running[i].Leaving}
		u := s.user(r.User)
		u.gpus += len(r.Devices)
		u.runs = append(u.runs, r)
		if len(r.Devices) == 0 {
			if i, ok := slices.BinarySearchFunc(s.hosts, r.Agent, func(h host, a string) int { return cmp.Compare(h.Agent, a) }); ok {
				s.hosts[i].light++
			}
		}
		for _, uuid := range r.Devices {
			p, fit := at[uuid]
			if !fit {
				continue // or its host is away
			}
			pool := &s.pools[p]
			i, _ := slices.BinarySearchFunc(pool.devices, uuid, func(d *device, u string) int { return cmp.Compare(d.uuid, u) })
			pool.devices[i].busy, pool.devices[i].run, pool.devices[i].ends = true, r, s.expected(r)
			if !slices.Contains(r.pools, pool) {
				r.pools = append(r.pools, pool)
			}
		}
	}
	for i := range s.pools {
		for _, d := range s.pools[i].devices {
			if d.open() {
				s.pools[i].free++
			}
		}
	}
	return s
}

// poolDevices sorts the devices into pools and says which pool each fit one is in. A device
// that two hosts report (an agent got another name, and the old one's lease is
// not over) is fit on neither.
func (s *state) poolDevices() map[string]int {
	at := map[string]int{}
	twice := map[string]bool{}
	for i := range s.hosts {
		for j := range s.hosts[i].Devices {
			uuid := s.hosts[i].Devices[j].UUID
			if _, seen := at[uuid]; seen {
				twice[uuid] = true
			}
			at[uuid] = 0
		}
	}
	clear(at)
	known := map[kind]int{}
	for i := range s.hosts {
		h := &s.hosts[i]
		order := make([]int, len(h.Devices))
		for j := range order {
			order[j] = j
		}
		gib := func(j int) int64 { return (h.Devices[j].MemoryBytes + 1<<29) >> 30 }
		slices.SortFunc(order, func(a, b int) int {
			return cmp.Or(cmp.Compare(h.Devices[a].Class, h.Devices[b].Class), cmp.Compare(gib(a), gib(b)), cmp.Compare(h.Devices[a].UUID, h.Devices[b].UUID))
		})
		var p *pool
		for n, j := range order {
			dev := &h.Devices[j]
			key := kind{class: dev.Class, gib: gib(j)}
			k, ok := known[key]
			if !ok {
				k = len(s.kinds)
				known[key] = k
				s.kinds = append(s.kinds, kind{class: dev.Class, gib: gib(j), bytes: dev.MemoryBytes})
			}
			s.kinds[k].bytes = min(s.kinds[k].bytes, dev.MemoryBytes)
			if n == 0 || p.kind != k {
				price, ok := h.PricePerHour[dev.Class]
				if !ok {
					price = math.MaxInt64
				}
				s.pools = append(s.pools, pool{host: i, kind: k, price: price, gib: gib(j), links: h.links()})
				p = &s.pools[len(s.pools)-1]
			}
			p.all++
			fault := dev.Fault
			if twice[dev.UUID] {
				fault = "two hosts report it"
			}
			if fault != "" {
				if p.fault == "" || fault < p.fault {
					p.fault = fault
				}
				continue
			}
			at[dev.UUID] = len(s.pools) - 1
			p.devices = append(p.devices, &device{uuid: dev.UUID, at: j, node: dev.Node, busy: dev.Busy})
		}
	}
	return at
}

// links gives Links if it has the size that it must have.
func (h *host) links() [][]int {
	if len(h.Links) != len(h.Devices) || slices.ContainsFunc(h.Links, func(row []int) bool { return len(row) != len(h.Devices) }) {
		return nil
	}
	return h.Links
}

// expected is when a run will be over; zero: unknown. One that is late already
// is taken to need another tenth of the time that it has had.
func (s *state) expected(r *run) time.Time {
	if r.Ends.IsZero() || r.Ends.After(s.Now) {
		return r.Ends
	}
	return s.Now.Add(max(s.Now.Sub(r.Started)/10, 0))
}

func (s *state) user(name string) *user {
	u := s.users[name]
	if u == nil {
		u = &user{User: s.Users[name], horizon: s.Policy.Horizon.Seconds()}
		if s.Policy.Horizon <= 0 {
			u.horizon = (15 * time.Minute).Seconds()
		}
		s.users[name] = u
	}
	return u
}

func (h *host) carries(labels map[string]string) bool {
	for k, v := range labels {
		if got, ok := h.Labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func (s *state) lacks(h *host, model string) bool {
	return model != "" && !slices.Contains(h.BaseModels, model)
}

// demandOf finds what j asks for among what was asked for before.
func (s *state) demandOf(j *Job) *demand {
	kinds := s.kindsOf(j)
	key := s.key[:0] // a lookup with it makes no string
	key = binary.AppendVarint(key, int64(j.Count))
	key = binary.AppendVarint(key, int64(len(kinds)))
	for _, k := range kinds {
		key = binary.AppendVarint(key, int64(k))
	}
	key = strconv.AppendQuote(key, j.BaseModel)
	if len(j.Labels) > 0 {
		for _, l := range slices.Sorted(maps.Keys(j.Labels)) {
			key = strconv.AppendQuote(strconv.AppendQuote(key, l), j.Labels[l])
		}
	}
	s.key = key
	d := s.demands[string(key)]
	if d == nil {
		d = &demand{count: j.Count, model: j.BaseModel, labels: j.Labels, kinds: kinds}
		for i := range s.pools {
			p := &s.pools[i]
			h := &s.hosts[p.host]
			if len(p.devices) < d.count || !slices.Contains(kinds, p.kind) || h.Draining || !h.carries(d.labels) {
				continue
			}
			lacks := s.modelless(d.model)[p.host]
			if !lacks || s.Policy.FetchModels {
				d.pools = append(d.pools, candidate{i, lacks})
			}
		}
		s.demands[string(key)] = d
	}
	return d
}

// kindsOf lists the kinds that j would take.
func (s *state) kindsOf(j *Job) []int {
	key := binary.AppendVarint(s.key[:0], j.MinBytes)
	key = binary.AppendVarint(key, int64(j.Wish.MinGB))
	key = binary.AppendVarint(key, int64(j.Wish.MaxGB))
	for _, c := range j.Wish.Classes {
		key = strconv.AppendQuote(key, c)
	}
	s.key = key
	kinds, ok := s.wishes[string(key)]
	if !ok {
		for i, k := range s.kinds {
			if k.bytes >= j.MinBytes && j.Wish.Matches(k.class, k.bytes) {
				kinds = append(kinds, i)
			}
		}
		s.wishes[string(key)] = kinds
	}
	return kinds
}

// modelless says of every host whether it lacks model.
func (s *state) modelless(model string) []bool {
	out, ok := s.models[model]
	if !ok {
		out = make([]bool, len(s.hosts))
		for i := range s.hosts {
			out[i] = s.lacks(&s.hosts[i], model)
		}
		s.models[model] = out
	}
	return out
}
