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

inline Limits device_limits(int device) {
    int bytes = 0, major = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "asking device " + std::to_string(device) + " for its shared memory");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "asking device " + std::to_string(device) + " for its compute capability");
    Limits limits;
    limits.shared_bytes = bytes;
    // 16 are for the data-centre parts of these two; others take the portable size.
    limits.cluster = major < 9 ? 1 : major <= 10 ? 16 : 8;
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
    check_launch(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes)),
                 name, grid);
    // Eight blocks are what every device takes; more have to be asked for.
    if (grid.cluster > 8)
        check_launch(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name, grid);
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(grid.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(grid.blocks));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = size_t(grid.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream.handle);
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
    void *arguments[] = {const_cast<Argument *>(&argument)};
    check_launch(cudaLaunchKernelExC(&config, function, arguments), name, grid);
}

}  // namespace cuda
}  // namespace otkern
