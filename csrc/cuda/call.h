// What the CUDA calls take beside the structs of cpu/call.h, whose addresses are then those of a device.
#pragma once

#include "../cpu/call.h"

namespace otkern {
namespace cuda {

constexpr int kWarp = 32, kThreads = 256, kMostCluster = 16;  // threads of a warp; the most of a block; blocks

// Where a call runs. Nothing waits for the stream.
struct Stream {
    void *handle = nullptr;
    int device = 0;
};

struct Grid {
    int64_t blocks = 0;  // a multiple of `cluster`
    int cluster = 1, threads = 0;
    int64_t shared_bytes = 0;  // of each block
};

// What a device allows.
struct Limits {
    int64_t shared_bytes = 0;  // of one block
    int cluster = 1;           // blocks
};

struct SizeClass {
    int cluster = 0, threads = 0;
    int64_t bytes = 0;        // of shared memory, of each block
    bool keeps_cost = false;  // beside the kernel; else it is formed again where it is needed
};

struct ForwardArguments {
    ForwardCall call;
    SizeClass size, smaller;  // the class of this launch, and the one before it (none: no threads)
    int64_t first_item = 0;
    bool log_domain_only = false;  // never on an absorbed kernel: what that is checked against
};

}  // namespace cuda
}  // namespace otkern
