// Backward: tiles of plan rows, their products with the points, the metric's derivative, sums over the plan.
//
// The gradient of the cost is W (cpu/call.h): dvalue P for the value (envelope theorem), or weights that the caller
// gives. Everything else follows from it. For the value, sums are formed for dvalue = 1 and scaled when they are
// written.
#include <stdexcept>

#include "launch.h"
#include "plan.h"

namespace otkern {
namespace cuda {
namespace {

// The weight in the products with the points, of which W stands at (i, j); for the cosine metric also the row's part
// along itself, sum_j W_ij cos_ij.
template <class T>
OTKERN_DEVICE T product_weight(const PlanTile<T> &tile, int i, int j, T w, T cost, T &along) {
    const Metric metric = tile.arguments.problem.metric;
    // d|x - y| / dx = (x - y) / |x - y|, and 0 where the points coincide.
    if (metric == Metric::euclidean) return cost > 0 ? w / cost : T(0);
    if (metric != Metric::cosine) return w;
    // Products are formed with the points as they are: W_ij / (|x_i| |y_j|).
    along += w * (1 - cost);
    return w * (tile.at.x.inverse_norm[i] * tile.at.y.inverse_norm[j]);
}

// One gradient row, from s_i = sum_j W_ij y_j, or sum_j W_ij (x_i - y_j) where the metric is one of differences.
//   dot: -s   cosine: -(s - x <x, s> / |x|^2), times the power of two of a scaled row   sqeuclidean: 2 s   euclidean: s
template <class T>
OTKERN_DEVICE void write_gradients(const PlanTile<T> &tile, T dvalue) {
    const PlanArguments &arguments = tile.arguments;
    const Problem &p = arguments.problem;
    const Cloud<T> &x = tile.at.x;
    const int64_t first = tile.item.first_a + tile.first;
    const int features = int(p.features);
    const auto write = [&](int i, int k, T sum) {
        T gradient = sum * dvalue;
        if (p.metric == Metric::cosine) {
            const T inverse = x.inverse_norm[i];
            const T point = x.coordinate(tile.first + i, i, k);
            gradient = (sum - point * (tile.at.along[i] * inverse * inverse)) * (-dvalue * x.scale(i));
        } else if (p.metric == Metric::dot) {
            gradient = -gradient;
        } else if (p.metric == Metric::sqeuclidean) {
            gradient = 2 * gradient;
        }
        store_element(arguments.dx, p.dtype, (first + i) * p.features + k, gradient);
    };
    if (is_of_differences(p.metric))
        weighted_sums<T, true>(tile, tile.at.y, features, write);
    else if constexpr (sizeof(T) == 4)
        matrix_sums(tile, tile.at.y, features, write);
    else
        weighted_sums<T, false>(tile, tile.at.y, features, write);
}

// Zeros in the tile's part of what lies beyond the item's true size, or in all of it; with `no_points` in all gradients
// of the points.
template <class T>
OTKERN_DEVICE void clear_tile(const PlanArguments &arguments, const Item<T> &item, int first, bool everything,
                              bool no_points) {
    const Problem &p = arguments.problem;
    const int n = everything ? 0 : item.n, m = everything ? 0 : item.m;
    const int64_t last = minimum<int64_t>(first + arguments.rows, item.room_a);
    for (int64_t i = first; i < last; ++i) {
        const int64_t row = item.first_a + i, start = i < n ? m : 0;
        if (arguments.dcost)
            for (int64_t j = start + thread_rank(); j < p.max_b; j += block_threads())
                store_element(arguments.dcost, p.dtype, (item.index * p.max_a + i) * p.max_b + j, T(0));
        if (arguments.dx && (i >= n || no_points))
            for (int64_t k = thread_rank(); k < p.features; k += block_threads())
                store_element(arguments.dx, p.dtype, row * p.features + k, T(0));
        if (i < n || thread_rank() != 0) continue;
        if (arguments.sums) static_cast<T *>(arguments.sums)[row] = 0;
        if (arguments.terms) static_cast<T *>(arguments.terms)[row] = 0;
    }
}

template <class T>
OTKERN_KERNEL plan_backward_kernel(OTKERN_ARGUMENT PlanArguments arguments) {
    const Problem &p = arguments.problem;
    const int64_t place = arguments.first_tile + block_index();
    const Item<T> item(p, place / arguments.tiles, false);
    const int first = int(place % arguments.tiles) * arguments.rows;
    const T dvalue = arguments.scale ? T(1) : static_cast<const T *>(arguments.dvalue)[item.index];
    const bool nothing = item.n == 0 || item.m == 0 || dvalue == 0;
    // Of a cloud with itself the caller counts the gradient of one side twice.
    const bool no_points = item.same && arguments.exchanged && arguments.scale == nullptr;
    clear_tile(arguments, item, first, nothing, no_points);
    if (nothing || first >= item.n) return;
    PlanTile<T> tile(arguments, item, first);
    tile.read();
    const bool given = arguments.scale != nullptr;
    tile.for_entries(
        [&](int i, const PlanRow<T> &row, int j, const Entry<T> &entry, T cost, T &along) {
            if (arguments.dcost)
                store_element(arguments.dcost, p.dtype, (item.index * p.max_a + row.row) * p.max_b + j,
                              entry.plan * dvalue);
            return product_weight(tile, i, j, entry.plan, cost, along);
        },
        [&](const PlanRow<T> &row, T sum, T entropy) {
            // Where the marginals are constraints a point without weight has a ratio of 1.
            const T ratio = !given && row.a == 0 && p.kind == Kind::balanced ? T(1) : sum;
            if (arguments.sums) static_cast<T *>(arguments.sums)[item.first_a + row.row] = ratio;
            const T term = given || row.a != 0 ? entropy : T(0);
            if (arguments.terms) static_cast<T *>(arguments.terms)[item.first_a + row.row] = term;
        });
    if (arguments.dx && !no_points) write_gradients(tile, dvalue);
}

struct SumArguments {
    Problem problem;
    const void *terms = nullptr;
    void *out = nullptr;
    bool weighted = false;
};

// sum_reg from the rows' terms; in double, by one warp an item.
template <class T>
OTKERN_KERNEL sum_terms_kernel(OTKERN_ARGUMENT SumArguments arguments) {
    const Item<T> item(arguments.problem, block_index(), false);
    double sum = 0;
    for (int i = thread_rank(); i < item.n; i += kWarp) {
        const T weight = arguments.weighted ? item.weight(arguments.problem.a, item.first_a, item.points_a, i) : T(1);
        sum += double(weight) * double(item.entry(arguments.terms, item.first_a, i));
    }
    sum = warp_sum(sum);
    if (thread_rank() == 0) static_cast<T *>(arguments.out)[item.index] = T(sum);
}

PlanArguments rows_of(const BackwardCall &call) {
    PlanArguments arguments;
    arguments.problem = call.problem;
    arguments.f = call.f;
    arguments.g = call.g;
    arguments.dvalue = call.dvalue;
    arguments.scale = call.scale;
    arguments.cost_scale = call.cost_scale;
    arguments.dense = call.dense;
    arguments.row = call.row;
    arguments.col = call.col;
    arguments.dense_row = call.problem.max_b;
    arguments.dense_col = 1;
    return arguments;
}

PlanArguments columns_of(const BackwardCall &call) {
    PlanArguments arguments = rows_of(call);
    arguments.problem = exchanged(call.problem);
    arguments.exchanged = true;
    arguments.f = call.g;
    arguments.g = call.f;
    arguments.row = call.col;
    arguments.col = call.row;
    arguments.dense_row = 1;
    arguments.dense_col = call.problem.max_b;
    return arguments;
}

void launch_backward(const PlanArguments &arguments, const Limits &limits, const Stream &stream) {
    launch_plan(arguments, limits, [&](const PlanArguments &part, const Grid &grid) {
        if (part.problem.dtype == Dtype::f64)
            launch("plan_backward_kernel<double>", plan_backward_kernel<double>, grid, part, stream);
        else
            launch("plan_backward_kernel<float>", plan_backward_kernel<float>, grid, part, stream);
    });
}

}  // namespace

int64_t plan_bytes(bool wide, int rows, int64_t m, bool directions) {
    return wide ? plan_bytes_of<double>(rows, m, directions) : plan_bytes_of<float>(rows, m, directions);
}

void backward(const BackwardCall &call, void *terms_reg, const Limits &limits, const Stream &stream) {
    const bool wide = call.problem.dtype == Dtype::f64;
    PlanArguments rows = rows_of(call), columns = columns_of(call);
    rows.dx = call.dx_a;
    rows.dcost = call.dcost;
    rows.sums = call.sum_a;
    rows.terms = call.sum_reg ? terms_reg : nullptr;
    columns.dx = call.dx_b;
    columns.sums = call.sum_b;
    if (rows.dx || rows.dcost || rows.sums || rows.terms) launch_backward(rows, limits, stream);
    if (columns.dx || columns.sums) launch_backward(columns, limits, stream);
    if (call.sum_reg == nullptr) return;
    SumArguments sum;
    sum.problem = call.problem;
    sum.terms = terms_reg;
    sum.out = call.sum_reg;
    sum.weighted = call.scale == nullptr;
    Grid grid;
    grid.blocks = call.problem.batch;
    grid.threads = kWarp;
    if (wide)
        launch("sum_terms_kernel<double>", sum_terms_kernel<double>, grid, sum, stream);
    else
        launch("sum_terms_kernel<float>", sum_terms_kernel<float>, grid, sum, stream);
}

}  // namespace cuda
}  // namespace otkern
