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
