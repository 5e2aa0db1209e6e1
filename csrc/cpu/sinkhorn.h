// Sinkhorn iterations of one item, by a team.
//
// Two ways to do one full iteration (f from g for all rows, then g from f for all columns):
//   log domain      s_i = -eps log sum_j b_j exp((g_j - C_ij) / eps), and likewise columns. Two exponentials per entry.
//   kernel domain   K_ij = exp((F_i + G_j - C_ij) / eps) with the potentials of some moment absorbed, and scalings
//                   u, v with f = F + eps log u, g = G + eps log v:  u_i = 1 / sum_j K_ij b_j v_j, then
//                   v_j = 1 / sum_i K_ij a_i u_i. One pass over K does both; two multiply-adds per entry.
// A cloud with itself needs one potential and one half of this: self.h.
// Without a relaxation f = s. With one (relaxation.h) f or u follows from s or from the sum, point by point.
// A schedule of eps runs in the log domain until it ends: a K for each eps would cost what it saves.
//
// Rows are cut into blocks by the item's size alone. A block leaves partial column sums, which are combined in block
// order: the bits are those of any number of threads.
#pragma once

#include "relaxation.h"

namespace otkern {
namespace OTKERN_LEVEL {

// What a block of rows leaves for the others to see.
template <class T>
struct BlockNotes {
    T smallest, largest;  // sum_j K_ij b_j v_j over its rows, and 1 / u_i where that is not the same
    T heaviest;           // a_i u_i
    T exponent;           // (F_i + G_j - C_ij) / eps, when K is built
    T error;              // sum_i a_i |r_i - 1| of the iteration before
    T excess;             // sum_i a_i (r_i - 1)
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
    Sinkhorn(const Item<T> &item_, Team &team_, int64_t store_bytes)
        : item(item_), team(team_), side_a(item_, 0), side_b(item_, 1) {
        block = maximum<int64_t>(32, round_up((item.rows + 63) / 64, kGroup));
        blocks = (item.rows + block - 1) / block;
        stored = item.rows * item.cols * int64_t(sizeof(T)) <= store_bytes;
        panel = stored ? block : minimum(block, maximum<int64_t>(kGroup, (1 << 20) / item.cols / kGroup * kGroup));
        absorbs = stored && side_a.can_be_scaled(item.reg) && side_b.can_be_scaled(item.reg);
        relaxed = !side_a.is_constraint() || !side_b.is_constraint();
        partial = item.problem.kind == Kind::partial;
        if (partial) mass = item.relaxation(0);
    }

    void carve(Carver &carver) {
        clouds.carve(carver, item);
        const int64_t rows = item.rows, cols = item.cols;
        T **const over_rows[] = {&a, &F, &row_sums, &counted_sums, &row_scale, &new_f, &dead_a, &offset_a};
        T **const over_columns[] = {&b, &G, &v, &new_v, &bv, &new_bv, &dead_b, &offset_b, &log_ratio};
        for (T **vector : over_rows) carver.take(*vector, rows);
        for (T **vector : over_columns) carver.take(*vector, cols);
        carver.take(partial_sums, blocks * cols);
        carver.take(partial_peaks, blocks * cols);
        carver.take(notes, blocks);
        carver.take(column_notes, team.size * 3);
        carver.take(bad, team.size);
        carver.take(cost, stored ? rows * cols : panel * cols * team.size);
        if (absorbs) carver.take(kernel, rows * cols);
    }

    // Potentials and marginal error of the last iteration; every thread of the team gets the same answer.
    // Returns nonzero bits 0, 1, 2 where x, y, the cost hold what they must not.
    int run(const ForwardCall &call);

    const Item<T> &item;
    Team &team;
    Side<T> side_a, side_b;
    int64_t iterations = 0;
    double error = 0;            // marginal error at the potentials
    T *a, *b, *F, *G;            // after run(): weights and potentials, not yet gauged
    T *dead_a, *dead_b;          // 1 for a row (column) whose entries all vanish, and for padding; else 0
    T *offset_a, *offset_b;      // o of relaxation.h
    T mass = 0, lam = 0;         // of a partial problem: the total mass asked for, and its multiplier
    bool nothing_moves = false;  // a partial problem without a single pair
    double excess = 0;           // of a cloud with itself: by how much the plan's mass is above that of the weights

  private:
    bool self_step(bool in_kernel);
    void leave_self_kernel();
    void finish_self(bool in_kernel);
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
    void self_cost();
    void set_eps(T value);
    T first_eps(const ForwardCall &call) const;
    const T *panel_rows(int64_t begin, int64_t end);
    // Into the kernel domain from g alone. Where a penalty keeps potentials far from their soft minima, f - o would be
    // a small difference of large numbers: there an iteration in the log domain comes first.
    bool enter_kernel() {
        if (!absorbs || item.same || eps != item.reg || side_a.is_penalty() || side_b.is_penalty()) return false;
        start_rows();
        return build_kernel();
    }
    void start_rows();
    bool build_kernel();
    void kernel_dots(int64_t begin, int64_t end);
    void kernel_columns(int64_t begin, int64_t end, bool add, T *sums);
    void kernel_rows(int64_t begin, int64_t end, bool columns_too, bool compare, T *sums, BlockNotes<T> &note);
    void relaxed_kernel_rows(int64_t begin, int64_t end, bool columns_too, bool compare, T *sums, BlockNotes<T> &note);
    bool kernel_column_step();
    Vec<T> relaxed_column(int64_t j, Vec<T> sum, Vec<T> &smallest, Vec<T> &largest);
    bool kernel_mass_step(T loss);
    // A strip of K stays in L1 between the two halves.
    int64_t strip_rows() const {
        return maximum<int64_t>(kGroup, int64_t(32 * 1024 / sizeof(T)) / item.cols / kGroup * kGroup);
    }
    bool row_sums_count() const;
    void leave_kernel();
    void log_rows(const T *c, int64_t begin, int64_t end, bool compare, BlockNotes<T> &note);
    void log_columns(const T *c, int64_t begin, int64_t end, T *peaks, T *sums);
    void log_column_step();
    void row_step(bool in_kernel, bool columns_too, bool compare);
    struct MassStep {
        T moved, change;  // the mass after the column half; the step of lam / eps that makes it the one asked for
        double gap;       // the columns' part of the marginal error after that step
        bool stranded;    // there is no pair to move anything over
    };
    MassStep mass_step() const;
    // 0 where g is below its cap, and then g = s; less than 0 at it.
    static Vec<T> log_ratio_of(Vec<T> x, Bits<T> below_cap) {
        return select<T>(below_cap, Vec<T>{}, vmin<T>(x, splat(-tiny<T>())));
    }
    bool column_step(bool in_kernel) {
        if (in_kernel) return kernel_column_step();
        log_column_step();
        return true;
    }
    void leave() {
        if (item.same)
            leave_self_kernel();
        else
            leave_kernel();
    }
    void finish(bool in_kernel);
    double combined_error() const {
        double sum = 0;
        for (int64_t k = 0; k < blocks; ++k) sum += notes[k].error;
        if (item.same) sum *= 2;
        if (side_a.is_constraint())
            for (int64_t i = 0; i < item.n; ++i) sum += dead_a[i] != 0 ? double(a[i]) : 0;
        if (side_b.is_constraint())
            for (int64_t j = 0; j < item.m; ++j) sum += dead_b[j] != 0 ? double(b[j]) : 0;
        return sum + column_gap;
    }

    Clouds<T> clouds;
    int64_t block, blocks, panel;
    bool stored, relaxed, partial;
    bool absorbs;                // there is a kernel domain
    T eps, inverse_eps;          // of this iteration
    T push = 0, level = 1;       // in the kernel domain lam + eps push stands for lam, which K holds; exp(push)
    double column_gap = 0;       // of a partial problem; else columns are exact after their half
    T *row_sums, *counted_sums;  // s_i = 1 / u_i of this pass, and of the last one that counted
    T *row_scale, *new_f, *v, *new_v, *bv, *new_bv;
    T *log_ratio;  // of a partial problem: (g_j - s_j) / eps, the log of its column sum over b_j before lam changes
    T *partial_sums, *partial_peaks, *column_notes, *cost, *kernel = nullptr;
    BlockNotes<T> *notes;
    int *bad;
};

// ---- set-up -------------------------------------------------------------------------------------------------------

template <class T>
int Sinkhorn<T>::prepare(const void *g_init, bool check) {
    bad[team.rank] = clouds.read(item, team, check);
    if (item.same) a = b, F = G, dead_a = dead_b, offset_a = offset_b;
    if (team.rank == 0) {
        item.read_a(a);
        item.read_b(b);
        item.read_vector(g_init, item.first_b, item.points_b, item.cols, G);
        for (int64_t i = 0; i < item.rows; ++i) dead_a[i] = i < item.n ? 0 : 1, F[i] = 0, counted_sums[i] = 1;
        for (int64_t j = 0; j < item.cols; ++j) dead_b[j] = j < item.m ? 0 : 1, v[j] = 1, bv[j] = b[j];
    }
    team.barrier();
    int64_t begin, end;
    own_rows(begin, end);
    bool good = true;
    if (stored && item.same)
        self_cost();
    else if (stored && begin < end)
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

// Of this thread's rows and columns; what others hold depends on it through the next barrier only.
template <class T>
void Sinkhorn<T>::set_eps(T value) {
    constexpr int width = Simd<T>::width;
    eps = value;
    inverse_eps = 1 / eps;
    side_a.set_eps(eps);
    side_b.set_eps(eps);
    const bool entropy = item.problem.entropy;
    int64_t begin, end;
    own_rows(begin, end);
    for (int64_t i = begin; i < end; i += width) {
        const Vec<T> weight = load_some(a + i, end - i, T(0));
        store_some(offset_a + i, end - i, entropy ? entropy_offset<T>(weight, eps) : Vec<T>{});
    }
    if (item.same) return;
    own_columns(begin, end);
    for (int64_t j = begin; j < end; j += width)
        store(offset_b + j, entropy ? entropy_offset<T>(load(b + j), eps) : Vec<T>{});
}

template <class T>
T Sinkhorn<T>::first_eps(const ForwardCall &call) const {
    if (call.eps_start == nullptr || call.max_iter <= 1) return item.reg;
    return maximum(item.reg, static_cast<const T *>(call.eps_start)[item.index]);
}

template <class T>
const T *Sinkhorn<T>::panel_rows(int64_t begin, int64_t end) {
    if (stored) return cost + begin * item.cols;
    T *rows = cost + team.rank * panel * item.cols;
    cost_rows(item, clouds, begin, minimum(end, item.n), rows);
    return rows;
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
            if (relaxed)
                relaxed_kernel_rows(begin, end, columns_too, compare, sums, notes[k]);
            else
                kernel_rows(begin, end, columns_too, compare, sums, notes[k]);
            continue;
        }
        notes[k].error = notes[k].excess = 0;
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

// By every thread over all columns, whose log_ratio is complete. Points that reach nothing have log_ratio -inf.
template <class T>
typename Sinkhorn<T>::MassStep Sinkhorn<T>::mass_step() const {
    constexpr int width = Simd<T>::width;
    const Vec<T> none = splat(-infinity<T>());
    Vec<T> peaks = none, sums{}, gaps{};
    for (int64_t j = 0; j < item.cols; j += width)
        peaks = vmax<T>(select<T>(load(b + j) > 0, load(log_ratio + j), none), peaks);
    const T peak = horizontal_max<T>(peaks);
    if (peak == -infinity<T>()) return {0, 0, double(mass), true};
    for (int64_t j = 0; j < item.cols; j += width) {
        const Vec<T> weight = load(b + j);
        sums += weight * vexp<T>(select<T>(weight > 0, load(log_ratio + j), none) - peak);
    }
    const T log_moved = peak + log_of(maximum(horizontal_sum<T>(sums), tiny<T>()));
    const T change = log_of(maximum(mass, tiny<T>())) - log_moved;
    for (int64_t j = 0; j < item.cols; j += width) {
        const Vec<T> x = load(log_ratio + j);
        // As for g = o at the cap, and any g < o below it.
        gaps += load(b + j) * side_b.gap(vexp<T>(x + change), select<T>(x < 0, Vec<T>{}, splat(T(-1))), Vec<T>{});
    }
    return {vexp<T>(splat(log_moved))[0], change, double(horizontal_sum<T>(gaps)), false};
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
int Sinkhorn<T>::run(const ForwardCall &call) {
    const int found = prepare(item.same ? nullptr : call.g_init, call.check);
    const int64_t max_iter = call.max_iter;
    set_eps(item.reg);
    if (partial) {
        int64_t begin, end;
        own_columns(begin, end);
        for (int64_t j = begin; j < end; ++j) G[j] = minimum(G[j], offset_b[j]);
        team.barrier();
    }
    set_eps(first_eps(call));
    bool in_kernel = enter_kernel();
    bool at_reg = false;                  // the last iteration was done at reg
    int64_t passes = 0;                   // counted passes since K was built
    int64_t log_run = 1, left = log_run;  // log-domain iterations to do before the next attempt
    for (;;) {
        const bool last = iterations == max_iter, compare = at_reg && (last || call.tol >= 0);
        row_step(in_kernel, !last && !item.same, compare);
        if (compare) error = combined_error();
        if (last || (compare && error <= call.tol)) {
            if (!in_kernel || row_sums_count()) break;
            leave();
            in_kernel = false;
            left = log_run = 1;
            continue;
        }
        if (!(item.same ? self_step(in_kernel) : column_step(in_kernel))) {
            log_run = passes == 0 ? minimum<int64_t>(2 * log_run, 32) : 1;
            left = log_run;
            leave();
            in_kernel = false;
            continue;
        }
        ++iterations;
        at_reg = eps == item.reg;
        if (!at_reg) {
            set_eps(iterations + 1 == max_iter ? item.reg : maximum(item.reg, eps * T(call.eps_factor)));
            in_kernel = enter_kernel();
        } else if (in_kernel) {
            if (!item.same) {
                exchange(row_sums, counted_sums);
                exchange(v, new_v);
                exchange(bv, new_bv);
            }
            ++passes;
        } else if (absorbs && --left <= 0 && iterations < max_iter) {
            in_kernel = build_kernel();
            passes = 0;
            if (!in_kernel) {
                log_run = minimum<int64_t>(2 * log_run, 32);
                left = log_run;
            }
        }
    }
    if (item.same)
        finish_self(in_kernel);
    else
        finish(in_kernel);
    return found;
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
