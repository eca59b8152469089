// Package nvml reads devices through the NVIDIA driver's library. It is the
// only room that knows go-nvml, and the one guard around it: go-nvml resolves
// symbols lazily, and calling one that the installed driver lacks ends the
// process, so every symbol that is used here is looked up once at Open.
package nvml

import "errors"

// ErrUnavailable says that there is no driver library to read, or that this
// binary was built without cgo.
var ErrUnavailable = errors.New("the NVIDIA driver library (libnvidia-ml.so.1) is not available")
