// GeomLoss's annealed loop of one item, equation (23), one cluster an item; one launch for each size class.
//
// Every step makes both soft minima from the same pair (f, g), in the log domain, and averages:
//   * rows: a warp makes the soft minimum of a row, which waits until the columns have read the f before;
//   * columns: a thread makes peak and sum of a column over the block's rows; after a barrier of the cluster, the
//     column's owner adds those of the blocks in their order, and gives every block the new g.
// A cloud with itself has f = g: its rows say it all, and a block owns the same points as rows and as columns.
//
// After the last step the sums r of equation (24), which the gradient divides by, have exponents that are rounded once,
// and say how s was rounded.
#include "classes.h"
#include "plan.h"

namespace otkern {
namespace cuda {
namespace {

template <class T>
struct AnnealingMemory {
    T *a, *F, *soft_a;  // of the block's rows
    T *b, *G;           // of all columns
    Cloud<T> x, y;      // the block's rows, all columns
    T *cost;
    T *partial_sums, *partial_peaks;  // of all columns
    char *stages;  // while the cost is formed: in place of the partial sums and of all that lies behind them

    OTKERN_BOTH void carve(Carver &carver, Team &team, const SizeClass &size, int64_t n, int64_t m, bool directions) {
        const int64_t rows = ceil_div(n, size.cluster);
        team.carve(carver);
        carver.take(a, rows);
        carver.take(F, rows);
        carver.take(soft_a, rows);
        carver.take(b, m);
        carver.take(G, m);
        x.carve(carver, int(rows), directions);
        y.carve(carver, int(m), directions);
        carver.take(cost, rows * m);
        Carver over = carver;
        over.take(stages, CostTiles::least_bytes());
        carver.take(partial_sums, m);
        carver.take(partial_peaks, m);
        carver.used = maximum(carver.used, over.used);
    }
};

template <class T>
class Annealing {
  public:
    OTKERN_DEVICE Annealing(const SymmetricArguments &arguments, const Item<T> &item_, Carver &carver)
        : call(arguments.call), item(item_), same(item_.same && item_.n == item_.m) {
        const Problem &p = call.problem;
        at.carve(carver, team, arguments.size, item.n, item.m, p.metric == Metric::cosine);
        team.join();
        at.x.point_at(p, p.x_a, item.offset_a);
        at.y.point_at(p, p.x_b, item.offset_b);
        team.slice(item.n, first_row, rows);
        team.slice(item.m, first_column, columns);
        if (p.kind == Kind::unbalanced) {
            rho_a = item.relaxation(p, 0);
            rho_b = item.relaxation(p, 1);
        }
    }

    OTKERN_DEVICE void run();

  private:
    template <class F>
    OTKERN_DEVICE void for_rows(F function) const {
        for (int i = team.thread; i < rows; i += team.threads) function(i);
    }
    template <class F>
    OTKERN_DEVICE void for_columns(F function) const {
        for (int c = team.thread; c < columns; c += team.threads) function(first_column + c);
    }

    OTKERN_DEVICE void prepare();
    template <bool Exact>
    OTKERN_DEVICE T term(T weight, T potential, T cost, T peak) const;
    template <bool Exact, class F>
    OTKERN_DEVICE void row_sums(F function) const;
    template <bool Exact>
    OTKERN_DEVICE void column_parts() const;
    template <class F>
    OTKERN_DEVICE void column_sums(F function) const;
    OTKERN_DEVICE void step(bool averaged);
    OTKERN_DEVICE void finish();
    OTKERN_DEVICE void write() const;

    OTKERN_DEVICE void set_eps(T value) {
        eps = value;
        inverse_eps = 1 / eps;
    }
    // s from the sum of w exp((h - C - peak) / eps). 0 where nothing counts, and so is r.
    OTKERN_DEVICE T soft_minimum(T peak, T sum) const {
        return sum > 0 ? -peak - eps * log_of(maximum(sum, tiny<T>())) : T(0);
    }
    // r of this s.
    OTKERN_DEVICE T ratio(T peak, T sum, T s) const { return sum > 0 ? sum * exp_of((s + peak) * inverse_eps) : T(0); }
    // Equation (13), and the average with the potential before.
    OTKERN_DEVICE T updated(T potential, T soft_min, T rho, bool averaged) const {
        const T damped = rho < infinity<T>() ? soft_min / (1 + eps / rho) : soft_min;
        return averaged ? (potential + damped) / 2 : damped;
    }

    const SymmetricCall &call;
    const Item<T> &item;
    const bool same;  // a cloud with itself
    AnnealingMemory<T> at;
    Team team;
    int first_row, rows, first_column, columns;  // of the block
    T rho_a = infinity<T>(), rho_b = infinity<T>();
    T eps = 1, inverse_eps = 1;
};

template <class T>
OTKERN_DEVICE void Annealing<T>::prepare() {
    // Kernels write into each other's shared memory: every block has to be there.
    team.sync_all();
    const Problem &p = call.problem;
    for_rows([&](int i) {
        at.a[i] = item.weight(p.a, item.first_a, item.points_a, first_row + i);
        at.F[i] = 0;
    });
    for (int j = team.thread; j < item.m; j += team.threads) {
        at.b[j] = item.weight(p.b, item.first_b, item.points_b, j);
        at.G[j] = 0;
    }
    measure_points(team, p.metric, at.x, first_row, rows, at.y, first_column, columns, item.m);
    cost_rows(team, p, item, at.x, at.y, first_row, rows, at.cost, item.m, at.stages);
    const T floor = T(call.cost_floor);
    for (int e = team.thread; e < rows * item.m; e += team.threads) at.cost[e] = maximum(floor, at.cost[e]);
    team.sync();
}

// ---- a pass over the cost -------------------------------------------------------------------------------------------

// w exp((h - C - peak) / eps). The peak is subtracted in units of the cost, so that a small eps does not amplify the
// rounding of the exponent.
template <class T>
template <bool Exact>
OTKERN_DEVICE T Annealing<T>::term(T weight, T potential, T cost, T peak) const {
    if (!(weight > 0 && cost < infinity<T>())) return 0;
    const T x = Exact ? exponent_of(potential, cost, -peak) : (potential - cost) - peak;
    return weight * exp_of(x * inverse_eps);
}

// function(i, peak, sum) for the block's rows, on one lane.
template <class T>
template <bool Exact, class F>
OTKERN_DEVICE void Annealing<T>::row_sums(F function) const {
    for (int i = team.warp; i < rows; i += team.warps) {
        const T *cost = at.cost + i * item.m;
        T peak = -infinity<T>(), sum = 0;
        for (int j = team.lane; j < item.m; j += kWarp)
            if (at.b[j] > 0) peak = maximum(at.G[j] - cost[j], peak);
        peak = warp_max(peak);
        for (int j = team.lane; j < item.m; j += kWarp) sum += term<Exact>(at.b[j], at.G[j], cost[j], peak);
        sum = warp_sum(sum);
        if (team.lane == 0) function(i, peak, sum);
    }
}

// Peaks and sums of the columns over the block's rows.
template <class T>
template <bool Exact>
OTKERN_DEVICE void Annealing<T>::column_parts() const {
    for (int j = team.thread; j < item.m; j += team.threads) {
        T peak = -infinity<T>(), sum = 0;
        for (int i = 0; i < rows; ++i)
            if (at.a[i] > 0) peak = maximum(at.F[i] - at.cost[i * item.m + j], peak);
        for (int i = 0; i < rows; ++i) sum += term<Exact>(at.a[i], at.F[i], at.cost[i * item.m + j], peak);
        at.partial_peaks[j] = peak;
        at.partial_sums[j] = sum;
    }
}

// function(j, peak, sum) for the block's columns, after a barrier of the team.
template <class T>
template <class F>
OTKERN_DEVICE void Annealing<T>::column_sums(F function) const {
    for_columns([&](int j) {
        T peak = -infinity<T>(), sum = 0;
        for (int block = 0; block < team.size; ++block)
            peak = maximum(map_shared(at.partial_peaks + j, block)[0], peak);
        const T origin = peak > -infinity<T>() ? peak : T(0);  // no -inf - -inf below
        for (int block = 0; block < team.size; ++block)
            sum += map_shared(at.partial_sums + j, block)[0] *
                   exp_of((map_shared(at.partial_peaks + j, block)[0] - origin) * inverse_eps);
        function(j, peak, sum);
    });
}

// ---- the ladder -----------------------------------------------------------------------------------------------------

// Both updates at eps. Ends in step.
template <class T>
OTKERN_DEVICE void Annealing<T>::step(bool averaged) {
    row_sums<false>([&](int i, T peak, T sum) { at.soft_a[i] = soft_minimum(peak, sum); });
    if (!same) column_parts<false>();
    team.sync_all();  // from here on, and from the first of these, blocks write into each other's shared memory
    for_rows([&](int i) {
        at.F[i] = updated(at.F[i], at.soft_a[i], rho_a, averaged);
        if (same) team.push(at.G + first_row + i, at.F[i]);
    });
    if (!same)
        column_sums([&](int j, T peak, T sum) {
            team.push(at.G + j, updated(at.G[j], soft_minimum(peak, sum), rho_b, averaged));
        });
    team.sync_all();
}

// The last soft minima and their r, straight to where they are wanted.
template <class T>
OTKERN_DEVICE void Annealing<T>::finish() {
    const auto put_a = [&](int i, T s, T r) {
        static_cast<T *>(call.s_a)[item.first_a + i] = s;
        static_cast<T *>(call.r_a)[item.first_a + i] = r;
    };
    const auto put_b = [&](int j, T s, T r) {
        static_cast<T *>(call.s_b)[item.first_b + j] = s;
        static_cast<T *>(call.r_b)[item.first_b + j] = r;
    };
    row_sums<true>([&](int i, T peak, T sum) {
        const T s = soft_minimum(peak, sum), r = ratio(peak, sum, s);
        put_a(first_row + i, s, r);
        if (same) put_b(first_row + i, s, r);
    });
    if (same) return;
    column_parts<true>();
    team.sync_all();
    column_sums([&](int j, T peak, T sum) {
        const T s = soft_minimum(peak, sum);
        put_b(j, s, ratio(peak, sum, s));
    });
    team.sync_all();
}

template <class T>
OTKERN_DEVICE void Annealing<T>::write() const {
    for_rows([&](int i) { static_cast<T *>(call.f)[item.first_a + first_row + i] = at.F[i]; });
    for_columns([&](int j) { static_cast<T *>(call.g)[item.first_b + j] = at.G[j]; });
    void *const over_rows[] = {call.s_a, call.f, call.r_a}, *const over_columns[] = {call.s_b, call.g, call.r_b};
    OTKERN_UNROLL
    for (int k = 0; k < 3; ++k) {
        clear<T>(team, over_rows[k], item.first_a, item.n, item.room_a);
        clear<T>(team, over_columns[k], item.first_b, item.m, item.room_b);
    }
}

template <class T>
OTKERN_DEVICE void Annealing<T>::run() {
    prepare();
    const T first = static_cast<const T *>(call.eps_start)[item.index];
    const int64_t between = maximum<int64_t>(call.n_steps[item.index], 0);
    double on_the_way = first;
    for (int64_t k = 0; k < between + 3; ++k) {
        set_eps(k < 2 ? first : k < between + 2 ? T(on_the_way) : item.reg);
        step(k > 0);
        if (k >= 2) on_the_way *= call.eps_factor;
    }
    finish();
    write();
}

template <class T>
OTKERN_BOTH int64_t bytes_of(const SizeClass &size, int64_t n, int64_t m, bool directions) {
    AnnealingMemory<T> memory;
    Team team;
    Carver carver;
    memory.carve(carver, team, size, n, m, directions);
    return carver.used;
}

// An item with an empty side has no potentials: zeros.
template <class T>
OTKERN_DEVICE void write_empty(const SymmetricCall &call, const Item<T> &item) {
    Team team;
    team.join();
    void *const over_rows[] = {call.s_a, call.f, call.r_a}, *const over_columns[] = {call.s_b, call.g, call.r_b};
    OTKERN_UNROLL
    for (int k = 0; k < 3; ++k) {
        clear<T>(team, over_rows[k], item.first_a, 0, item.room_a);
        clear<T>(team, over_columns[k], item.first_b, 0, item.room_b);
    }
}

template <class T>
OTKERN_KERNEL symmetric_kernel(OTKERN_ARGUMENT SymmetricArguments arguments) {
    const Problem &p = arguments.call.problem;
    const Item<T> item(p, arguments.first_item + block_index() / arguments.size.cluster, false);
    if (!is_of_class(arguments, item, [&](const SizeClass &size, int64_t n, int64_t m) {
            return bytes_of<T>(size, n, m, p.metric == Metric::cosine);
        }))
        return;
    if (item.n == 0 || item.m == 0) {
        write_empty(arguments.call, item);
        return;
    }
    Carver carver;
    carver.base = shared_memory();
    Annealing<T> loop(arguments, item, carver);
    loop.run();
}

}  // namespace

int64_t symmetric_bytes(bool wide, const SizeClass &size, int64_t n, int64_t m, bool directions) {
    return wide ? bytes_of<double>(size, n, m, directions) : bytes_of<float>(size, n, m, directions);
}

void symmetric(const SymmetricCall &call, bool exact_sizes, const Limits &limits, const Stream &stream) {
    const Problem &p = call.problem;
    const bool wide = p.dtype == Dtype::f64, directions = p.metric == Metric::cosine;
    SymmetricArguments arguments;
    arguments.call = call;
    launch_classes(
        "symmetric_kernel", arguments, implicit_classes(limits), limits, kOtherRegisters, p.max_a, p.max_b, exact_sizes,
        [&](const SizeClass &size, int64_t n, int64_t m) { return symmetric_bytes(wide, size, n, m, directions); },
        [&](const SymmetricArguments &part, const Grid &grid) {
            if (wide)
                launch("symmetric_kernel<double>", symmetric_kernel<double>, grid, part, stream);
            else
                launch("symmetric_kernel<float>", symmetric_kernel<float>, grid, part, stream);
        });
}

}  // namespace cuda
}  // namespace otkern
