/* The CUDA runtime: devices, memory, streams, events, graphs and launches, of which only copies and fills do anything. */
#include "standin.h"
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of everything below that is not atomic */
static atomic_long counters[NUM_COUNTERS][DEVICES];
static __thread int device;
static __thread cudaError_t last_error;
static int holding; /* whether asynchronous copies are held back until they are waited for */

/* ---- counting and telling */

static char trace_path[4096]; /* opened when there is something to tell: compilers that are run inherit it too */
static int trace_file = -1;
static char phase[64] = "";

void count(enum counter which, int on, long amount) { atomic_fetch_add(&counters[which][on], amount); }
int tracing(void) { return *trace_path; }
int current_device(void) { return device; }
static long thread_id(void) {
    static __thread long id;
    return id ? id : (id = syscall(SYS_gettid));
}

void tell(int stack, const char *format, ...) {
    static void *(*python_thread)(void), (*dump)(int, void *);
    char line[512];
    va_list values;
    if (!tracing()) return;
    va_start(values, format);
    vsnprintf(line, sizeof line, format, values);
    va_end(values);
    pthread_mutex_lock(&lock);
    if (trace_file < 0) trace_file = open(trace_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (!dump) {
        python_thread = (void *(*)(void))dlsym(RTLD_DEFAULT, "PyGILState_GetThisThreadState");
        dump = (void (*)(int, void *))dlsym(RTLD_DEFAULT, "_Py_DumpTraceback");
    }
    const char *thread = thread_id() == getpid() ? "main" : "other";
    dprintf(trace_file, "%s\t%s\t%d\t%s\n", phase, thread, device, line);
    void *state = stack && dump && python_thread ? python_thread() : NULL;
    if (state) dump(trace_file, state);
    pthread_mutex_unlock(&lock);
}

EXPORT void standin_trace(const char *path) {
    if (trace_file >= 0) close(trace_file);
    trace_file = -1;
    snprintf(trace_path, sizeof trace_path, path ? path : "", getpid()); /* "%d" in it gives each process its own */
}
EXPORT void standin_phase(const char *name) { snprintf(phase, sizeof phase, "%s", name); }
EXPORT void standin_hold(int on) { holding = on; }
EXPORT void standin_reset(void) { memset(counters, 0, sizeof counters); }
EXPORT long standin_read(int which, int on) { return which < NUM_COUNTERS ? counters[which][on] : -1; }
EXPORT const char *standin_names(void) {
#define X(name) #name " "
    return COUNTERS(X);
#undef X
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("STANDIN_TRACE"), *hold = getenv("STANDIN_HOLD");
    if (path) standin_trace(path);
    holding = hold && *hold == '1';
}

static cudaError_t fail(cudaError_t error) { return last_error = error; }
EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
EXPORT cudaError_t cudaPeekAtLastError(void) { return last_error; }
EXPORT const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorOfTheStandIn"; }
EXPORT const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle: of another device";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    default: return "an error of the stand-in";
    }
}

/* ---- devices */

static int devices(void) {
    static int known;
    const char *asked = getenv("STANDIN_GPUS"), *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (known) return known - 1;
    int found = asked ? atoi(asked) : 1;
    if (visible) { /* as the driver reads it: a list that ends at the first number which is none of a device */
        int usable = 0;
        for (const char *at = visible; *at >= '0' && *at <= '9' && atoi(at) < found; usable++) {
            at += strspn(at, "0123456789");
            if (*at != ',') {
                usable++;
                break;
            }
            at++;
        }
        found = usable;
    }
    return (known = (found < DEVICES ? found : DEVICES) + 1) - 1;
}

/* A context is what a process costs a GPU that it touches: half a gigabyte, on every one. */
static atomic_int contexts[DEVICES];
static void touch(int on) {
    if (contexts[on]) return;
    contexts[on] = 1;
    tell(1, "context\tdevice %d", on);
}
int touched(int on) { return contexts[on]; }

EXPORT cudaError_t cudaGetDeviceCount(int *number) { return *number = devices(), devices() ? cudaSuccess : fail(cudaErrorNoDevice); }
EXPORT cudaError_t cudaGetDevice(int *current) { return *current = device, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int to) {
    if (to < 0 || to >= devices()) return fail(cudaErrorInvalidDevice);
    device = to;
    touch(to);
    return cudaSuccess;
}

static size_t memory_size(void) {
    const char *gibibytes = getenv("STANDIN_GIB");
    return (size_t)(gibibytes ? atof(gibibytes) * (1 << 30) : 140.0 * (1 << 30));
}

/* An H200, by NVIDIA's tables of compute capability 9.0. */
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int of) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", getenv("STANDIN_NAME") ? getenv("STANDIN_NAME") : "NVIDIA H200");
    p->totalGlobalMem = memory_size();
    p->major = 9;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->maxGridSize[0] = 0x7fffffff;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 50 << 20;
    p->unifiedAddressing = p->concurrentKernels = 1;
    p->textureAlignment = 512;
    p->pciBusID = of + 1;
    p->uuid.bytes[0] = of + 1;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int of) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, of);
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMemoryPoolsSupported: *value = 0; break;
    default: *value = 1;
    }
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int of) { return snprintf(id, size, "0000:%02x:00.0", of + 1), cudaSuccess; }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) { return *can = from != to, cudaSuccess; }
EXPORT cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaProfilerStart(void) { return tell(0, "profiler\tstart"), cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop(void) { return tell(0, "profiler\tstop"), cudaSuccess; }

/* ---- streams: what each has yet to do, for those who wait for it */

struct graph { long kernels, others; };
struct capture { struct graph *graph; enum cudaStreamCaptureMode mode; long thread; struct stream *origin; int invalid, unjoined; };
struct work { /* a copy that is held back, or a wait for what another stream has yet to do */
    struct work *next;
    long number;
    struct stream *after;
    long after_number;
    char *host, *bytes; /* of a copy: where on the host, and what was or will be there */
    size_t size;
    int to_host;
};
struct stream {
    int device, priority;
    long number; /* of what was issued so far */
    struct work *first, **last;
    struct capture *capture;
    int unjoined; /* whether it has captured work that the capture's own stream does not wait for */
};
struct event { int device; struct stream *stream; long number; struct capture *capture; struct timespec time; };

static struct stream default_streams[DEVICES];
static struct stream *every_stream[4096];
static atomic_int num_streams, num_captures;
static struct capture *current_capture; /* one at a time, which is all that torch does */
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static struct stream *find(cudaStream_t stream) {
    if ((size_t)stream > 2) return (struct stream *)stream;
    struct stream *found = &default_streams[device]; /* 0, 1, 2: this device's own */
    found->device = device;
    return found;
}
int stream_device(cudaStream_t stream) { return find(stream)->device; }

/* Does what a stream had to do up to a number, and before that what this waits for. Called with the lock held. */
static void finish(struct stream *stream, long number) {
    struct work *work;
    while ((work = stream->first) && work->number <= number) {
        if (!(stream->first = work->next)) stream->last = NULL;
        if (work->after) finish(work->after, work->after_number);
        if (work->host) {
            size_t i = 0;
            if (work->to_host) { /* nobody may have written where it will arrive */
                while (i < work->size && (unsigned char)work->host[i] == 0xff) i++;
            } else if (!memcmp(work->host, work->bytes, work->size)) { /* nor where it is read from */
                i = work->size;
            }
            if (i < work->size) count(COUNT_races, stream->device, 1);
            if (i < work->size && trace_file >= 0)
                dprintf(trace_file, "%s\tother\t%d\trace\ta host buffer of %zu bytes was written while its copy was in flight\n",
                        phase, stream->device, work->size);
            if (work->to_host) memcpy(work->host, work->bytes, work->size);
            free(work->bytes);
        }
        free(work);
    }
}
static struct work *add_work(struct stream *stream) {
    struct work *work = calloc(1, sizeof *work);
    work->number = ++stream->number;
    if (!stream->first) stream->last = &stream->first;
    *stream->last = work;
    stream->last = &work->next;
    return work;
}
static void finish_all(int on) { /* every device with -1 */
    pthread_mutex_lock(&lock);
    for (int i = 0; i < DEVICES; i++)
        if (on < 0 || on == i) finish(&default_streams[i], default_streams[i].number);
    for (int i = 0; i < num_streams; i++)
        if (on < 0 || every_stream[i]->device == on) finish(every_stream[i], every_stream[i]->number);
    pthread_mutex_unlock(&lock);
}

/* Refuses what CUDA forbids while a capture is under way (programming guide, "Prohibited and Unhandled Operations"). */
static cudaError_t refused(const char *what) {
    struct capture *capture = current_capture;
    if (!atomic_load(&num_captures) || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    int here = capture->thread == thread_id();
    if (here ? capture->mode == cudaStreamCaptureModeRelaxed
             : capture->mode != cudaStreamCaptureModeGlobal || thread_mode != cudaStreamCaptureModeGlobal)
        return cudaSuccess;
    capture->invalid = 1;
    count(COUNT_refused, device, 1);
    tell(1, "refused\t%s during a capture", what);
    return fail(cudaErrorStreamCaptureUnsupported);
}
#define NOT_IN_CAPTURE(what) do { cudaError_t error_ = refused(what); if (error_) return error_; } while (0)

/* Counts a wait of the host: of the main thread, which launches, or elsewhere (savers, loaders). */
static void waited(const char *what, int on) {
    count(thread_id() == getpid() ? COUNT_waits : COUNT_waits_elsewhere, on, 1);
    tell(1, "wait\t%s of device %d", what, on);
}

/* Where work goes: into the graph captured on this stream (returned), or it is done. */
static struct graph *captured(struct stream *stream) {
    if (!stream->capture) return NULL;
    if (stream != stream->capture->origin && !stream->unjoined) stream->unjoined = 1, stream->capture->unjoined++;
    return stream->capture->graph;
}

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *made, unsigned flags, int priority) {
    struct stream *stream = calloc(1, sizeof *stream);
    touch(stream->device = device);
    stream->priority = priority;
    int at = atomic_fetch_add(&num_streams, 1);
    if (at >= 4096) abort();
    every_stream[at] = stream;
    *made = (cudaStream_t)stream;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *made) { return cudaStreamCreateWithPriority(made, 0, 0); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; /* kept: events may name it */ }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = find(stream)->priority, cudaSuccess; }
static void finish_one(struct stream *stream, long number) {
    pthread_mutex_lock(&lock);
    finish(stream, number);
    pthread_mutex_unlock(&lock);
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
    NOT_IN_CAPTURE("cudaStreamQuery");
    finish_one(find(stream), find(stream)->number);
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    NOT_IN_CAPTURE("cudaStreamSynchronize");
    waited("cudaStreamSynchronize", stream_device(stream));
    finish_one(find(stream), find(stream)->number);
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize(void) {
    NOT_IN_CAPTURE("cudaDeviceSynchronize");
    waited("cudaDeviceSynchronize", device);
    finish_all(device);
    return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
    if (captured(find(stream))) return find(stream)->capture->graph->others++, cudaSuccess;
    finish_one(find(stream), find(stream)->number);
    function(argument);
    return cudaSuccess;
}

/* ---- events */

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *made, unsigned flags) {
    struct event *event = calloc(1, sizeof *event);
    touch(event->device = device);
    *made = (cudaEvent_t)event;
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *made) { return cudaEventCreateWithFlags(made, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t of, cudaStream_t on, unsigned flags) {
    struct event *event = (struct event *)of;
    struct stream *stream = find(on);
    if (event->device != stream->device) {
        tell(1, "error\tan event of device %d recorded on a stream of device %d", event->device, stream->device);
        return fail(cudaErrorInvalidResourceHandle);
    }
    count(COUNT_event_records, stream->device, 1);
    event->stream = stream;
    event->number = stream->number;
    event->capture = stream->capture;
    clock_gettime(CLOCK_MONOTONIC, &event->time);
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t waiting, cudaEvent_t of, unsigned flags) {
    struct event *event = (struct event *)of;
    struct stream *stream = find(waiting);
    count(COUNT_stream_waits, stream->device, 1);
    if (event->capture && event->capture == current_capture) { /* it joins the capture, or is joined by it */
        if (stream == event->capture->origin && event->stream->unjoined) event->stream->unjoined = 0, event->capture->unjoined--;
        stream->capture = event->capture;
        return cudaSuccess;
    }
    if (stream->capture && event->stream) {
        stream->capture->invalid = 1;
        tell(1, "refused\ta captured stream waits for work outside of its capture");
        count(COUNT_refused, stream->device, 1);
        return fail(cudaErrorStreamCaptureIsolation);
    }
    if (holding && event->stream && event->stream != stream) {
        pthread_mutex_lock(&lock);
        struct work *work = add_work(stream);
        work->after = event->stream;
        work->after_number = event->number;
        pthread_mutex_unlock(&lock);
    }
    return cudaSuccess;
}
static void finish_event(struct event *event) {
    if (event->stream) finish_one(event->stream, event->number);
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
    NOT_IN_CAPTURE("cudaEventQuery");
    finish_event((struct event *)event);
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    NOT_IN_CAPTURE("cudaEventSynchronize");
    waited("cudaEventSynchronize", ((struct event *)event)->device);
    finish_event((struct event *)event);
    return cudaSuccess;
}
/* The time between the calls that recorded them: of the host, so never a GPU's. */
EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    struct event *a = (struct event *)from, *b = (struct event *)to;
    if (a->device != b->device) return fail(cudaErrorInvalidResourceHandle);
    *milliseconds = (b->time.tv_sec - a->time.tv_sec) * 1e3f + (b->time.tv_nsec - a->time.tv_nsec) / 1e6f;
    if (*milliseconds <= 0) *milliseconds = 1e-3f;
    return cudaSuccess;
}

/* ---- memory: the address tells the kind. A region a device, one for pinned memory; pages appear when touched */

enum { PAGEABLE = -2, PINNED = -1 };
static const size_t BASE = (size_t)1 << 44, REGION = (size_t)1 << 41, PAGE = 4096;
static size_t taken[DEVICES + 1], used[DEVICES];
static struct { char *at; size_t size; } registered[64];

static int kind(const void *pointer) {
    size_t at = (size_t)pointer;
    if (at >= BASE && at < BASE + DEVICES * REGION) return (at - BASE) / REGION;
    if (at >= BASE && at < BASE + (DEVICES + 1) * REGION) return PINNED;
    for (int i = 0; i < 64; i++)
        if (registered[i].at && (char *)pointer >= registered[i].at && (char *)pointer < registered[i].at + registered[i].size) return PINNED;
    return PAGEABLE;
}
static void *take(int region, size_t size) {
    size_t whole = (size + PAGE - 1) / PAGE * PAGE + PAGE; /* its size stands in a page before it */
    pthread_mutex_lock(&lock);
    size_t at = BASE + region * REGION + taken[region];
    taken[region] += whole;
    pthread_mutex_unlock(&lock);
    char *made = mmap((void *)at, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (made != (void *)at) return NULL;
    *(size_t *)made = whole;
    return made + PAGE;
}
static size_t give_back(void *pointer) {
    size_t whole = *(size_t *)((char *)pointer - PAGE);
    munmap((char *)pointer - PAGE, whole);
    return whole - PAGE;
}
EXPORT cudaError_t cudaMalloc(void **made, size_t size) {
    NOT_IN_CAPTURE("cudaMalloc");
    touch(device);
    size = (size + PAGE - 1) / PAGE * PAGE;
    if (used[device] + size > memory_size() || !(*made = take(device, size))) return fail(cudaErrorMemoryAllocation);
    used[device] += size;
    count(COUNT_allocations, device, 1);
    tell(0, "allocate\t%zu bytes on device %d", size, device);
    return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void *pointer) {
    NOT_IN_CAPTURE("cudaFree");
    if (pointer) used[kind(pointer)] -= give_back(pointer);
    return cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void **made, size_t size, unsigned flags) {
    NOT_IN_CAPTURE("cudaHostAlloc");
    touch(device);
    count(COUNT_pinned_allocations, device, 1);
    count(COUNT_pinned_bytes, device, size);
    tell(1, "pin\t%zu bytes", size);
    return (*made = take(DEVICES, size)) ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
EXPORT cudaError_t cudaFreeHost(void *pointer) {
    NOT_IN_CAPTURE("cudaFreeHost");
    finish_all(-1);
    if (pointer) give_back(pointer);
    return cudaSuccess;
}
EXPORT cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
    for (int i = 0; i < 64; i++)
        if (!registered[i].at) return registered[i].size = size, registered[i].at = pointer, cudaSuccess;
    return fail(cudaErrorMemoryAllocation);
}
EXPORT cudaError_t cudaHostUnregister(void *pointer) {
    finish_all(-1);
    for (int i = 0; i < 64; i++)
        if (registered[i].at == pointer) registered[i].at = NULL;
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = memory_size();
    *free = *total - used[device];
    return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *pointer) {
    int of = kind(pointer);
    memset(a, 0, sizeof *a);
    a->type = of >= 0 ? cudaMemoryTypeDevice : of == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->device = of >= 0 ? of : 0;
    a->devicePointer = a->hostPointer = (void *)pointer;
    return cudaSuccess;
}

static const char *kind_name(int of) { return of >= 0 ? "device" : of == PINNED ? "pinned" : "pageable"; }

static cudaError_t copy(void *to, const void *from, size_t size, int asynchronous, cudaStream_t on) {
    struct stream *stream = find(on);
    int to_kind = kind(to), from_kind = kind(from), host = to_kind < 0 || from_kind < 0;
    struct graph *graph = captured(stream);
    touch(stream->device);
    if (!size) return cudaSuccess;
    if (graph && asynchronous && to_kind != PAGEABLE && from_kind != PAGEABLE) return graph->others++, cudaSuccess;
    /* From or to pageable memory: the host waits until a stage holds it, or until it has arrived. */
    int waits = !asynchronous || to_kind == PAGEABLE || from_kind == PAGEABLE;
    if (waits) NOT_IN_CAPTURE("a copy that waits");
    count(COUNT_copies, stream->device, 1);
    tell(0, "copy\t%s %s to %s, %zu bytes, stream of device %d", asynchronous ? "asynchronous" : "waiting", kind_name(from_kind),
         kind_name(to_kind), size, stream->device);
    if (waits) {
        if (asynchronous && from_kind == PAGEABLE) {
            count(COUNT_staged_copies, stream->device, 1);
            tell(1, "stage\t%zu bytes of pageable memory for device %d", size, stream->device);
        } else
            waited("a copy that waits", stream->device);
        finish_one(stream, stream->number);
    }
    if (!host) { /* values of the device's memory mean nothing: large ones are not worth their pages */
        if (size <= 1 << 16) memmove(to, from, size);
    } else if (holding && !waits) { /* what is copied is fixed now, when and whether it is safe, later */
        pthread_mutex_lock(&lock);
        struct work *work = add_work(stream);
        work->to_host = to_kind < 0;
        work->host = work->to_host ? to : (void *)from;
        work->size = size;
        memcpy(work->bytes = malloc(size), from, size);
        if (work->to_host) memset(to, 0xff, size); /* a NaN, or -1: who reads too early will see that */
        else memcpy(to, from, size);
        pthread_mutex_unlock(&lock);
    } else
        memmove(to, from, size);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind k) { return copy(to, from, size, 0, 0); }
EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind k, cudaStream_t stream) {
    return copy(to, from, size, 1, stream);
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int b, const void *from, int a, size_t size, cudaStream_t stream) {
    return copy(to, from, size, 1, stream);
}
EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                                     enum cudaMemcpyKind k, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        if (copy((char *)to + row * to_pitch, (char *)from + row * from_pitch, width, 1, stream)) return last_error;
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void *s, const void *f, size_t n, size_t o, enum cudaMemcpyKind k) { return cudaSuccess; }
EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { return *address = (void *)symbol, cudaSuccess; }
EXPORT cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t on) {
    struct graph *graph = captured(find(on));
    if (graph) return graph->others++, cudaSuccess;
    count(COUNT_fills, stream_device(on), 1);
    if (size > 1 << 20 && !value) { /* dropped pages are zero again, and cost nothing */
        char *first = (char *)(((size_t)at + PAGE - 1) / PAGE * PAGE), *last = (char *)(((size_t)at + size) / PAGE * PAGE);
        madvise(first, last - first, MADV_DONTNEED);
        memset(at, 0, first - (char *)at);
        memset(last, 0, (char *)at + size - last);
    } else
        memset(at, value, size);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void *at, int value, size_t size) { return cudaMemsetAsync(at, value, size, 0); }

/* ---- graphs */

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    struct capture *capture = find(stream)->capture;
    *status = !capture ? cudaStreamCaptureStatusNone : capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **from, const cudaGraphEdgeData **edges, size_t *number) {
    struct capture *capture = find(stream)->capture;
    if (id) *id = (size_t)capture;
    if (graph) *graph = capture ? (cudaGraph_t)capture->graph : NULL;
    if (number) *number = 0;
    return cudaStreamIsCapturing(stream, status);
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t on, enum cudaStreamCaptureMode mode) {
    struct stream *stream = find(on);
    if ((size_t)on <= 2 || stream->capture || num_captures) return fail(cudaErrorStreamCaptureUnsupported);
    struct capture *capture = calloc(1, sizeof *capture); /* kept: events may name it */
    *capture = (struct capture){calloc(1, sizeof(struct graph)), mode, thread_id(), stream};
    tell(0, "capture\tbegins on device %d", stream->device);
    current_capture = stream->capture = capture;
    atomic_store(&num_captures, 1);
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t on, cudaGraph_t *graph) {
    struct capture *capture = find(on)->capture;
    if (!capture || capture->origin != find(on)) return fail(cudaErrorIllegalState);
    for (int i = 0; i < num_streams; i++)
        if (every_stream[i]->capture == capture) every_stream[i]->capture = NULL, every_stream[i]->unjoined = 0;
    for (int i = 0; i < DEVICES; i++) default_streams[i].capture = NULL;
    atomic_store(&num_captures, 0);
    current_capture = NULL;
    tell(0, "capture\tends on device %d, %ld kernels and %ld others", find(on)->device, capture->graph->kernels, capture->graph->others);
    *graph = capture->invalid || capture->unjoined ? NULL : (cudaGraph_t)capture->graph;
    if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
    return capture->unjoined ? fail(cudaErrorStreamCaptureUnjoined) : cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    return *made = (cudaGraphExec_t)graph, cudaSuccess; /* graphs are kept: a few bytes each */
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t made, cudaStream_t stream) {
    struct graph *graph = (struct graph *)made;
    int on = stream_device(stream);
    count(COUNT_graph_launches, on, 1);
    count(COUNT_replayed_launches, on, graph->kernels);
    if (!graph->kernels) count(COUNT_empty_replays, on, 1);
    tell(!graph->kernels, "replay\t%ld kernels and %ld others on device %d", graph->kernels, graph->others, on);
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *number) {
    return *number = ((struct graph *)graph)->kernels + ((struct graph *)graph)->others, cudaSuccess;
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaSuccess; }

/* ---- kernels: their names, and that they were launched */

enum { KERNELS = 1 << 19 };
static struct { const void *key; const char *name; } kernels[KERNELS];

static unsigned place(const void *key) {
    unsigned at = ((size_t)key >> 3) * 2654435761u % KERNELS;
    while (kernels[at].key && kernels[at].key != key) at = (at + 1) % KERNELS;
    return at;
}
EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **handle) {}
EXPORT void __cudaUnregisterFatBinary(void **handle) {}
EXPORT char __cudaInitModule(void **handle) { return 0; }
EXPORT void __cudaRegisterVar(void **h, char *v, char *a, const char *n, int e, size_t s, int c, int g) {}
EXPORT void __cudaRegisterFunction(void **handle, const char *function, char *f, const char *name, int limit, void *t, void *b, void *d, void *g,
                                   int *w) {
    unsigned at = place(function);
    kernels[at].key = function;
    kernels[at].name = name;
}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configuration.grid = grid, configuration.block = block, configuration.shared = shared, configuration.stream = stream;
    return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared, *(void **)stream = configuration.stream;
    return cudaSuccess;
}
cudaError_t launched(const char *name, cudaStream_t on) {
    struct stream *stream = find(on);
    if (stream->device != device) { /* "a launch fails on a stream that is not of the current device" */
        tell(1, "error\t%s launched on a stream of device %d", name, stream->device);
        return fail(cudaErrorInvalidResourceHandle);
    }
    struct graph *graph = captured(stream);
    if (graph) return graph->kernels++, cudaSuccess;
    touch(device);
    count(COUNT_launches, device, 1);
    if (tracing()) tell(0, "launch\t%s", name);
    return cudaSuccess;
}
static cudaError_t launch(const void *function, cudaStream_t stream) {
    const char *name = tracing() ? kernels[place(function)].name : NULL;
    return launched(name ? name : "a kernel", stream);
}
EXPORT cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t shared, cudaStream_t stream) { return launch(f, stream); }
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t shared, cudaStream_t stream) {
    return launch(f, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return launch(f, c->stream); }
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *f) { return *kernel = (cudaKernel_t)f, cudaSuccess; }
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **a, size_t shared, cudaStream_t stream) { return launch(k, stream); }
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = 90;
    return cudaSuccess;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int value) { return cudaSuccess; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t s) { return *n = 2, cudaSuccess; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned g) {
    return *n = 2, cudaSuccess;
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *found) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = dlsym(RTLD_DEFAULT, "standin_unsupported");
    if (found) *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
EXPORT long standin_unsupported(void) { return fail(cudaErrorNotSupported); }
