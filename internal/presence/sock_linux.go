package presence

import (
	"net"

	"golang.org/x/sys/unix"
)

// setUserTimeout bounds how long the kernel waits for a silent peer. It may
// fail or find no TCP below; then the kernel's own patience is what there is.
func setUserTimeout(conn net.Conn) {
	tcp, ok := raw(conn).(*net.TCPConn)
	if !ok {
		return
	}
	rc, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
	})
}
