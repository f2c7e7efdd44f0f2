/* What the stand-in's files share. See README.md. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* What is counted, by device: see standin.py, which reads the names from here. */
#define COUNTERS(X)                                                                                                    \
    X(launches) X(graph_launches) X(replayed_launches) X(copies) X(fills) X(waits) X(waits_elsewhere) X(staged_copies) \
    X(event_records) X(stream_waits) X(collectives) X(collective_bytes) X(allocations) X(pinned_allocations)           \
    X(pinned_bytes) X(refused) X(races) X(empty_replays)

enum counter {
#define X(name) COUNT_##name,
    COUNTERS(X)
#undef X
    NUM_COUNTERS
};

enum { DEVICES = 16 };

void count(enum counter which, int device, long amount);
/* Writes a line to the trace, if there is one; with `stack`, what Python is doing below it. */
void tell(int stack, const char *format, ...) __attribute__((format(printf, 2, 3)));
int tracing(void);
int stream_device(cudaStream_t stream);
int current_device(void);
int touched(int device); /* whether this process has a context there */
/* Counts a kernel on a stream, or adds it to the graph that is being captured there. */
cudaError_t launched(const char *name, cudaStream_t stream);
