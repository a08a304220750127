/* A libnvidia-ml.so.1 without a driver: the ABI of nvml.h over what a text file says; state.h tells how it says it.
 *
 * No file: NVML_ERROR_DRIVER_NOT_LOADED. Of functions that are not here, pynvml makes NVML_ERROR_FUNCTION_NOT_FOUND, as
 * with an old driver. One GPU that is lost does not fail a look-up of another by UUID, as it may in NVML.
 */
#include "state.h"

/* --- what nvml.h says ------------------------------------------------------------------------------------------- */

typedef struct device *nvmlDevice_t;
typedef struct event_set *nvmlEventSet_t;

typedef struct { ulonglong total, free, used; } nvmlMemory_t; /* used holds what is reserved */
typedef struct { uint version; ulonglong total, reserved, free, used; } nvmlMemory_v2_t;
typedef struct { uint pid; ulonglong usedGpuMemory; uint gpuInstanceId, computeInstanceId; } nvmlProcessInfo_t;
typedef struct { uint gpu, memory; } nvmlUtilization_t;
typedef struct {
    char busIdLegacy[16];
    uint domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo_t;
typedef struct {
    uint multiprocessorCount, sharedCopyEngineCount, sharedDecoderCount, sharedEncoderCount, sharedJpegCount,
        sharedOfaCount, gpuInstanceSliceCount, computeInstanceSliceCount;
    ulonglong memorySizeMB;
} nvmlDeviceAttributes_t;
typedef struct {
    nvmlDevice_t device;
    ulonglong eventType, eventData;
    uint gpuInstanceId, computeInstanceId;
} nvmlEventData_t;
typedef struct { uint version, sensorType; int temperature; } nvmlTemperature_t;
typedef union {
    double dVal;
    int siVal;
    uint uiVal;
    unsigned long ulVal;
    ulonglong ullVal;
    long long sllVal;
    unsigned short usVal;
} nvmlValue_t;
typedef struct {
    uint fieldId, scopeId;
    long long timestamp, latencyUsec;
    int valueType; /* nvmlValueType_t */
    nvmlReturn_t nvmlReturn;
    nvmlValue_t value;
} nvmlFieldValue_t;

#define STRUCT_VERSION(type, version) ((uint)(sizeof(type) | (version) << 24)) /* NVML_STRUCT_VERSION */
#define VALUE_NOT_AVAILABLE (~0ULL)
#define NO_INSTANCE 0xFFFFFFFFu
#define EVENT_XID 8ULL
#define FIELD_RECOVERY_ACTION 230 /* NVML_FI_DEV_GET_GPU_RECOVERY_ACTION */
#define VALUE_UNSIGNED_INT 1    /* NVML_VALUE_TYPE_UNSIGNED_INT */
#define MOST_NVLINKS 36
#define MIB (1ULL << 20)

/* --- start, end, handles ---------------------------------------------------------------------------------------- */

/* A handle is the UUID that it was got by, so it keeps its meaning when the file changes; it is never freed. */
struct device { char uuid[96]; struct device *next; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct device *devices;
static int starts;

static bool started(void) {
    pthread_mutex_lock(&lock);
    bool answer = starts > 0;
    pthread_mutex_unlock(&lock);
    return answer;
}

static nvmlReturn_t hand_out(const char *uuid, nvmlDevice_t *device) {
    pthread_mutex_lock(&lock);
    struct device *known = devices;
    while (known && strcmp(known->uuid, uuid)) known = known->next;
    if (!known && strlen(uuid) < sizeof known->uuid && (known = calloc(1, sizeof *known))) {
        strcpy(known->uuid, uuid);
        known->next = devices;
        devices = known;
    }
    pthread_mutex_unlock(&lock);
    *device = known;
    return known ? NVML_SUCCESS : NVML_ERROR_MEMORY;
}

static nvmlReturn_t enter_pair(struct state *state, const char *call, nvmlDevice_t one, nvmlDevice_t other,
                               struct target met[2]) {
    if (!started()) return NVML_ERROR_UNINITIALIZED;
    if (!one || !other) return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn_t refused = enter(state, call, (const char *[2]){one->uuid, other->uuid}, met);
    if (!refused && (!met[0].gpu || !met[1].gpu)) return NVML_ERROR_GPU_IS_LOST; /* the file no longer has it */
    return refused;
}

#define STATE struct state state __attribute__((cleanup(forget))) = {0}
#define OR_LEAVE(step) \
    do { nvmlReturn_t refused = (step); if (refused) return refused; } while (0)

/* Begins every call about one device: `state` and `it`, the GPU or slice, are good after it. */
#define DEVICE_CALL(device, out) \
    STATE; \
    struct target both[2]; \
    if (!(out)) return NVML_ERROR_INVALID_ARGUMENT; \
    OR_LEAVE(enter_pair(&state, __func__, device, device, both)); \
    struct target it = both[0]; \
    (void)it

/* The same, for what slices do not answer. */
#define GPU_CALL(device, out) \
    DEVICE_CALL(device, out); \
    if (it.mig) return NVML_ERROR_NOT_SUPPORTED

/* Begins a call about the whole machine, or about a device that is named; both[0] is what the name found. */
#define SYSTEM_CALL(name, out) \
    STATE; \
    struct target both[2]; \
    if (!(out)) return NVML_ERROR_INVALID_ARGUMENT; \
    if (!started()) return NVML_ERROR_UNINITIALIZED; \
    OR_LEAVE(enter(&state, __func__, (const char *[2]){name, NULL}, both))

nvmlReturn_t nvmlInitWithFlags(uint flags) {
    STATE;
    struct target none[2];
    (void)flags;
    OR_LEAVE(enter(&state, "nvmlInit_v2", (const char *[2]){NULL, NULL}, none));
    pthread_mutex_lock(&lock);
    starts++;
    pthread_mutex_unlock(&lock);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void) {
    SYSTEM_CALL(NULL, "");
    pthread_mutex_lock(&lock);
    starts--;
    pthread_mutex_unlock(&lock);
    return NVML_SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t result) {
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == result) return ERRORS[i].text;
    return "Unknown Error";
}

static nvmlReturn_t put(const char *value, char *out, uint length) {
    if (strlen(value) >= length) return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, value);
    return NVML_SUCCESS;
}

static const char *of_driver(const struct state *state, const char *key, const char *absent) {
    EACH(state, "driver", driver) return text(driver, key, absent);
    return absent;
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, uint length) {
    SYSTEM_CALL(NULL, version);
    return put(of_driver(&state, "version", "580.159.04"), version, length);
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) {
    SYSTEM_CALL(NULL, version);
    *version = atoi(of_driver(&state, "cuda", "13000"));
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCount_v2(uint *count) {
    SYSTEM_CALL(NULL, count);
    *count = 0;
    EACH(&state, "gpu", gpu) (void)gpu, ++*count;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(uint index, nvmlDevice_t *device) {
    char name[16];
    snprintf(name, sizeof name, "%u", index);
    SYSTEM_CALL(name, device);
    if (!both[0].gpu) return NVML_ERROR_INVALID_ARGUMENT;
    return hand_out(text(both[0].gpu, "uuid", ""), device);
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    SYSTEM_CALL(uuid, device && uuid);
    const struct line *found = both[0].mig ? both[0].mig : both[0].gpu;
    if (!found || strcmp(text(found, "uuid", ""), uuid)) return NVML_ERROR_NOT_FOUND;
    return hand_out(uuid, device);
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus, nvmlDevice_t *device) {
    SYSTEM_CALL(bus, device && bus);
    if (!both[0].gpu || !same_bus(text(both[0].gpu, "bus", ""), bus)) return NVML_ERROR_NOT_FOUND;
    return hand_out(text(both[0].gpu, "uuid", ""), device);
}

/* --- what a GPU is ---------------------------------------------------------------------------------------------- */

#define NUMBER(function, type, line, key) \
    nvmlReturn_t function(nvmlDevice_t device, type *value) { \
        DEVICE_CALL(device, value); \
        if (!(line) || !text(line, key, NULL)) return NVML_ERROR_NOT_SUPPORTED; \
        *value = (type)number(line, key, 0); \
        return NVML_SUCCESS; \
    }
#define WHOLE (it.mig ? NULL : it.gpu)
#define EITHER (it.mig ? it.mig : it.gpu)

NUMBER(nvmlDeviceGetIndex, uint, EITHER, "index")
NUMBER(nvmlDeviceGetMinorNumber, uint, WHOLE, "minor")
NUMBER(nvmlDeviceGetNumaNodeId, uint, WHOLE, "numa_node_id")
NUMBER(nvmlDeviceGetPowerUsage, uint, WHOLE, "power_milliwatts")
NUMBER(nvmlDeviceGetComputeMode, uint, WHOLE, "compute_mode")
NUMBER(nvmlDeviceGetPersistenceMode, uint, WHOLE, "persistence")
NUMBER(nvmlDeviceGetGpuInstanceId, uint, it.mig, "gi")
NUMBER(nvmlDeviceGetComputeInstanceId, uint, it.mig, "ci")

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, uint length) {
    DEVICE_CALL(device, uuid);
    return put(device->uuid, uuid, length);
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, uint length) {
    DEVICE_CALL(device, name);
    const char *gpu = text(it.gpu, "name", "NVIDIA Fake");
    char whole[192];
    snprintf(whole, sizeof whole, "%s MIG %s", gpu, it.mig ? text(it.mig, "profile", "1g") : "");
    return put(it.mig ? whole : gpu, name, length);
}

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, uint sensor, uint *temperature) {
    DEVICE_CALL(device, temperature);
    if (sensor != 0) return NVML_ERROR_INVALID_ARGUMENT;
    if (it.mig || !text(it.gpu, "temperature_celsius", NULL)) return NVML_ERROR_NOT_SUPPORTED;
    *temperature = (uint)number(it.gpu, "temperature_celsius", 0);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, nvmlTemperature_t *temperature) {
    if (temperature->version != STRUCT_VERSION(*temperature, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    return nvmlDeviceGetTemperature(device, temperature->sensorType, (uint *)&temperature->temperature);
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *rates) {
    GPU_CALL(device, rates);
    bool sliced = number(it.gpu, "mig", 0); /* nvml.h: not supported while MIG is on */
    if (sliced || !text(it.gpu, "utilisation", NULL)) return NVML_ERROR_NOT_SUPPORTED;
    *rates = (nvmlUtilization_t){(uint)number(it.gpu, "utilisation", 0), (uint)number(it.gpu, "memory_utilisation", 0)};
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor) {
    DEVICE_CALL(device, major && minor);
    const char *capability = text(it.gpu, "capability", NULL);
    if (!capability) return NVML_ERROR_NOT_SUPPORTED;
    if (sscanf(capability, "%d.%d", major, minor) != 2) broken("not a compute capability", capability);
    return NVML_SUCCESS;
}

/* Volatile and aggregate counts are the same number here. */
nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, uint type, uint counter, ulonglong *count) {
    GPU_CALL(device, count);
    if (type > 1 || counter > 1) return NVML_ERROR_INVALID_ARGUMENT;
    const char *key = type == 1 ? "ecc_uncorrected" : "ecc_corrected";
    if (!text(it.gpu, key, NULL)) return NVML_ERROR_NOT_SUPPORTED;
    *count = (ulonglong)number(it.gpu, key, 0);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t device, uint *correctable, uint *uncorrectable, uint *pending,
                                       uint *failed) {
    GPU_CALL(device, correctable && uncorrectable && pending && failed);
    bool sliced = number(it.gpu, "mig", 0); /* nvml.h: not supported while MIG is on */
    if (sliced || !text(it.gpu, "remapped_uncorrectable", NULL)) return NVML_ERROR_NOT_SUPPORTED;
    *correctable = (uint)number(it.gpu, "remapped_correctable", 0);
    *uncorrectable = (uint)number(it.gpu, "remapped_uncorrectable", 0);
    *pending = (uint)number(it.gpu, "remap_pending", 0);
    *failed = (uint)number(it.gpu, "remap_failed", 0);
    return NVML_SUCCESS;
}

/* All retired pages are of double bit errors (cause 1). */
nvmlReturn_t nvmlDeviceGetRetiredPages(nvmlDevice_t device, uint cause, uint *count, ulonglong *addresses) {
    GPU_CALL(device, count);
    if (!text(it.gpu, "retired_pages", NULL)) return NVML_ERROR_NOT_SUPPORTED;
    uint retired = cause == 1 ? (uint)number(it.gpu, "retired_pages", 0) : 0, room = *count;
    *count = retired;
    if (room < retired) return NVML_ERROR_INSUFFICIENT_SIZE;
    for (uint i = 0; i < retired; i++) addresses[i] = (ulonglong)i << 12;
    return NVML_SUCCESS;
}

/* The call succeeds, and each field says for itself whether it is offered; slices offer none. */
nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t *values) {
    DEVICE_CALL(device, values && count > 0);
    for (nvmlFieldValue_t *field = values; field < values + count; field++) {
        const char *action = it.mig ? NULL : text(it.gpu, "recovery_action", NULL);
        field->nvmlReturn = NVML_ERROR_NOT_SUPPORTED;
        if (field->fieldId != FIELD_RECOVERY_ACTION || !action) continue;
        field->nvmlReturn = NVML_SUCCESS;
        field->valueType = VALUE_UNSIGNED_INT;
        field->value.uiVal = (uint)number(it.gpu, "recovery_action", 0);
    }
    return NVML_SUCCESS;
}

/* --- where a GPU is --------------------------------------------------------------------------------------------- */

static nvmlReturn_t put_pci(const char *bus, const struct line *gpu, nvmlPciInfo_t *pci) {
    *pci = (nvmlPciInfo_t){0};
    if (sscanf(bus, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device) != 3) broken("not a PCI bus id", bus);
    /* An H100 of SXM5, where nothing else is said. */
    pci->pciDeviceId = gpu ? (uint)number(gpu, "pci_device_id", 0x233010de) : 0;
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "%04X:%02X:%02X.0", pci->domain & 0xffff, pci->bus & 0xff,
             pci->device & 0x1f);
    snprintf(pci->busId, sizeof pci->busId, "%08X:%02X:%02X.0", pci->domain, pci->bus & 0xff, pci->device & 0x1f);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci) {
    GPU_CALL(device, pci);
    return put_pci(needed(it.gpu, "bus"), it.gpu, pci);
}

/* The bits of "0-15,32-47", as far as the array goes. */
static void put_bits(const char *list, unsigned long *words, uint count) {
    const uint width = 8 * sizeof *words;
    memset(words, 0, sizeof *words * count);
    for (const char *at = list; *at; at += *at == ',') {
        char *end;
        unsigned long low = strtoul(at, &end, 10), high = low;
        if (end == at) broken("not a list of numbers", list);
        if (*end == '-') high = strtoul(end + 1, &end, 10);
        for (; low <= high && low < (unsigned long)count * width; low++) words[low / width] |= 1UL << low % width;
        at = end;
    }
}

#define AFFINITY(function, key, ...) \
    nvmlReturn_t function(nvmlDevice_t device, uint count, unsigned long *set __VA_ARGS__) { \
        GPU_CALL(device, set && count); \
        if (!text(it.gpu, key, NULL)) return NVML_ERROR_NOT_SUPPORTED; \
        put_bits(text(it.gpu, key, ""), set, count); \
        return NVML_SUCCESS; \
    }

AFFINITY(nvmlDeviceGetMemoryAffinity, "numa", , uint scope __attribute__((unused)))
AFFINITY(nvmlDeviceGetCpuAffinityWithinScope, "cpus", , uint scope __attribute__((unused)))
AFFINITY(nvmlDeviceGetCpuAffinity, "cpus")

static bool ends_at(const struct state *state, const struct line *link, const struct line *one) {
    return target_called(state, needed(link, "a")).gpu == one || target_called(state, needed(link, "b")).gpu == one;
}

static bool is_nvlink(const struct line *link) { return !strcmp(needed(link, "kind"), "nvlink"); }

static uint level(const struct state *state, const struct target pair[2]) {
    static const char *const kinds[] = {"internal", "pix", "pxb", "phb", "node", "sys"};
    if (pair[0].gpu == pair[1].gpu) return 0;
    EACH(state, "link", link) {
        if (is_nvlink(link) || !ends_at(state, link, pair[0].gpu) || !ends_at(state, link, pair[1].gpu)) continue;
        for (uint i = 0; i < 6; i++)
            if (!strcmp(text(link, "kind", ""), kinds[i])) return i * 10;
        broken("no such kind of link", text(link, "kind", ""));
    }
    return strcmp(text(pair[0].gpu, "numa", "0"), text(pair[1].gpu, "numa", "0")) ? 50 : 40;
}

nvmlReturn_t nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t one, nvmlDevice_t other, uint *path) {
    STATE;
    struct target both[2];
    if (!path) return NVML_ERROR_INVALID_ARGUMENT;
    OR_LEAVE(enter_pair(&state, __func__, one, other, both));
    *path = level(&state, both);
    return NVML_SUCCESS;
}

/* Without p2p=: peers reach each other over NVLink and below one socket's root, and not across sockets. */
nvmlReturn_t nvmlDeviceGetP2PStatus(nvmlDevice_t one, nvmlDevice_t other, uint capability, uint *status) {
    static const char *const names[] = {"ok", "cns", "gns", "tns", "disabled", "ns", "unknown"};
    enum { OK = 0, TOPOLOGY_NOT_SUPPORTED = 3, NOT_SUPPORTED = 5 };
    STATE;
    struct target both[2];
    if (!status || capability > 4) return NVML_ERROR_INVALID_ARGUMENT;
    OR_LEAVE(enter_pair(&state, __func__, one, other, both));
    bool linked = number(both[0].gpu, "nvswitch_links", 0) > 0 && number(both[1].gpu, "nvswitch_links", 0) > 0;
    const char *told = NULL;
    EACH(&state, "link", link) {
        if (!ends_at(&state, link, both[0].gpu) || !ends_at(&state, link, both[1].gpu)) continue;
        linked |= is_nvlink(link) && number(link, "up", number(link, "count", 1)) > 0;
        told = text(link, "p2p", told);
    }
    if (capability == 2) return *status = linked ? OK : NOT_SUPPORTED, NVML_SUCCESS;
    *status = linked || level(&state, both) < 50 ? OK : TOPOLOGY_NOT_SUPPORTED;
    for (uint i = 0; told && i < sizeof names / sizeof *names; i++)
        if (!strcmp(told, names[i])) *status = i;
    return NVML_SUCCESS;
}

struct nvlink { bool active, to_switch; const char *bus; };

/* The link of that number: first those to the switch, then those to peers, then inactive ones. */
static nvmlReturn_t nvlink(const struct state *state, struct target it, uint wanted, struct nvlink *found) {
    uint before = (uint)number(it.gpu, "nvswitch_links", 0);
    bool to_switch = wanted < before;
    *found = (struct nvlink){to_switch, to_switch, text(it.gpu, "nvswitch", "0000:07:00.0")};
    EACH(state, "link", link) {
        if (!is_nvlink(link) || !ends_at(state, link, it.gpu)) continue;
        uint count = (uint)number(link, "count", 1);
        struct target a = target_called(state, text(link, "a", "")), b = target_called(state, text(link, "b", ""));
        if (wanted >= before && wanted - before < count)
            *found = (struct nvlink){wanted - before < (uint)number(link, "up", count), false,
                                     text(a.gpu == it.gpu ? b.gpu : a.gpu, "bus", "")};
        before += count;
    }
    if (wanted >= MOST_NVLINKS) return NVML_ERROR_INVALID_ARGUMENT;
    return before ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t device, uint number_of_link, uint *active) {
    GPU_CALL(device, active);
    struct nvlink link;
    OR_LEAVE(nvlink(&state, it, number_of_link, &link));
    *active = link.active;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo_v2(nvmlDevice_t device, uint number_of_link, nvmlPciInfo_t *pci) {
    GPU_CALL(device, pci);
    struct nvlink link;
    OR_LEAVE(nvlink(&state, it, number_of_link, &link));
    return link.active ? put_pci(link.bus, NULL, pci) : NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetNvLinkRemoteDeviceType(nvmlDevice_t device, uint number_of_link, uint *type) {
    GPU_CALL(device, type);
    struct nvlink link;
    OR_LEAVE(nvlink(&state, it, number_of_link, &link));
    if (!link.active) return NVML_ERROR_NOT_SUPPORTED;
    *type = link.to_switch ? 2 : 0; /* NVML_NVLINK_DEVICE_TYPE_SWITCH, _GPU */
    return NVML_SUCCESS;
}

/* --- memory and processes --------------------------------------------------------------------------------------- */

enum life { LIVES, LINGERS, GONE };

static bool is_alive(long long pid, long long start) {
    char path[64], state = 'X';
    unsigned long long ticks = 0;
    snprintf(path, sizeof path, "/proc/%lld/stat", pid);
    char *stat = file_text(path), *name_end = stat ? strrchr(stat, ')') : NULL;
    if (name_end)
        sscanf(name_end + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu", &state,
               &ticks);
    free(stat);
    return state != 'X' && state != 'Z' && (start < 0 || (ulonglong)start == ticks);
}

/* When the pid was first seen dead: what a symlink says, which only the first who sees it can make. */
static long long time_of_death(long long pid, long long start, long long now) {
    char ending[64], said[32] = "";
    snprintf(ending, sizeof ending, ".dead.%lld.%lld", pid, start);
    snprintf(said, sizeof said, "%lld", now);
    char *path = file_beside_state(ending);
    if (symlink(said, path) != 0 && errno != EEXIST) broken("cannot note a death in", path);
    ssize_t length = readlink(path, said, sizeof said - 1);
    said[length < 0 ? 0 : length] = '\0';
    return atoll(said);
}

static enum life life(const struct state *state, const struct line *process) {
    long long pid = number(process, "pid", 0), start = number(process, "start", -1);
    if (number(process, "elsewhere", 0) || is_alive(pid, start)) return LIVES;
    long long linger = number(process, "linger_seconds", 0);
    if (linger == 0) return GONE;
    struct timespec clock;
    clock_gettime(CLOCK_BOOTTIME, &clock);
    long long now = clock.tv_sec;
    EACH(state, "clock", line) now += number(line, "ahead_seconds", 0);
    return now - time_of_death(pid, start, now) < linger ? LINGERS : GONE;
}

static nvmlMemory_v2_t memory(const struct state *state, struct target it) {
    const struct line *size = it.mig ? it.mig : it.gpu;
    nvmlMemory_v2_t sum = {.version = STRUCT_VERSION(nvmlMemory_v2_t, 2)};
    sum.total = (ulonglong)number(size, "total_mib", 0) * MIB;
    sum.reserved = (ulonglong)number(size, "reserved_mib", 0) * MIB;
    EACH(state, "used", used)
        if (within(state, used, it)) sum.used += (ulonglong)number(used, "mib", 0) * MIB;
    EACH(state, "process", process)
        if (within(state, process, it) && life(state, process) != GONE)
            sum.used += (ulonglong)number(process, "mib", 0) * MIB;
    ulonglong taken = sum.reserved + sum.used;
    sum.free = taken < sum.total ? sum.total - taken : 0;
    return sum;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *out) {
    DEVICE_CALL(device, out);
    if (!text(it.gpu, "total_mib", NULL)) return NVML_ERROR_NOT_SUPPORTED;
    nvmlMemory_v2_t now = memory(&state, it);
    *out = (nvmlMemory_t){.total = now.total, .free = now.free, .used = now.reserved + now.used};
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *out) {
    DEVICE_CALL(device, out);
    if (out->version != STRUCT_VERSION(*out, 2)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (!text(it.gpu, "total_mib", NULL)) return NVML_ERROR_NOT_SUPPORTED;
    *out = memory(&state, it);
    return NVML_SUCCESS;
}

/* Not of NVML: the truth behind it, which no fault spoils and which counts as no call. false: there is no such GPU.
 * sizes: total, reserved and used in MiB. */
bool fakenvml_memory(const char *file, const char *gpu, ulonglong sizes[3]) {
    STATE;
    asked_about = file;
    struct target it = {NULL, NULL};
    if (load(&state)) it = target_called(&state, gpu);
    if (it.gpu) {
        nvmlMemory_v2_t now = memory(&state, it);
        sizes[0] = now.total / MIB, sizes[1] = now.reserved / MIB, sizes[2] = now.used / MIB;
    }
    asked_about = NULL;
    return it.gpu != NULL;
}

static bool told_of(const struct state *state, const char *word, struct target it) {
    EACH(state, word, line)
        if (!text(line, "gpu", NULL) || target_called(state, text(line, "gpu", "")).gpu == it.gpu) return true;
    return false;
}

/* `size` of an entry: the first version's is the beginning of the later ones'. Past the room they are only counted. */
static nvmlReturn_t processes(const struct state *state, struct target it, const char *kind, uint *count, char *out,
                              size_t size) {
    bool unavailable = told_of(state, "procs_unavailable", it), hidden = told_of(state, "hide_pids", it);
    uint room = out ? *count : 0, listed = 0;
    EACH(state, "process", line) {
        if (hidden || strcmp(text(line, "kind", "compute"), kind) || !within(state, line, it)) continue;
        enum life now = life(state, line);
        if (now == GONE || (now == LINGERS && !number(line, "ghost", 0))) continue;
        const struct line *mig = target_called(state, text(line, "gpu", "")).mig;
        nvmlProcessInfo_t process = {
            .pid = (uint)number(line, "pid", 0),
            .usedGpuMemory = unavailable ? VALUE_NOT_AVAILABLE : (ulonglong)number(line, "mib", 0) * MIB,
            .gpuInstanceId = mig ? (uint)number(mig, "gi", 0) : NO_INSTANCE,
            .computeInstanceId = mig ? (uint)number(mig, "ci", 0) : NO_INSTANCE,
        };
        if (listed < room) memcpy(out + listed * size, &process, size);
        listed++;
    }
    *count = listed;
    return listed > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

#define PROCESSES(function, kind, size) \
    nvmlReturn_t function(nvmlDevice_t device, uint *count, void *out) { \
        DEVICE_CALL(device, count); \
        return processes(&state, it, kind, count, out, size); \
    }

PROCESSES(nvmlDeviceGetComputeRunningProcesses, "compute", offsetof(nvmlProcessInfo_t, gpuInstanceId))
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, "compute", sizeof(nvmlProcessInfo_t))
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, "compute", sizeof(nvmlProcessInfo_t))
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, "graphics", sizeof(nvmlProcessInfo_t))
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics", sizeof(nvmlProcessInfo_t))
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3, "mps", sizeof(nvmlProcessInfo_t))

/* --- slices ----------------------------------------------------------------------------------------------------- */

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, uint *current, uint *pending) {
    GPU_CALL(device, current && pending);
    if (!text(it.gpu, "mig", NULL)) return NVML_ERROR_NOT_SUPPORTED;
    *current = *pending = (uint)number(it.gpu, "mig", 0);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, uint *count) {
    GPU_CALL(device, count);
    *count = number(it.gpu, "mig", 0) ? 7 : 0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, uint index, nvmlDevice_t *slice) {
    GPU_CALL(device, slice);
    if (!number(it.gpu, "mig", 0)) return NVML_ERROR_NOT_SUPPORTED;
    EACH(&state, "mig", mig)
        if (within(&state, mig, it) && number(mig, "index", 0) == (long long)index)
            return hand_out(needed(mig, "uuid"), slice);
    return NVML_ERROR_NOT_FOUND;
}

nvmlReturn_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t device, uint *is_slice) {
    DEVICE_CALL(device, is_slice);
    *is_slice = it.mig != NULL;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t slice, nvmlDevice_t *device) {
    DEVICE_CALL(slice, device);
    return it.mig ? hand_out(needed(it.gpu, "uuid"), device) : NVML_ERROR_INVALID_ARGUMENT;
}

nvmlReturn_t nvmlDeviceGetAttributes_v2(nvmlDevice_t device, nvmlDeviceAttributes_t *attributes) {
    DEVICE_CALL(device, attributes);
    if (!it.mig) return NVML_ERROR_NOT_SUPPORTED;
    uint slices = (uint)number(it.mig, "slices", 1);
    *attributes = (nvmlDeviceAttributes_t){
        .multiprocessorCount = (uint)number(it.mig, "multiprocessors", 16),
        .sharedCopyEngineCount = slices,
        .gpuInstanceSliceCount = slices,
        .computeInstanceSliceCount = slices,
        .memorySizeMB = (ulonglong)number(it.mig, "total_mib", 0),
    };
    return NVML_SUCCESS;
}

/* --- events: Xid errors only ------------------------------------------------------------------------------------ */

struct event_set { struct device *device[64]; int devices, seen; }; /* seen: so many xid lines are old */

nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *set) {
    SYSTEM_CALL(NULL, set);
    *set = calloc(1, sizeof **set);
    return *set ? NVML_SUCCESS : NVML_ERROR_MEMORY;
}

nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set) {
    SYSTEM_CALL(NULL, set);
    free(set);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, ulonglong *types) {
    GPU_CALL(device, types);
    *types = EVENT_XID;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, ulonglong types, nvmlEventSet_t set) {
    GPU_CALL(device, set);
    if (types & ~EVENT_XID) return NVML_ERROR_NOT_SUPPORTED;
    if (set->devices == 64) return NVML_ERROR_MEMORY;
    int lines = 0;
    EACH(&state, "xid", xid) (void)xid, lines++;
    if (set->devices == 0) set->seen = lines;
    set->device[set->devices++] = device;
    return NVML_SUCCESS;
}

static bool next_event(nvmlEventSet_t set, const struct state *state, nvmlEventData_t *event) {
    int ordinal = 0;
    EACH(state, "xid", xid) {
        if (ordinal++ < set->seen) continue;
        set->seen = ordinal;
        for (int i = 0; i < set->devices; i++)
            if (within(state, xid, target_called(state, set->device[i]->uuid))) {
                *event = (nvmlEventData_t){set->device[i], EVENT_XID, (ulonglong)number(xid, "code", 999), NO_INSTANCE,
                                           NO_INSTANCE};
                return true;
            }
    }
    return false;
}

nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t *event, uint milliseconds) {
    SYSTEM_CALL(NULL, set && event);
    for (uint waited = 0;; waited += 10) {
        if (next_event(set, &state, event)) return NVML_SUCCESS;
        if (waited >= milliseconds) return NVML_ERROR_TIMEOUT;
        sleep_ms(10);
        forget(&state);
        if (!load(&state)) return NVML_ERROR_DRIVER_NOT_LOADED;
    }
}
