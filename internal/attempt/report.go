package attempt

import (
	"errors"
	"path/filepath"
	"slices"

	"lorayard/internal/job"
	"lorayard/internal/presence"
)

// reportFile is what an attempt's shim sends to the dispatchers when this
// process dies under it: the job is elsewhere then before its lease is over.
const reportFile = "death.json"

// Announce says where the dispatchers are; shims of attempts under way learn of
// it as well.
func (r *Runner) Announce(addresses []string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.Equal(addresses, r.dispatchers) {
		return nil
	}
	r.dispatchers = slices.Clone(addresses)
	var errs []error
	for dir, ref := range r.under {
		errs = append(errs, r.writeReport(dir, ref))
	}
	return errors.Join(errs...)
}

// announce writes the report of an attempt that is under way from now on.
func (r *Runner) announce(dir string, ref job.Ref) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.under == nil {
		r.under = map[string]job.Ref{}
	}
	r.under[dir] = ref
	return r.writeReport(dir, ref)
}

func (r *Runner) forget(dir string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.under, dir)
}

func (r *Runner) writeReport(dir string, ref job.Ref) error {
	return presence.WriteReport(filepath.Join(dir, reportFile), presence.Report{
		Addresses: r.dispatchers, CA: r.CA,
		Death: presence.Death{Agent: r.Agent, Boot: r.Boot, Ref: ref, Message: "the agent died; its shim ended the trainer"},
	})
}
