// Sinkhorn iterations of one item, by a team.
//
// Two ways to do one full iteration (f from g for all rows, then g from f for all columns):
//   log domain      f_i = -reg log sum_j b_j exp((g_j - C_ij) / reg), and likewise g. Two exponentials per entry.
//   kernel domain   K_ij = exp((F_i + G_j - C_ij) / reg) with the potentials of some moment absorbed, and scalings
//                   u, v with f = F + reg log u, g = G + reg log v:  u_i = 1 / sum_j K_ij b_j v_j, then
//                   v_j = 1 / sum_i K_ij a_i u_i. One pass over K does both; two multiply-adds per entry.
// They agree to rounding as long as no entry of K that matters has left the range of the number format. K is cut to
// zero below `least`; a row loses at most cols * least * max(b v), so a pass counts only if every sum is at least
// `share` times the largest weight it could have lost, and none is near overflow. A pass that fails this test is
// thrown away and its iteration done in the log domain, after which the potentials are absorbed anew.
//
// Rows are cut into blocks by the item's size alone. A block leaves partial column sums, which are combined in block
// order: the bits are those of any number of threads.
#pragma once

#include "item.h"

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

// What a block of rows leaves for the others to see.
template <class T>
struct BlockNotes {
    T smallest, largest;  // sum_j K_ij b_j v_j over its rows
    T heaviest;           // a_i u_i
    T exponent;           // (F_i + G_j - C_ij) / reg, when K is built
    T error;              // sum_i a_i |r_i - 1| of the iteration before
};

template <class T>
OTKERN_INLINE void exchange(T *&x, T *&y) {
    T *const z = x;
    x = y;
    y = z;
}

template <class T>
class Sinkhorn {
  public:
    Sinkhorn(const Item<T> &item_, Team &team_, int64_t store_bytes) : item(item_), team(team_) {
        block = maximum<int64_t>(32, round_up((item.rows + 63) / 64, kGroup));
        blocks = (item.rows + block - 1) / block;
        stored = item.rows * item.cols * int64_t(sizeof(T)) <= store_bytes;
        panel = stored ? block : minimum(block, maximum<int64_t>(kGroup, (1 << 20) / item.cols / kGroup * kGroup));
    }

    void carve(Carver &carver) {
        clouds.carve(carver, item);
        const int64_t rows = item.rows, cols = item.cols;
        T **const over_rows[] = {&a, &F, &row_sums, &counted_sums, &row_scale, &new_f, &dead_a};
        T **const over_columns[] = {&b, &G, &v, &new_v, &bv, &new_bv, &dead_b};
        for (T **vector : over_rows) carver.take(*vector, rows);
        for (T **vector : over_columns) carver.take(*vector, cols);
        carver.take(partial_sums, blocks * cols);
        carver.take(partial_peaks, blocks * cols);
        carver.take(notes, blocks);
        carver.take(column_notes, team.size * 3);
        carver.take(bad, team.size);
        carver.take(cost, stored ? rows * cols : panel * cols * team.size);
        if (stored) carver.take(kernel, rows * cols);
    }

    // Potentials and marginal error of the last iteration; every thread of the team gets the same answer.
    // Returns nonzero bits 0, 1, 2 where x, y, the cost hold what they must not.
    int run(const void *g_init, int64_t max_iter, double tol, bool check);

    const Item<T> &item;
    Team &team;
    int64_t iterations = 0;
    double error = 0;    // marginal error at the potentials
    T *a, *b, *F, *G;    // after run(): weights and potentials, not yet gauged
    T *dead_a, *dead_b;  // 1 for a row (column) whose entries all vanish, and for padding; else 0

  private:
    void own_rows(int64_t &begin, int64_t &end) const {
        team.split(blocks, begin, end);
        begin *= block;
        end = minimum(end * block, item.rows);
    }
    void own_columns(int64_t &begin, int64_t &end) const {
        team.split(item.cols / Simd<T>::width, begin, end);
        begin *= Simd<T>::width;
        end *= Simd<T>::width;
    }

    int prepare(const void *g_init, bool check);
    const T *panel_rows(int64_t begin, int64_t end);
    void start_rows();
    bool build_kernel();
    void kernel_dots(int64_t begin, int64_t end);
    void kernel_columns(int64_t begin, int64_t end, bool add, T *sums);
    void kernel_rows(int64_t begin, int64_t end, bool columns_too, bool compare, T *sums, BlockNotes<T> &note);
    void log_rows(const T *c, int64_t begin, int64_t end, bool compare, BlockNotes<T> &note);
    void log_columns(const T *c, int64_t begin, int64_t end, T *peaks, T *sums);
    void row_step(bool in_kernel, bool columns_too, bool compare);
    bool column_step(bool in_kernel);
    bool row_sums_count() const;
    void leave_kernel();
    void finish(bool in_kernel);
    double combined_error() const {
        double sum = 0;
        for (int64_t k = 0; k < blocks; ++k) sum += notes[k].error;
        for (int64_t i = 0; i < item.n; ++i) sum += dead_a[i] != 0 ? double(a[i]) : 0;
        for (int64_t j = 0; j < item.m; ++j) sum += dead_b[j] != 0 ? double(b[j]) : 0;
        return sum;
    }

    Clouds<T> clouds;
    int64_t block, blocks, panel;
    bool stored;
    T *row_sums, *counted_sums;  // s_i = 1 / u_i of this pass, and of the last one that counted
    T *row_scale, *new_f, *v, *new_v, *bv, *new_bv;
    T *partial_sums, *partial_peaks, *column_notes, *cost, *kernel = nullptr;
    BlockNotes<T> *notes;
    int *bad;
};

// ---- set-up -------------------------------------------------------------------------------------------------------

template <class T>
int Sinkhorn<T>::prepare(const void *g_init, bool check) {
    bad[team.rank] = clouds.read(item, team, check);
    if (team.rank == 0) {
        item.read_a(a);
        item.read_b(b);
        item.read_vector(g_init, item.first_b, item.m, item.cols, G);
        for (int64_t i = 0; i < item.rows; ++i) dead_a[i] = i < item.n ? 0 : 1, F[i] = 0, counted_sums[i] = 1;
        for (int64_t j = 0; j < item.cols; ++j) dead_b[j] = j < item.m ? 0 : 1, v[j] = 1, bv[j] = b[j];
    }
    team.barrier();
    int64_t begin, end;
    own_rows(begin, end);
    bool good = true;
    if (stored && begin < end)
        good = cost_rows(item, clouds, begin, minimum(end, item.n), cost + begin * item.cols);
    else if (check && !item.has_points())
        for (int64_t i = begin; i < end; i += panel)
            good = cost_rows(item, clouds, i, minimum(minimum(i + panel, end), item.n),
                             cost + team.rank * panel * item.cols) &&
                   good;
    if (check && !item.has_points() && !good) bad[team.rank] |= 4;
    if (!check) return 0;
    team.barrier();
    int all = 0;
    for (int k = 0; k < team.size; ++k) all |= bad[k];
    return all;
}

template <class T>
const T *Sinkhorn<T>::panel_rows(int64_t begin, int64_t end) {
    if (stored) return cost + begin * item.cols;
    T *rows = cost + team.rank * panel * item.cols;
    cost_rows(item, clouds, begin, minimum(end, item.n), rows);
    return rows;
}

// ---- kernel domain --------------------------------------------------------------------------------------------------

// F_i = min_j (C_ij - G_j) over columns with weight: the largest entry of each row of K is then 1.
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
        F[i] = dead ? T(0) : -largest;
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
                const Vec<T> exponent = ((load(G + j) - load(cost + i * item.cols + j)) + F[i]) * item.inverse_reg;
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
    Four smallest = infinity<T>() - Four{}, largest{}, heaviest{}, gap{};
    const int64_t strip = maximum<int64_t>(kGroup, int64_t(32 * 1024 / sizeof(T)) / item.cols / kGroup * kGroup);
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
            }
        }
        if (columns_too) kernel_columns(first, last, first > begin, sums);
    }
    note.smallest = minimum(minimum(smallest[0], smallest[1]), minimum(smallest[2], smallest[3]));
    note.largest = maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3]));
    note.heaviest = maximum(maximum(heaviest[0], heaviest[1]), maximum(heaviest[2], heaviest[3]));
    note.error = (gap[0] + gap[1]) + (gap[2] + gap[3]);
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

// ---- log domain -----------------------------------------------------------------------------------------------------

// new_f for rows [begin, end), whose cost starts at `c`. Exponents are formed after the peak is subtracted in units of
// the cost, so that a small reg does not amplify the rounding of the exponent.
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
            new_f[i] = 0;
            continue;
        }
        for (int64_t j = 0; j < item.cols; j += width) {
            const Vec<T> weight = load(b + j);
            const Vec<T> x = select<T>(weight > 0, load(G + j), none) - load(row + j);
            sums += weight * vexp<T>((x - peak) * item.inverse_reg);
        }
        const T sum = maximum(horizontal_sum<T>(sums), T(sizeof(T) == 4 ? 1.2e-38 : 2.3e-308));
        new_f[i] = -(peak + item.reg * log_of(sum));
        if (compare && a[i] > 0) {
            const T ratio = vexp<T>(splat((F[i] - new_f[i]) * item.inverse_reg))[0] - 1;
            note.error += a[i] * (ratio < 0 ? -ratio : ratio);
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
        Vec<T> sum = load(sums + j) * vexp<T>((before - origin) * item.inverse_reg);
        for (int64_t i = begin; i < end; ++i)
            if (a[i] > 0)
                sum += a[i] * vexp<T>(((new_f[i] - load(c + (i - begin) * item.cols + j)) - origin) * item.inverse_reg);
        store(peaks + j, peak);
        store(sums + j, sum);
    }
}

// ---- one iteration --------------------------------------------------------------------------------------------------

template <class T>
void Sinkhorn<T>::row_step(bool in_kernel, bool columns_too, bool compare) {
    int64_t first, last;
    team.split(blocks, first, last);
    for (int64_t k = first; k < last; ++k) {
        const int64_t begin = k * block, end = minimum(begin + block, item.rows);
        T *sums = partial_sums + k * item.cols, *peaks = partial_peaks + k * item.cols;
        if (in_kernel) {
            kernel_rows(begin, end, columns_too, compare, sums, notes[k]);
            continue;
        }
        notes[k].error = 0;
        for (int64_t j = 0; j < item.cols; ++j) sums[j] = 0, peaks[j] = -infinity<T>();
        for (int64_t i = begin; i < end; i += panel) {
            const int64_t stop = minimum(i + panel, end);
            const T *c = panel_rows(i, stop);
            log_rows(c, i, stop, compare, notes[k]);
            if (columns_too) log_columns(c, i, stop, peaks, sums);
        }
    }
    team.barrier();
}

// The column half. In the kernel domain it returns false, on every thread alike, when the pass does not count.
template <class T>
bool Sinkhorn<T>::column_step(bool in_kernel) {
    typedef Range<T> R;
    constexpr int width = Simd<T>::width;
    int64_t begin, end;
    own_columns(begin, end);
    if (!in_kernel) {
        const Vec<T> none = splat(-infinity<T>());
        for (int64_t j = begin; j < end; j += width) {
            Vec<T> peak = none, sum{};
            for (int64_t k = 0; k < blocks; ++k) peak = vmax<T>(load(partial_peaks + k * item.cols + j), peak);
            const Bits<T> alive = peak > none;
            const Vec<T> origin = select<T>(alive, peak, Vec<T>{});
            for (int64_t k = 0; k < blocks; ++k)
                sum += load(partial_sums + k * item.cols + j) *
                       vexp<T>((load(partial_peaks + k * item.cols + j) - origin) * item.inverse_reg);
            sum = vmax<T>(sum, splat(T(sizeof(T) == 4 ? 1.2e-38 : 2.3e-308)));
            store(G + j, select<T>(alive, -(origin + item.reg * vlog<T>(sum)), Vec<T>{}));
            store(dead_b + j, select<T>(alive, Vec<T>{}, splat(T(1))));
        }
        own_rows(begin, end);
        for (int64_t i = begin; i < end; ++i) F[i] = new_f[i];
        team.barrier();
        return true;
    }
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
    return least_row >= maximum(R::least, R::share * heaviest_col) && most_row <= R::most &&
           least_col >= maximum(R::least, R::share * heaviest_row) && most_col <= R::most;
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
    return least_row >= maximum(Range<T>::least, Range<T>::share * heaviest_col) && most_row <= Range<T>::most;
}

// f, g from the scalings, each thread its own part.
template <class T>
void Sinkhorn<T>::leave_kernel() {
    constexpr int width = Simd<T>::width;
    int64_t begin, end;
    own_rows(begin, end);
    for (int64_t i = begin; i < end; i += kGroup) {
        // Groups of rows are shorter than most vectors.
        alignas(64) T sums[Simd<T>::width > kGroup ? Simd<T>::width : kGroup];
        for (int r = 0; r < int(sizeof(sums) / sizeof(T)); ++r) sums[r] = r < kGroup ? counted_sums[i + r] : T(1);
        for (int r = 0; r < kGroup; r += width) store(sums + r, vlog<T>(load(sums + r)));
        for (int r = 0; r < kGroup; ++r) F[i + r] -= item.reg * sums[r], counted_sums[i + r] = 1;
    }
    own_columns(begin, end);
    for (int64_t j = begin; j < end; j += width) {
        store(G + j, load(G + j) + item.reg * vlog<T>(load(v + j)));
        store(v + j, splat(T(1)));
        store(bv + j, load(b + j));
    }
    team.barrier();
}

// After the last row half: rows without weight follow the final g.
template <class T>
void Sinkhorn<T>::finish(bool in_kernel) {
    int64_t begin, end;
    own_rows(begin, end);
    for (int64_t i = begin; i < end; ++i) {
        if (a[i] != 0) continue;
        if (in_kernel)
            counted_sums[i] = row_sums[i];
        else
            F[i] = new_f[i];
    }
    if (in_kernel) leave_kernel();
    team.barrier();
}

template <class T>
int Sinkhorn<T>::run(const void *g_init, int64_t max_iter, double tol, bool check) {
    const int found = prepare(g_init, check);
    bool in_kernel = false;
    int64_t passes = 0;             // counted passes since K was built
    int64_t log_run = 1, left = 0;  // log-domain iterations to do before the next attempt
    if (stored) {
        start_rows();
        in_kernel = build_kernel();
        if (!in_kernel) left = log_run;
    }
    for (;;) {
        const bool last = iterations == max_iter, compare = iterations > 0 && (last || tol >= 0);
        row_step(in_kernel, !last, compare);
        if (compare) error = combined_error();
        if (last || (compare && error <= tol)) {
            if (!in_kernel || row_sums_count()) break;
            leave_kernel();
            in_kernel = false;
            left = log_run = 1;
            continue;
        }
        const bool counts = column_step(in_kernel);
        if (in_kernel && !counts) {
            log_run = passes == 0 ? minimum<int64_t>(2 * log_run, 32) : 1;
            left = log_run;
            leave_kernel();
            in_kernel = false;
            continue;
        }
        ++iterations;
        if (in_kernel) {
            exchange(row_sums, counted_sums);
            exchange(v, new_v);
            exchange(bv, new_bv);
            ++passes;
        } else if (stored && --left <= 0 && iterations < max_iter) {
            in_kernel = build_kernel();
            passes = 0;
            if (!in_kernel) {
                log_run = minimum<int64_t>(2 * log_run, 32);
                left = log_run;
            }
        }
    }
    finish(in_kernel);
    return found;
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
