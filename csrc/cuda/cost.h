// Slices of an item's cost, formed from the points in tiles.
//
// Inner products are made in the matrix units, but for fp64; all else by multiply-adds in the dtype of the arithmetic.
#pragma once

#include "sums.h"

namespace otkern {
namespace cuda {

// From the sum over features at (i, j); the same number at (j, i) of the exchanged clouds.
template <class T>
OTKERN_DEVICE T cost_of(Metric metric, const Cloud<T> &a, const Cloud<T> &b, int i, int j, T sum) {
    if (metric == Metric::cosine) return 1 - sum * (a.inverse_norm[i] * b.inverse_norm[j]);
    if (metric == Metric::dot) return -sum;
    return metric == Metric::euclidean ? root_of(sum) : sum;
}
OTKERN_BOTH bool is_of_differences(Metric metric) {
    return metric == Metric::sqeuclidean || metric == Metric::euclidean;
}

// cost(i, j) to `out` + i pitch + j for rows first .. first + rows of `a` and all columns; by the whole block, which is
// in step before and after. `memory`, and all shared memory behind it, is free.
template <class Sums, class T>
OTKERN_DEVICE void form_cost(const Team &team, Metric metric, const Cloud<T> &a, const Cloud<T> &b, int first, int rows,
                             int columns, T *out, int pitch, char *memory) {
    if (rows == 0 || columns == 0) return;
    const int element = element_bytes(a.dtype);
    const CostTiles tiles(team.warps, rows, columns, Sums::columns, int64_t(a.features) * element,
                          Stages<T>::memory_from(memory));
    Stages<T> stages(memory, a.dtype, tiles.rows() + tiles.columns(), tiles.width);
    const int across = int(ceil_div(columns, tiles.columns())), down = int(ceil_div(rows, tiles.rows()));
    const int loads = maximum(1, int(ceil_div(a.features, stages.features())));  // of a tile
    const int row = team.warp / tiles.across * kTile, column = team.warp % tiles.across * Sums::columns;
    const auto row_of = [&](int c) { return c / loads / across * tiles.rows(); };
    const auto feature_of = [&](int c) { return c % loads * stages.features(); };
    const auto column_of = [&](int c) { return c / loads % across * tiles.columns(); };
    Sums sums;
    stages.run(
        team, down * across * loads,
        [&](int c) {
            StageLoad<T> load;
            const int i0 = row_of(c), j0 = column_of(c);
            const int count_a = minimum(tiles.rows(), rows - i0), count_b = minimum(tiles.columns(), columns - j0);
            load.rows[0] = {&a, first + i0, i0, count_a, 0, count_a};
            load.rows[1] = {&b, j0, j0, count_b, tiles.rows(), count_b};
            load.feature = feature_of(c);
            return load;
        },
        [&](int c, const char *stage) {
            const int i0 = row_of(c) + row, j0 = column_of(c) + column;
            if (row >= tiles.rows() || i0 >= rows || j0 >= columns) return;
            if (c % loads == 0) sums.clear();
            const char *const left = stage + row * stages.pitch;
            const char *const right = stage + (tiles.rows() + column) * stages.pitch;
            const int steps = stages.steps(a, feature_of(c));
            OTKERN_ROLLED
            for (int k = 0; k < steps; ++k)
                sums.add_inner(left + k * kStep, right + k * kStep, stages.pitch, a.dtype, team.lane);
            if (c % loads != loads - 1) return;
            sums.for_each(team.lane, [&](int r, int s, T sum) {
                const int i = i0 + r, j = j0 + s;
                if (i < rows && j < columns) out[int64_t(i) * pitch + j] = cost_of(metric, a, b, i, j, sum);
            });
        });
}

// What the metric needs to know of the points of `a`, of which the block has `rows` from `first_row` on, and of all `m`
// of `b`, of which it measures its slice for the cluster. By the whole team, in step after it.
template <class T>
OTKERN_DEVICE void measure_points(Team &team, Metric metric, Cloud<T> &a, int first_row, int rows, Cloud<T> &b,
                                  int first_column, int columns, int m) {
    if (metric != Metric::cost) {
        a.measure(team, first_row, 0, rows, false);
        b.measure(team, first_column, first_column, columns, true);
    }
    team.sync_all();
    if (metric == Metric::cost) return;
    a.settle(team, rows);
    b.settle(team, m);
}

// Rows first .. first + rows of the cost, null points included, to `out`; by the whole block, in step before and after.
template <class T>
OTKERN_DEVICE void cost_rows(const Team &team, const Problem &p, const Item<T> &item, const Cloud<T> &a,
                             const Cloud<T> &b, int first, int rows, T *out, int pitch, char *memory) {
    const int real = maximum(minimum(rows, item.points_a - first), 0), columns = item.points_b;
    if (p.metric == Metric::cost)
        for (int i = team.warp; i < real; i += team.warps)
            for (int j = team.lane; j < columns; j += kWarp)
                out[int64_t(i) * pitch + j] = load_element<T>(
                    p.cost.data, p.dtype,
                    p.cost.stride_b * item.index + (first + i) * p.cost.stride_row + j * p.cost.stride_col);
    else if (is_of_differences(p.metric))
        form_cost<ThreadSums<T, true>>(team, p.metric, a, b, first, real, columns, out, pitch, memory);
    else if constexpr (sizeof(T) == 4)
        form_cost<MatrixSums>(team, p.metric, a, b, first, real, columns, out, pitch, memory);
    else
        form_cost<ThreadSums<T, false>>(team, p.metric, a, b, first, real, columns, out, pitch, memory);
    if (item.m > columns)
        for (int i = team.thread; i < real; i += team.threads) out[int64_t(i) * pitch + columns] = item.null_cost;
    if (item.n > item.points_a && rows > real)
        for (int j = team.thread; j < item.m; j += team.threads)
            out[int64_t(real) * pitch + j] = j < columns ? item.null_cost : T(0);
    team.sync();
}

}  // namespace cuda
}  // namespace otkern
