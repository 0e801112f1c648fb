// A libcuda.so.1 without a GPU: Triton compiles, loads and launches as on an H100, and no kernel runs.
//
// It has what Triton's driver.c calls. A launch is checked as far as the real driver checks one, and counted.
#include <cuda.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

// Compute capability and limits of an H100.
enum { CAPABILITY_MAJOR = 9, CAPABILITY_MINOR = 0, MULTIPROCESSORS = 132, WARP_SIZE = 32, MAX_THREADS = 1024 };
enum { SHARED_MEMORY = 232448, REGISTERS = 65536, N_DEVICES = 2, MAX_GRID_Y = 65535 };

static int current_device = 0;
static char contexts[N_DEVICES];
static long launches = 0;
static long modules = 0;
static long programs = 0;

// For tests, by ctypes.
long stub_launches(void) { return launches; }
long stub_modules(void) { return modules; }
long stub_programs_of_last_launch(void) { return programs; }

CUresult cuInit(unsigned int flags) { return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument (stub driver)" : "error of the stub driver";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = N_DEVICES;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  if (ordinal < 0 || ordinal >= N_DEVICES) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (device < 0 || device >= N_DEVICES) return CUDA_ERROR_INVALID_DEVICE;
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = CAPABILITY_MAJOR; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = CAPABILITY_MINOR; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = MULTIPROCESSORS; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = WARP_SIZE; break;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = MAX_THREADS; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED_MEMORY; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}

// A context is its device's place in `contexts`.
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  if (device < 0 || device >= N_DEVICES) return CUDA_ERROR_INVALID_DEVICE;
  *context = (CUcontext)&contexts[device];
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  ptrdiff_t device = (char *)context - contexts;
  if (device < 0 || device >= N_DEVICES) return CUDA_ERROR_INVALID_CONTEXT;
  current_device = (int)device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { return cuDevicePrimaryCtxRetain(context, current_device); }

CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, current_device); }

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  (void)limit;
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  (void)limit;
  (void)value;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  // a cubin is an ELF file
  if (memcmp(image, "\177ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;
  modules++;
  *module = (CUmodule)malloc(1);
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  free(module);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  (void)module;
  *function = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MAX_THREADS : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  (void)function;
  (void)attribute;
  return value > SHARED_MEMORY ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  (void)function;
  (void)config;
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  (void)function;
  (void)config;
  *count = 1;
  return CUDA_SUCCESS;
}

// All memory is the host's, so every pointer passes: whether tensors are on the device, tensors tell.
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  (void)stream;
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  (void)extra;
  unsigned long threads = (unsigned long)config->blockDimX * config->blockDimY * config->blockDimZ;
  if (function == NULL || params == NULL || threads == 0 || threads > MAX_THREADS) return CUDA_ERROR_INVALID_VALUE;
  if (config->gridDimX == 0 || config->gridDimX > 0x7fffffff) return CUDA_ERROR_INVALID_VALUE;
  if (config->gridDimY == 0 || config->gridDimY > MAX_GRID_Y) return CUDA_ERROR_INVALID_VALUE;
  if (config->gridDimZ == 0 || config->gridDimZ > MAX_GRID_Y) return CUDA_ERROR_INVALID_VALUE;
  if (config->sharedMemBytes > SHARED_MEMORY) return CUDA_ERROR_INVALID_VALUE;
  launches++;
  programs = (long)config->gridDimX * config->gridDimY * config->gridDimZ;
  return CUDA_SUCCESS;
}
