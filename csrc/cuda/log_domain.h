// Iterations in the log domain, see sinkhorn.h: slower, and good for every range of costs.
#pragma once

#include "sinkhorn.h"

namespace otkern {
namespace cuda {

// The new f of the block's rows, and with `columns_too` their part in the columns. Exponents are formed after the peak
// is subtracted in units of the cost, so that a small reg does not amplify the rounding of the exponent.
template <class T>
OTKERN_DEVICE void Sinkhorn<T>::log_row_step(bool columns_too, bool compare) {
    T *const soft_min = at.row_scale;  // a scaling has no meaning here
    for (int i = team.warp; i < rows; i += team.warps) {
        const T *row = at.cost + i * item.m;
        T peak = -infinity<T>();
        for (int j = team.lane; j < item.m; j += kWarp)
            if (at.b[j] > 0) peak = maximum(at.G[j] - row[j], peak);
        peak = warp_max(peak);
        const bool dead = peak == -infinity<T>();
        const T origin = dead ? T(0) : peak;
        T sum = 0;
        for (int j = team.lane; j < item.m; j += kWarp)
            if (at.b[j] > 0) sum += at.b[j] * exp_of(((at.G[j] - row[j]) - origin) * inverse_eps);
        sum = warp_sum(sum);
        if (team.lane != 0) continue;
        at.dead_a[i] = dead ? T(1) : T(0);
        soft_min[i] = -(origin + eps * log_of(maximum(sum, tiny<T>()))) - lam;
    }
    team.sync();
    T notes[2] = {0, 0};
    for_rows([&](int i) {
        const T weight = at.a[i], offset = at.offset_a[i], s = soft_min[i];
        const bool dead = at.dead_a[i] != 0;
        at.new_f[i] = dead ? side_a.of_dead(offset) : relaxed ? side_a.potential(s, offset) : s;
        if (!compare || !(weight > 0)) return;
        const T ratio = dead ? T(1) : exp_of((at.F[i] - s) * inverse_eps);
        notes[1] += weight * (ratio - 1);
        if (dead)
            notes[0] += side_a.is_constraint() ? weight : T(0);
        else
            notes[0] += weight * side_a.gap(ratio, at.F[i], offset);
    });
    team.note(notes, 3);
    team.sync();
    team.send(notes, 3);
    if (columns_too) log_columns();
    team.sync_all();
    team.collect(notes, 3);
    if (compare) note_error(notes[0], notes[1]);
}

// Peaks and sums of the columns over the block's rows, with potentials new_f.
template <class T>
OTKERN_DEVICE void Sinkhorn<T>::log_columns() {
    for (int j = team.thread; j < item.m; j += team.threads) {
        T peak = -infinity<T>();
        for (int i = 0; i < rows; ++i)
            if (at.a[i] > 0) peak = maximum(at.new_f[i] - at.cost[i * item.m + j], peak);
        const T origin = peak > -infinity<T>() ? peak : T(0);  // no -inf - -inf below
        T sum = 0;
        for (int i = 0; i < rows; ++i)
            if (at.a[i] > 0) sum += at.a[i] * exp_of(((at.new_f[i] - at.cost[i * item.m + j]) - origin) * inverse_eps);
        at.partial_peaks[j] = peak;
        at.partial_sums[j] = sum;
    }
}

// The column half.
template <class T>
OTKERN_DEVICE void Sinkhorn<T>::log_column_step() {
    T notes[1] = {0};
    for_columns([&](int c, int j) {
        T peak = -infinity<T>(), sum = 0;
        for (int block = 0; block < team.size; ++block)
            peak = maximum(map_shared(at.partial_peaks + j, block)[0], peak);
        const bool alive = peak > -infinity<T>();
        const T origin = alive ? peak : T(0), offset = at.offset_b[c];
        for (int block = 0; block < team.size; ++block)
            sum += map_shared(at.partial_sums + j, block)[0] *
                   exp_of((map_shared(at.partial_peaks + j, block)[0] - origin) * inverse_eps);
        const T soft_min = -(origin + eps * log_of(maximum(sum, tiny<T>()))) - lam;
        const T potential = relaxed ? side_b.potential(soft_min, offset) : soft_min;
        team.push(at.G + j, alive ? potential : side_b.of_dead(offset));
        at.dead_b[c] = alive ? T(0) : T(1);
        notes[0] += !alive && side_b.is_constraint() ? at.b[j] : T(0);
        if (!partial) return;
        const T x = (potential - soft_min) * inverse_eps;
        at.log_ratio[c] = alive ? log_ratio_of(x, potential < offset) : -infinity<T>();
    });
    for_rows([&](int i) { at.F[i] = at.new_f[i]; });
    team.reduce(notes, 1);
    dead_columns = double(notes[0]);
    if (!partial) return;
    const MassStep step = mass_step();
    lam += eps * step.change;
    column_gap = double(step.gap);
    nothing_moves = step.stranded;
}

}  // namespace cuda
}  // namespace otkern
