// Runs whole kernels on the CPU, for tests on machines without a GPU.
//
// Clusters run one after the other. Every thread of a cluster is a fiber that runs until it waits for others: at a
// barrier, or for the lanes of its warp. So an execution is one legal interleaving of the kernel, always the same, and
// `set_order` gives others: a result that depends on it tells of a missing barrier. What else shows here:
//   * shared memory is filled with NaN before each block, and its end is watched;
//   * threads that wait where others never come, or end while others wait, are an error that names the kernel;
//   * so is an address mapped into a block that has ended, or that is not of shared memory;
//   * copies that run by themselves arrive when a thread waits for them and not before, so that who forgets to wait
//   reads
//     NaN; or, with another order, at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace otkern {
namespace cuda {

struct Grid;

namespace host {

// What a running thread may ask of itself.
struct Fiber {
    int thread, threads;  // of the block
    int block, blocks;    // of the cluster
    int64_t block_index;  // of the grid
    char *shared;
    int shared_bytes;
    // The executor's own.
    void *stack_pointer;
    int exchanges;
    bool ended;
};

extern Fiber *current;

void wait_for_block();
void wait_for_cluster();
// All lanes give `size` <= 8 bytes and get those of all lanes, 8 bytes apart.
void exchange_in_warp(const void *mine, size_t size, void *all);
char *map_address(char *pointer, int rank);

// As in device.h.
bool has_bulk_copies();
void start_copy(void *to, const void *from);
void commit_copies();
void wait_for_copies(int pending);
void start_barrier(uint64_t *barrier);
void end_barrier(uint64_t *barrier);
void expect_bytes(uint64_t *barrier, int bytes);
void start_bulk_copy(void *to, const void *from, int bytes, uint64_t *barrier);
void wait_for_bytes(uint64_t *barrier, int phase);

// Throws std::runtime_error.
void run_grid(const char *name, const Grid &grid, void (*run)(const void *), const void *self);

// Which of the threads that can go on does: those released together from the first or from the last one on, and the
// groups in turn, or the latest group first, so that one block runs ahead of the others as far as barriers let it. With
// `pieces` there are no bulk copies, as before compute capability 9. With `eager` copies arrive when they start: who
// starts one into memory that is still in use spoils it.
struct Order {
    bool backward = false, ahead = false, pieces = false, eager = false;
};
void set_order(const Order &order);

}  // namespace host
}  // namespace cuda
}  // namespace otkern
