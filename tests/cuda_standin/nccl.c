/* NCCL for ranks on one machine: they exchange pieces through a file in shared memory, and wait for one another. */
#include "standin.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 1 << 20, MOST_SECONDS = 120, NCCL_SYSTEM_ERROR = 2 };
enum { SUM, PRODUCT, MAX, MIN, AVERAGE }; /* ncclRedOp_t */
typedef struct { char bytes[128]; } Id;
struct shared { atomic_int arrived, round; char pieces[]; };
typedef struct { int size, rank, splits; char name[64]; struct shared *shared; } Comm;

/* By ncclDataType_t: int8, uint8, int32, uint32, int64, uint64, fp16, fp32, fp64, bf16 and two of fp8. */
static const int sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

static Comm *attach(int size, int rank, const char *name) {
    Comm *comm = calloc(1, sizeof *comm);
    size_t bytes = sizeof(struct shared) + (size_t)size * PIECE;
    comm->size = size, comm->rank = rank;
    snprintf(comm->name, sizeof comm->name, "%s", name);
    if (size > 1) {
        int file = shm_open(name, O_CREAT | O_RDWR, 0600);
        if (file < 0 || ftruncate(file, bytes)) abort();
        comm->shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
    }
    return comm;
}
static char *piece(Comm *comm, int rank) { return comm->shared->pieces + (size_t)rank * PIECE; }
static int meet(Comm *comm) {
    struct shared *s = comm->shared;
    if (!s) return 0;
    int round = s->round;
    if (atomic_fetch_add(&s->arrived, 1) == comm->size - 1) {
        s->arrived = 0;
        s->round++;
    }
    for (long waits = 0; s->round == round; waits++) {
        struct timespec pause = {0, 100000};
        if (waits > MOST_SECONDS * 10000L) return NCCL_SYSTEM_ERROR; /* the other rank is gone */
        nanosleep(&pause, NULL);
    }
    return 0;
}

EXPORT int ncclGetVersion(int *version) { return *version = 22809, 0; }
EXPORT int ncclGetUniqueId(Id *id) {
    int file = open("/dev/urandom", O_RDONLY);
    memset(id, 0, sizeof *id);
    int got = read(file, id, 8);
    close(file);
    return got == 8 ? 0 : NCCL_SYSTEM_ERROR;
}
EXPORT int ncclCommInitRank(Comm **made, int size, Id id, int rank) {
    char name[64];
    unsigned long number;
    memcpy(&number, &id, 8);
    snprintf(name, sizeof name, "/standin%016lx", number);
    *made = attach(size, rank, name);
    int problem = meet(*made);
    if (!rank && size > 1) shm_unlink(name); /* all have it: nothing is left when they end */
    return problem;
}
EXPORT int ncclCommInitRankConfig(Comm **made, int size, Id id, int rank, void *config) { return ncclCommInitRank(made, size, id, rank); }
EXPORT int ncclCommSplit(Comm *comm, int color, int key, Comm **made, void *config) {
    char name[64];
    int members = 1, rank = 0;
    snprintf(name, sizeof name, "%.40s-%d-%d", comm->name, ++comm->splits, color);
    if (comm->size > 1) { /* the color of each rank; a key is always its rank's own */
        memcpy(piece(comm, comm->rank), &color, sizeof color);
        if (meet(comm)) return NCCL_SYSTEM_ERROR;
        members = 0;
        for (int i = 0; i < comm->size; i++) {
            if (i == comm->rank) rank = members;
            members += *(int *)piece(comm, i) == color;
        }
        if (meet(comm)) return NCCL_SYSTEM_ERROR;
    }
    *made = color < 0 ? NULL : attach(members, rank, name);
    int problem = *made ? meet(*made) : 0;
    if (*made && !rank && members > 1) shm_unlink(name);
    return problem;
}
EXPORT int ncclCommFinalize(Comm *comm) { return 0; }
EXPORT int ncclCommDestroy(Comm *comm) { return 0; }
EXPORT int ncclCommAbort(Comm *comm) { return 0; }
EXPORT int ncclCommGetAsyncError(Comm *comm, int *error) { return *error = 0; }
EXPORT int ncclCommCount(Comm *comm, int *size) { return *size = comm->size, 0; }
EXPORT int ncclCommUserRank(Comm *comm, int *rank) { return *rank = comm->rank, 0; }
EXPORT int ncclGroupStart(void) { return 0; }
EXPORT int ncclGroupEnd(void) { return 0; }

static cudaError_t begin(const char *name, size_t bytes, cudaStream_t stream) {
    cudaError_t error = launched(name, stream);
    if (error) return error;
    count(COUNT_collectives, stream_device(stream), 1);
    count(COUNT_collective_bytes, stream_device(stream), bytes);
    tell(0, "collective\t%s of %zu bytes", name, bytes);
    return error;
}
#define COMBINE(T)                                                                                        \
    for (size_t i = 0; i < n; i++) {                                                                      \
        T all = ((T *)piece(comm, 0))[i];                                                                 \
        for (int k = 1; k < comm->size; k++) {                                                            \
            T one = ((T *)piece(comm, k))[i];                                                             \
            all = how == MAX ? (one > all ? one : all) : how == MIN ? (one < all ? one : all) : all + one; \
        }                                                                                                 \
        ((T *)to)[i] = how == AVERAGE ? all / comm->size : all;                                           \
    }
static void combine(Comm *comm, void *to, size_t n, int type, int how) {
    switch (type) {
    case 2: case 3: COMBINE(int) break;
    case 4: case 5: COMBINE(long) break;
    case 7: COMBINE(float) break;
    case 8: COMBINE(double) break;
    case 6: case 9: memcpy(to, piece(comm, comm->rank), 2 * n); break; /* halves are never more than a kernel's results */
    default: COMBINE(unsigned char)
    }
}
/* Every rank shows its next piece of `from`; then the rest makes of all pieces what this rank keeps. */
#define EXCHANGE(from, bytes, ...)                                                    \
    for (size_t at = 0; at < (bytes) && comm->size > 1; at += PIECE) {                \
        size_t part = (bytes) - at < PIECE ? (bytes) - at : PIECE;                    \
        memcpy(piece(comm, comm->rank), (const char *)(from) + at, part);             \
        if (meet(comm)) return NCCL_SYSTEM_ERROR;                                     \
        __VA_ARGS__;                                                                  \
        if (meet(comm)) return NCCL_SYSTEM_ERROR;                                     \
    }                                                                                 \
    return 0
EXPORT int ncclAllReduce(const void *from, void *to, size_t n, int type, int how, Comm *comm, cudaStream_t stream) {
    if (begin("ncclAllReduce", n * sizes[type], stream)) return 1;
    if (comm->size < 2 && from != to) memmove(to, from, n * sizes[type]);
    EXCHANGE(from, n * sizes[type], combine(comm, (char *)to + at, part / sizes[type], type, how));
}
EXPORT int ncclReduce(const void *from, void *to, size_t n, int type, int how, int root, Comm *comm, cudaStream_t stream) {
    if (begin("ncclReduce", n * sizes[type], stream)) return 1;
    if (comm->size < 2 && from != to) memmove(to, from, n * sizes[type]);
    EXCHANGE(from, n * sizes[type], if (comm->rank == root) combine(comm, (char *)to + at, part / sizes[type], type, how));
}
EXPORT int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, Comm *comm, cudaStream_t stream) {
    if (begin("ncclBroadcast", n * sizes[type], stream)) return 1;
    if (comm->size < 2 && from != to) memmove(to, from, n * sizes[type]);
    EXCHANGE(from, n * sizes[type], memcpy((char *)to + at, piece(comm, root), part));
}
EXPORT int ncclBcast(void *at, size_t n, int type, int root, Comm *comm, cudaStream_t stream) {
    return ncclBroadcast(at, at, n, type, root, comm, stream);
}
EXPORT int ncclAllGather(const void *from, void *to, size_t n, int type, Comm *comm, cudaStream_t stream) {
    size_t bytes = n * sizes[type];
    if (begin("ncclAllGather", bytes * comm->size, stream)) return 1;
    if (comm->size < 2 && from != to) memmove(to, from, bytes);
    EXCHANGE(from, bytes, for (int k = 0; k < comm->size; k++) memcpy((char *)to + k * bytes + at, piece(comm, k), part));
}
EXPORT int ncclReduceScatter(const void *from, void *to, size_t n, int type, int how, Comm *comm, cudaStream_t stream) {
    size_t bytes = n * sizes[type], mine = comm->rank * bytes, whole = bytes * comm->size;
    if (begin("ncclReduceScatter", whole, stream)) return 1;
    if (comm->size < 2 && from != to) memmove(to, from, bytes);
    char *all = comm->size > 1 ? malloc(PIECE) : NULL; /* of a piece, what lies in this rank's part */
    EXCHANGE(from, whole, {
        size_t first = mine > at ? mine - at : 0, last = mine + bytes < at + part ? (mine + bytes > at ? mine + bytes - at : 0) : part;
        combine(comm, all, part / sizes[type], type, how);
        if (first < last) memcpy((char *)to + at + first - mine, all + first, last - first);
        if (at + part == whole) free(all);
    });
}
