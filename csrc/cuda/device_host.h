// The device layer on the CPU: every function asks the host executor, which runs the threads of a cluster as fibers.
#pragma once

#include <cmath>
#include <cstring>

#include "host_executor.h"

#define OTKERN_DEVICE inline
#define OTKERN_BOTH inline
#define OTKERN_KERNEL void
#define OTKERN_ARGUMENT const
#define OTKERN_UNROLL _Pragma("GCC unroll 16")
#define OTKERN_ROLLED

namespace otkern {
namespace cuda {

inline int thread_rank() {
    return host::current->thread;
}
inline int block_threads() {
    return host::current->threads;
}
inline int64_t block_index() {
    return host::current->block_index;
}
inline int block_rank() {
    return host::current->block;
}
inline int cluster_blocks() {
    return host::current->blocks;
}
inline void sync_block() {
    host::wait_for_block();
}
inline void sync_cluster() {
    host::wait_for_cluster();
}
inline int recomputed(int x) {
    return x;
}
inline char *shared_memory() {
    return host::current->shared;
}
inline int shared_bytes() {
    return host::current->shared_bytes;
}
template <class P>
P *map_shared(P *pointer, int rank) {
    return reinterpret_cast<P *>(host::map_address(reinterpret_cast<char *>(pointer), rank));
}

template <class T>
T shuffle_xor(T x, int mask) {
    double lanes[kWarp];  // 8 bytes a lane hold any number
    host::exchange_in_warp(&x, sizeof(T), lanes);
    T other;
    memcpy(&other, lanes + ((host::current->thread & (kWarp - 1)) ^ mask), sizeof(T));
    return other;
}

inline float half_to_float(uint16_t bits) {
    _Float16 x;
    memcpy(&x, &bits, 2);
    return float(x);
}
inline uint16_t float_to_half(float x) {
    const _Float16 half = _Float16(x);
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}

// Lane 8 k + i names row i of block k, of eight numbers. A lane gets numbers 2 (lane % 4) and the next one of row
// lane / 4, or of column lane / 4 of the transposed block.
inline void load_matrices(const void *row, bool transposed, uint32_t (&x)[4]) {
    const uint16_t *rows[kWarp];
    host::exchange_in_warp(&row, 8, rows);
    const int lane = host::current->thread & (kWarp - 1), major = lane / 4, minor = 2 * (lane % 4);
    for (int k = 0; k < 4; ++k) {
        const uint16_t *const *const block = rows + 8 * k;
        const uint32_t low = transposed ? block[minor][major] : block[major][minor];
        const uint32_t high = transposed ? block[minor + 1][major] : block[major][minor + 1];
        x[k] = low | high << 16;
    }
}

inline float number_of(bool bf16, uint32_t word, int half) {
    const uint16_t bits = uint16_t(word >> (16 * half));
    if (!bf16) return half_to_float(bits);
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

// Of the left, lane 4 i + k holds words k and k + 4 of rows i and i + 8; of the right, those of column i. A word is one
// number or two. product(x, y) is that of two words.
template <class F>
void multiply_words(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4], F product) {
    uint32_t words[3][kWarp][2];
    host::exchange_in_warp(a, 8, words[0]);
    host::exchange_in_warp(a + 2, 8, words[1]);
    host::exchange_in_warp(b, 8, words[2]);
    const int lane = host::current->thread & (kWarp - 1);
    for (int e = 0; e < 4; ++e) {
        const int row = lane / 4, high = e / 2, column = 2 * (lane % 4) + e % 2;
        for (int k = 0; k < 8; ++k)
            c[e] += product(words[k / 4][4 * row + k % 4][high], words[2][4 * column + k % 4][k / 4]);
    }
}
inline void multiply_matrices(bool bf16, const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]) {
    multiply_words(a, b, c, [&](uint32_t x, uint32_t y) {
        return number_of(bf16, x, 0) * number_of(bf16, y, 0) + number_of(bf16, x, 1) * number_of(bf16, y, 1);
    });
}
inline void multiply_matrices_tf32(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]) {
    multiply_words(a, b, c, [](uint32_t x, uint32_t y) {
        float left, right;
        memcpy(&left, &x, 4);
        memcpy(&right, &y, 4);
        return left * right;
    });
}
// Ties go away from zero, as in the instruction.
inline uint32_t to_tf32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const bool number = x - x == 0;
    return number ? (bits + 0x1000) & 0xffffe000 : bits;
}

inline void start_copy(void *to, const void *from) {
    host::start_copy(to, from);
}
inline void commit_copies() {
    host::commit_copies();
}
inline void wait_for_copies(int pending) {
    host::wait_for_copies(pending);
}
inline bool has_bulk_copies() {
    return host::has_bulk_copies();
}
inline void start_barrier(uint64_t *barrier) {
    host::start_barrier(barrier);
}
inline void end_barrier(uint64_t *barrier) {
    host::end_barrier(barrier);
}
inline void expect_bytes(uint64_t *barrier, int bytes) {
    host::expect_bytes(barrier, bytes);
}
inline void start_bulk_copy(void *to, const void *from, int bytes, uint64_t *barrier) {
    host::start_bulk_copy(to, from, bytes, barrier);
}
inline void wait_for_bytes(uint64_t *barrier, int phase) {
    host::wait_for_bytes(barrier, phase);
}
inline void publish_stores() {}

inline float exp_of(float x) {
    return std::exp(x);
}
inline double exp_of(double x) {
    return std::exp(x);
}
inline float log_of(float x) {
    return std::log(x);
}
inline double log_of(double x) {
    return std::log(x);
}
inline double expm1_of(double x) {
    return std::expm1(x);
}
inline float root_of(float x) {
    return std::sqrt(x);
}
inline double root_of(double x) {
    return std::sqrt(x);
}
inline float scale_by_power(float x, int exponent) {
    return std::ldexp(x, exponent);
}
inline double scale_by_power(double x, int exponent) {
    return std::ldexp(x, exponent);
}
inline int exponent_of_number(double x) {
    int exponent;
    std::frexp(x, &exponent);
    return exponent;
}

// As a device of compute capability 9 or 10.
template <class Argument>
Limits device_limits(int, void (*)(const Argument)) {
    Limits limits;
    limits.shared_bytes = 227 << 10;
    limits.cluster = kMostCluster;
    return limits;
}

template <class Argument>
void launch(const char *name, void (*kernel)(const Argument), const Grid &grid, const Argument &argument,
            const Stream &) {
    struct Call {
        void (*kernel)(const Argument);
        const Argument &argument;
        static void run(const void *self) {
            const Call *call = static_cast<const Call *>(self);
            call->kernel(call->argument);
        }
    };
    const Call call{kernel, argument};
    host::run_grid(name, grid, Call::run, &call);
}

}  // namespace cuda
}  // namespace otkern
