// Small kernels for the executor's own tests: what it runs right, and what it has to refuse.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "team.h"

namespace otkern {
namespace cuda {
namespace host {

constexpr int kProbeThreads = 64, kProbeBlocks = 4;

struct ProbeArguments {
    double *out;  // of each thread of the grid
};

OTKERN_DEVICE double *slot_of(const ProbeArguments &arguments) {
    return arguments.out + block_index() * block_threads() + thread_rank();
}

// The number of the neighbouring thread, which has to be there after the barrier.
inline OTKERN_KERNEL neighbour_probe_kernel(OTKERN_ARGUMENT ProbeArguments arguments) {
    double *shared = reinterpret_cast<double *>(shared_memory());
    shared[thread_rank()] = thread_rank();
    sync_block();
    *slot_of(arguments) = shared[(thread_rank() + 1) % block_threads()];
}

// The same without the barrier: what it reads depends on the order of the threads.
inline OTKERN_KERNEL race_probe_kernel(OTKERN_ARGUMENT ProbeArguments arguments) {
    double *shared = reinterpret_cast<double *>(shared_memory());
    shared[thread_rank()] = thread_rank();
    *slot_of(arguments) = shared[(thread_rank() + 1) % block_threads()];
}

inline OTKERN_KERNEL shuffle_probe_kernel(OTKERN_ARGUMENT ProbeArguments arguments) {
    *slot_of(arguments) = warp_sum(double(thread_rank())) + 1000 * shuffle_xor(double(thread_rank()), 3);
}

// Every block writes into the next one.
inline OTKERN_KERNEL cluster_probe_kernel(OTKERN_ARGUMENT ProbeArguments arguments) {
    double *shared = reinterpret_cast<double *>(shared_memory());
    sync_cluster();
    map_shared(shared, (block_rank() + 1) % cluster_blocks())[thread_rank()] = 100 * block_rank() + thread_rank();
    sync_cluster();
    *slot_of(arguments) = shared[thread_rank()];
}

inline OTKERN_KERNEL unset_probe_kernel(OTKERN_ARGUMENT ProbeArguments arguments) {
    *slot_of(arguments) = reinterpret_cast<double *>(shared_memory())[thread_rank()];
}

inline OTKERN_KERNEL divergent_probe_kernel(OTKERN_ARGUMENT ProbeArguments) {
    if (thread_rank() < kWarp)
        sync_block();
    else
        sync_cluster();
}

inline OTKERN_KERNEL early_end_probe_kernel(OTKERN_ARGUMENT ProbeArguments) {
    if (thread_rank() != 7) sync_block();
}

inline OTKERN_KERNEL overrun_probe_kernel(OTKERN_ARGUMENT ProbeArguments) {
    if (thread_rank() == 0) reinterpret_cast<double *>(shared_memory())[kProbeThreads] = 1;
}

inline OTKERN_KERNEL ended_block_probe_kernel(OTKERN_ARGUMENT ProbeArguments arguments) {
    if (block_rank() != 0) return;
    sync_block();
    *slot_of(arguments) = *map_shared(reinterpret_cast<double *>(shared_memory()), 1);
}

// What copies bring: 1, 2, 3, ..
struct alignas(16) CopySource {
    double x[kProbeThreads];
    CopySource() {
        for (int k = 0; k < kProbeThreads; ++k) x[k] = k + 1;
    }
};
inline const double *copy_source() {
    static const CopySource source;
    return source.x;
}

// The first half of the threads copies two numbers each.
OTKERN_DEVICE void start_probe_copies(double *shared, int shift) {
    if (2 * thread_rank() < kProbeThreads)
        start_copy(shared + 2 * thread_rank() + shift, copy_source() + 2 * thread_rank());
    commit_copies();
}
inline OTKERN_KERNEL copy_probe_kernel(OTKERN_ARGUMENT ProbeArguments arguments) {
    double *shared = reinterpret_cast<double *>(shared_memory());
    start_probe_copies(shared, 0);
    wait_for_copies(0);
    sync_block();
    *slot_of(arguments) = shared[thread_rank()];
}
// The same without waiting.
inline OTKERN_KERNEL hasty_probe_kernel(OTKERN_ARGUMENT ProbeArguments arguments) {
    double *shared = reinterpret_cast<double *>(shared_memory());
    start_probe_copies(shared, 0);
    wait_for_copies(1);
    sync_block();
    *slot_of(arguments) = shared[thread_rank()];
    sync_block();
    wait_for_copies(0);
}
inline OTKERN_KERNEL unawaited_probe_kernel(OTKERN_ARGUMENT ProbeArguments) {
    start_probe_copies(reinterpret_cast<double *>(shared_memory()), 0);
}
inline OTKERN_KERNEL misaligned_probe_kernel(OTKERN_ARGUMENT ProbeArguments) {
    start_probe_copies(reinterpret_cast<double *>(shared_memory()), 1);
}

// Half of the shared memory, in two copies; then the same again into the same place.
inline OTKERN_KERNEL bulk_probe_kernel(OTKERN_ARGUMENT ProbeArguments arguments) {
    constexpr int half = kProbeThreads / 2, bytes = half / 2 * sizeof(double);
    double *shared = reinterpret_cast<double *>(shared_memory());
    uint64_t *barrier = reinterpret_cast<uint64_t *>(shared + half);
    if (thread_rank() == 0) start_barrier(barrier);
    sync_block();
    double sum = 0;
    for (int phase = 0; phase < 2; ++phase) {
        if (thread_rank() == phase) {
            start_bulk_copy(shared, copy_source() + half * phase, bytes, barrier);
            expect_bytes(barrier, 2 * bytes);
            start_bulk_copy(shared + half / 2, copy_source() + half * phase + half / 2, bytes, barrier);
        }
        wait_for_bytes(barrier, phase);
        sum += shared[thread_rank() % half];
        sync_block();
    }
    if (thread_rank() == 0) end_barrier(barrier);
    *slot_of(arguments) = sum;
}
inline OTKERN_KERNEL left_barrier_probe_kernel(OTKERN_ARGUMENT ProbeArguments) {
    if (thread_rank() == 0) start_barrier(reinterpret_cast<uint64_t *>(shared_memory()));
}
inline OTKERN_KERNEL short_copy_probe_kernel(OTKERN_ARGUMENT ProbeArguments) {
    uint64_t *barrier = reinterpret_cast<uint64_t *>(shared_memory());
    if (thread_rank() == 0) {
        start_barrier(barrier);
        expect_bytes(barrier, 32);
        start_bulk_copy(shared_memory() + 16, copy_source(), 16, barrier);
    }
    sync_block();
    wait_for_bytes(barrier, 0);
}

inline std::vector<double> probe(const std::string &name) {
    const struct {
        const char *name;
        void (*kernel)(const ProbeArguments);
    } probes[] = {
        {"neighbour", neighbour_probe_kernel},
        {"race", race_probe_kernel},
        {"shuffle", shuffle_probe_kernel},
        {"cluster", cluster_probe_kernel},
        {"unset", unset_probe_kernel},
        {"divergent", divergent_probe_kernel},
        {"early_end", early_end_probe_kernel},
        {"overrun", overrun_probe_kernel},
        {"ended_block", ended_block_probe_kernel},
        {"copy", copy_probe_kernel},
        {"hasty", hasty_probe_kernel},
        {"unawaited", unawaited_probe_kernel},
        {"misaligned", misaligned_probe_kernel},
        {"bulk", bulk_probe_kernel},
        {"left_barrier", left_barrier_probe_kernel},
        {"short_copy", short_copy_probe_kernel},
    };
    Grid grid;
    grid.blocks = kProbeBlocks;
    grid.cluster = 2;
    grid.threads = kProbeThreads;
    grid.shared_bytes = kProbeThreads * sizeof(double);
    std::vector<double> out(size_t(kProbeBlocks * kProbeThreads), std::numeric_limits<double>::quiet_NaN());
    for (const auto &probe : probes)
        if (name == probe.name) {
            launch((name + "_probe_kernel").c_str(), probe.kernel, grid, ProbeArguments{out.data()}, Stream());
            return out;
        }
    throw std::invalid_argument("name must be that of a probe, got '" + name + "'");
}

}  // namespace host
}  // namespace cuda
}  // namespace otkern
