// The device layer by CUDA's own means.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

#define OTKERN_DEVICE __device__ __forceinline__
#define OTKERN_BOTH __host__ __device__ __forceinline__
#define OTKERN_KERNEL __global__ void __launch_bounds__(otkern::cuda::kThreads, 1)
#define OTKERN_ARGUMENT const __grid_constant__
#define OTKERN_UNROLL _Pragma("unroll")

namespace otkern {
namespace cuda {

OTKERN_DEVICE int thread_rank() {
    return int(threadIdx.x);
}
OTKERN_DEVICE int block_threads() {
    return int(blockDim.x);
}
OTKERN_DEVICE int64_t block_index() {
    return int64_t(blockIdx.x);
}
OTKERN_DEVICE void sync_block() {
    __syncthreads();
}

// Clusters exist from compute capability 9 on; before it a block is alone.
OTKERN_DEVICE int block_rank() {
#if __CUDA_ARCH__ >= 900
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
#else
    return 0;
#endif
}
OTKERN_DEVICE int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
    uint32_t blocks;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return int(blocks);
#else
    return 1;
#endif
}
OTKERN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
    __syncwarp();  // the aligned form wants the lanes of a warp together
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}
template <class P>
OTKERN_DEVICE P *map_shared(P *pointer, int rank) {
#if __CUDA_ARCH__ >= 900
    uint64_t mapped;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(uint64_t(pointer)), "r"(rank));
    return reinterpret_cast<P *>(mapped);
#else
    return pointer;
#endif
}

OTKERN_DEVICE char *shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

template <class T>
OTKERN_DEVICE T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

OTKERN_DEVICE void multiply_matrices(bool bf16, const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]) {
    if (bf16)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

OTKERN_DEVICE float half_to_float(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
OTKERN_DEVICE uint16_t float_to_half(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

OTKERN_DEVICE float exp_of(float x) {
    return expf(x);
}
OTKERN_DEVICE double exp_of(double x) {
    return exp(x);
}
OTKERN_DEVICE float log_of(float x) {
    return logf(x);
}
OTKERN_DEVICE double log_of(double x) {
    return log(x);
}
OTKERN_DEVICE double expm1_of(double x) {
    return expm1(x);
}
OTKERN_DEVICE float root_of(float x) {
    return sqrtf(x);
}
OTKERN_DEVICE double root_of(double x) {
    return sqrt(x);
}
OTKERN_DEVICE float scale_by_power(float x, int exponent) {
    return ldexpf(x, exponent);
}
OTKERN_DEVICE double scale_by_power(double x, int exponent) {
    return ldexp(x, exponent);
}
// The e with |x| = m 2^e, 1/2 <= m < 1.
OTKERN_DEVICE int exponent_of_number(double x) {
    int exponent;
    frexp(x, &exponent);
    return exponent;
}

// The device of a call, while it lasts.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        if (cudaGetDevice(&before) == cudaSuccess && before != device) changed = cudaSetDevice(device) == cudaSuccess;
    }
    ~DeviceGuard() {
        if (changed) cudaSetDevice(before);
    }
    DeviceGuard(const DeviceGuard &) = delete;
    DeviceGuard &operator=(const DeviceGuard &) = delete;

  private:
    int before = 0;
    bool changed = false;
};

inline void check(cudaError_t status, const std::string &what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // the error is reported here and must not meet a later call that asks
    throw std::runtime_error(what + " failed: " + cudaGetErrorString(status));
}

inline int attribute_of(int device, cudaDeviceAttr which, const char *what) {
    int number = 0;
    check(cudaDeviceGetAttribute(&number, which, device),
          "asking device " + std::to_string(device) + " for its " + what);
    return number;
}

// All the shared memory that the device lets a block have, whatever a launch asks for: the attribute belongs to the
// kernel, and another thread may be launching it, too.
inline cudaError_t allow_memory(const void *function, int device) {
    int most = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status != cudaSuccess) return status;
    return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// Eight blocks are what every device with clusters takes; more have to be asked for.
inline cudaError_t allow_cluster(const void *function, int cluster) {
    if (cluster <= 8) return cudaSuccess;
    return cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

struct LaunchConfiguration {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster;

    LaunchConfiguration(const Grid &grid, void *stream) {
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = unsigned(grid.cluster);
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.gridDim = dim3(unsigned(grid.blocks));
        config.blockDim = dim3(unsigned(grid.threads));
        config.dynamicSmemBytes = size_t(grid.shared_bytes);
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &cluster;
        config.numAttrs = grid.cluster > 1 ? 1 : 0;
    }
    LaunchConfiguration(const LaunchConfiguration &) = delete;
    LaunchConfiguration &operator=(const LaunchConfiguration &) = delete;
};

// The shared memory of a block, and the largest cluster of blocks with all of it that the device can hold: that depends
// on how its multiprocessors are grouped, and on what of it one is given.
template <class Argument>
Limits device_limits(int device, void (*kernel)(const Argument)) {
    const DeviceGuard guard(device);
    const void *function = reinterpret_cast<const void *>(kernel);
    Limits limits;
    limits.shared_bytes = attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared memory");
    if (attribute_of(device, cudaDevAttrClusterLaunch, "clusters") == 0) return limits;
    check(allow_memory(function, device), "allowing a kernel its shared memory");
    for (int cluster = kMostCluster; cluster > 1 && limits.cluster == 1; cluster /= 2) {
        Grid grid;
        grid.blocks = grid.cluster = cluster;
        grid.threads = kThreads;
        grid.shared_bytes = limits.shared_bytes;
        const LaunchConfiguration launch(grid, nullptr);
        int fit = 0;
        if (allow_cluster(function, cluster) == cudaSuccess &&
            cudaOccupancyMaxActiveClusters(&fit, function, &launch.config) == cudaSuccess && fit > 0)
            limits.cluster = cluster;
        cudaGetLastError();  // a size that is refused is an answer, not an error
    }
    return limits;
}

inline void check_launch(cudaError_t status, const char *name, const Grid &grid) {
    if (status == cudaSuccess) return;
    check(status, std::string("the launch of ") + name + " (" + std::to_string(grid.blocks) +
                      " blocks in clusters of " + std::to_string(grid.cluster) + ", " + std::to_string(grid.threads) +
                      " threads, " + std::to_string(grid.shared_bytes) + " bytes of shared memory a block)");
}

template <class Argument>
void launch(const char *name, void (*kernel)(const Argument), const Grid &grid, const Argument &argument,
            const Stream &stream) {
    if (grid.blocks == 0) return;
    const DeviceGuard guard(stream.device);
    const void *function = reinterpret_cast<const void *>(kernel);
    const LaunchConfiguration launch(grid, stream.handle);
    void *arguments[] = {const_cast<Argument *>(&argument)};
    cudaError_t status = allow_cluster(function, grid.cluster);
    if (status == cudaSuccess) status = allow_memory(function, stream.device);
    if (status == cudaSuccess) status = cudaLaunchKernelExC(&launch.config, function, arguments);
    check_launch(status, name, grid);
}

}  // namespace cuda
}  // namespace otkern
