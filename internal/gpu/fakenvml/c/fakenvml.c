/* A stand-in for NVIDIA's libnvidia-ml.so.1 that has as many devices as its
 * state says and breaks when it is told to. The state is a file that both sides
 * map; fakenvml.go has the same layout. Only what the agent calls is here. */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, NOT_LOADED = 9, TIMEOUT = 10, LOST = 15, RESET = 16 };
enum { DEVICES = 16, PARTS = 7, EVENTS = 4096 };

struct device {
	char uuid[48];
	char name[64];
	uint64_t total, used, reserved, corrected, uncorrected, energy, replays;
	uint32_t lost, reset, recovery, utilization, power, temperature;
	uint32_t remaps, remaps_bad, pending, failed, parts, links;
	uint32_t reasons, prohibited, spent_banks, off_fabric, pid, unused;
};

struct event { uint32_t device, type; uint64_t data; uint32_t instance, unused; };

struct state {
	uint32_t count, hang_ms, gone, generation, switched, old;
	volatile uint32_t written, read;
	struct event events[EVENTS];
	struct device devices[DEVICES];
};

static struct state *st;
static char mapped[4096];
static uint32_t seen; /* the generation of the driver that handles are of */

/* A handle is the address of one of these; a part is beside its device. */
static struct handle { int device, part; } handles[DEVICES][PARTS + 1];

/* What was lost stays so until the library is opened anew. */
static unsigned char stuck[DEVICES];

static int ready(void) {
	if (!st) return UNINITIALIZED;
	uint32_t ms = st->hang_ms;
	if (ms) {
		struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
		nanosleep(&t, NULL);
	}
	if (st->gone || st->generation != seen) return UNINITIALIZED;
	return OK;
}

static int at(struct handle *h, struct device **d) {
	int r = ready();
	if (r) return r;
	*d = &st->devices[h->device];
	if ((*d)->lost) stuck[h->device] = 1;
	if (stuck[h->device]) return LOST;
	if ((*d)->reset) return RESET;
	return OK;
}

#define DEVICE(h) struct device *d; int r = at(h, &d); if (r) return r

int nvmlInit_v2(void) {
	const char *path = getenv("FAKE_NVML_STATE");
	if (!path) return NOT_LOADED;
	if (!st || strcmp(mapped, path)) {
		int fd = open(path, O_RDWR);
		if (fd < 0) return NOT_LOADED;
		void *m = mmap(NULL, sizeof *st, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		close(fd);
		if (m == MAP_FAILED) return NOT_LOADED;
		st = m;
		snprintf(mapped, sizeof mapped, "%s", path);
	}
	if (st->gone) return NOT_LOADED;
	seen = st->generation;
	memset(stuck, 0, sizeof stuck);
	for (int i = 0; i < DEVICES; i++)
		for (int p = 0; p <= PARTS; p++) handles[i][p] = (struct handle){i, p};
	return OK;
}

int nvmlShutdown(void) { return OK; }

int nvmlSystemGetDriverVersion(char *to, unsigned n) { snprintf(to, n, "580.65.06"); return OK; }
int nvmlSystemGetCudaDriverVersion(int *v) { *v = 13000; return OK; }

int nvmlDeviceGetCount_v2(unsigned *n) {
	int r = ready();
	if (!r) *n = st->count;
	return r;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned i, struct handle **h) {
	int r = ready();
	if (r) return r;
	if (i >= st->count) return INVALID;
	if (st->devices[i].lost) return LOST;
	*h = &handles[i][0];
	return OK;
}

int nvmlDeviceGetUUID(struct handle *h, char *to, unsigned n) {
	DEVICE(h);
	if (h->part) snprintf(to, n, "MIG-%d-%s", h->part, d->uuid + 4);
	else snprintf(to, n, "%s", d->uuid);
	return OK;
}

int nvmlDeviceGetName(struct handle *h, char *to, unsigned n) {
	DEVICE(h);
	snprintf(to, n, h->part ? "%s MIG 1g.10gb" : "%s", d->name);
	return OK;
}

struct memory2 { unsigned version; unsigned long long total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo_v2(struct handle *h, struct memory2 *m) {
	DEVICE(h);
	uint64_t share = h->part ? 8 : 1;
	m->total = d->total / share;
	m->reserved = d->reserved / share;
	m->used = d->used / share;
	m->free = m->total - m->reserved - m->used;
	return OK;
}

struct memory { unsigned long long total, free, used; };
int nvmlDeviceGetMemoryInfo(struct handle *h, struct memory *m) {
	DEVICE(h);
	m->total = d->total;
	m->used = d->used + d->reserved;
	m->free = m->total - m->used;
	return OK;
}

struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };
static void pci_of(int i, struct pci *p) {
	memset(p, 0, sizeof *p);
	p->bus = 0x10 + (unsigned)i;
	snprintf(p->bus_id, sizeof p->bus_id, "00000000:%02X:00.0", p->bus);
}
int nvmlDeviceGetPciInfo_v3(struct handle *h, struct pci *p) {
	DEVICE(h);
	pci_of(h->device, p);
	return OK;
}

struct field { unsigned id, scope; long long time, latency; unsigned type, ret; unsigned long long value; };
int nvmlDeviceGetFieldValues(struct handle *h, int n, struct field *f) {
	DEVICE(h);
	if (st->old)
		for (int i = 0; i < n; i++)
			if (f[i].id >= 186) return INVALID;
	for (int i = 0; i < n; i++) {
		f[i].ret = OK;
		f[i].type = 3;
		switch (f[i].id) {
		case 3: f[i].value = d->corrected; break;
		case 4: f[i].value = d->uncorrected; break;
		case 74: case 269: case 270: case 271: f[i].value = 1000000000; break;
		case 82: f[i].value = d->temperature + 8; f[i].type = 1; break;
		case 83: f[i].value = d->energy; break;
		case 94: f[i].value = d->replays; f[i].type = 1; break;
		case 142: f[i].value = d->remaps; f[i].type = 1; break;
		case 143: f[i].value = d->remaps_bad; f[i].type = 1; break;
		case 144: f[i].value = d->pending; f[i].type = 1; break;
		case 145: f[i].value = d->failed; f[i].type = 1; break;
		case 186: f[i].value = d->power; f[i].type = 1; break;
		case 230: f[i].value = d->recovery; f[i].type = 1; break;
		case 38: case 52: case 59: f[i].value = 0; break;
		default: f[i].ret = UNSUPPORTED;
		}
	}
	return OK;
}

struct rates { unsigned gpu, memory; };
int nvmlDeviceGetUtilizationRates(struct handle *h, struct rates *u) {
	DEVICE(h);
	u->gpu = d->utilization;
	u->memory = d->utilization / 2;
	return OK;
}

int nvmlDeviceGetTemperature(struct handle *h, int sensor, unsigned *t) { DEVICE(h); (void)sensor; *t = d->temperature; return OK; }
int nvmlDeviceGetEnforcedPowerLimit(struct handle *h, unsigned *p) { DEVICE(h); *p = 700000; return OK; }
int nvmlDeviceGetClockInfo(struct handle *h, int which, unsigned *mhz) { DEVICE(h); *mhz = which == 2 ? 2619 : 1980; return OK; }
int nvmlDeviceGetCurrPcieLinkWidth(struct handle *h, unsigned *w) { DEVICE(h); *w = 16; return OK; }
int nvmlDeviceGetMaxPcieLinkWidth(struct handle *h, unsigned *w) { DEVICE(h); *w = 16; return OK; }
int nvmlDeviceGetCurrentClocksEventReasons(struct handle *h, unsigned long long *r_) { DEVICE(h); *r_ = d->reasons; return OK; }
int nvmlDeviceGetPowerUsage(struct handle *h, unsigned *p) { DEVICE(h); *p = d->power; return OK; }
int nvmlDeviceGetPersistenceMode(struct handle *h, int *on) { DEVICE(h); *on = 1; return OK; }
int nvmlDeviceGetComputeMode(struct handle *h, int *mode) { DEVICE(h); *mode = d->prohibited ? 2 : 0; return OK; }
int nvmlDeviceGetEccMode(struct handle *h, int *now, int *next) { DEVICE(h); *now = *next = 1; return OK; }
struct histogram { unsigned max, high, partial, low, none; };
int nvmlDeviceGetRowRemapperHistogram(struct handle *h, struct histogram *v) {
	DEVICE(h);
	*v = (struct histogram){2560 - d->spent_banks, 0, 0, 0, d->spent_banks};
	return OK;
}
int nvmlDeviceValidateInforom(struct handle *h) { DEVICE(h); return OK; }
struct sram { unsigned version; unsigned long long counts[11]; unsigned exceeded; };
int nvmlDeviceGetSramEccErrorStatus(struct handle *h, struct sram *v) { DEVICE(h); v->exceeded = 0; return OK; }
struct fabric { unsigned version; unsigned char cluster[16]; unsigned status, clique; unsigned char state; unsigned health; };
int nvmlDeviceGetGpuFabricInfoV(struct handle *h, struct fabric *v) {
	DEVICE(h);
	v->status = 0;
	v->state = !st->switched ? 0 : d->off_fabric ? 2 : 3;
	v->health = 2;
	return OK;
}
int nvmlDeviceGetCurrPcieLinkGeneration(struct handle *h, unsigned *g) { DEVICE(h); *g = d->utilization ? 5 : 1; return OK; }
int nvmlDeviceGetMaxPcieLinkGeneration(struct handle *h, unsigned *g) { DEVICE(h); *g = 5; return OK; }
struct process { unsigned pid; unsigned long long used; unsigned gi, ci; };
int nvmlDeviceGetComputeRunningProcesses_v3(struct handle *h, unsigned *n, struct process *p) {
	DEVICE(h);
	if (d->pid && *n < 1) return *n = 1, 7;
	*n = d->pid ? 1 : 0;
	if (d->pid) *p = (struct process){d->pid, d->used, 0xffffffff, 0xffffffff};
	return OK;
}
struct margin { unsigned version; int margin; };
int nvmlDeviceGetMarginTemperature(struct handle *h, struct margin *m) { DEVICE(h); m->margin = 87 - (int)d->temperature; return OK; }

int nvmlDeviceGetNvLinkState(struct handle *h, unsigned link, int *on) {
	DEVICE(h);
	if (link >= d->links) return INVALID;
	*on = 1;
	return OK;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(struct handle *h, unsigned link, unsigned *kind) {
	DEVICE(h);
	(void)link;
	*kind = st->switched ? 2 : 0;
	return OK;
}
/* Without a switch devices are linked in pairs. */
int nvmlDeviceGetNvLinkRemotePciInfo_v2(struct handle *h, unsigned link, struct pci *p) {
	DEVICE(h);
	(void)link;
	pci_of(h->device ^ 1, p);
	return OK;
}
/* Four devices share a processor. */
int nvmlDeviceGetTopologyCommonAncestor(struct handle *a, struct handle *b, int *level) {
	*level = a->device / 4 == b->device / 4 ? 30 : 50;
	return ready();
}

int nvmlDeviceGetMigMode(struct handle *h, unsigned *now, unsigned *pending) { DEVICE(h); *now = *pending = d->parts > 0; return OK; }
int nvmlDeviceGetMaxMigDeviceCount(struct handle *h, unsigned *n) { DEVICE(h); *n = PARTS; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(struct handle *h, unsigned i, struct handle **part) {
	DEVICE(h);
	if (i >= d->parts) return NOT_FOUND;
	*part = &handles[h->device][i + 1];
	return OK;
}

int nvmlDeviceGetGpuInstanceId(struct handle *h, unsigned *id) {
	DEVICE(h);
	if (!h->part) return INVALID;
	*id = 6 + (unsigned)h->part;
	return OK;
}

int nvmlEventSetCreate(void **set) { *set = &seen; return ready(); }
int nvmlEventSetFree(void *set) { (void)set; return OK; }
int nvmlDeviceGetSupportedEventTypes(struct handle *h, unsigned long long *types) { DEVICE(h); *types = 0x1f; return OK; }
int nvmlDeviceRegisterEvents(struct handle *h, unsigned long long types, void *set) { DEVICE(h); (void)types; (void)set; return OK; }

struct event_data { struct handle *device; unsigned long long type, data; unsigned gi, ci; };
int nvmlEventSetWait_v2(void *set, struct event_data *e, unsigned ms) {
	struct timespec until, now, left;
	(void)set;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += ms / 1000;
	until.tv_nsec += (long)(ms % 1000) * 1000000;
	for (;;) {
		if (!st || st->gone || st->generation != seen) return UNINITIALIZED;
		uint32_t w = st->written;
		if (st->read != w) {
			struct event *from = &st->events[st->read % EVENTS];
			e->device = &handles[from->device][0];
			e->type = from->type;
			e->data = from->data;
			e->gi = from->instance;
			e->ci = 0xffffffff;
			st->read++;
			return OK;
		}
		clock_gettime(CLOCK_MONOTONIC, &now);
		left.tv_sec = until.tv_sec - now.tv_sec;
		left.tv_nsec = until.tv_nsec - now.tv_nsec;
		while (left.tv_nsec < 0) { left.tv_nsec += 1000000000; left.tv_sec--; }
		while (left.tv_nsec >= 1000000000) { left.tv_nsec -= 1000000000; left.tv_sec++; }
		if (left.tv_sec < 0) return TIMEOUT;
		syscall(SYS_futex, &st->written, FUTEX_WAIT, w, &left, NULL, 0);
	}
}
