package proto

// Rules are the rules of the protocol, each switched off by its field. The
// zero Rules are the protocol; anything else is a mutant, for tests that must
// notice that a rule is missing.
type Rules struct {
	// The database.
	AssignBlindly         bool // an assignment does not compare state and attempt
	AcceptAnyAttempt      bool // an accept does not compare the attempt
	AcceptAnyBoot         bool // an accept does not compare the process
	AcceptCancelled       bool // an accept does not look for a cancel
	AcceptOnce            bool // an accept asked again with its nonce is stale
	RenewAnyBoot          bool // a renewal does not compare the process
	WriteUnfenced         bool // a write compares nothing
	WriteWithoutNonce     bool // a write compares the attempt alone
	SettleAgain           bool // a settlement does not look whether the attempt is open
	SettleForgets         bool // a settlement asked again is stale
	CancelLoses           bool // a settlement does not look for a cancel
	FinalMayChange        bool // final statuses do not absorb
	LoseAnyAttempt        bool // the reaper does not compare the attempt
	LoseBlindly           bool // the reaper does not look again whether the agent is silent
	RequeueCancelled      bool // going back to the queue does not look for a cancel
	KeepUnlisted          bool // a renewal does not lose what its agent does not run
	RegisterKeepsAll      bool // a new process does not lose what it does not adopt
	RegisterAnyGeneration bool // a registration that comes after its heir's takes the agent back
	RegisterAnyInstance   bool // a process on another host takes an id whose lease is held
	// The dispatcher.
	NeverResend          bool
	NeverTakeBack        bool
	NeverReap            bool
	NeverSettleCancelled bool
	SameTaskID           bool // the name of a message has no send in it
	// The agent.
	GiveUpSettle        bool // a settlement without an answer is forgotten
	IgnoreLost          bool // an attempt that a renewal does not answer for goes on
	JudgeUnasked        bool // an attempt is judged by a renewal that did not name it
	ExtendUnasked       bool // a deadline is moved by a renewal that did not name the attempt
	ShareDevices        bool // a task is accepted while its devices are in use
	RegisterOverOrphans bool // a process registers while a trainer of the one before lives
	StartBeforeAccept   bool // the trainer starts before the accept is answered
	// The shim.
	NoOrphanKill       bool // a trainer whose agent is gone goes on
	NoDeadline         bool // a trainer out of touch goes on
	DeadlineFromAnswer bool // the deadline counts from the answer of a renewal
	DeadlineFromAccept bool // a new trainer's deadline counts from its accept
	StartLate          bool // a trainer is started though its deadline is over
	ReportBeforeDeath  bool // the death is reported before the trainer is dead
}
