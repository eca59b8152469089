//go:build race

package proto_test

// raced: the race detector is on.
const raced = true
