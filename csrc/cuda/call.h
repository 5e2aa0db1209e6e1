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

struct SymmetricArguments {
    SymmetricCall call;
    SizeClass size, smaller;  // as above
    int64_t first_item = 0;
};

struct ImplicitArguments {
    ImplicitCall call;
    SizeClass size, smaller;  // as above
    int64_t first_item = 0;
};

// Rows of the plan of side a. Those of side b are the same with the sides of the problem exchanged.
struct PlanArguments {
    Problem problem;
    const void *f = nullptr, *g = nullptr;  // of the rows, of the columns
    // The weights of BackwardCall, of rows and columns alike; strides of `dense` within an item.
    const void *dvalue = nullptr;
    const void *scale = nullptr, *cost_scale = nullptr, *dense = nullptr, *row = nullptr, *col = nullptr;
    int64_t dense_row = 0, dense_col = 0;
    // Of the rows: gradients of the points, sums (ratios where no `scale` is given), terms of the sum for reg.
    void *dx = nullptr, *sums = nullptr, *terms = nullptr;
    void *dcost = nullptr;  // (batch, max_a, max_b)
    // Products instead: out_i = sum_j P_ij v_j; or the plan itself.
    const void *v = nullptr;
    void *out = nullptr, *plan = nullptr;
    int64_t channels = 0;
    bool times_cost = false;
    bool exchanged = false;  // these are the columns of the problem
    int rows = 0;            // that a block makes
    int64_t tiles = 0;       // of so many rows, of an item
    int64_t first_tile = 0;  // of the launch, counted over the batch
};

}  // namespace cuda
}  // namespace otkern
