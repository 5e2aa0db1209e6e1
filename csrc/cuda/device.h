// What kernels are written in. Everything that has no C++ form stands here: by the instructions themselves where nvcc
// compiles (device_cuda.h), by the host executor where a C++ compiler does (device_host.h). Kernels hold no #ifdef.
//
//   OTKERN_DEVICE         before a function that only kernels call
//   OTKERN_BOTH           before one that the host calls, too
//   OTKERN_KERNEL         before a kernel of at most kThreads threads a block
//   OTKERN_ARGUMENT       before its argument, which stays in constant memory
//   OTKERN_UNROLL         before a loop whose body indexes registers
//   OTKERN_ROLLED         before one that would take too many registers if several of its turns were under way
//   recomputed(x)         x; what follows from it is not kept in registers from before, but worked out again
//   thread_rank(), block_threads(), block_index()   of the block; thread and warp sizes are whole warps
//   block_rank(), cluster_blocks()                  of the block in its cluster
//   sync_block(), sync_cluster()   every thread of the block, of the cluster
//   shuffle_xor(x, mask)           the value of lane ^ mask; every lane of the warp
//   load_matrices(row, transposed, x)  four 8 x 8 blocks of 16 bits, of which each lane names a row; by the warp
//   multiply_matrices(bf16, a, b, c)   c += a b of 16 x 16 and 16 x 8 numbers of 16 bits, spread over a warp
//   multiply_matrices_tf32(a, b, c)    the same of 16 x 8 and 8 x 8 numbers of `to_tf32`
//   shared_memory(), shared_bytes()    the block's dynamic shared memory
//   start_copy, commit_copies, wait_for_copies      into shared memory, in pieces of 16 bytes, while the thread goes on
//   has_bulk_copies()              whether there are those, too, of whole rows: start_bulk_copy, and the barriers of
//                                  shared memory that tell of their end: start_barrier .. end_barrier
//   publish_stores()               what threads have stored comes before bulk copies that start after a barrier
//   map_shared(p, rank)            the address, in block `rank` of the cluster, of the shared `p`
//   device_limits(device, kernel)  what the device allows a kernel in clusters
//   launch(...)                    a grid on a stream; throws std::runtime_error that names the kernel
#pragma once

#include <cstdint>

#include "call.h"

#if defined(__CUDACC__)
#include "device_cuda.h"
#else
#include "device_host.h"
#endif

namespace otkern {
namespace cuda {

template <class T>
OTKERN_BOTH constexpr T infinity() {
    return sizeof(T) == 4 ? T(__builtin_huge_valf()) : T(__builtin_huge_val());
}
// Near the smallest normal number, and a size that leaves room for sums.
template <class T>
OTKERN_BOTH constexpr T tiny() {
    return sizeof(T) == 4 ? T(1.2e-38) : T(2.3e-308);
}
template <class T>
OTKERN_BOTH constexpr T huge() {
    return sizeof(T) == 4 ? T(1e37) : T(1e307);
}

template <class T>
OTKERN_BOTH constexpr T maximum(T x, T y) {
    return x > y ? x : y;
}
template <class T>
OTKERN_BOTH constexpr T minimum(T x, T y) {
    return x < y ? x : y;
}
template <class T>
OTKERN_BOTH constexpr T absolute(T x) {
    return x < 0 ? -x : x;
}
template <class T>
OTKERN_BOTH constexpr bool is_finite(T x) {
    return x - x == 0;
}
OTKERN_BOTH constexpr int64_t ceil_div(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit;
}
OTKERN_BOTH constexpr int64_t round_up(int64_t n, int64_t unit) {
    return ceil_div(n, unit) * unit;
}

// Of all lanes, by all lanes; the same bits in each.
template <class T>
OTKERN_DEVICE T warp_sum(T x) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
// Of four numbers of each lane their sums over the warp, in six exchanges and not twenty: number `of_four(lane)` of
// them, the same bits in each lane that has it.
OTKERN_DEVICE int of_four(int lane) {
    return lane / 16 * 2 + lane / 8 % 2;
}
template <class T>
OTKERN_DEVICE T warp_sum_of_four(const T (&x)[4], int lane) {
    const bool late = lane & 16, odd = lane & 8;
    const T even_sum = (late ? x[2] : x[0]) + shuffle_xor(late ? x[0] : x[2], 16);
    const T odd_sum = (late ? x[3] : x[1]) + shuffle_xor(late ? x[1] : x[3], 16);
    T sum = (odd ? odd_sum : even_sum) + shuffle_xor(odd ? even_sum : odd_sum, 8);
    for (int mask = 4; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
}
template <class T>
OTKERN_DEVICE T warp_max(T x) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x = maximum(x, shuffle_xor(x, mask));
    return x;
}

// ---- numbers in tensors -------------------------------------------------------------------------------------------

OTKERN_DEVICE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
OTKERN_DEVICE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

// To bfloat16, the nearest, ties to even.
OTKERN_DEVICE uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return 0x7fff;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

OTKERN_BOTH constexpr int element_bytes(Dtype dtype) {
    return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}
// Of 16 bits.
OTKERN_DEVICE float widened(Dtype dtype, uint16_t bits) {
    return dtype == Dtype::bf16 ? from_bits(uint32_t(bits) << 16) : half_to_float(bits);
}

// Element `offset` of a tensor, in the dtype of the arithmetic: double for f64 and float for the others.
template <class T>
OTKERN_DEVICE T load_element(const void *data, Dtype dtype, int64_t offset) {
    if (sizeof(T) == 8) return T(static_cast<const double *>(data)[offset]);
    if (dtype == Dtype::f32) return T(static_cast<const float *>(data)[offset]);
    return T(widened(dtype, static_cast<const uint16_t *>(data)[offset]));
}

template <class T>
OTKERN_DEVICE void store_element(void *data, Dtype dtype, int64_t offset, T x) {
    if (sizeof(T) == 8)
        static_cast<double *>(data)[offset] = x;
    else if (dtype == Dtype::f32)
        static_cast<float *>(data)[offset] = float(x);
    else
        static_cast<uint16_t *>(data)[offset] = dtype == Dtype::bf16 ? to_bf16(float(x)) : float_to_half(float(x));
}

// Four numbers at an address that is a multiple of their size.
template <class T>
struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) Four {
    T x[4];
};
template <class T>
OTKERN_DEVICE Four<T> load_four(const T *p) {
    return *reinterpret_cast<const Four<T> *>(p);
}

}  // namespace cuda
}  // namespace otkern
