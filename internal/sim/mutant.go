package sim

import "lorayard/internal/proto"

// Mutant is a world in which one rule is missing, for the test that somebody
// notices. Rules are the protocol's: those of the database are missing in the
// fake one, those of dispatcher, agent and shim at the seams around the real
// code. The rest is what only real code shows.
type Mutant struct {
	proto.Rules
	JudgeAtOnce    bool // the reaper does not wait a lease after the database was away
	JudgeUnled     bool // the reaper does not ask who leads
	ShareInBase    bool // neither an assignment nor an accept looks whether a device is taken
	FreeLate       bool // devices are free only after the settlement
	LeadWithoutEnd bool // the database gives the lead to everybody
	PayTwice       bool // the cost record has no id of its own
	PayLost        bool // lost attempts are billed
	FreshNonce     bool // an accept that is asked again draws another nonce
	ResumeUnasked  bool // a process goes on with what it was not given at registration
	LiveOrphans    bool // a process does not wait for what a killed one left
	ForgetDrain    bool // a leaving agent does not say so
	UnheardCancel  bool // a renewal does not bring a cancel
}
