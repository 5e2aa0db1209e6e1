// Sinkhorn iterations of one item, on the chip, by a team: the cluster's blocks own slices of rows and of columns.
//
// The two ways to do an iteration, in the log domain and on an absorbed kernel, are those of cpu/sinkhorn.h, and so are
// the conditions under which a pass on the kernel counts. What differs is who holds what:
//   * a block holds the cost of its rows, their potentials, and everything of all columns that a pass over rows reads;
//   * rows: a warp makes the sum of four rows; then a thread finishes each row;
//   * columns: a thread makes the sum of a column over the block's rows, or a part of them; after a barrier of the
//     cluster, the column's owner adds those of the blocks in their order, finishes it, and gives every block the
//     result.
// A cloud with itself needs one potential and one half of this: self.h.
// With `keeps_cost` there are two matrices. Else the kernel takes the place of the cost, which is formed again from the
// points when it is needed: to absorb anew, or for iterations in the log domain.
#pragma once

#include "products.h"
#include "relaxation.h"

namespace otkern {
namespace cuda {

template <class T>
OTKERN_DEVICE void exchange(T *&x, T *&y) {
    T *const z = x;
    x = y;
    y = z;
}

// Where the pieces of one block's shared memory lie. Its size decides whether an item fits (launch.h).
template <class T>
struct ForwardMemory {
    T *a, *F, *row_sums, *counted_sums, *row_scale, *new_f, *dead_a, *offset_a;  // of the block's rows
    T *b, *G, *bv;                                                               // of all columns
    T *v, *new_v, *dead_b, *offset_b, *log_ratio;                                // of the block's columns
    Cloud<T> x, y;                                                               // the block's rows, all columns
    T *cost;
    T *partial_sums, *partial_peaks;  // of all columns, of the sums several parts where there are few
    T *kernel;
    char *stages;  // while the cost is formed: in place of the partial sums and of all that lies behind them

    OTKERN_BOTH void carve(Carver &carver, Team &team, const SizeClass &size, int64_t n, int64_t m, bool directions) {
        const int64_t rows = ceil_div(n, size.cluster), columns = ceil_div(m, size.cluster);
        team.carve(carver);
        carver.take(a, rows);
        carver.take(F, rows);
        carver.take(row_sums, rows);
        carver.take(counted_sums, rows);
        carver.take(row_scale, rows);
        carver.take(new_f, rows);
        carver.take(dead_a, rows);
        carver.take(offset_a, rows);
        carver.take(b, m);
        carver.take(G, m);
        carver.take(bv, m);
        carver.take(v, columns);
        carver.take(new_v, columns);
        carver.take(dead_b, columns);
        carver.take(offset_b, columns);
        carver.take(log_ratio, columns);
        x.carve(carver, int(rows), directions);
        y.carve(carver, int(m), directions);
        carver.take(cost, rows * m);
        Carver over = carver;
        over.take(stages, CostTiles::least_bytes());
        carver.take(partial_sums, column_parts_count(size.threads, m));
        carver.take(partial_peaks, m);
        kernel = cost;
        if (size.keeps_cost) carver.take(kernel, rows * m);
        carver.used = maximum(carver.used, over.used);
    }
};

template <class T>
class Sinkhorn {
  public:
    OTKERN_DEVICE Sinkhorn(const ForwardArguments &arguments, const Item<T> &item_, Carver &carver)
        : call(arguments.call),
          size(arguments.size),
          item(item_),
          side_a(call.problem, item_, 0),
          side_b(call.problem, item_, 1) {
        const Problem &p = call.problem;
        at.carve(carver, team, size, item.n, item.m, p.metric == Metric::cosine);
        team.join();
        at.x.point_at(p, p.x_a, item.offset_a);
        at.y.point_at(p, p.x_b, item.offset_b);
        team.slice(item.n, first_row, rows);
        team.slice(item.m, first_column, columns);
        absorbs = !arguments.log_domain_only && side_a.can_be_scaled(item.reg) && side_b.can_be_scaled(item.reg);
        relaxed = !side_a.is_constraint() || !side_b.is_constraint();
        partial = p.kind == Kind::partial;
        mass = partial ? item.relaxation(p, 0) : T(0);
    }

    OTKERN_DEVICE void run();

    const ForwardCall &call;
    const SizeClass &size;
    const Item<T> &item;
    ForwardMemory<T> at;
    Team team;
    Side<T> side_a, side_b;
    int first_row, rows, first_column, columns;  // of the block
    int64_t iterations = 0;
    double error = 0;   // marginal error at the potentials
    double excess = 0;  // of a cloud with itself: by how much the plan has more mass than the weights
    T mass, lam = 0;    // of a partial problem: the total mass asked for, and its multiplier
    bool partial;
    bool nothing_moves = false;  // a partial problem without a single pair

  private:
    template <class F>
    OTKERN_DEVICE void for_rows(F function) const {
        for (int i = team.thread; i < rows; i += team.threads) function(i);
    }
    // By their places in the block's own vectors, and among all columns.
    template <class F>
    OTKERN_DEVICE void for_columns(F function) const {
        for (int c = team.thread; c < columns; c += team.threads) function(c, first_column + c);
    }

    OTKERN_DEVICE void read();
    OTKERN_DEVICE void form();
    OTKERN_DEVICE void set_eps(T value);
    OTKERN_DEVICE T first_eps() const;
    OTKERN_DEVICE bool enter_kernel();
    OTKERN_DEVICE void start_rows();
    OTKERN_DEVICE bool build_kernel();
    OTKERN_DEVICE void kernel_row_step(bool columns_too, bool compare);
    OTKERN_DEVICE bool kernel_column_step();
    OTKERN_DEVICE T kernel_column(int c, int j, T &smallest, T &largest);
    OTKERN_DEVICE bool kernel_mass_step(T loss);
    OTKERN_DEVICE bool row_sums_count();
    OTKERN_DEVICE void leave_kernel();
    OTKERN_DEVICE void log_row_step(bool columns_too, bool compare);
    OTKERN_DEVICE void log_columns();
    OTKERN_DEVICE bool self_step(bool in_kernel);
    OTKERN_DEVICE void leave_self_kernel();
    OTKERN_DEVICE void finish_self(bool in_kernel);
    OTKERN_DEVICE bool column_step(bool in_kernel);
    OTKERN_DEVICE void leave() {
        if (item.same)
            leave_self_kernel();
        else
            leave_kernel();
    }
    // From a pass over rows: its part of the marginal error, and by how much their sums are above their weights.
    OTKERN_DEVICE void note_error(T of_rows, T above) {
        error = item.same ? 2 * double(of_rows) : double(of_rows) + dead_columns + column_gap;
        excess = double(above);
    }
    OTKERN_DEVICE void log_column_step();
    struct MassStep {
        T moved, change;  // the mass after the column half; the step of lam / eps that makes it the one asked for
        T gap;            // the columns' part of the marginal error after that step
        bool stranded;    // there is no pair to move anything over
    };
    OTKERN_DEVICE MassStep mass_step();
    // 0 where g is below its cap, and then g = s; less than 0 at it.
    OTKERN_DEVICE static T log_ratio_of(T x, bool below_cap) { return below_cap ? T(0) : minimum(x, -tiny<T>()); }
    OTKERN_DEVICE void finish(bool in_kernel);

    bool absorbs, relaxed;    // there is a kernel domain; a side is not a constraint
    bool has_cost = false;    // `cost` holds the cost, and not the kernel
    bool exchanged = false;   // the sums and scalings of a pass have the places of those before it
    T eps, inverse_eps;       // of this iteration
    T push = 0, level = 1;    // in the kernel domain lam + eps push stands for lam, which K holds; exp(push)
    double column_gap = 0;    // of a partial problem; else columns are exact after their half
    double dead_columns = 0;  // the mass of constraint columns that reach nothing
    // What the last pass over rows has left: the smallest and largest of sum_j K_ij b_j v_j (and of 1 / u_i where that
    // is not the same), the largest a_i u_i, and sum_i a_i |r_i - 1| of the iteration before.
    T smallest_row, largest_row, heaviest_row;
};

// ---- set-up -------------------------------------------------------------------------------------------------------

template <class T>
OTKERN_DEVICE void Sinkhorn<T>::read() {
    const Problem &p = call.problem;
    const bool null = item.n > item.points_a;
    // A null point can take all the mass of the other side.
    const T mass_a = null ? item.mass(p.a, item.first_a, item.points_a, team) : T(0);
    const T mass_b = null ? item.mass(p.b, item.first_b, item.points_b, team) : T(0);
    for_rows([&](int i) {
        const int row = first_row + i;
        at.a[i] = row < item.points_a ? item.weight(p.a, item.first_a, item.points_a, row) : mass_b;
        at.F[i] = at.dead_a[i] = 0;
        at.counted_sums[i] = 1;
    });
    for (int j = team.thread; j < item.m; j += team.threads) {
        at.b[j] = at.bv[j] = j < item.points_b ? item.weight(p.b, item.first_b, item.points_b, j) : mass_a;
        at.G[j] = j < item.points_b ? item.entry(call.g_init, item.first_b, j) : T(0);
    }
    for_columns([&](int c, int) {
        at.v[c] = 1;
        at.dead_b[c] = 0;
    });
    // Null points are no points of a cloud.
    const int points_x = maximum(0, minimum(rows, item.points_a - first_row));
    const int points_y = maximum(0, minimum(columns, item.points_b - first_column));
    measure_points(team, p.metric, at.x, first_row, points_x, at.y, first_column, points_y, item.points_b);
    // From here on others write into the vectors of all columns.
}

// The cost of the block's rows; by the whole block. The stages take the place of the kernel, which there is none of
// then, and of the partial sums, which other blocks read between the barriers of a pass only.
template <class T>
OTKERN_DEVICE void Sinkhorn<T>::form() {
    if (has_cost) return;
    cost_rows(team, call.problem, item, at.x, at.y, first_row, rows, at.cost, item.m, at.stages);
    has_cost = true;
    // What the tiles of the cost have had no registers for.
    const int n = recomputed(item.n), m = recomputed(item.m);
    Carver carver;
    carver.base = shared_memory();
    at.carve(carver, team, size, n, m, call.problem.metric == Metric::cosine);
    team.slice(n, first_row, rows);
    team.slice(m, first_column, columns);
    if (!exchanged) return;
    exchange(at.row_sums, at.counted_sums);
    exchange(at.v, at.new_v);
}

template <class T>
OTKERN_DEVICE void Sinkhorn<T>::set_eps(T value) {
    eps = value;
    inverse_eps = 1 / eps;
    side_a.set_eps(eps);
    side_b.set_eps(eps);
    const bool entropy = call.problem.entropy;
    for_rows([&](int i) { at.offset_a[i] = entropy ? entropy_offset(at.a[i], eps) : T(0); });
    for_columns([&](int c, int j) { at.offset_b[c] = entropy ? entropy_offset(at.b[j], eps) : T(0); });
    team.sync();
}

template <class T>
OTKERN_DEVICE T Sinkhorn<T>::first_eps() const {
    if (call.eps_start == nullptr || call.max_iter <= 1) return item.reg;
    return maximum(item.reg, static_cast<const T *>(call.eps_start)[item.index]);
}

// ---- one iteration --------------------------------------------------------------------------------------------------

// By every thread over all columns, whose log_ratio is complete. Points that reach nothing have log_ratio -inf.
template <class T>
OTKERN_DEVICE typename Sinkhorn<T>::MassStep Sinkhorn<T>::mass_step() {
    T peak = -infinity<T>();
    for_columns([&](int c, int j) { peak = at.b[j] > 0 ? maximum(at.log_ratio[c], peak) : peak; });
    peak = team.max(peak);
    if (peak == -infinity<T>()) return {0, 0, mass, true};
    T sum = 0;
    for_columns([&](int c, int j) { sum += at.b[j] > 0 ? at.b[j] * exp_of(at.log_ratio[c] - peak) : T(0); });
    const T log_moved = peak + log_of(maximum(team.sum(sum), tiny<T>()));
    const T change = log_of(maximum(mass, tiny<T>())) - log_moved;
    T gap = 0;
    for_columns([&](int c, int j) {
        const T x = at.log_ratio[c];
        // As for g = o at the cap, and any g < o below it.
        gap += at.b[j] * side_b.gap(exp_of(x + change), x < 0 ? T(0) : T(-1), T(0));
    });
    return {exp_of(log_moved), change, team.sum(gap), false};
}

// The column half. False, on every thread alike, when the pass does not count.
template <class T>
OTKERN_DEVICE bool Sinkhorn<T>::column_step(bool in_kernel) {
    if (in_kernel) return kernel_column_step();
    log_column_step();
    return true;
}

// After the last row half: rows without weight follow the final g.
template <class T>
OTKERN_DEVICE void Sinkhorn<T>::finish(bool in_kernel) {
    for_rows([&](int i) {
        if (at.a[i] != 0) return;
        if (in_kernel)
            at.counted_sums[i] = at.row_sums[i];
        else
            at.F[i] = at.new_f[i];
    });
    if (in_kernel) leave_kernel();
    team.sync_all();
}

template <class T>
OTKERN_DEVICE void Sinkhorn<T>::run() {
    // Kernels write into each other's shared memory: every block has to be there.
    team.sync_all();
    read();
    set_eps(item.reg);
    if (partial) {
        for_columns([&](int c, int j) { team.push(at.G + j, minimum(at.G[j], at.offset_b[c])); });
        team.sync_all();
    }
    set_eps(first_eps());
    bool in_kernel = false, enter = true;  // `enter`: at an eps that has not been tried
    bool at_reg = false;                   // the last iteration was done at reg
    int64_t passes = 0;                    // counted passes since K was built
    int64_t log_run = 1, left = log_run;   // log-domain iterations to do before the next attempt
    for (;;) {
        if (!in_kernel) {
            form();
            in_kernel = enter && enter_kernel();
            enter = false;
        }
        const bool last = iterations == call.max_iter, compare = at_reg && (last || call.tol >= 0);
        if (in_kernel)
            kernel_row_step(!last && !item.same, compare);
        else
            log_row_step(!last && !item.same, compare);
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
            set_eps(iterations + 1 == call.max_iter ? item.reg : maximum(item.reg, eps * T(call.eps_factor)));
            in_kernel = false;
            enter = true;
        } else if (in_kernel) {
            if (!item.same) {
                exchange(at.row_sums, at.counted_sums);
                exchange(at.v, at.new_v);
                exchanged = !exchanged;
            }
            ++passes;
        } else if (absorbs && --left <= 0 && iterations < call.max_iter) {
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
}

}  // namespace cuda
}  // namespace otkern
