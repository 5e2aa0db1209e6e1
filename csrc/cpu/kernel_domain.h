// Iterations on the absorbed kernel K_ij = exp((F_i + G_j + lam - C_ij) / eps), see sinkhorn.h.
//
// They agree with the log domain to rounding as long as no entry of K that matters has left the range of the number
// format. K is cut to zero below `least`; a row loses at most cols * least * max(b v), so a pass counts only if every
// sum is at least `share` times the largest weight it could have lost, and none is near overflow. A pass that fails
// this test is thrown away and its iteration done in the log domain, after which the potentials are absorbed anew.
// Where a potential is at its cap, the sum has no say in it, and 1 / u is what has to stay in range.
#pragma once

#include "sinkhorn.h"

namespace otkern {
namespace OTKERN_LEVEL {

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

// F_i = min_j (C_ij - G_j) - lam over columns with weight: the largest entry of each row of K is then 1. No more than o
// where that is a cap.
template <class T>
void Sinkhorn<T>::start_rows() {
    int64_t begin, end;
    own_rows(begin, end);
    const Vec<T> none = splat(-infinity<T>());
    for (int64_t i = begin; i < end; ++i) {
        Vec<T> peak = none;
        for (int64_t j = 0; j < item.cols; j += Simd<T>::width)
            peak = vmax<T>(select<T>(load(b + j) > 0, load(G + j), none) - load(cost + i * item.cols + j), peak);
        const T largest = horizontal_max<T>(peak);
        const bool dead = largest == -infinity<T>();
        F[i] = partial ? minimum(-largest - lam, offset_a[i]) : dead ? T(0) : -largest;
        dead_a[i] = dead ? T(1) : T(0);
    }
}

// K from the absorbed potentials. Returns false, on every thread alike, when an entry would come near overflow.
template <class T>
bool Sinkhorn<T>::build_kernel() {
    int64_t first, last;
    team.split(blocks, first, last);
    for (int64_t k = first; k < last; ++k) {
        Vec<T> peak = splat(-infinity<T>());
        for (int64_t i = k * block; i < minimum((k + 1) * block, item.rows); ++i)
            for (int64_t j = 0; j < item.cols; j += Simd<T>::width) {
                const Vec<T> exponent = ((load(G + j) - load(cost + i * item.cols + j)) + (F[i] + lam)) * inverse_eps;
                peak = vmax<T>(exponent, peak);
                store(kernel + i * item.cols + j, vexp<T>(exponent));
            }
        notes[k].exponent = horizontal_max<T>(peak);
    }
    team.barrier();
    bool safe = true;
    for (int64_t k = 0; k < blocks; ++k) safe = safe && notes[k].exponent < Range<T>::exponent;
    return safe;
}

// Rows [begin, end) of one pass: row sums s_i = sum_j K_ij b_j v_j, and with u_i = 1 / s_i the partial column sums
// sum_i a_i u_i K_ij. Dead rows have s_i = 1. `compare`: r_i = u_i(before) s_i is the row marginal ratio at the
// potentials of the iteration before. Done in strips of rows that stay in L1 between the two halves.
template <class T>
void Sinkhorn<T>::kernel_rows(int64_t begin, int64_t end, bool columns_too, bool compare, T *sums,
                              BlockNotes<T> &note) {
    typedef typename Simd<T>::Four Four;
    Four smallest = infinity<T>() - Four{}, largest{}, heaviest{}, gap{}, excess{};
    const int64_t strip = strip_rows();
    for (int64_t first = begin; first < end; first += strip) {
        const int64_t last = minimum(first + strip, end);
        kernel_dots(first, last);
        for (int64_t i = first; i < last; i += kGroup) {
            const Four s = load_four(row_sums + i), weights = load_four(a + i), au = weights / s;
            store_four(row_scale + i, au);
            smallest = s < smallest ? s : smallest;
            largest = s > largest ? s : largest;
            heaviest = au > heaviest ? au : heaviest;
            if (compare) {
                // Without weight a ratio may be infinite, and 0 * inf must not enter.
                const Four ratio = weights > 0 ? s / load_four(counted_sums + i) - 1 : Four{};
                gap += weights * (ratio < 0 ? -ratio : ratio);
                excess += weights * ratio;
            }
        }
        if (columns_too) kernel_columns(first, last, first > begin, sums);
    }
    note.smallest = minimum(minimum(smallest[0], smallest[1]), minimum(smallest[2], smallest[3]));
    note.largest = maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3]));
    note.heaviest = maximum(maximum(heaviest[0], heaviest[1]), maximum(heaviest[2], heaviest[3]));
    note.error = (gap[0] + gap[1]) + (gap[2] + gap[3]);
    note.excess = (excess[0] + excess[1]) + (excess[2] + excess[3]);
}

// The same with a relaxation. Between the halves every row sum becomes 1 / u_i by `Side::reciprocal`.
template <class T>
void Sinkhorn<T>::relaxed_kernel_rows(int64_t begin, int64_t end, bool columns_too, bool compare, T *sums,
                                      BlockNotes<T> &note) {
    constexpr int width = Simd<T>::width;
    Vec<T> smallest = splat(infinity<T>()), largest{}, heaviest{}, gap{}, excess{};
    const int64_t strip = strip_rows();
    for (int64_t first = begin; first < end; first += strip) {
        const int64_t last = minimum(first + strip, end);
        kernel_dots(first, last);
        for (int64_t i = first; i < last; i += width) {
            const int64_t count = last - i;
            const Vec<T> weights = load_some(a + i, count, T(0)), absorbed = load_some(F + i, count, T(0));
            const Vec<T> offset = load_some(offset_a + i, count, T(0));
            const Bits<T> alive = load_some(dead_a + i, count, T(1)) == 0;
            const Vec<T> s = load_some(row_sums + i, count, T(1)) * level;
            const Vec<T> r = select<T>(alive, side_a.reciprocal(s, absorbed, offset), splat(T(1)));
            const Vec<T> ranged = side_a.capped ? r : select<T>(alive, s, r), au = weights / r;
            smallest = vmin<T>(vmin<T>(r, ranged), smallest);
            largest = vmax<T>(vmax<T>(r, ranged), largest);
            heaviest = vmax<T>(au, heaviest);
            if (compare) {
                const Vec<T> before = load_some(counted_sums + i, count, T(1));
                const Vec<T> of_row = side_a.gap(s / before, side_a.scaled(before, absorbed, offset), offset);
                gap += select<T>(alive & (weights > 0), weights * of_row, Vec<T>{});
                excess += select<T>(alive & (weights > 0), weights * (s / before - 1), Vec<T>{});
            }
            store_some(row_sums + i, count, r);
            store_some(row_scale + i, count, au);
        }
        if (columns_too) kernel_columns(first, last, first > begin, sums);
    }
    note.smallest = -horizontal_max<T>(-smallest);
    note.largest = horizontal_max<T>(largest);
    note.heaviest = horizontal_max<T>(heaviest);
    note.error = horizontal_sum<T>(gap);
    note.excess = horizontal_sum<T>(excess);
}

template <class T>
void Sinkhorn<T>::kernel_dots(int64_t begin, int64_t end) {
    constexpr int width = Simd<T>::width, together = width < kGroup ? width : kGroup;
    for (int64_t i = begin; i < end; i += kGroup) {
        const T *row = kernel + i * item.cols;
        Vec<T> acc[kGroup] = {};
        for (int64_t j = 0; j < item.cols; j += width) {
            const Vec<T> weight = load(bv + j);
            for (int r = 0; r < kGroup; ++r) acc[r] += load(row + r * item.cols + j) * weight;
        }
        alignas(64) T four[kGroup < width ? width : kGroup];
        for (int r = 0; r < kGroup; r += together) store(four + r, sum_lanes<T, together>(acc + r));
        store_four(row_sums + i, load_four(four) + load_four(dead_a + i));
    }
}

// Two sets of accumulators, for even and odd rows, so that one column of four vectors hides the latency.
template <class T>
void Sinkhorn<T>::kernel_columns(int64_t begin, int64_t end, bool add, T *sums) {
    constexpr int width = Simd<T>::width, vectors = 4;
    int64_t j = 0;
    for (; j + vectors * width <= item.cols; j += vectors * width) {
        Vec<T> even[vectors], odd[vectors] = {};
        for (int c = 0; c < vectors; ++c) even[c] = add ? load(sums + j + c * width) : Vec<T>{};
        for (int64_t i = begin; i < end; i += 2) {
            const T *row = kernel + i * item.cols + j;
            const Vec<T> scale = splat(row_scale[i]), next_scale = splat(row_scale[i + 1]);
            for (int c = 0; c < vectors; ++c) {
                even[c] += load(row + c * width) * scale;
                odd[c] += load(row + item.cols + c * width) * next_scale;
            }
        }
        for (int c = 0; c < vectors; ++c) store(sums + j + c * width, even[c] + odd[c]);
    }
    for (; j < item.cols; j += width) {
        Vec<T> even = add ? load(sums + j) : Vec<T>{}, odd{};
        for (int64_t i = begin; i < end; i += 2) {
            even += load(kernel + i * item.cols + j) * row_scale[i];
            odd += load(kernel + (i + 1) * item.cols + j) * row_scale[i + 1];
        }
        store(sums + j, even + odd);
    }
}

// The column half. False, on every thread alike, when the pass does not count.
template <class T>
bool Sinkhorn<T>::kernel_column_step() {
    typedef Range<T> R;
    constexpr int width = Simd<T>::width;
    int64_t begin, end;
    own_columns(begin, end);
    // Read before the barrier: afterwards a faster thread may already write its notes of the next pass.
    T least_row = infinity<T>(), most_row = 0, heaviest_row = 0;
    for (int64_t k = 0; k < blocks; ++k) {
        least_row = minimum(notes[k].smallest, least_row);
        most_row = maximum(notes[k].largest, most_row);
        heaviest_row = maximum(notes[k].heaviest, heaviest_row);
    }
    Vec<T> smallest = splat(infinity<T>()), largest{}, heaviest{};
    for (int64_t j = begin; j < end; j += width) {
        Vec<T> sum = load(partial_sums + j);
        for (int64_t k = 1; k < blocks; ++k) sum += load(partial_sums + k * item.cols + j);
        sum += load(dead_b + j);
        if (relaxed) sum = relaxed_column(j, sum, smallest, largest);
        smallest = vmin<T>(sum, smallest);
        largest = vmax<T>(sum, largest);
        const Vec<T> inverse = 1 / sum;
        heaviest = vmax<T>(load(b + j) * load(v + j), heaviest);
        store(new_v + j, inverse);
        store(new_bv + j, load(b + j) * inverse);
    }
    column_notes[team.rank * 3] = -horizontal_max<T>(-smallest);
    column_notes[team.rank * 3 + 1] = horizontal_max<T>(largest);
    column_notes[team.rank * 3 + 2] = horizontal_max<T>(heaviest);
    team.barrier();
    T least_col = infinity<T>(), most_col = 0, heaviest_col = 0;
    for (int k = 0; k < team.size; ++k) {
        least_col = minimum(column_notes[k * 3], least_col);
        most_col = maximum(column_notes[k * 3 + 1], most_col);
        heaviest_col = maximum(column_notes[k * 3 + 2], heaviest_col);
    }
    const bool counts = least_row >= maximum(R::least, R::share * (heaviest_col * level)) && most_row <= R::most &&
                        least_col >= maximum(R::least, R::share * (heaviest_row * level)) && most_col <= R::most;
    return counts && (!partial || kernel_mass_step(heaviest_row / least_col));
}

// 1 / v_j from the sums of the columns at j, which join the range that the pass has to stay in.
template <class T>
OTKERN_INLINE Vec<T> Sinkhorn<T>::relaxed_column(int64_t j, Vec<T> sum, Vec<T> &smallest, Vec<T> &largest) {
    const Bits<T> alive = load(dead_b + j) == 0;
    const Vec<T> s = sum * level;
    const Vec<T> r = select<T>(alive, side_b.reciprocal(s, load(G + j), load(offset_b + j)), splat(T(1)));
    if (!side_b.capped) {
        smallest = vmin<T>(select<T>(alive, s, r), smallest);
        largest = vmax<T>(select<T>(alive, s, r), largest);
    }
    if (partial) {
        const Vec<T> x = vlog<T>(vmax<T>(s / r, splat(tiny<T>())));
        const Bits<T> below = ~side_b.at_cap(s, load(G + j), load(offset_b + j));
        store(log_ratio + j, select<T>(alive, log_ratio_of(x, below), splat(-infinity<T>())));
    }
    return r;
}

// The multiplier of the mass after the columns. False when entries that K has cut may matter to the sum, a part of at
// most `loss` times what a number can hold, or when lam has moved too far from the one in K.
template <class T>
bool Sinkhorn<T>::kernel_mass_step(T loss) {
    typedef Range<T> R;
    const MassStep step = mass_step();
    const T next = push + step.change;
    T total = 0;
    for (int64_t j = 0; j < item.cols; ++j) total += b[j];
    if (!(step.moved >= R::share * (loss * level) * total) || !(next < R::exponent / 2 && next > -R::exponent / 2))
        return false;
    push = next;
    level = vexp<T>(splat(push))[0];
    column_gap = step.gap;
    return true;
}

// Whether the row sums of a pass that no column half follows lost nothing that matters; the same on every thread.
template <class T>
bool Sinkhorn<T>::row_sums_count() const {
    T least_row = infinity<T>(), most_row = 0, heaviest_col = 0;
    for (int64_t k = 0; k < blocks; ++k) {
        least_row = minimum(notes[k].smallest, least_row);
        most_row = maximum(notes[k].largest, most_row);
    }
    for (int64_t j = 0; j < item.cols; ++j) heaviest_col = maximum(bv[j], heaviest_col);
    return least_row >= maximum(Range<T>::least, Range<T>::share * (heaviest_col * level)) &&
           most_row <= Range<T>::most;
}

// f, g, lam from the scalings, each thread its own part.
template <class T>
void Sinkhorn<T>::leave_kernel() {
    constexpr int width = Simd<T>::width;
    int64_t begin, end;
    own_rows(begin, end);
    for (int64_t i = begin; i < end; i += width) {
        const int64_t count = end - i;
        const Vec<T> sums = load_some(counted_sums + i, count, T(1)), absorbed = load_some(F + i, count, T(0));
        store_some(F + i, count, side_a.scaled(sums, absorbed, load_some(offset_a + i, count, T(0))));
        store_some(counted_sums + i, count, splat(T(1)));
    }
    own_columns(begin, end);
    for (int64_t j = begin; j < end; j += width) {
        const Vec<T> absorbed = load(G + j), scale = load(v + j);
        store(G + j, side_b.rescaled(scale, absorbed, load(offset_b + j)));
        store(v + j, splat(T(1)));
        store(bv + j, load(b + j));
    }
    lam += eps * push;
    push = 0;
    level = 1;
    team.barrier();
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
