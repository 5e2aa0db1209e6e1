// Products with the plan of one item, P v, P^T v, (P o C) v, (P o C)^T v, and the plan itself where it is asked for.
// Compiled once per SIMD level.
#include "plan.h"

namespace otkern {
namespace OTKERN_LEVEL {
namespace {

// Zeros in an item's part of the dense plans, from the true size on.
template <class T>
void clear_plan(const ApplyCall &call, const Item<T> &item) {
    const Problem &p = call.problem;
    T *out = static_cast<T *>(call.plan) + item.index * p.max_a * p.max_b;
    for (int64_t i = 0; i < p.max_a; ++i)
        for (int64_t j = i < item.n ? item.m : 0; j < p.max_b; ++j) out[i * p.max_b + j] = 0;
}

template <class T>
void plan_item(ApplyCall &call, int64_t index, Team &team) {
    const Item<T> item(call.problem, index);
    if (team.rank == 0) clear_plan(call, item);
    if (item.n == 0 || item.m == 0) return;
    const int64_t panel = panel_size(item, team);
    PlanInputs<T> in;
    T *rows = nullptr;
    const auto carve = [&](Carver &carver) {
        in.carve(carver, item);
        carver.take(rows, panel * item.cols);
    };
    if (!carve_scratch(call, team, carve)) return;
    in.read(item, team, call.f, call.g);
    team.barrier();
    int64_t begin, end;
    for (int64_t first = 0; first < item.n; first += panel) {
        const int64_t count = minimum(panel, item.n - first);
        team.split(round_up(count, kGroup) / kGroup, begin, end);
        begin *= kGroup;
        end = minimum(end * kGroup, count);
        if (begin < end) cost_rows(item, in.clouds, first + begin, first + end, rows + begin * item.cols);
        for (int64_t i = begin; i < end; ++i) {
            T *row = rows + i * item.cols;
            plan_row(item, in, first + i, false, row, row);
            T *out = static_cast<T *>(call.plan) + (index * call.problem.max_a + first + i) * call.problem.max_b;
            for (int64_t j = 0; j < item.m; ++j) out[j] = row[j];
        }
        team.barrier();  // the next panel may be split in other places
    }
}

template <class T>
void apply_item(ApplyCall &call, int64_t index, Team &team) {
    constexpr int width = Simd<T>::width;
    const Item<T> item(call.problem, index);
    const int64_t channels = call.channels, stride = row_stride<T>(channels), length = padded<T>(channels);
    T *out = static_cast<T *>(call.out) + (call.transpose ? item.first_b : item.first_a) * channels;
    const T *v = static_cast<const T *>(call.v) + (call.transpose ? item.first_a : item.first_b) * channels;
    const int64_t results = call.transpose ? item.m : item.n, terms = call.transpose ? item.n : item.m;
    const int64_t room = call.transpose ? item.room_b : item.room_a;
    const bool empty = item.n == 0 || item.m == 0;
    if (team.rank == 0)
        for (int64_t k = (empty ? 0 : results) * channels; k < room * channels; ++k) out[k] = 0;
    if (empty) return;

    const int64_t panel = panel_size(item, team);
    PlanInputs<T> in;
    T *cost = nullptr, *plan = nullptr, *values = nullptr, *sums = nullptr;
    const T **value_rows = nullptr;
    const auto carve = [&](Carver &carver) {
        in.carve(carver, item);
        carver.take(cost, panel * item.cols);
        carver.take(plan, panel * item.cols);
        carver.take(values, terms * stride);
        carver.take(value_rows, terms);
        carver.take(sums, round_up(call.transpose ? item.m : panel, kGroup) * stride);
    };
    if (!carve_scratch(call, team, carve)) return;

    in.read(item, team, call.f, call.g);
    int64_t begin, end;
    team.split(terms, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        read_row(v + j * channels, 1, channels, values + j * stride);
        for (int64_t k = channels; k < stride; ++k) values[j * stride + k] = 0;
        value_rows[j] = values + j * stride;
    }
    team.barrier();
    const auto write = [&](const T *row, int64_t i) {
        for (int64_t k = 0; k < channels; ++k) out[i * channels + k] = row[k];
    };
    for (int64_t first = 0; first < item.n; first += panel) {
        const int64_t count = minimum(panel, item.n - first), used = round_up(count, kGroup);
        team.split(used / kGroup, begin, end);
        begin *= kGroup;
        end *= kGroup;
        if (begin < end)
            cost_rows(item, in.clouds, first + begin, minimum(first + end, item.n), cost + begin * item.cols);
        for (int64_t i = begin; i < end; ++i) {
            const T *c = cost + i * item.cols;
            T *p = plan + i * item.cols;
            plan_row(item, in, first + i, false, c, p);
            if (!call.times_cost) continue;
            for (int64_t j = 0; j < item.cols; j += width) {
                const Vec<T> mass = load(p + j);
                store(p + j, select<T>(mass > 0, mass * load(c + j), Vec<T>{}));  // a masked entry: 0 * inf
            }
        }
        if (!call.transpose) {
            if (begin < end)
                weighted_sums<T, false>(plan + begin * item.cols, item.cols, 1, nullptr, end - begin, value_rows,
                                        item.m, length, false, sums + begin * stride, stride);
            for (int64_t i = begin; i < minimum(end, count); ++i) write(sums + i * stride, first + i);
            continue;
        }
        team.barrier();
        team.split(round_up(item.m, kGroup) / kGroup, begin, end);
        if (begin < end)
            weighted_sums<T, false>(plan + begin * kGroup, 1, item.cols, nullptr, (end - begin) * kGroup,
                                    value_rows + first, count, length, first > 0, sums + begin * kGroup * stride,
                                    stride);
        team.barrier();
    }
    if (!call.transpose) return;
    for (int64_t j = begin * kGroup; j < minimum(end * kGroup, item.m); ++j) write(sums + j * stride, j);
}

}  // namespace

void apply(ApplyCall &call, int64_t item, Team &team) {
    const bool wide = call.problem.dtype == Dtype::f64;
    if (call.plan)
        (wide ? plan_item<double> : plan_item<float>)(call, item, team);
    else
        (wide ? apply_item<double> : apply_item<float>)(call, item, team);
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
