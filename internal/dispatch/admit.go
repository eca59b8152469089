package dispatch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"lorayard/internal/job"
	"lorayard/internal/store"
)

// admit looks at every new row, or at those that came: what can be run joins the
// queue, what cannot is failed in words for the user.
func (d *Dispatcher) admit(ctx context.Context, came []job.ID) error {
	rows, err := d.Store.Unadmitted(ctx, batch, came)
	if err != nil {
		d.news.Store(true)
		return err
	}
	if len(rows) == batch {
		d.news.Store(true) // there may be more
		d.Wake()
	}
	if len(rows) == 0 {
		return nil
	}
	if err := d.refresh(ctx, false); err != nil {
		return err
	}
	var errs []error
	var good []store.Admission
	for _, row := range rows { // one bad row never blocks the others
		a, refusal, err := d.judge(row, d.known.rates)
		switch {
		case err != nil:
			errs = append(errs, err)
		case refusal != "":
			d.Metrics.Admitted.WithLabelValues("refused").Inc()
			d.Log.InfoContext(ctx, "job refused", "job", row.ID, "err", refusal)
			errs = append(errs, d.Store.Refuse(ctx, row.ID, refusal))
		default:
			good = append(good, a)
		}
	}
	if len(good) == 0 {
		return errors.Join(errs...)
	}
	joined, err := d.Store.Admit(ctx, good)
	if err != nil {
		d.known.queue = false
		return errors.Join(append(errs, err)...)
	}
	d.known.join(joined)
	d.Metrics.Admitted.WithLabelValues("admitted").Add(float64(len(good)))
	for _, a := range good {
		d.Log.InfoContext(ctx, "job admitted", "job", a.ID)
	}
	return errors.Join(errs...)
}

// judge resolves what a row asks for. The refusal is for the user; the error
// is ours, and leaves the row to the next round.
func (d *Dispatcher) judge(row store.Row, rates map[string]int64) (a store.Admission, refusal string, err error) {
	spec, err := job.ParseSpec(row.Preset, row.Hyperparameters, row.GPUConfig, d.Config.Policy)
	if err != nil {
		refusal = job.ForUser(err)
	}
	// The database refuses a user's insert on another's data set; this holds
	// for rows that the app's server inserted.
	if row.DatasetOwner != row.User {
		refusal = join(refusal, "dataset_id is not one of your data sets: choose one of your own.")
	} else if row.DatasetDeleted {
		refusal = join(refusal, "the data set was deleted: choose another one.")
	} else if row.DatasetStatus == "error" {
		refusal = join(refusal, "the data set did not pass validation: correct its file and upload it again.")
	}
	rate, ok := dearest(spec.GPUs, rates)
	if !ok && err == nil {
		// A class is offered when it has a price; the operator adds one to
		// lorayard.rates.
		refusal = join(refusal, fmt.Sprintf("gpu_config.type %s is not offered here: choose one of %s.", spec.GPUs, strings.Join(slices.Sorted(maps.Keys(rates)), ", ")))
	}
	if refusal != "" {
		return a, refusal, nil
	}
	a = store.Admission{ID: row.ID, Spec: spec}
	if a.Hyperparameters, err = spec.Hyperparameters(row.Hyperparameters); err != nil {
		return a, "", fmt.Errorf("admit job %s: %w", row.ID, err)
	}
	if a.GPUConfig, err = spec.GPUConfig(row.GPUConfig, strconv.FormatFloat(float64(rate)/1e6, 'f', -1, 64)); err != nil {
		return a, "", fmt.Errorf("admit job %s: %w", row.ID, err)
	}
	return a, "", nil
}

// dearest is the highest rate among the classes that a wish admits and the
// rate card knows, in micro-dollars an hour: what is shown before the job is
// placed is not exceeded after. The bill is by the class it ran on.
func dearest(w job.Wish, rates map[string]int64) (rate int64, ok bool) {
	for _, class := range w.Admits() {
		if r, known := rates[class]; known {
			rate, ok = max(rate, r), true
		}
	}
	return rate, ok
}

func join(a, b string) string {
	if a == "" {
		return b
	}
	return a + " " + b
}
