// Which launch serves an item: size classes, clusters, shared memory. Ordinary C++, the same on host and device.
//
// A class is a cluster, a number of threads and an amount of shared memory. An item belongs to the first class whose
// memory it fits into, which follows from its own sizes: batch mates change neither its class nor its bits. The host,
// which knows the longest sides only, launches every class that the batch may hold, and in each launch the items of
// other classes end at once.
#pragma once

#include <vector>

#include "call.h"

namespace otkern {
namespace cuda {

// The classes of the forward, smallest first.
std::vector<SizeClass> forward_classes(const Limits &limits);
// The shared memory that an item takes in a class, with its null points counted in `n` and `m`.
int64_t forward_bytes(bool wide, const SizeClass &size, int64_t n, int64_t m, bool directions);
// The same for the adjoint of the fixed point and for the annealed loop, which hold one matrix: they serve whatever the
// forward does.
std::vector<SizeClass> implicit_classes(const Limits &limits);
int64_t implicit_bytes(bool wide, const SizeClass &size, int64_t n, int64_t m, bool directions);
int64_t symmetric_bytes(bool wide, const SizeClass &size, int64_t n, int64_t m, bool directions);
// Rows of the plan that a block makes at once, 0 where not even the fewest fit. Their number shows in no bit.
int plan_rows(const Limits &limits, bool wide, int64_t n, int64_t m, int64_t batch, bool directions);
int64_t plan_bytes(bool wide, int rows, int64_t m, bool directions);

// What a block that needs `bytes` of shared memory may have without keeping another one off its multiprocessor: it goes
// to what is on its way. A thread of the kernel takes at least so many registers, on every target.
int64_t roomy_bytes(const Limits &limits, int64_t bytes, int threads, int registers);
constexpr int kForwardRegisters = 232, kOtherRegisters = 136;

// The same problem with its sides exchanged.
Problem exchanged(const Problem &problem);

// The host executor is taken for a device of compute capability 9.
Limits limits_of_device(int device);

// The most blocks of one launch; a larger batch takes several.
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

// Launches; nothing waits for the device. They throw std::runtime_error with the kernel's name and its grid.
void forward(const ForwardCall &call, bool exact_sizes, bool log_domain_only, const Limits &limits,
             const Stream &stream);
void symmetric(const SymmetricCall &call, bool exact_sizes, const Limits &limits, const Stream &stream);

// `terms_reg` (like f) is memory for the terms of sum_reg.
void backward(const BackwardCall &call, void *terms_reg, const Limits &limits, const Stream &stream);
void implicit(const ImplicitCall &call, bool exact_sizes, const Limits &limits, const Stream &stream);
void apply(const ApplyCall &call, const Limits &limits, const Stream &stream);

}  // namespace cuda
}  // namespace otkern
