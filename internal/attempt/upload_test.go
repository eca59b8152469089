package attempt

import (
	"testing"

	"lorayard/internal/job"
)

func TestARunIsJudgedByWhatIsHandedOut(t *testing.T) {
	value := func(f float64) *float64 { return &f }
	for name, c := range map[string]struct {
		result      job.Result
		convergence string
		stars       int
	}{
		"no validation data":       {job.Result{TrainingLoss: 0.1, Overfit: "unknown"}, "unknown", 3},
		"much better":              {job.Result{ValidationLoss: value(1), BaseValidation: value(2), Overfit: "no"}, "excellent", 5},
		"better":                   {job.Result{ValidationLoss: value(1.5), BaseValidation: value(2), Overfit: "no"}, "good", 4},
		"a little":                 {job.Result{ValidationLoss: value(1.8), BaseValidation: value(2), Overfit: "no"}, "fair", 3},
		"hardly":                   {job.Result{ValidationLoss: value(1.99), BaseValidation: value(2), Overfit: "no"}, "poor", 2},
		"worse, yet not by heart":  {job.Result{ValidationLoss: value(3), BaseValidation: value(2), Overfit: "no"}, "poor", 1},
		"from before it overfit":   {job.Result{ValidationLoss: value(1.1), BaseValidation: value(2), Overfit: "yes"}, "overfit", 4},
		"overfit from the start":   {job.Result{ValidationLoss: value(3), BaseValidation: value(2), Overfit: "yes"}, "overfit", 1},
		"an older trainer, a gap":  {job.Result{TrainingLoss: 0.1, ValidationLoss: value(1.9), BaseValidation: value(2)}, "overfit", 2},
		"an older trainer, no gap": {job.Result{TrainingLoss: 1.7, ValidationLoss: value(1.8), BaseValidation: value(2)}, "fair", 3},
	} {
		if q := quality(&c.result); q["convergence_quality"] != c.convergence || q["overall_score"] != c.stars {
			t.Errorf("%s: %v, want %s with %d stars", name, q, c.convergence, c.stars)
		}
	}
}
