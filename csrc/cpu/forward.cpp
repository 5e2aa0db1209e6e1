// Forward of one item: cost, iterations, gauge, value. Compiled once per SIMD level.
#include "kernel_domain.h"
#include "log_domain.h"
#include "self.h"

namespace otkern {
namespace OTKERN_LEVEL {
namespace {

// Sums over weights and potentials are scalars of the result: kept in double.
template <class T>
double total(const T *weights, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weights[i];
    return sum;
}

template <class T>
double weighted(const T *weights, const T *potential, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i)
        if (weights[i] != 0) sum += double(weights[i]) * double(potential[i]);
    return sum;
}

// Mass on a side whose entries all vanish: there is no plan.
template <class T>
bool stranded(const T *weights, const T *dead, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (weights[i] > 0 && dead[i] != 0) return true;
    return false;
}

// The dual objective after a column half, A(f) + B(g) - reg (sum P - R), of which R is the mass of the reference
// measure and A, B are `Side::dual`; lam mass joins in a partial problem.
template <class T>
void write_results(ForwardCall &call, const Item<T> &item, const Sinkhorn<T> &solver) {
    const double reg = item.reg;
    const bool partial = item.problem.kind == Kind::partial;
    const Side<T> &rows = solver.side_a, &columns = solver.side_b;
    const double dual_a = rows.dual(solver.a, solver.F, solver.offset_a, solver.dead_a, item.n);
    const double dual_b = columns.dual(solver.b, solver.G, solver.offset_b, solver.dead_b, item.m);
    const double sum_a = total(solver.a, item.n), sum_b = total(solver.b, item.m);
    double moved = solver.mass;
    if (item.same)
        moved = sum_b + solver.excess;
    else if (!partial)
        moved = columns.mass(solver.b, solver.G, solver.offset_b, solver.dead_b, item.m);
    // Only two constraints leave the potentials a gauge: <a, f + t> = <b, g - t>.
    T shift = 0;
    if (rows.is_constraint() && columns.is_constraint() && sum_a + sum_b > 0)
        shift = T((weighted(solver.b, solver.G, item.m) - weighted(solver.a, solver.F, item.n)) / (sum_a + sum_b));
    double value =
        dual_a + dual_b + double(shift) * (sum_a - sum_b) - reg * (moved - (item.problem.entropy ? 0 : sum_a) * sum_b);
    if (partial) value += double(solver.lam) * double(solver.mass);
    if ((rows.is_constraint() && stranded(solver.a, solver.dead_a, item.n)) ||
        (columns.is_constraint() && stranded(solver.b, solver.dead_b, item.m)) || solver.nothing_moves)
        value = __builtin_inf();
    // lam in equal parts, so that P = a b exp((f + g - C) / reg) in every kind.
    const T half = solver.lam / 2;
    write_padded(call.f, item.first_a, item.room_a, solver.F, item.points_a, shift + half);
    write_padded(call.g, item.first_b, item.room_b, solver.G, item.points_b, half - shift);
    T *multipliers = static_cast<T *>(call.multipliers) + 2 * item.index;
    const bool null = item.n > item.points_a;
    multipliers[0] = null ? solver.F[item.points_a] + shift : solver.lam;
    multipliers[1] = null ? solver.G[item.points_b] - shift : T(0);
    static_cast<T *>(call.value)[item.index] = T(value);
    static_cast<T *>(call.marginal_error)[item.index] = T(solver.error);
    call.n_iters[item.index] = int32_t(solver.iterations);
}

// An item with an empty side: no iteration; mass on the other side has nowhere to go, or is let go at its price.
template <class T>
void write_empty(ForwardCall &call, const Item<T> &item) {
    const Problem &p = call.problem;
    const Side<T> sides[] = {Side<T>(item, 0), Side<T>(item, 1)};
    const double masses[] = {double(item.mass(p.a, item.first_a, item.n)),
                             double(item.mass(p.b, item.first_b, item.m))};
    double value = 0, error = 0;
    for (int k = 0; k < 2; ++k) {
        if (masses[k] > 0) value += double(sides[k].rho) * masses[k];
        if (sides[k].is_constraint()) error += masses[k];
    }
    if (p.kind == Kind::partial) {
        value = __builtin_inf();
        error = double(item.relaxation(0));
    }
    write_padded<T>(call.f, item.first_a, item.room_a, nullptr, 0);
    write_padded<T>(call.g, item.first_b, item.room_b, nullptr, 0);
    T *multipliers = static_cast<T *>(call.multipliers) + 2 * item.index;
    multipliers[0] = multipliers[1] = 0;
    static_cast<T *>(call.value)[item.index] = T(value);
    static_cast<T *>(call.marginal_error)[item.index] = T(error);
    call.n_iters[item.index] = 0;
}

template <class T>
void forward_item(ForwardCall &call, int64_t index, Team &team) {
    const Item<T> item(call.problem, index, call.problem.kind == Kind::null);
    if (item.n == 0 || item.m == 0) {
        if (team.rank == 0) write_empty(call, item);
        return;
    }
    Sinkhorn<T> solver(item, team, call.store_bytes);
    if (!carve_scratch(call, team, [&](Carver &carver) { solver.carve(carver); })) return;
    const int found = solver.run(call);
    if (team.rank != 0) return;
    if (found) report_bad_input(call.bad_input, index, found);
    write_results(call, item, solver);
}

}  // namespace

void forward(ForwardCall &call, int64_t item, Team &team) {
    if (call.problem.dtype == Dtype::f64)
        forward_item<double>(call, item, team);
    else
        forward_item<float>(call, item, team);
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
