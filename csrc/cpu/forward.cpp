// Forward of one item: cost, iterations, gauge, value. Compiled once per SIMD level.
#include "sinkhorn.h"

namespace otkern {
namespace OTKERN_LEVEL {
namespace {

template <class T>
void write_padded(void *out, int64_t first, int64_t room, const T *from, int64_t count, T shift) {
    T *to = static_cast<T *>(out) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] + shift;
    for (int64_t i = count; i < room; ++i) to[i] = 0;
}

// Sums over weights and potentials are scalars of the result: kept in double.
template <class T>
double weighted(const T *weights, const T *potential, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i)
        if (weights[i] != 0) sum += double(weights[i]) * double(potential[i]);
    return sum;
}

template <class T>
double total(const T *weights, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weights[i];
    return sum;
}

// Mass on a side whose entries all vanish: there is no plan.
template <class T>
bool stranded(const T *weights, const T *dead, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (weights[i] > 0 && dead[i] != 0) return true;
    return false;
}

// value = <a, f> + <b, g> - reg (sum b - sum a sum b), the dual objective after a column half.
template <class T>
void write_results(ForwardCall &call, const Item<T> &item, const Sinkhorn<T> &solver) {
    const double reg = item.reg;
    const double sum_a = total(solver.a, item.n), sum_b = total(solver.b, item.m);
    const double af = weighted(solver.a, solver.F, item.n), bg = weighted(solver.b, solver.G, item.m);
    // <a, f + t> = <b, g - t>
    const T shift = sum_a + sum_b > 0 ? T((bg - af) / (sum_a + sum_b)) : T(0);
    double value = af + bg + double(shift) * (sum_a - sum_b) - reg * (sum_b - sum_a * sum_b);
    if (stranded(solver.a, solver.dead_a, item.n) || stranded(solver.b, solver.dead_b, item.m)) value = __builtin_inf();
    write_padded(call.f, item.first_a, item.room_a, solver.F, item.n, shift);
    write_padded(call.g, item.first_b, item.room_b, solver.G, item.m, T(-shift));
    static_cast<T *>(call.value)[item.index] = T(value);
    static_cast<T *>(call.marginal_error)[item.index] = T(solver.error);
    call.n_iters[item.index] = int32_t(solver.iterations);
}

// An item with an empty side: no iteration; mass on the other side has nowhere to go.
template <class T>
void write_empty(ForwardCall &call, const Item<T> &item) {
    const Problem &p = call.problem;
    double mass = 0;
    const T *a = static_cast<const T *>(p.a), *b = static_cast<const T *>(p.b);
    for (int64_t i = 0; i < item.n; ++i) mass += a ? double(a[item.first_a + i]) : 1.0 / double(item.n);
    for (int64_t j = 0; j < item.m; ++j) mass += b ? double(b[item.first_b + j]) : 1.0 / double(item.m);
    write_padded<T>(call.f, item.first_a, item.room_a, nullptr, 0, 0);
    write_padded<T>(call.g, item.first_b, item.room_b, nullptr, 0, 0);
    static_cast<T *>(call.value)[item.index] = mass > 0 ? infinity<T>() : T(0);
    static_cast<T *>(call.marginal_error)[item.index] = T(mass);
    call.n_iters[item.index] = 0;
}

// The smallest item wins, whichever thread comes first.
void report(ForwardCall &call, int64_t item, int found) {
    const int64_t mine = item * 4 + (found & 1 ? 0 : found & 2 ? 1 : 2);
    int64_t before = __atomic_load_n(&call.bad_input, __ATOMIC_RELAXED);
    while ((before < 0 || mine < before) &&
           !__atomic_compare_exchange_n(&call.bad_input, &before, mine, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

template <class T>
void forward_item(ForwardCall &call, int64_t index, Team &team) {
    const Item<T> item(call.problem, index);
    if (item.n == 0 || item.m == 0) {
        if (team.rank == 0) write_empty(call, item);
        return;
    }
    Sinkhorn<T> solver(item, team, call.store_bytes);
    Carver carver;
    solver.carve(carver);
    carver.memory = static_cast<char *>(team.scratch(carver.used));
    if (carver.memory == nullptr) {
        call.out_of_memory = true;
        return;
    }
    carver.used = 0;
    solver.carve(carver);
    const int found = solver.run(call.g_init, call.max_iter, call.tol, call.check);
    if (team.rank != 0) return;
    if (found) report(call, index, found);
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
