// Iterations of a cloud with itself: one potential h for both sides, averaged updates, equation (27); see cpu/self.h.
//
// A block owns the same points as rows and as columns. F holds h of its rows and G that of all; in the kernel domain
// h = H + eps log v, and u as the row sums ask. One pass over the rows is a whole iteration.
#pragma once

#include "kernel_domain.h"
#include "log_domain.h"

namespace otkern {
namespace cuda {

// The update after a pass: h <- (h + k s[h]) / 2, or v <- sqrt(v u). False, on every thread alike, when the pass does
// not count.
template <class T>
OTKERN_DEVICE bool Sinkhorn<T>::self_step(bool in_kernel) {
    if (in_kernel && !row_sums_count()) return false;
    for_columns([&](int i, int j) {
        if (in_kernel) {
            at.v[i] = root_of(at.v[i] / at.row_sums[i]);
            at.counted_sums[i] = 1 / at.v[i];
            team.push(at.bv + j, at.b[j] * at.v[i]);
        } else {
            at.F[i] = (at.F[i] + at.new_f[i]) / 2;
            team.push(at.G + j, at.F[i]);
        }
    });
    team.sync_all();
    return true;
}

// h from its scaling.
template <class T>
OTKERN_DEVICE void Sinkhorn<T>::leave_self_kernel() {
    for_columns([&](int i, int j) {
        at.F[i] += eps * log_of(at.v[i]);
        at.v[i] = at.counted_sums[i] = 1;
        team.push(at.G + j, at.F[i]);
        team.push(at.bv + j, at.b[j]);
    });
    team.sync_all();
}

// After the last pass: points without weight follow h.
template <class T>
OTKERN_DEVICE void Sinkhorn<T>::finish_self(bool in_kernel) {
    for_columns([&](int i, int j) {
        at.dead_b[i] = at.dead_a[i];
        if (at.b[j] != 0) return;
        if (in_kernel)
            at.v[i] = 1 / at.row_sums[i];
        else
            at.F[i] = at.new_f[i];
        team.push(at.G + j, at.F[i]);
    });
    if (in_kernel) leave_self_kernel();
    team.sync_all();
}

}  // namespace cuda
}  // namespace otkern
