// Iterations on the absorbed kernel K_ij = exp((F_i + G_j + lam - C_ij) / eps), see sinkhorn.h. When a pass counts is
// explained in cpu/kernel_domain.h: K is cut to zero below `least`, and every sum has to be far above what a row or a
// column can have lost by it.
#pragma once

#include "sinkhorn.h"

namespace otkern {
namespace cuda {

template <class T>
struct Range;
template <>
struct Range<float> {
    static constexpr float share = 1e-26f, least = 1e-30f, most = 1e30f, exponent = 60;
};
template <>
struct Range<double> {
    static constexpr double share = 1e-270, least = 1e-250, most = 1e250, exponent = 460;
};

// Into the kernel domain from g alone. Where a penalty keeps potentials far from their soft minima, f - o would be a
// small difference of large numbers: there an iteration in the log domain comes first.
template <class T>
OTKERN_DEVICE bool Sinkhorn<T>::enter_kernel() {
    if (!absorbs || item.same || eps != item.reg || side_a.is_penalty() || side_b.is_penalty()) return false;
    start_rows();
    return build_kernel();
}

// F_i = min_j (C_ij - G_j) - lam over columns with weight: the largest entry of each row of K is then 1. No more than o
// where that is a cap.
template <class T>
OTKERN_DEVICE void Sinkhorn<T>::start_rows() {
    for (int i = team.warp; i < rows; i += team.warps) {
        T peak = -infinity<T>();
        for (int j = team.lane; j < item.m; j += kWarp)
            if (at.b[j] > 0) peak = maximum(at.G[j] - at.cost[i * item.m + j], peak);
        peak = warp_max(peak);
        if (team.lane != 0) continue;
        const bool dead = peak == -infinity<T>();
        at.F[i] = partial ? minimum(-peak - lam, at.offset_a[i]) : dead ? T(0) : -peak;
        at.dead_a[i] = dead ? T(1) : T(0);
    }
    team.sync();
}

// K from the absorbed potentials. Returns false, on every thread alike, when an entry would come near overflow; the
// cost is then as it was.
template <class T>
OTKERN_DEVICE bool Sinkhorn<T>::build_kernel() {
    const auto exponent = [&](int i, int j) {
        return ((at.G[j] - at.cost[i * item.m + j]) + (at.F[i] + lam)) * inverse_eps;
    };
    T peak = -infinity<T>();
    for (int i = team.warp; i < rows; i += team.warps)
        for (int j = team.lane; j < item.m; j += kWarp) peak = maximum(exponent(i, j), peak);
    if (!(team.max(peak) < Range<T>::exponent)) return false;
    for (int i = team.warp; i < rows; i += team.warps)
        for (int j = team.lane; j < item.m; j += kWarp) at.kernel[i * item.m + j] = exp_of(exponent(i, j));
    has_cost = size.keeps_cost;
    team.sync();
    return true;
}

// One pass over rows: s_i = sum_j K_ij b_j v_j, u_i, and with `columns_too` the block's part of sum_i a_i u_i K_ij.
// `compare`: r_i = u_i(before) s_i is the row marginal ratio at the potentials of the iteration before.
template <class T>
OTKERN_DEVICE void Sinkhorn<T>::kernel_row_step(bool columns_too, bool compare) {
    sum_rows(team, at.kernel, rows, item.m, at.bv, [&](int i, T sum) { at.row_sums[i] = sum; });
    team.sync();
    T notes[5] = {-infinity<T>(), 0, 0, 0, 0};
    for_rows([&](int i) {
        const T weight = at.a[i], F = at.F[i], offset = at.offset_a[i];
        const bool dead = at.dead_a[i] != 0;
        const T s = dead ? T(1) : at.row_sums[i] * level;
        const T r = dead || !relaxed ? s : side_a.reciprocal(s, F, offset), scale = weight / r;
        const T ranged = side_a.capped ? r : s;
        notes[0] = maximum(-minimum(r, ranged), notes[0]);
        notes[1] = maximum(maximum(r, ranged), notes[1]);
        notes[2] = maximum(scale, notes[2]);
        if (compare && weight > 0) {
            const T before = at.counted_sums[i];
            if (!dead) notes[4] += weight * (s / before - 1);
            if (dead)
                notes[3] += side_a.is_constraint() ? weight : T(0);
            else if (relaxed)
                notes[3] += weight * side_a.gap(s / before, side_a.scaled(before, F, offset), offset);
            else
                notes[3] += weight * absolute(s / before - 1);
        }
        at.row_sums[i] = r;
        at.row_scale[i] = scale;
    });
    team.note(notes, 24);
    team.sync();
    team.send(notes, 24);
    if (columns_too) sum_columns(team, at.kernel, rows, item.m, at.row_scale, at.partial_sums);
    team.sync_all();
    team.collect(notes, 24);
    smallest_row = -notes[0];
    largest_row = notes[1];
    heaviest_row = notes[2];
    if (compare) note_error(notes[3], notes[4]);
}

// The column half. False, on every thread alike, when the pass does not count.
template <class T>
OTKERN_DEVICE bool Sinkhorn<T>::kernel_column_step() {
    typedef Range<T> R;
    T notes[4] = {-infinity<T>(), 0, 0, 0};
    for_columns([&](int c, int j) {
        const bool dead = at.dead_b[c] != 0;
        T smallest = infinity<T>(), largest = 0;
        const T sum = kernel_column(c, j, smallest, largest);
        notes[0] = maximum(-smallest, notes[0]);
        notes[1] = maximum(largest, notes[1]);
        notes[2] = maximum(at.b[j] * at.v[c], notes[2]);
        notes[3] += dead && side_b.is_constraint() ? at.b[j] : T(0);
        const T inverse = 1 / sum;
        at.new_v[c] = inverse;
        team.push(at.bv + j, at.b[j] * inverse);
    });
    team.reduce(notes, 8);
    const T smallest = -notes[0], largest = notes[1], heaviest = notes[2];
    dead_columns = double(notes[3]);
    const bool counts = smallest_row >= maximum(T(R::least), R::share * (heaviest * level)) && largest_row <= R::most &&
                        smallest >= maximum(T(R::least), R::share * (heaviest_row * level)) && largest <= R::most;
    return counts && (!partial || kernel_mass_step(heaviest_row / smallest));
}

// 1 / v_j, and what of it the pass has to keep in range.
template <class T>
OTKERN_DEVICE T Sinkhorn<T>::kernel_column(int c, int j, T &smallest, T &largest) {
    const bool dead = at.dead_b[c] != 0;
    const T parts = sum_of_column(team, at.partial_sums, item.m, j), sum = dead ? T(1) + parts : parts;
    T r = sum;
    if (relaxed) {
        const T s = sum * level, G = at.G[j], offset = at.offset_b[c];
        r = dead ? T(1) : side_b.reciprocal(s, G, offset);
        if (!side_b.capped) smallest = largest = dead ? r : s;
        if (partial) {
            const T x = log_of(maximum(s / r, tiny<T>()));
            at.log_ratio[c] = dead ? -infinity<T>() : log_ratio_of(x, !side_b.at_cap(s, G, offset));
        }
    }
    smallest = minimum(r, smallest);
    largest = maximum(r, largest);
    return r;
}

// The multiplier of the mass after the columns. False when entries that K has cut may matter to the sum, a part of at
// most `loss` times what a number can hold, or when lam has moved too far from the one in K.
template <class T>
OTKERN_DEVICE bool Sinkhorn<T>::kernel_mass_step(T loss) {
    typedef Range<T> R;
    const MassStep step = mass_step();
    const T next = push + step.change;
    T total = 0;
    for_columns([&](int, int j) { total += at.b[j]; });
    total = team.sum(total);
    if (!(step.moved >= R::share * (loss * level) * total) || !(next < R::exponent / 2 && next > -R::exponent / 2))
        return false;
    push = next;
    level = exp_of(push);
    column_gap = double(step.gap);
    return true;
}

// Whether the row sums of a pass that no column half follows lost nothing that matters; the same on every thread.
template <class T>
OTKERN_DEVICE bool Sinkhorn<T>::row_sums_count() {
    T heaviest = 0;
    for_columns([&](int, int j) { heaviest = maximum(at.bv[j], heaviest); });
    heaviest = team.max(heaviest);
    return smallest_row >= maximum(T(Range<T>::least), Range<T>::share * (heaviest * level)) &&
           largest_row <= Range<T>::most;
}

// f, g, lam from the scalings.
template <class T>
OTKERN_DEVICE void Sinkhorn<T>::leave_kernel() {
    for_rows([&](int i) {
        at.F[i] = side_a.scaled(at.counted_sums[i], at.F[i], at.offset_a[i]);
        at.counted_sums[i] = 1;
    });
    for_columns([&](int c, int j) {
        team.push(at.G + j, side_b.rescaled(at.v[c], at.G[j], at.offset_b[c]));
        team.push(at.bv + j, at.b[j]);
        at.v[c] = 1;
    });
    lam += eps * push;
    push = 0;
    level = 1;
    team.sync_all();
}

}  // namespace cuda
}  // namespace otkern
