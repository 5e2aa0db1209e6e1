// Products with the plan, P v, P^T v, (P o C) v, (P o C)^T v, and the plan itself where it is asked for.
#include "launch.h"
#include "plan.h"

namespace otkern {
namespace cuda {
namespace {

template <class T>
OTKERN_KERNEL plan_apply_kernel(OTKERN_ARGUMENT PlanArguments arguments) {
    const Problem &p = arguments.problem;
    const int64_t place = arguments.first_tile + block_index();
    const Item<T> item(p, place / arguments.tiles, false);
    const int first = int(place % arguments.tiles) * arguments.rows;
    T *const out = static_cast<T *>(arguments.out), *const plan = static_cast<T *>(arguments.plan);
    const bool empty = item.n == 0 || item.m == 0;
    const int64_t last = minimum<int64_t>(first + arguments.rows, item.room_a);
    for (int64_t i = first; i < last; ++i) {
        const bool real = !empty && i < item.n;
        for (int64_t j = (real ? item.m : 0) + thread_rank(); plan && j < p.max_b; j += block_threads())
            plan[(item.index * p.max_a + i) * p.max_b + j] = 0;
        for (int64_t k = thread_rank(); out && !real && k < arguments.channels; k += block_threads())
            out[(item.first_a + i) * arguments.channels + k] = 0;
    }
    if (empty || first >= item.n) return;
    PlanTile<T> tile(arguments, item, first);
    tile.read();
    tile.for_entries(
        [&](int, const PlanRow<T> &row, int j, const Entry<T> &entry, T cost, T &) {
            if (plan) plan[(item.index * p.max_a + row.row) * p.max_b + j] = entry.plan;
            if (!arguments.times_cost) return entry.plan;
            return entry.plan > 0 ? entry.plan * cost : T(0);  // a masked entry: 0 * inf
        },
        [](const PlanRow<T> &, T, T) {});
    if (out == nullptr) return;
    Cloud<T> values;
    values.data = arguments.v;
    values.dtype = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
    values.offset = item.first_b * arguments.channels;
    values.stride_row = arguments.channels;
    values.stride_col = 1;
    const int64_t row = item.first_a + first;
    weighted_sums<T, false>(tile, values, int(arguments.channels),
                            [&](int i, int k, T sum) { out[(row + i) * arguments.channels + k] = sum; });
}

}  // namespace

void apply(const ApplyCall &call, const Limits &limits, const Stream &stream) {
    PlanArguments arguments;
    const bool exchange = call.transpose && call.plan == nullptr;
    arguments.problem = exchange ? exchanged(call.problem) : call.problem;
    arguments.f = exchange ? call.g : call.f;
    arguments.g = exchange ? call.f : call.g;
    arguments.v = call.v;
    arguments.out = call.plan ? nullptr : call.out;
    arguments.plan = call.plan;
    arguments.channels = call.channels;
    arguments.times_cost = call.times_cost;
    launch_plan(arguments, limits, [&](const PlanArguments &part, const Grid &grid) {
        if (part.problem.dtype == Dtype::f64)
            launch("plan_apply_kernel<double>", plan_apply_kernel<double>, grid, part, stream);
        else
            launch("plan_apply_kernel<float>", plan_apply_kernel<float>, grid, part, stream);
    });
}

}  // namespace cuda
}  // namespace otkern
