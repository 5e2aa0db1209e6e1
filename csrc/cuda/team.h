// The threads that work on one item together: the blocks of a cluster, of 32 to 256 threads each.
//
// Sums over the team are made in a fixed order: lanes by a butterfly, warps and then blocks one after the other. Every
// thread gets the same bits, so that all of them decide alike.
#pragma once

#include "device.h"

namespace otkern {
namespace cuda {

constexpr int kMostNotes = 10, kMostWarps = kThreads / kWarp;

// Hands out pieces of a block's shared memory. Without a base it learns the size only, on host and device alike.
struct Carver {
    char *base = nullptr;
    int64_t used = 0;

    template <class T>
    OTKERN_BOTH void take(T *&pointer, int64_t count) {
        pointer = reinterpret_cast<T *>(base + used);
        // Whole groups of four numbers: vectors are read in those.
        used += round_up(count * int64_t(sizeof(T)), maximum<int64_t>(16, 4 * sizeof(T)));
    }
};

class Team {
  public:
    int thread, threads, lane, warp, warps;
    int rank, size;  // of the block, in the cluster

    OTKERN_BOTH Team() {}
    OTKERN_DEVICE void join() {
        thread = thread_rank();
        threads = block_threads();
        lane = thread % kWarp;
        warp = thread / kWarp;
        warps = threads / kWarp;
        rank = block_rank();
        size = cluster_blocks();
    }
    OTKERN_BOTH void carve(Carver &carver) {
        carver.take(warp_notes, kMostWarps * kMostNotes);
        carver.take(block_notes, 2 * kMostCluster * kMostNotes);
    }

    // The block's share of `total` rows or columns: all blocks but the last have the same number.
    OTKERN_DEVICE void slice(int total, int &first, int &count) const {
        const int each = int(ceil_div(total, size));
        first = rank * each;
        count = maximum(0, minimum(each, total - first));
    }

    OTKERN_DEVICE void sync() const { sync_block(); }
    OTKERN_DEVICE void sync_all() const {
        if (size > 1)
            sync_cluster();
        else
            sync_block();
    }

    // `value` to where `place` is, in every block.
    template <class T>
    OTKERN_DEVICE void push(T *place, T value) const {
        if (size == 1) {
            *place = value;
            return;
        }
        for (int block = 0; block < size; ++block) *map_shared(place, block) = value;
    }

    // Of `count` numbers of each thread their sums over the team, where bit k of `sums` is set, else their maxima.
    // In three steps, so that the barriers between them can serve others, too.
    template <class T, int count>
    OTKERN_DEVICE void note(const T (&x)[count], int sums) const {
        static_assert(count <= kMostNotes, "more notes than there is room for");
        T *notes = reinterpret_cast<T *>(warp_notes);
        OTKERN_UNROLL
        for (int k = 0; k < count; ++k) {
            const T total = (sums >> k) & 1 ? warp_sum(x[k]) : warp_max(x[k]);
            if (lane == 0) notes[warp * count + k] = total;
        }
    }
    // After a barrier of the block.
    template <class T, int count>
    OTKERN_DEVICE void send(const T (&)[count], int sums) {
        const T *notes = reinterpret_cast<const T *>(warp_notes);
        if (thread < count) {
            T total = notes[thread];
            for (int k = 1; k < warps; ++k) {
                const T other = notes[k * count + thread];
                total = (sums >> thread) & 1 ? total + other : maximum(total, other);
            }
            push(notes_of<T>(rank) + thread, total);
        }
    }
    // After a barrier of the team. Two sets of notes: a fast block may send again before a slow one has collected.
    template <class T, int count>
    OTKERN_DEVICE void collect(T (&x)[count], int sums) {
        OTKERN_UNROLL
        for (int k = 0; k < count; ++k) {
            T total = notes_of<T>(0)[k];
            for (int block = 1; block < size; ++block) {
                const T other = notes_of<T>(block)[k];
                total = (sums >> k) & 1 ? total + other : maximum(total, other);
            }
            x[k] = total;
        }
        turn ^= 1;
    }
    template <class T, int count>
    OTKERN_DEVICE void reduce(T (&x)[count], int sums) {
        note(x, sums);
        sync();
        send(x, sums);
        sync_all();
        collect(x, sums);
    }
    // Whether `x` holds on a thread of the block.
    OTKERN_DEVICE bool any(bool x) const {
        const float in_warp = warp_max(x ? 1.f : 0.f);
        sync();
        if (lane == 0) warp_notes[warp] = in_warp;
        sync();
        double found = 0;
        for (int k = 0; k < warps; ++k) found = maximum(warp_notes[k], found);
        sync();
        return found > 0;
    }
    template <class T>
    OTKERN_DEVICE T sum(T x) {
        T one[1] = {x};
        reduce(one, 1);
        return one[0];
    }
    template <class T>
    OTKERN_DEVICE T max(T x) {
        T one[1] = {x};
        reduce(one, 0);
        return one[0];
    }

  private:
    template <class T>
    OTKERN_DEVICE T *notes_of(int block) const {
        return reinterpret_cast<T *>(block_notes + (turn * kMostCluster + block) * kMostNotes);
    }

    int turn = 0;
    double *warp_notes, *block_notes;  // of T, which is no wider
};

}  // namespace cuda
}  // namespace otkern
