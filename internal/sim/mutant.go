package sim

import "lorayard/internal/proto"

// Mutant is a world in which one rule is missing, for the test that somebody
// notices. Rules are the protocol's: those of the database are missing in the
// fake one, those of dispatcher, agent and shim at the seams around the real
// code. The rest is what only real code shows.
type Mutant struct {
	proto.Rules
	JudgeAtOnce   bool // the reaper does not wait a lease after the database was away
	JudgeUnled    bool // the reaper does not ask who leads
	ShareInBase   bool // neither an assignment nor an accept looks whether a device is taken
	PayLost       bool // lost attempts are billed
	PayIdle       bool // an attempt is billed until its settlement
	FreeLate      bool // devices are free only after the settlement
	ForgetLeft    bool // a process does not look for what the one before left to it
	ListNothing   bool // a renewal does not list what runs
	ResumeUnasked bool // a process goes on with what it was not given at registration
	UnheardCancel bool // a renewal does not bring a cancel
	HangingAccept bool // an accept waits for its answer for as long as it takes
	NeverAdmit    bool // a dispatcher does not see new rows
}
