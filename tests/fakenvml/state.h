/* The file that says what the machine is: its lines, and the faults that they tell of.
 *
 * FAKE_NVML_STATE names it; it is read anew at every call, and so is FILE.claims, which has the same lines. A file that
 * does not parse ends the process: it is the test's mistake.
 *
 * A line is a word and key=value pairs; "quotes" keep blanks together; # begins a comment. What a GPU has no key for
 * is NOT_SUPPORTED. GPU is an index, a UUID, a PCI bus id, or the UUID of a slice. Seconds and MiB are whole.
 *
 *   driver   version=580.159.04 cuda=13000
 *   gpu      index=0 uuid=GPU-... name="NVIDIA H100 80GB HBM3" bus=0000:17:00.0 minor=0 total_mib=81559
 *            reserved_mib=600 numa=0 (of the host's memory near it) cpus=0-15,32-47
 *            numa_node_id=2 (of its own memory: only where the GPU is a NUMA node, as in Grace Hopper)
 *            utilisation=0 memory_utilisation=0 temperature_celsius=35 power_milliwatts=70000 capability=9.0
 *            compute_mode=0 persistence=1 mig=0 ecc_corrected=0 ecc_uncorrected=0 remapped_correctable=0
 *            remapped_uncorrectable=0 remap_pending=0 remap_failed=0 retired_pages=0 nvswitch_links=18
 *            nvswitch=0000:07:00.0 recovery_action=0 (NVML_GPU_RECOVERY_ACTION_*)
 *   mig      gpu=0 index=0 uuid=MIG-... profile=1g.10gb total_mib=9984 reserved_mib=0 gi=7 ci=0 multiprocessors=16
 *            slices=1; the gpu needs mig=1
 *   process  gpu=GPU pid=123 mib=58169 kind=compute|graphics|mps
 *            Its memory counts while the pid lives and is no zombie. start=TICKS: and started then (proc(5), field 22).
 *            linger_seconds=10: its memory stays that long after the first call that saw it dead; FILE.dead.* say when.
 *            ghost=1: and it stays in the list as long. elsewhere=1: a pid of another namespace, taken as alive.
 *   used     gpu=GPU mib=100; memory of nobody
 *   link     a=GPU b=GPU kind=nvlink count=18 up=18 | kind=internal|pix|pxb|phb|node|sys, and either
 *            p2p=ok|cns|gns|tns|disabled|ns|unknown, as nvidia-smi topo -p2p calls them. Without a line of a PCI kind,
 *            a pair is node or sys by `numa`. GPUs that both have nvswitch_links reach each other over NVLink.
 *   xid      gpu=GPU code=79; an event for sets that were registered before the line came
 *   error    call=nvmlDeviceGetMemoryInfo gpu=GPU code=NVML_ERROR_GPU_IS_LOST after=3 times=1 counter=NAME
 *   delay    call=... milliseconds=500        (the same keys)
 *   hang     call=...                         (the same keys) until the line is gone
 *            call=* means every call; a name without its _v2 means all its versions; nvmlInit means all that start.
 *            No gpu: all. A fault on a GPU is one on its slices too, and on looking the GPU up. after: the calls of all
 *            processes before it begins; times: how often it strikes. Both are counted in FILE.calls.NAME.
 *   procs_unavailable gpu=GPU    the memory of each process is NVML_VALUE_NOT_AVAILABLE
 *   hide_pids         gpu=GPU    lists of processes are empty; no gpu: on all
 *   clock    ahead_seconds=60    time for linger_seconds has moved on
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef unsigned int uint;
typedef unsigned long long ulonglong;
typedef int nvmlReturn_t;

#define NVML_ERRORS(X) \
    X(1, UNINITIALIZED, "Uninitialized") X(2, INVALID_ARGUMENT, "Invalid Argument") \
    X(3, NOT_SUPPORTED, "Not Supported") X(4, NO_PERMISSION, "Insufficient Permissions") \
    X(5, ALREADY_INITIALIZED, "Already Initialized") X(6, NOT_FOUND, "Not Found") \
    X(7, INSUFFICIENT_SIZE, "Insufficient Size") X(8, INSUFFICIENT_POWER, "Insufficient External Power") \
    X(9, DRIVER_NOT_LOADED, "Driver Not Loaded") X(10, TIMEOUT, "Timeout") \
    X(11, IRQ_ISSUE, "Interrupt Request Issue") \
    X(12, LIBRARY_NOT_FOUND, "NVML Shared Library Not Found") X(13, FUNCTION_NOT_FOUND, "Function Not Found") \
    X(14, CORRUPTED_INFOROM, "Corrupted infoROM") X(15, GPU_IS_LOST, "GPU is lost") \
    X(16, RESET_REQUIRED, "GPU requires reset") \
    X(17, OPERATING_SYSTEM, "The operating system has blocked the request") \
    X(18, LIB_RM_VERSION_MISMATCH, "Driver/library version mismatch") X(19, IN_USE, "In use by another client") \
    X(20, MEMORY, "Insufficient Memory") X(21, NO_DATA, "No data") \
    X(23, INSUFFICIENT_RESOURCES, "Insufficient Resources") \
    X(25, ARGUMENT_VERSION_MISMATCH, "Argument version mismatch") X(26, DEPRECATED, "Deprecated") \
    X(27, NOT_READY, "Not Ready") X(28, GPU_NOT_FOUND, "GPU not found") X(29, INVALID_STATE, "Invalid state") \
    X(999, UNKNOWN, "Unknown Error")

#define CODE(code, name, text) NVML_ERROR_##name = code,
#define ROW(code, name, text) {code, "NVML_ERROR_" #name, text},
enum { NVML_SUCCESS = 0, NVML_ERRORS(CODE) };
static const struct { int code; const char *name, *text; } ERRORS[] = {
    {0, "NVML_SUCCESS", "Success"}, NVML_ERRORS(ROW)
};

/* --- the file --------------------------------------------------------------------------------------------------- */

#define MOST_PAIRS 48

struct pair { const char *key, *value; };
struct line { const char *word; int pairs; struct pair pair[MOST_PAIRS]; };
struct state { char *text[2]; struct line *line; int lines; };

/* A GPU, or one of its slices; gpu is NULL where nothing has the name. */
struct target { const struct line *gpu, *mig; };

static const char *const WORDS[] = {
    "driver", "gpu", "mig", "process", "used", "link", "xid", "error", "delay", "hang", "clock", "procs_unavailable",
    "hide_pids",
};

#define EACH(state, of, name) \
    for (const struct line *name = (state)->line; name < (state)->line + (state)->lines; name++) \
        if (strcmp(name->word, of) == 0)

static void broken(const char *what, const char *where) {
    fprintf(stderr, "fakenvml: %s: %s\n", what, where);
    abort();
}

/* The file that this thread asks about; NULL: FAKE_NVML_STATE names it. */
static __thread const char *asked_about;

static char *file_beside_state(const char *ending) {
    static __thread char path[4096];
    const char *state = asked_about ? asked_about : getenv("FAKE_NVML_STATE");
    if (!state || (size_t)snprintf(path, sizeof path, "%s%s", state, ending) >= sizeof path) return NULL;
    return path;
}

/* The whole file, or NULL where there is none. */
static char *file_text(const char *path) {
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return NULL;
    size_t size = 0, room = 4096;
    char *text = malloc(room);
    for (ssize_t got; text && (got = read(fd, text + size, room - size - 1)) > 0;) {
        size += (size_t)got;
        if (size == room - 1) text = realloc(text, room *= 2);
    }
    close(fd);
    if (text) text[size] = '\0';
    return text;
}

static void parse_line(struct state *state, char *at) {
    struct line line = {.word = strsep(&at, " \t")};
    bool known = false;
    for (size_t i = 0; i < sizeof WORDS / sizeof *WORDS; i++) known |= strcmp(line.word, WORDS[i]) == 0;
    if (!known) broken("no such word", line.word);
    while (at && *(at += strspn(at, " \t"))) {
        char *key = strsep(&at, "=");
        if (!at || line.pairs == MOST_PAIRS) broken("not key=value, or too many", key);
        if (*at == '"') at++, line.pair[line.pairs++] = (struct pair){key, strsep(&at, "\"")};
        else line.pair[line.pairs++] = (struct pair){key, strsep(&at, " \t")};
    }
    struct line *more = realloc(state->line, sizeof line * (size_t)(state->lines + 1));
    if (!more) abort();
    state->line = more;
    state->line[state->lines++] = line;
}

static bool load(struct state *state) {
    static const char *const endings[] = {"", ".claims"};
    *state = (struct state){0};
    for (int i = 0; i < 2; i++) {
        char *rest = state->text[i] = file_text(file_beside_state(endings[i]));
        if (!rest && i == 0) return false;
        for (char *line; rest && (line = strsep(&rest, "\n"));) {
            line += strspn(line, " \t");
            if (*line && *line != '#') parse_line(state, line);
        }
    }
    return true;
}

static void forget(struct state *state) {
    free(state->text[0]);
    free(state->text[1]);
    free(state->line);
    *state = (struct state){0};
}

static const char *text(const struct line *line, const char *key, const char *absent) {
    for (int i = 0; i < line->pairs; i++)
        if (strcmp(line->pair[i].key, key) == 0) return line->pair[i].value;
    return absent;
}

static long long number(const struct line *line, const char *key, long long absent) {
    const char *value = text(line, key, NULL);
    if (!value) return absent;
    char *end;
    long long read = strtoll(value, &end, 0);
    if (end == value || *end) broken("not a whole number", value);
    return read;
}

static const char *needed(const struct line *line, const char *key) {
    const char *value = text(line, key, NULL);
    if (!value) broken("this key is missing", key);
    return value;
}

static bool same_bus(const char *one, const char *other) {
    uint a[3], b[3];
    return sscanf(one, "%x:%x:%x", a, a + 1, a + 2) == 3 && sscanf(other, "%x:%x:%x", b, b + 1, b + 2) == 3 &&
           memcmp(a, b, sizeof a) == 0;
}

static struct target target_called(const struct state *state, const char *name) {
    EACH(state, "gpu", gpu) {
        const char *bus = text(gpu, "bus", "");
        if (!strcmp(needed(gpu, "index"), name) || !strcmp(needed(gpu, "uuid"), name) || same_bus(bus, name))
            return (struct target){gpu, NULL};
    }
    EACH(state, "mig", mig)
        if (!strcmp(needed(mig, "uuid"), name))
            return (struct target){target_called(state, needed(mig, "gpu")).gpu, mig};
    return (struct target){NULL, NULL};
}

/* Does the line speak of the target, or of a part of it? */
static bool within(const struct state *state, const struct line *line, struct target whole) {
    struct target part = target_called(state, needed(line, "gpu"));
    return whole.gpu && part.gpu == whole.gpu && (!whole.mig || part.mig == whole.mig);
}

/* --- faults ----------------------------------------------------------------------------------------------------- */

static void sleep_ms(long long milliseconds) {
    struct timespec left = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    while (nanosleep(&left, &left) && errno == EINTR) continue;
}

/* Exactly this call, all of its versions, or every call. */
static bool is_call(const char *wanted, const char *call) {
    const char *version = strstr(call, "_v");
    size_t length = version ? (size_t)(version - call) : strlen(call);
    return !strcmp(wanted, "*") || !strcmp(wanted, call) ||
           (strlen(wanted) == length && !strncmp(wanted, call, length));
}

static bool strikes(const struct state *state, const struct line *fault, const char *call, const struct target met[2]) {
    if (!is_call(needed(fault, "call"), call)) return false;
    const char *name = text(fault, "gpu", NULL);
    if (!name) return true;
    struct target hurt = target_called(state, name);
    for (int i = 0; i < 2; i++)
        if (hurt.gpu && hurt.gpu == met[i].gpu && (!hurt.mig || hurt.mig == met[i].mig)) return true;
    return false;
}

/* Counts the call: a byte in a file that all processes share, so each gets an ordinal of its own. */
static bool is_due(const struct line *fault) {
    long long after = number(fault, "after", 0), times = number(fault, "times", -1);
    if (after == 0 && times < 0) return true;
    char ending[256];
    snprintf(ending, sizeof ending, ".calls.%s", needed(fault, "counter"));
    int fd = open(file_beside_state(ending), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, ".", 1) != 1) broken("cannot count calls in", ending);
    long long ordinal = lseek(fd, 0, SEEK_CUR);
    close(fd);
    return ordinal > after && (times < 0 || ordinal <= after + times);
}

static const struct line *fault(const struct state *state, const char *word, const char *call,
                                const struct target met[2], bool counted) {
    EACH(state, word, line)
        if (strikes(state, line, call, met) && (!counted || is_due(line))) return line;
    return NULL;
}

static nvmlReturn_t error_called(const char *name) {
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (!strcmp(ERRORS[i].name, name)) return ERRORS[i].code;
    broken("no such error", name);
    return NVML_SUCCESS;
}

/* Read the file, find what the call is about, hang, wait and fail as told. A name that nothing has leaves gpu NULL. */
static nvmlReturn_t enter(struct state *state, const char *call, const char *const names[2], struct target met[2]) {
    for (bool first = true;; first = false) {
        if (!load(state)) return NVML_ERROR_DRIVER_NOT_LOADED;
        for (int i = 0; i < 2; i++) met[i] = names[i] ? target_called(state, names[i]) : (struct target){NULL, NULL};
        if (!fault(state, "hang", call, met, first)) break;
        forget(state);
        sleep_ms(20);
    }
    const struct line *delay = fault(state, "delay", call, met, true);
    if (delay) sleep_ms(number(delay, "milliseconds", 0));
    const struct line *error = fault(state, "error", call, met, true);
    return error ? error_called(needed(error, "code")) : NVML_SUCCESS;
}
