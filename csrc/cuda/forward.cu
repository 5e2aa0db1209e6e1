// Forward of one item by one cluster: cost, iterations, gauge, value; one launch for each size class.
#include "classes.h"
#include "kernel_domain.h"
#include "log_domain.h"
#include "self.h"

namespace otkern {
namespace cuda {
namespace {

// The dual objective after a column half, A(f) + B(g) - reg (sum P - R), of which R is the mass of the reference
// measure and A, B are `Side::dual`; lam mass joins in a partial problem. Sums over weights and potentials are scalars
// of the result: kept in double.
template <class T>
OTKERN_DEVICE void write_results(const ForwardCall &call, const Item<T> &item, Sinkhorn<T> &solver) {
    Team &team = solver.team;
    const ForwardMemory<T> &at = solver.at;
    const Side<T> &side_a = solver.side_a, &side_b = solver.side_b;
    // dual_a, dual_b, sum a, sum b, <a, f>, <b, g>, the mass of the columns, mass that reaches nothing on either side
    double sums[9] = {};
    for (int i = team.thread; i < solver.rows; i += team.threads) {
        const T weight = at.a[i], f = at.F[i];
        const bool dead = at.dead_a[i] != 0;
        sums[0] += side_a.dual(weight, f, at.offset_a[i], dead);
        sums[2] += weight;
        sums[4] += weight != 0 ? double(weight) * double(f) : 0;
        sums[7] += weight > 0 && dead ? 1 : 0;
    }
    for (int c = team.thread; c < solver.columns; c += team.threads) {
        const T weight = at.b[solver.first_column + c], g = at.G[solver.first_column + c];
        const bool dead = at.dead_b[c] != 0;
        sums[1] += side_b.dual(weight, g, at.offset_b[c], dead);
        sums[3] += weight;
        sums[5] += weight != 0 ? double(weight) * double(g) : 0;
        sums[6] += side_b.mass(weight, g, at.offset_b[c], dead);
        sums[8] += weight > 0 && dead ? 1 : 0;
    }
    team.reduce(sums, 0x1ff);
    const double reg = item.reg, sum_a = sums[2], sum_b = sums[3];
    const double moved = solver.partial ? double(solver.mass) : item.same ? sum_b + solver.excess : sums[6];
    // Only two constraints leave the potentials a gauge: <a, f + t> = <b, g - t>.
    T shift = 0;
    if (side_a.is_constraint() && side_b.is_constraint() && sum_a + sum_b > 0)
        shift = T((sums[5] - sums[4]) / (sum_a + sum_b));
    double value = sums[0] + sums[1] + double(shift) * (sum_a - sum_b) -
                   reg * (moved - (call.problem.entropy ? 0 : sum_a) * sum_b);
    if (solver.partial) value += double(solver.lam) * double(solver.mass);
    if ((side_a.is_constraint() && sums[7] > 0) || (side_b.is_constraint() && sums[8] > 0) || solver.nothing_moves)
        value = infinity<double>();
    // lam in equal parts, so that P = a b exp((f + g - C) / reg) in every kind.
    const T half = solver.lam / 2;
    T *multipliers = static_cast<T *>(call.multipliers) + 2 * item.index;
    const bool null = item.n > item.points_a;
    for (int i = team.thread; i < solver.rows; i += team.threads) {
        const int row = solver.first_row + i;
        if (row < item.points_a)
            static_cast<T *>(call.f)[item.first_a + row] = at.F[i] + (shift + half);
        else
            multipliers[0] = at.F[i] + shift;
    }
    for (int c = team.thread; c < solver.columns; c += team.threads) {
        const int j = solver.first_column + c;
        if (j < item.points_b)
            static_cast<T *>(call.g)[item.first_b + j] = at.G[j] + (half - shift);
        else
            multipliers[1] = at.G[j] - shift;
    }
    clear<T>(team, call.f, item.first_a, item.points_a, item.room_a);
    clear<T>(team, call.g, item.first_b, item.points_b, item.room_b);
    if (team.rank != 0 || team.thread != 0) return;
    if (!null) {
        multipliers[0] = solver.lam;
        multipliers[1] = 0;
    }
    static_cast<T *>(call.value)[item.index] = T(value);
    static_cast<T *>(call.marginal_error)[item.index] = T(solver.error);
    call.n_iters[item.index] = int32_t(solver.iterations);
}

// An item with an empty side: no iteration; mass on the other side has nowhere to go, or is let go at its price.
template <class T>
OTKERN_DEVICE void write_empty(const ForwardCall &call, const Item<T> &item, Team &team) {
    const Problem &p = call.problem;
    const Side<T> side_a(p, item, 0), side_b(p, item, 1);
    const double mass_a = double(item.mass(p.a, item.first_a, item.n, team));
    const double mass_b = double(item.mass(p.b, item.first_b, item.m, team));
    clear<T>(team, call.f, item.first_a, 0, item.room_a);
    clear<T>(team, call.g, item.first_b, 0, item.room_b);
    if (team.rank != 0 || team.thread != 0) return;
    double value = (mass_a > 0 ? double(side_a.rho) * mass_a : 0) + (mass_b > 0 ? double(side_b.rho) * mass_b : 0);
    double error = (side_a.is_constraint() ? mass_a : 0) + (side_b.is_constraint() ? mass_b : 0);
    if (p.kind == Kind::partial) {
        value = infinity<double>();
        error = double(item.relaxation(p, 0));
    }
    T *multipliers = static_cast<T *>(call.multipliers) + 2 * item.index;
    multipliers[0] = multipliers[1] = 0;
    static_cast<T *>(call.value)[item.index] = T(value);
    static_cast<T *>(call.marginal_error)[item.index] = T(error);
    call.n_iters[item.index] = 0;
}

template <class T>
OTKERN_BOTH int64_t bytes_of(const SizeClass &size, int64_t n, int64_t m, bool directions) {
    ForwardMemory<T> memory;
    Carver carver;
    Team team;
    memory.carve(carver, team, size, n, m, directions);
    return carver.used;
}

template <class T>
OTKERN_KERNEL sinkhorn_forward_kernel(OTKERN_ARGUMENT ForwardArguments arguments) {
    const ForwardCall &call = arguments.call;
    const int64_t index = arguments.first_item + block_index() / arguments.size.cluster;
    const Item<T> item(call.problem, index, call.problem.kind == Kind::null);
    if (!is_of_class(arguments, item, [&](const SizeClass &size, int64_t n, int64_t m) {
            return bytes_of<T>(size, n, m, call.problem.metric == Metric::cosine);
        }))
        return;
    Carver carver;
    carver.base = shared_memory();
    if (item.n == 0 || item.m == 0) {
        Team team;
        team.carve(carver);
        team.join();
        write_empty(call, item, team);
        return;
    }
    Sinkhorn<T> solver(arguments, item, carver);
    solver.run();
    // Where the item's results go is no matter until here: registers.
    const int place = recomputed(int(block_index() / arguments.size.cluster));
    write_results(call, Item<T>(call.problem, arguments.first_item + place, call.problem.kind == Kind::null), solver);
}

}  // namespace

// The forward's kernel is the one with the largest clusters.
Limits limits_of_device(int device) {
    return device_limits(device, sinkhorn_forward_kernel<float>);
}

int64_t forward_bytes(bool wide, const SizeClass &size, int64_t n, int64_t m, bool directions) {
    return wide ? bytes_of<double>(size, n, m, directions) : bytes_of<float>(size, n, m, directions);
}

void forward(const ForwardCall &call, bool exact_sizes, bool log_domain_only, const Limits &limits,
             const Stream &stream) {
    const Problem &p = call.problem;
    const bool wide = p.dtype == Dtype::f64, directions = p.metric == Metric::cosine, null = p.kind == Kind::null;
    ForwardArguments arguments;
    arguments.call = call;
    arguments.log_domain_only = log_domain_only;
    launch_classes(
        "sinkhorn_forward_kernel", arguments, forward_classes(limits), limits, kForwardRegisters, p.max_a + null,
        p.max_b + null, exact_sizes,
        [&](const SizeClass &size, int64_t n, int64_t m) { return forward_bytes(wide, size, n, m, directions); },
        [&](const ForwardArguments &part, const Grid &grid) {
            if (wide)
                launch("sinkhorn_forward_kernel<double>", sinkhorn_forward_kernel<double>, grid, part, stream);
            else
                launch("sinkhorn_forward_kernel<float>", sinkhorn_forward_kernel<float>, grid, part, stream);
        });
}

}  // namespace cuda
}  // namespace otkern
