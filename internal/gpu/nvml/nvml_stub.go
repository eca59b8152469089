//go:build !linux || !cgo

package nvml

import (
	"context"

	"lorayard/internal/gpu"
)

// Driver cannot be had in this build.
type Driver struct{}

// Open gives ErrUnavailable.
func Open() (*Driver, error) { return nil, ErrUnavailable }

// Close does nothing.
func (*Driver) Close() {}

// Devices gives ErrUnavailable.
func (*Driver) Devices(context.Context) ([]gpu.Device, error) { return nil, ErrUnavailable }

// Utilization gives ErrUnavailable.
func (*Driver) Utilization(context.Context) (map[string]float64, error) { return nil, ErrUnavailable }
