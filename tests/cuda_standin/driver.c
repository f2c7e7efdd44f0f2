/* What Triton and torch ask the driver (libcuda.so.1, whose name this library carries) for: modules, launches, contexts. */
#include "standin.h"
#include <cuda.h>

struct function { char name[200]; };

/* A context is 1 + the number of its device: CUDA's runtime sets the one that the driver then finds. */
EXPORT CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)(1L + current_device()), CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    return context && (long)context != 1 + current_device() ? (CUresult)cudaSetDevice((long)context - 1) : CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice *device) { return *device = current_device(), CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t *size, CUlimit limit) { return *size = 1 << 20, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t size) { return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)(1L + device), CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    return *flags = 0, *active = touched(device), CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int *number) { return (CUresult)cudaGetDeviceCount(number); }
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    if (attribute == CU_DEVICE_ATTRIBUTE_CLOCK_RATE) return *value = 1980000, CUDA_SUCCESS;
    if (attribute == CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE) return *value = 3201000, CUDA_SUCCESS;
    if (attribute == CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH) return *value = 6144, CUDA_SUCCESS;
    return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device); /* the numbers are the same */
}
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "an error of the stand-in", CUDA_SUCCESS; }
EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    struct cudaPointerAttributes a;
    cudaPointerGetAttributes(&a, (void *)pointer);
    if (a.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) *(int *)value = a.device;
    else *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = malloc(1), CUDA_SUCCESS; }
EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *o, void **v) {
    return cuModuleLoadData(module, image);
}
EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction *made, CUmodule module, const char *name) {
    struct function *function = malloc(sizeof *function);
    snprintf(function->name, sizeof function->name, "%s", name);
    return *made = (CUfunction)function, CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int block, size_t shared) { return *n = 2, CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { return *n = 2, CUDA_SUCCESS; }
static CUresult launch(CUfunction function, CUstream stream) {
    return (CUresult)launched(((struct function *)function)->name, (cudaStream_t)stream);
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra) { return launch(f, c->hStream); }
EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned x, unsigned y, unsigned z, unsigned shared,
                               CUstream stream, void **arguments, void **extra) {
    return launch(f, stream);
}

/* cuBLASLt's own: torch asks for an algorithm, then multiplies on the stream it gives. */
EXPORT size_t cublasLtGetVersion(void) { return 130000; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference, int asked,
                                          void *found, int *number) {
    memset(found, 0, 96); /* one cublasLtMatmulHeuristicResult_t: status 0 */
    return *number = 1, 0;
}
EXPORT int cublasLtMatmul(void *handle, void *operation, void *alpha, void *a, void *la, void *b, void *lb, void *beta, void *c, void *lc, void *d,
                          void *ld, void *algorithm, void *workspace, size_t size, cudaStream_t stream) {
    return launched("cublasLtMatmul", stream);
}
EXPORT int cublasCreate_v2(cudaStream_t **handle) { return *handle = calloc(1, sizeof(cudaStream_t)), 0; }
EXPORT int cublasSetStream_v2(cudaStream_t *handle, cudaStream_t stream) { return *handle = stream, 0; }
int standin_blas(cudaStream_t *handle, const char *name) { return launched(name, *handle); }
