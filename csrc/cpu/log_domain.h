// Iterations in the log domain, see sinkhorn.h: slower, and good for every range of costs.
#pragma once

#include "sinkhorn.h"

namespace otkern {
namespace OTKERN_LEVEL {

// The new f of rows [begin, end), whose cost starts at `c`. Exponents are formed after the peak is subtracted in units
// of the cost, so that a small reg does not amplify the rounding of the exponent.
template <class T>
void Sinkhorn<T>::log_rows(const T *c, int64_t begin, int64_t end, bool compare, BlockNotes<T> &note) {
    constexpr int width = Simd<T>::width;
    const Vec<T> none = splat(-infinity<T>());
    for (int64_t i = begin; i < end; ++i) {
        const T *row = c + (i - begin) * item.cols;
        Vec<T> peaks = none, sums{};
        for (int64_t j = 0; j < item.cols; j += width)
            peaks = vmax<T>(select<T>(load(b + j) > 0, load(G + j), none) - load(row + j), peaks);
        const T peak = horizontal_max<T>(peaks);
        const bool dead = peak == -infinity<T>();
        dead_a[i] = dead ? T(1) : T(0);
        if (dead) {
            new_f[i] = side_a.of_dead(splat(offset_a[i]))[0];
            continue;
        }
        for (int64_t j = 0; j < item.cols; j += width) {
            const Vec<T> weight = load(b + j);
            const Vec<T> x = select<T>(weight > 0, load(G + j), none) - load(row + j);
            sums += weight * vexp<T>((x - peak) * inverse_eps);
        }
        const T soft_min = -(peak + eps * log_of(maximum(horizontal_sum<T>(sums), tiny<T>()))) - lam;
        const Vec<T> offset = splat(offset_a[i]);
        new_f[i] = relaxed ? side_a.potential(splat(soft_min), offset)[0] : soft_min;
        if (compare && a[i] > 0) {
            const Vec<T> ratio = vexp<T>(splat((F[i] - soft_min) * inverse_eps));
            note.error += a[i] * side_a.gap(ratio, splat(F[i]), offset)[0];
            note.excess += a[i] * (ratio[0] - 1);
        }
    }
}

// Rows [begin, end) join the running peaks and sums of the columns, with potentials new_f.
template <class T>
void Sinkhorn<T>::log_columns(const T *c, int64_t begin, int64_t end, T *peaks, T *sums) {
    constexpr int width = Simd<T>::width;
    const Vec<T> none = splat(-infinity<T>());
    for (int64_t j = 0; j < item.cols; j += width) {
        const Vec<T> before = load(peaks + j);
        Vec<T> peak = before;
        for (int64_t i = begin; i < end; ++i)
            if (a[i] > 0) peak = vmax<T>(new_f[i] - load(c + (i - begin) * item.cols + j), peak);
        const Vec<T> origin = select<T>(peak > none, peak, Vec<T>{});  // no -inf - -inf below
        Vec<T> sum = load(sums + j) * vexp<T>((before - origin) * inverse_eps);
        for (int64_t i = begin; i < end; ++i)
            if (a[i] > 0)
                sum += a[i] * vexp<T>(((new_f[i] - load(c + (i - begin) * item.cols + j)) - origin) * inverse_eps);
        store(peaks + j, peak);
        store(sums + j, sum);
    }
}

// The column half.
template <class T>
void Sinkhorn<T>::log_column_step() {
    constexpr int width = Simd<T>::width;
    const Vec<T> none = splat(-infinity<T>());
    int64_t begin, end;
    own_columns(begin, end);
    for (int64_t j = begin; j < end; j += width) {
        Vec<T> peak = none, sum{};
        for (int64_t k = 0; k < blocks; ++k) peak = vmax<T>(load(partial_peaks + k * item.cols + j), peak);
        const Bits<T> alive = peak > none;
        const Vec<T> origin = select<T>(alive, peak, Vec<T>{});
        for (int64_t k = 0; k < blocks; ++k)
            sum += load(partial_sums + k * item.cols + j) *
                   vexp<T>((load(partial_peaks + k * item.cols + j) - origin) * inverse_eps);
        sum = vmax<T>(sum, splat(tiny<T>()));
        const Vec<T> soft_min = -(origin + eps * vlog<T>(sum)) - lam;
        const Vec<T> potential = relaxed ? side_b.potential(soft_min, load(offset_b + j)) : soft_min;
        store(G + j, select<T>(alive, potential, side_b.of_dead(load(offset_b + j))));
        store(dead_b + j, select<T>(alive, Vec<T>{}, splat(T(1))));
        if (!partial) continue;
        const Vec<T> x = (potential - soft_min) * inverse_eps;
        store(log_ratio + j, select<T>(alive, log_ratio_of(x, potential < load(offset_b + j)), none));
    }
    own_rows(begin, end);
    for (int64_t i = begin; i < end; ++i) F[i] = new_f[i];
    team.barrier();
    if (!partial) return;
    const MassStep step = mass_step();
    lam += eps * step.change;
    column_gap = step.gap;
    nothing_moves = step.stranded;
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
