//go:build !linux

package presence

import "net"

// setUserTimeout is Linux's alone; elsewhere the keep-alive has to do.
func setUserTimeout(net.Conn) { _ = userTimeout }
