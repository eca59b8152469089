package gpu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// LockDirs are where lock files of devices may stand, the first that can be
// used wins. Two agents on one host have to look at the same place, whatever
// their data directories and users are.
func LockDirs() []string { return []string{"/run/lorayard", "/run/lock", os.TempDir()} }

// Locks are held while this process uses its devices, and end with it.
type Locks struct{ files []*os.File }

// LockDevices makes sure that no other agent of this host uses any of devices.
// Pretended ones are left alone. The error says which process has one.
func LockDevices(dirs []string, devices []Device) (*Locks, error) {
	l := &Locks{}
	for _, d := range devices {
		if d.Pretend || d.Fault != "" {
			continue
		}
		f, err := lockDevice(dirs, d.UUID)
		if err != nil {
			l.Close()
			return nil, err
		}
		l.files = append(l.files, f)
	}
	return l, nil
}

// Close gives the devices up.
func (l *Locks) Close() {
	for _, f := range l.files {
		f.Close()
	}
}

func lockDevice(dirs []string, uuid string) (*os.File, error) {
	var failed []error
	for _, dir := range dirs {
		f, err := openLock(filepath.Join(dir, "lorayard-"+uuid+".lock"))
		if err != nil {
			failed = append(failed, err)
			continue
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			owner := make([]byte, 32)
			n, _ := f.ReadAt(owner, 0)
			f.Close()
			if errors.Is(err, syscall.EWOULDBLOCK) {
				return nil, fmt.Errorf("device %s is used by another agent on this host (process %s): one agent runs all GPUs of a host, stop the other one", uuid, strings.TrimSpace(string(owner[:n])))
			}
			failed = append(failed, fmt.Errorf("lock %s: %w", f.Name(), err))
			continue
		}
		// For whoever comes and wants to know; another user's file stays as it is.
		if err := f.Truncate(0); err == nil {
			_, _ = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
		}
		return f, nil
	}
	return nil, fmt.Errorf("no place for the lock file of device %s: %w", uuid, errors.Join(failed...))
}

// openLock opens a file that agents of all users lock. One that is there is
// never made anew: in a directory that everybody may write, the kernel refuses
// that.
func openLock(path string) (*os.File, error) {
	_ = os.Mkdir(filepath.Dir(path), 0o755) // /run/lorayard, where we may
	for {
		f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrPermission) {
			f, err = os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
		}
		if errors.Is(err, fs.ErrNotExist) {
			f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o644)
			if errors.Is(err, fs.ErrExist) {
				continue // somebody was faster
			}
		}
		if err != nil {
			return nil, fmt.Errorf("open the lock file of a device: %w", err)
		}
		return f, nil
	}
}
