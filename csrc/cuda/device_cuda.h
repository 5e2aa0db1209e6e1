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
#define OTKERN_ROLLED _Pragma("unroll 1")

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

OTKERN_DEVICE int recomputed(int x) {
    int same;
    asm volatile("mov.b32 %0, %1;" : "=r"(same) : "r"(x));
    return same;
}
OTKERN_DEVICE char *shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}
OTKERN_DEVICE int shared_bytes() {
    uint32_t bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return int(bytes);
}
// Within the block's shared memory, as instructions take it.
OTKERN_DEVICE uint32_t shared_address(const void *pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

template <class T>
OTKERN_DEVICE T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

OTKERN_DEVICE void load_matrices(const void *row, bool transposed, uint32_t (&x)[4]) {
    if (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(shared_address(row))
                     : "memory");
}

OTKERN_DEVICE void multiply_matrices(bool bf16, const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]) {
    if (bf16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
OTKERN_DEVICE void multiply_matrices_tf32(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The nearest number of 11 bits, in the bits of an fp32.
OTKERN_DEVICE uint32_t to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// ---- copies from global into shared memory, between addresses that are multiples of 16 -----------------------------

OTKERN_DEVICE void start_copy(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from))
                 : "memory");
}
OTKERN_DEVICE void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// For those of this thread, but not for its last `pending` commits, at most two.
OTKERN_DEVICE void wait_for_copies(int pending) {
    if (pending == 0)
        asm volatile("cp.async.wait_group 0;" ::: "memory");
    else if (pending == 1)
        asm volatile("cp.async.wait_group 1;" ::: "memory");
    else
        asm volatile("cp.async.wait_group 2;" ::: "memory");
}

// From compute capability 9 on; before it nobody may call what follows.
#if __CUDA_ARCH__ >= 900
OTKERN_DEVICE constexpr bool has_bulk_copies() {
    return true;
}
// A barrier of one arrival, that of the thread which says how many bytes will come.
OTKERN_DEVICE void start_barrier(uint64_t *barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
OTKERN_DEVICE void end_barrier(uint64_t *barrier) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
OTKERN_DEVICE void expect_bytes(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
OTKERN_DEVICE void start_bulk_copy(void *to, const void *from, int bytes, uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
// For the end of a phase; they are 0 and 1 in turn.
OTKERN_DEVICE void wait_for_bytes(uint64_t *barrier, int phase) {
    uint32_t done = 0;
    while (done == 0)
        asm volatile(
            "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(phase)
            : "memory");
}
OTKERN_DEVICE void publish_stores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#else
OTKERN_DEVICE constexpr bool has_bulk_copies() {
    return false;
}
OTKERN_DEVICE void start_barrier(uint64_t *) {}
OTKERN_DEVICE void end_barrier(uint64_t *) {}
OTKERN_DEVICE void expect_bytes(uint64_t *, int) {}
OTKERN_DEVICE void start_bulk_copy(void *, const void *, int, uint64_t *) {}
OTKERN_DEVICE void wait_for_bytes(uint64_t *, int) {}
OTKERN_DEVICE void publish_stores() {}
#endif

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
