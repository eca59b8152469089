package gpu

import (
	"fmt"
	"sync"
)

// XIDClass says what follows from an XID, the number under which NVIDIA's
// driver reports an error of a device.
type XIDClass string

// The classes. Lists of other tools disagree with the driver's own catalogue,
// in both directions; this table follows the catalogue, and the driver's
// recovery action, where the driver tells one, has the last word.
const (
	XIDUnknown   XIDClass = "unknown"   // not in the table: the device is looked at, nobody is ended
	XIDApp       XIDClass = "app"       // what a program did wrong; the device is as good as before
	XIDContained XIDClass = "contained" // memory broke under one program only: that one is ended, the device goes on
	XIDReset     XIDClass = "reset"     // the device works again after a reset
	XIDReboot    XIDClass = "reboot"    // the device is gone until the host is started anew
	XIDLink      XIDClass = "nvlink"    // the link to other devices broke
	XIDInfo      XIDClass = "info"      // to be counted, nothing more
	XIDVerdict   XIDClass = "verdict"   // the driver changed its recovery action: ask it
)

// XID is what is known of one number.
type XID struct {
	Code  int
	Class XIDClass
	Name  string // a few words; those of the driver's catalogue where it has some
}

// LookUp gives what is known of an XID.
func LookUp(code int) XID {
	if x, ok := xids()[code]; ok {
		return x
	}
	return XID{Code: code, Class: XIDUnknown, Name: "an error that this version does not know"}
}

// String is how a person reads it.
func (x XID) String() string { return fmt.Sprintf("XID %d, %s", x.Code, x.Name) }

// memory reports whether an XID says that memory gave wrong data or could not
// be mended: then the driver's later silence is no reason to trust the device.
func (x XID) memory() bool { return x.Code == 48 || x.Code == 64 || x.Code == 95 || x.Code == 140 }

const (
	xidCleanup    = 45  // follows other errors; alone it says nothing
	xidRowRemap   = 63  // a row was replaced, or is to be at the next reset
	xidFellOff    = 79  // also what we call a device that is gone without an XID
	xidContained  = 94  // memory broke under one program
	xidCorrection = 92  // so many single-bit errors that it will not stay at them
	xidVerdict    = 154 // the recovery action changed
)

// policy is the table: class by class, with names where there are known ones.
var policy = []struct {
	class XIDClass
	codes map[int]string
}{
	{XIDApp, map[int]string{
		8: "the GPU stopped processing", 11: "invalid or corrupted push buffer stream", 13: "graphics engine exception", 25: "invalid or illegal push buffer stream",
		31: "GPU memory page fault", 32: "invalid or corrupted push buffer stream", 39: "", 40: "", 41: "", 43: "the GPU stopped processing", 45: "preemptive clean-up after an earlier error",
		60: "video processor exception", 68: "video decoder exception", 69: "graphics engine class error", 70: "copy engine exception", 71: "copy engine exception", 72: "copy engine exception",
		75: "", 76: "", 77: "", 80: "corrupted data sent to the GPU", 82: "", 83: "", 84: "", 85: "", 86: "", 87: "", 88: "", 89: "",
		96: "", 97: "", 98: "", 99: "", 100: "", 101: "", 102: "", 103: "", 104: "", 105: "",
		126: "", 127: "", 128: "", 129: "", 130: "", 131: "", 132: "", 133: "", 134: "", 135: "", 137: "NVLink privilege error of a program", 139: "",
	}},
	{XIDContained, map[int]string{94: "contained memory error"}},
	{XIDReset, map[int]string{
		46: "the GPU stopped processing", 48: "double-bit memory error", 62: "internal micro-controller halt", 64: "a memory row could not be replaced", 95: "uncontained memory error",
		109: "context switch timed out", 110: "security fault", 119: "the GPU's system processor timed out", 120: "the GPU's system processor failed", 136: "", 140: "memory error that was not corrected",
		143: "initialisation failed", 155: "", 156: "", 158: "",
	}},
	{XIDReboot, map[int]string{79: "the GPU has fallen off the bus", 151: "key rotation failed"}},
	{XIDLink, map[int]string{74: "NVLink error", 144: "NVLink error", 145: "NVLink error", 146: "NVLink error", 147: "NVLink error", 148: "NVLink error", 149: "NVLink error", 150: "NVLink error"}},
	{XIDInfo, map[int]string{
		14: "", 37: "", 38: "driver firmware error", 44: "", 63: "a memory row was replaced or is to be", 66: "illegal access by the driver", 67: "", 92: "many single-bit memory errors",
		93: "", 106: "", 107: "", 108: "", 121: "a link to the host's processor was retrained", 141: "", 152: "", 153: "", 157: "", 160: "", 161: "", 162: "", 163: "", 164: "", 165: "",
	}},
	{XIDVerdict, map[int]string{154: "the driver's recovery action changed"}},
}

// names of a class whose codes have none of their own.
var named = map[XIDClass]string{
	XIDApp: "an error of a program", XIDReset: "an error that needs a reset", XIDInfo: "a note of the driver",
}

var xids = sync.OnceValue(func() map[int]XID {
	table := map[int]XID{}
	for _, p := range policy {
		for code, name := range p.codes {
			if name == "" {
				name = named[p.class]
			}
			table[code] = XID{Code: code, Class: p.class, Name: name}
		}
	}
	return table
})
