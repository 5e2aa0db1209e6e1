// Row panels of the transport plan from the potentials; the plan is never held as a whole.
#pragma once

#include "item.h"

namespace otkern {
namespace OTKERN_LEVEL {

// What the backward and the products with the plan need to know of an item.
template <class T>
struct PlanInputs {
    Clouds<T> clouds;
    T *a, *b, *f, *g;

    void carve(Carver &carver, const Item<T> &item) {
        clouds.carve(carver, item);
        carver.take(a, item.rows);
        carver.take(f, item.rows);
        carver.take(b, item.cols);
        carver.take(g, item.cols);
    }

    void read(const Item<T> &item, const Team &team, const void *f_in, const void *g_in) {
        clouds.read(item, team, false);
        if (team.rank != 0) return;
        item.read_a(a);
        item.read_b(b);
        item.read_vector(f_in, item.first_a, item.n, item.rows, f);
        item.read_vector(g_in, item.first_b, item.m, item.cols, g);
    }
};

// Rows of a panel: 256 KB for one thread, and enough for every thread of a team. The sums over a panel continue those
// of the panel before, number by number, so that its size does not show in the bits.
template <class T>
inline int64_t panel_size(const Item<T> &item, const Team &team) {
    const int64_t entries = int64_t(256 * 1024 / sizeof(T)) * (team.size > 1 ? 2 * team.size : 1);
    return minimum(round_up(item.n, kGroup), maximum<int64_t>(8, entries / item.cols / 8 * 8));
}

// h(x) = 1 - exp(x) + x exp(x), the entropy of one entry; `e` is exp(x). Near 0, where a large reg leads, it is
// x^2 / 2 and the terms cancel: there the series sum_k x^k (k - 1) / k!.
template <class T>
OTKERN_INLINE Vec<T> entropy_of(Vec<T> x, Vec<T> e) {
    constexpr int terms = sizeof(T) == 4 ? 10 : 18;
    double factorial = 1;
    T coefficients[terms + 1] = {};
    for (int k = 2; k <= terms; ++k) {
        factorial *= k;
        coefficients[k] = T((k - 1) / factorial);
    }
    Vec<T> series = splat(coefficients[terms]);
    for (int k = terms - 1; k >= 2; --k) series = series * x + coefficients[k];
    const Vec<T> direct = 1 + e * (vmax<T>(x, splat(T(-1e4))) - 1);  // masked entries: 0 * -inf is 0 here
    const T near = T(0.7);
    return select<T>((x > -near) & (x < near), series * x * x, direct);
}

// g + f - c with one rounding: what the two sums lose is collected (Knuth) and added. A small reg multiplies this
// error, and nothing after it can undo that. -inf where `alive` is not set: there the differences may be NaN.
template <class T>
OTKERN_INLINE Vec<T> exponent_of(Vec<T> g, Vec<T> c, T f, Bits<T> alive) {
    const Vec<T> s = g - c, minus_c = s - g;
    const Vec<T> lost = (g - (s - minus_c)) - (c + minus_c);
    const Vec<T> t = s + f, just_f = t - s;
    return select<T>(alive, t + (lost + ((s - (t - just_f)) + (f - just_f))), splat(-infinity<T>()));
}

struct RowSums {
    double ratio;    // sum_j b_j E_ij = r_i
    double entropy;  // sum_j b_j h(log E_ij), when asked for
};

// P_ij = a_i b_j E_ij with E_ij = exp((f_i + g_j - C_ij) / reg), from the cost row `c` to `plan` (may be the same).
// A column or a row without weight is 0 whatever its potential, and has r_i = 1 here.
template <class T>
inline RowSums plan_row(const Item<T> &item, const PlanInputs<T> &in, int64_t i, bool with_entropy, const T *c,
                        T *plan) {
    constexpr int width = Simd<T>::width;
    const T weight = in.a[i], potential = in.f[i];
    if (weight == 0) {
        for (int64_t j = 0; j < item.cols; ++j) plan[j] = 0;
        return {1, 0};
    }
    // A point of nearly no weight may have entries E that are too large for a number, and P is one: their logarithms
    // join. 0 for all others, whose bits it does not touch.
    const T least = sizeof(T) == 4 ? T(1e-20) : T(1e-150);
    const T joined = weight < least ? -log_of(weight) : T(0), factor = weight < least ? T(1) : weight;
    Vec<T> ratio{}, entropy{};
    for (int64_t j = 0; j < item.cols; j += width) {
        const Vec<T> b = load(in.b + j);
        const Vec<T> entry = load(c + j);
        const Vec<T> x =
            exponent_of<T>(load(in.g + j), entry, potential, (b > 0) & (entry < infinity<T>())) * item.inverse_reg;
        const Vec<T> e = vexp<T>(x - joined);
        ratio += b * e;
        if (with_entropy) entropy += b * entropy_of<T>(x, joined > 0 ? vexp<T>(x) : e);
        store(plan + j, factor * (b * e));
    }
    const double scale = joined > 0 ? 1 / double(weight) : 1;
    return {scale * horizontal_sum<T>(ratio), horizontal_sum<T>(entropy)};
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
