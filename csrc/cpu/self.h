// Iterations of a cloud with itself: one potential h for both sides, averaged updates, equation (27),
//
//   h <- (h + k s[h]) / 2, and in the kernel domain, h = H + eps log v and u as the row sums ask:  v <- sqrt(v u)
//
// One pass over the rows is a whole iteration, whose error falls by a factor of at least 2 where exp(-C / eps) is
// positive definite. Its row sums are the marginals at the potential before, and serve as the test for stopping.
#pragma once

#include "sinkhorn.h"

namespace otkern {
namespace OTKERN_LEVEL {

// By the whole team: the entries on and right of the diagonal, block by block, and then their mirror images. Blocks to
// and fro over the team: rows get shorter downwards.
template <class T>
void Sinkhorn<T>::self_cost() {
    constexpr int64_t unit = Simd<T>::width < kGroup ? kGroup : Simd<T>::width;
    for (int64_t turn = 0; turn * team.size < blocks; ++turn) {
        const int64_t k = turn * team.size + (turn % 2 ? team.size - 1 - team.rank : team.rank);
        const int64_t begin = k * block, end = minimum(begin + block, item.n);
        if (begin < end) cost_rows(item, clouds, begin, end, cost + begin * item.cols, begin / unit * unit);
    }
    team.barrier();
    int64_t begin, end;
    own_rows(begin, end);
    for (int64_t i = begin; i < minimum(end, item.n); ++i)
        for (int64_t j = 0; j < i / block * block; ++j) cost[i * item.cols + j] = cost[j * item.cols + i];
    for (int64_t i = maximum(begin, item.n); i < end; ++i)
        for (int64_t j = 0; j < item.cols; ++j) cost[i * item.cols + j] = infinity<T>();
}

// The update after a pass, each thread its own points. False, on every thread alike, when the pass does not count.
template <class T>
bool Sinkhorn<T>::self_step(bool in_kernel) {
    if (in_kernel && !row_sums_count()) return false;
    int64_t begin, end;
    own_columns(begin, end);
    end = minimum(end, item.n);
    // What the others read in row_sums_count and combined_error is left alone until all of them have.
    team.barrier();
    for (int64_t i = begin; i < end; ++i) {
        if (!in_kernel) {
            G[i] = (G[i] + new_f[i]) / 2;
            continue;
        }
        v[i] = square_root(v[i] / row_sums[i]);
        bv[i] = b[i] * v[i];
        counted_sums[i] = 1 / v[i];
    }
    team.barrier();
    return true;
}

// h from its scaling.
template <class T>
void Sinkhorn<T>::leave_self_kernel() {
    int64_t begin, end;
    own_columns(begin, end);
    team.barrier();
    for (int64_t i = begin; i < minimum(end, item.n); ++i) {
        G[i] += eps * log_of(v[i]);
        v[i] = counted_sums[i] = 1;
        bv[i] = b[i];
    }
    team.barrier();
}

// After the last pass: points without weight follow h.
template <class T>
void Sinkhorn<T>::finish_self(bool in_kernel) {
    for (int64_t k = 0; k < blocks; ++k) excess += notes[k].excess;
    int64_t begin, end;
    own_columns(begin, end);
    team.barrier();
    for (int64_t i = begin; i < minimum(end, item.n); ++i) {
        if (b[i] != 0) continue;
        if (in_kernel)
            v[i] = 1 / row_sums[i];
        else
            G[i] = new_f[i];
    }
    if (in_kernel) leave_self_kernel();
    team.barrier();
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
