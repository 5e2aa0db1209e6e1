// GeomLoss's annealed loop of one item, equation (23): at every eps of a ladder f and g are updated from each other at
// once, and averaged with what they were. Compiled once per SIMD level.
//
// Both soft minima of a step come from the same pair (f, g), so one exponential per entry serves the two of them:
//   E_ij = exp((f_i + g_j - C_ij) / eps),  s_i = f_i - eps log sum_j b_j E_ij,  s_j = g_j - eps log sum_i a_i E_ij
// as long as no sum has left the range of the number format. A step in which one has is done again in the log domain,
// where the largest exponent of every row and column is taken out first: two exponentials per entry.
//
// The sums r_i = sum_j b_j exp((s_i + g_j - C_ij) / eps) after the last step say how s was rounded. They, too, follow
// from the sums of E, there with exponents that are rounded once.
//
// Between a cloud and itself C and E are symmetric and f = g. The entries on and above the diagonal then stand for all:
// an entry above it counts in the sum of its row and in that of its column.
//
// Rows are cut into blocks by the item's size alone. A block leaves partial column sums, which are combined in block
// order: the bits are those of any number of threads.
#include "plan.h"

namespace otkern {
namespace OTKERN_LEVEL {
namespace {

template <class T>
struct Limits;
template <>
struct Limits<float> {
    static constexpr float share = 1e-26f, least = 1e-30f, most = 1e30f;
};
template <>
struct Limits<double> {
    static constexpr double share = 1e-270, least = 1e-250, most = 1e250;
};

// Where a sum of w_j E_j is as good as in the log domain: far above all that exponents below the range could have
// added, and below what one at its upper end, where the exponential is cut off, adds at the smallest weight.
template <class T>
struct Trusted {
    T low = 0, high = 0;

    Trusted() {}
    Trusted(const T *weights, int64_t count) {
        T total = 0, least = infinity<T>();
        for (int64_t i = 0; i < count; ++i) {
            total += weights[i];
            if (weights[i] > 0) least = minimum(weights[i], least);
        }
        low = maximum(Limits<T>::least, Limits<T>::share * total);
        high = minimum(Limits<T>::most, huge<T>() * minimum(least, T(1)));
    }
    Bits<T> hold(Vec<T> sum) const { return (sum >= low) & (sum <= high); }
};

// 0, 1, 2, ...
template <class T>
OTKERN_INLINE Vec<T> lane_numbers() {
    Vec<T> lanes{};
    for (int k = 0; k < Simd<T>::width; ++k) lanes[k] = T(k);
    return lanes;
}

template <class T>
OTKERN_INLINE bool all_of(Bits<T> mask) {
    bool all = true;
    for (int k = 0; k < Simd<T>::width; ++k) all = all && mask[k];
    return all;
}

template <class T>
class Annealing {
  public:
    Annealing(const SymmetricCall &call_, const Item<T> &item_, Team &team_)
        : call(call_), item(item_), team(team_), same(item_.same) {
        // Whole vectors, so that a block's rows start one on the diagonal as well.
        block = round_up<int64_t>((item.rows + 63) / 64, 32);
        blocks = (item.rows + block - 1) / block;
        stored = item.rows * item.cols * int64_t(sizeof(T)) <= call.store_bytes;
        panel = stored ? block : minimum(block, maximum<int64_t>(kGroup, (1 << 20) / item.cols / kGroup * kGroup));
        if (item.problem.kind == Kind::unbalanced) rho_a = item.relaxation(0), rho_b = item.relaxation(1);
    }

    void carve(Carver &carver) {
        clouds.carve(carver, item);
        T **const over_rows[] = {&a, &F, &soft_a, &ratio_a, &row_sums, &row_peaks};
        T **const over_columns[] = {&b, &G, &new_G, &soft_b, &ratio_b};
        for (T **vector : over_rows) carver.take(*vector, padded<T>(item.rows));
        for (T **vector : over_columns) carver.take(*vector, item.cols);
        carver.take(partial_sums, blocks * item.cols);
        carver.take(partial_peaks, blocks * item.cols);
        carver.take(notes, team.size);
        carver.take(cost, stored ? item.rows * item.cols : panel * item.cols * team.size);
    }

    // Returns nonzero bits 0, 1, 2 where x, y, the cost hold what they must not.
    int run();
    void write() const;

  private:
    // function(begin, end, k) for this thread's blocks k. To and fro over the team: between a cloud and itself rows get
    // shorter downwards.
    template <class F_>
    void own_blocks(F_ function) const {
        for (int64_t turn = 0; turn * team.size < blocks; ++turn) {
            const int64_t k = turn * team.size + (turn % 2 ? team.size - 1 - team.rank : team.rank);
            if (k < blocks) function(k * block, minimum((k + 1) * block, item.rows), k);
        }
    }
    // function(begin, end) for the panels of rows [begin, end).
    template <class F_>
    void panels(int64_t begin, int64_t end, F_ function) const {
        for (int64_t i = begin; i < end; i += panel) function(i, minimum(i + panel, end));
    }
    int64_t first_column(int64_t row) const { return same ? row / Simd<T>::width * Simd<T>::width : 0; }
    T *place(int64_t begin) const { return cost + (stored ? begin : team.rank * panel) * item.cols; }

    int prepare();
    bool make_rows(int64_t begin, int64_t end);
    void step(T at_eps, bool averaged);
    void advance(bool averaged);
    bool pass(bool in_logs, bool averaged);
    template <bool Diagonal, bool Exact>
    void entries(const T *c, int64_t i, int64_t j, Vec<T> *row_sum, T *column_sums) const;
    template <bool Exact>
    void shared_rows(const T *c, int64_t begin, int64_t end, T *column_sums);
    void log_rows(const T *c, int64_t begin, int64_t end);
    void log_columns(const T *c, int64_t begin, int64_t end, T *peaks, T *sums) const;
    bool finish_rows(int64_t begin, int64_t end, bool in_logs);
    bool finish_columns(bool in_logs, bool averaged);

    // s and, after the last step, r from the sum of w exp((... - C) / eps - origin / eps); 0 and 0 where nothing
    // counts.
    Vec<T> soft_minimum(Vec<T> origin, Vec<T> sum, Bits<T> padding, T *ratio) const {
        const Vec<T> s = origin - eps * vlog<T>(vmax<T>(sum, splat(tiny<T>())));
        const Bits<T> alive = ~padding & (sum > 0);
        if (last) store(ratio, select<T>(alive, sum * vexp<T>((s - origin) * inverse_eps), Vec<T>{}));
        return select<T>(alive, s, Vec<T>{});
    }
    // Equation (13), and the average with the potential before.
    Vec<T> updated(Vec<T> potential, Vec<T> soft_min, T rho, bool averaged) const {
        const Vec<T> damped = rho < infinity<T>() ? soft_min / (1 + eps / rho) : soft_min;
        return averaged ? (potential + damped) / 2 : damped;
    }

    const SymmetricCall &call;
    const Item<T> &item;
    Team &team;
    Clouds<T> clouds;
    const bool same;  // a cloud with itself: a, F are b, G
    int64_t block, blocks, panel;
    bool stored;
    T rho_a = infinity<T>(), rho_b = infinity<T>();
    T eps = 1, inverse_eps = 1;
    Trusted<T> trusted_rows, trusted_columns;
    int log_steps = 0, patience = 0;  // steps in the log domain before the next attempt, and how many it was last time
    bool last = false;                // of the steps: r is wanted
    T *a, *b, *F, *G, *new_G, *soft_a, *soft_b, *ratio_a, *ratio_b;
    T *row_sums, *row_peaks;  // of this pass; with `same`, over the entries on and right of the diagonal
    T *partial_sums, *partial_peaks, *cost;
    int *notes;
};

template <class T>
bool Annealing<T>::make_rows(int64_t begin, int64_t end) {
    T *out = place(begin);
    const int64_t from = first_column(begin);
    const bool good = cost_rows(item, clouds, begin, minimum(end, item.n), out, from);
    const Vec<T> floor = splat(T(call.cost_floor));
    for (int64_t i = 0; i < end - begin; ++i)
        for (int64_t j = from; j < item.cols; j += Simd<T>::width)
            store(out + i * item.cols + j, vmax<T>(floor, load(out + i * item.cols + j)));
    return good;
}

template <class T>
int Annealing<T>::prepare() {
    notes[team.rank] = clouds.read(item, team, call.check);
    if (team.rank == 0) {
        item.read_b(b);
        item.read_vector(nullptr, 0, 0, item.cols, G);
        item.read_vector(nullptr, 0, 0, padded<T>(item.rows), row_sums);
        for (int64_t i = 0; i < padded<T>(item.rows); ++i) row_peaks[i] = -infinity<T>();
        if (!same) {
            item.read_vector(nullptr, 0, 0, padded<T>(item.rows), a);
            item.read_a(a);
            item.read_vector(nullptr, 0, 0, padded<T>(item.rows), F);
        }
    }
    if (same) a = b, F = G;
    team.barrier();
    trusted_rows = Trusted<T>(b, item.m);
    trusted_columns = Trusted<T>(a, item.n);
    bool good = true;
    const bool check_cost = call.check && !item.has_points();
    if (stored || check_cost)
        own_blocks([&](int64_t begin, int64_t end, int64_t) {
            panels(begin, end, [&](int64_t i, int64_t stop) { good = make_rows(i, stop) && good; });
        });
    if (check_cost && !good) notes[team.rank] |= 4;
    if (!call.check) return 0;
    team.barrier();
    int all = 0;
    for (int k = 0; k < team.size; ++k) all |= notes[k];
    team.barrier();
    return all;
}

// ---- a pass over the cost ---------------------------------------------------------------------------------------

// Rows [i, i + kGroup) and the vector of columns from j on, where rows start on the diagonal with `Diagonal`.
template <class T>
template <bool Diagonal, bool Exact>
OTKERN_INLINE void Annealing<T>::entries(const T *c, int64_t i, int64_t j, Vec<T> *row_sum, T *column_sums) const {
    const Vec<T> weight = load(b + j), potential = load(G + j);
    Vec<T> sums = load(column_sums + j);
    for (int r = 0; r < kGroup; ++r) {
        const Vec<T> entry = load(c + r * item.cols + j);
        const Vec<T> x =
            Exact ? exponent_of<T>(potential, entry, F[i + r], entry < infinity<T>()) : F[i + r] + (potential - entry);
        const Vec<T> e = bounded_exp<T>(x * inverse_eps);
        if (Diagonal) {
            const Vec<T> lanes = lane_numbers<T>();
            const T diagonal = T(i + r - j);
            row_sum[r] += select<T>(lanes >= diagonal, weight * e, Vec<T>{});
            sums += select<T>(lanes > diagonal, a[i + r] * e, Vec<T>{});
        } else {
            row_sum[r] += weight * e;
            sums += a[i + r] * e;
        }
    }
    store(column_sums + j, sums);
}

template <class T>
template <bool Exact>
void Annealing<T>::shared_rows(const T *c, int64_t begin, int64_t end, T *column_sums) {
    constexpr int width = Simd<T>::width, together = width < kGroup ? width : kGroup;
    for (int64_t i = begin; i < end; i += kGroup, c += kGroup * item.cols) {
        Vec<T> row_sum[kGroup] = {};
        int64_t j = first_column(i);
        if (same)
            for (; j < minimum(i + kGroup, item.cols); j += width) entries<true, Exact>(c, i, j, row_sum, column_sums);
        for (; j < item.cols; j += width) entries<false, Exact>(c, i, j, row_sum, column_sums);
        alignas(64) T four[kGroup < width ? width : kGroup];
        for (int r = 0; r < kGroup; r += together) store(four + r, sum_lanes<T, together>(row_sum + r));
        store_four(row_sums + i, load_four(four));
    }
}

template <class T>
void Annealing<T>::log_rows(const T *c, int64_t begin, int64_t end) {
    constexpr int width = Simd<T>::width;
    const Vec<T> none = splat(-infinity<T>()), lanes = lane_numbers<T>();
    for (int64_t i = begin; i < end; ++i, c += item.cols) {
        const auto counts = [&](int64_t j) {
            const Bits<T> real = load(b + j) > 0;
            return same ? real & (lanes >= T(i - j)) : real;
        };
        Vec<T> peaks = none, sums{};
        for (int64_t j = first_column(i); j < item.cols; j += width)
            peaks = vmax<T>(select<T>(counts(j), load(G + j), none) - load(c + j), peaks);
        const T peak = horizontal_max<T>(peaks);
        if (peak > -infinity<T>())
            for (int64_t j = first_column(i); j < item.cols; j += width) {
                const Vec<T> entry = load(c + j);
                const Vec<T> x = exponent_of<T>(load(G + j), entry, -peak, counts(j) & (entry < infinity<T>()));
                sums += load(b + j) * vexp<T>(x * inverse_eps);
            }
        row_peaks[i] = peak;
        row_sums[i] = horizontal_sum<T>(sums);
    }
}

// Rows [begin, end) join the running peaks and sums of the columns.
template <class T>
void Annealing<T>::log_columns(const T *c, int64_t begin, int64_t end, T *peaks, T *sums) const {
    const Vec<T> none = splat(-infinity<T>()), lanes = lane_numbers<T>();
    for (int64_t j = first_column(begin); j < item.cols; j += Simd<T>::width) {
        const auto entry = [&](int64_t i) { return load(c + (i - begin) * item.cols + j); };
        const auto counts = [&](int64_t i) {
            const Bits<T> finite = entry(i) < infinity<T>();
            return same ? finite & (lanes > T(i - j)) : finite;
        };
        const Vec<T> before = load(peaks + j);
        Vec<T> peak = before;
        for (int64_t i = begin; i < end; ++i)
            if (a[i] > 0) peak = vmax<T>(select<T>(counts(i), F[i] - entry(i), none), peak);
        const Vec<T> origin = select<T>(peak > none, peak, Vec<T>{});  // no -inf - -inf below
        Vec<T> sum = load(sums + j) * vexp<T>((before - origin) * inverse_eps);
        for (int64_t i = begin; i < end; ++i)
            if (a[i] > 0) sum += a[i] * vexp<T>(exponent_of<T>(-origin, entry(i), F[i], counts(i)) * inverse_eps);
        store(peaks + j, peak);
        store(sums + j, sum);
    }
}

// The soft minima at the rows of a block. False where a sum cannot be trusted.
template <class T>
bool Annealing<T>::finish_rows(int64_t begin, int64_t end, bool in_logs) {
    constexpr int width = Simd<T>::width;
    Bits<T> trusted = ~Bits<T>{};
    for (int64_t i = begin; i < end; i += width) {
        const Vec<T> sum = load(row_sums + i);
        const Bits<T> padding = lane_numbers<T>() >= T(minimum<int64_t>(item.n - i, width));
        trusted &= padding | trusted_rows.hold(sum);
        const Vec<T> origin = in_logs ? -load(row_peaks + i) : load(F + i);
        store(soft_a + i, soft_minimum(origin, sum, padding, ratio_a + i));
    }
    return in_logs || all_of<T>(trusted);
}

// The soft minima at this thread's columns, and the new potentials. False where a sum cannot be trusted.
template <class T>
bool Annealing<T>::finish_columns(bool in_logs, bool averaged) {
    constexpr int width = Simd<T>::width;
    Bits<T> trusted = ~Bits<T>{};
    int64_t begin, end;
    team.split(item.cols / width, begin, end);
    for (int64_t j = begin * width; j < end * width; j += width) {
        // With `same`, the blocks that reach up to here from above.
        const int64_t count = same ? minimum(j / block + 1, blocks) : blocks;
        Vec<T> peak = splat(-infinity<T>()), sum{};
        if (in_logs) {
            if (same) peak = load(row_peaks + j);
            for (int64_t k = 0; k < count; ++k) peak = vmax<T>(load(partial_peaks + k * item.cols + j), peak);
            const Vec<T> origin = select<T>(peak > -infinity<T>(), peak, Vec<T>{});
            if (same) sum = load(row_sums + j) * vexp<T>((load(row_peaks + j) - origin) * inverse_eps);
            for (int64_t k = 0; k < count; ++k)
                sum += load(partial_sums + k * item.cols + j) *
                       vexp<T>((load(partial_peaks + k * item.cols + j) - origin) * inverse_eps);
        } else {
            if (same) sum = load(row_sums + j);
            for (int64_t k = 0; k < count; ++k) sum += load(partial_sums + k * item.cols + j);
        }
        const Bits<T> padding = lane_numbers<T>() >= T(minimum<int64_t>(item.m - j, width));
        trusted &= padding | trusted_columns.hold(sum);
        const Vec<T> potential = load(G + j);
        const Vec<T> soft_min = soft_minimum(in_logs ? -peak : potential, sum, padding, ratio_b + j);
        store(soft_b + j, soft_min);
        store(new_G + j, updated(potential, soft_min, rho_b, averaged));
    }
    return in_logs || all_of<T>(trusted);
}

// All soft minima at eps. False, on every thread alike, when a sum has left the range.
template <class T>
bool Annealing<T>::pass(bool in_logs, bool averaged) {
    bool good = true;
    own_blocks([&](int64_t begin, int64_t end, int64_t k) {
        T *sums = partial_sums + k * item.cols, *peaks = partial_peaks + k * item.cols;
        for (int64_t j = first_column(begin); j < item.cols; ++j) sums[j] = 0;
        if (in_logs)
            for (int64_t j = first_column(begin); j < item.cols; ++j) peaks[j] = -infinity<T>();
        panels(begin, end, [&](int64_t i, int64_t stop) {
            if (!stored) make_rows(i, stop);
            const T *c = place(i);
            if (in_logs) {
                log_rows(c, i, stop);
                log_columns(c, i, stop, peaks, sums);
            } else {
                last ? shared_rows<true>(c, i, stop, sums) : shared_rows<false>(c, i, stop, sums);
            }
        });
        if (!same) good = finish_rows(begin, end, in_logs) && good;
    });
    team.barrier();
    notes[team.rank] = finish_columns(in_logs, averaged) && good;
    team.barrier();
    good = true;
    for (int k = 0; k < team.size; ++k) good = good && notes[k];
    return good;
}

// ---- the ladder ---------------------------------------------------------------------------------------------------

template <class T>
void Annealing<T>::step(T at_eps, bool averaged) {
    eps = at_eps;
    inverse_eps = 1 / eps;
    if (log_steps > 0) {
        --log_steps;
        pass(true, averaged);
    } else if (pass(false, averaged)) {
        patience = 0;
    } else {
        patience = minimum(2 * patience + 1, 31);
        log_steps = patience - 1;
        pass(true, averaged);
    }
}

// After a step: the row potentials, which only their own thread reads, and those of the columns.
template <class T>
void Annealing<T>::advance(bool averaged) {
    if (!same)
        own_blocks([&](int64_t begin, int64_t end, int64_t) {
            for (int64_t i = begin; i < end; i += Simd<T>::width)
                store(F + i, updated(load(F + i), load(soft_a + i), rho_a, averaged));
        });
    T *const before = G;
    G = new_G;
    new_G = before;
    if (same) F = G;
}

template <class T>
int Annealing<T>::run() {
    const int found = prepare();
    const T first = static_cast<const T *>(call.eps_start)[item.index];
    const int64_t between = maximum<int64_t>(call.n_steps[item.index], 0);
    for (int64_t k = 0; k < between + 3; ++k) {
        const T on_the_way = T(double(first) * __builtin_pow(call.eps_factor, double(k - 2)));
        step(k < 2 ? first : k < between + 2 ? on_the_way : item.reg, k > 0);
        advance(k > 0);
    }
    last = true;
    step(item.reg, false);
    return found;
}

template <class T>
void Annealing<T>::write() const {
    write_padded(call.s_a, item.first_a, item.room_a, same ? soft_b : soft_a, item.n);
    write_padded(call.s_b, item.first_b, item.room_b, soft_b, item.m);
    write_padded(call.r_a, item.first_a, item.room_a, same ? ratio_b : ratio_a, item.n);
    write_padded(call.r_b, item.first_b, item.room_b, ratio_b, item.m);
    write_padded(call.f, item.first_a, item.room_a, F, item.n);
    write_padded(call.g, item.first_b, item.room_b, G, item.m);
}

template <class T>
void symmetric_item(SymmetricCall &call, int64_t index, Team &team) {
    const Item<T> item(call.problem, index);
    if (item.n == 0 || item.m == 0) {
        if (team.rank != 0) return;
        void *const over_rows[] = {call.s_a, call.f, call.r_a}, *const over_columns[] = {call.s_b, call.g, call.r_b};
        for (void *out : over_rows) write_padded<T>(out, item.first_a, item.room_a, nullptr, 0);
        for (void *out : over_columns) write_padded<T>(out, item.first_b, item.room_b, nullptr, 0);
        return;
    }
    Annealing<T> loop(call, item, team);
    if (!carve_scratch(call, team, [&](Carver &carver) { loop.carve(carver); })) return;
    const int found = loop.run();
    if (team.rank != 0) return;
    if (found) report_bad_input(call.bad_input, index, found);
    loop.write();
}

}  // namespace

void symmetric(SymmetricCall &call, int64_t item, Team &team) {
    (call.problem.dtype == Dtype::f64 ? symmetric_item<double> : symmetric_item<float>)(call, item, team);
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
