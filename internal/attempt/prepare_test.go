package attempt

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"lorayard/internal/job"
	"lorayard/internal/storage"
)

// Training anew what a checkpoint holds costs hours: only one that is gone or
// damaged is passed over.
func TestOnlyALostCheckpointIsPassedOver(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		want bool
	}{
		"missing":              {&storage.Error{Status: 404}, true},
		"damaged":              {&storage.Error{Err: fmt.Errorf("%w: other bytes", storage.ErrDigest)}, true},
		"with an odd name":     {errors.New("a file named ../x"), true},
		"refused":              {&storage.Error{Status: 403}, false},
		"the store is down":    {&storage.Error{Status: 503}, false},
		"this disk is full":    {&storage.Error{Err: syscall.ENOSPC}, false},
		"the store was silent": {&storage.Error{Err: context.DeadlineExceeded}, false},
	} {
		if got := unusable(fmt.Errorf("fetch: %w", c.err)); got != c.want {
			t.Errorf("%s: unusable = %v", name, got)
		}
	}
}

func TestALostLeaseIsNoTroubleOfStorage(t *testing.T) {
	x := &run{}
	lost := fmt.Errorf("look: %w", &job.Failure{Kind: job.LeaseLost})
	for err, want := range map[error]job.Kind{
		lost:                        job.LeaseLost,
		&storage.Error{Status: 404}: job.DatasetMissing,
		&storage.Error{Status: 403}: job.StorageUnavailable,
	} {
		if got := job.KindOf(x.fetchFailure(t.Context(), err)); got != want {
			t.Errorf("%v is a failure of kind %s, want %s", err, got, want)
		}
	}
}
