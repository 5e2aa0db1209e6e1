// Slices of an item's cost, formed from the points in tiles.
//
// Points of 16 bits meet in the matrix units where the cost is an inner product; their products are exact in fp32. All
// else is done by multiply-adds in the dtype of the arithmetic: fp32 points in fp32, never in TF32. Differences are
// squared as they are: that keeps the relative accuracy of distances, and coincident points at exactly 0.
#pragma once

#include "item.h"

namespace otkern {
namespace cuda {

// Tiles of kTileRows rows and as many columns as give every thread 4 x 4 of them, over kTileFeatures features at once.
// The rows of the staged tiles are padded so that neither their stores nor their loads meet in one bank.
constexpr int kTileRows = 32, kTileFeatures = 8, kTilePad = 4;
// In the matrix units: tiles of as many rows, 16 columns a warp and twice the features, which take no more memory.
constexpr int kMatrixFeatures = 16;

OTKERN_BOTH int tile_columns(int threads) {
    return threads / (kTileRows / 4) * 4;
}

template <class T>
struct CostTiles {
    T *x, *y;  // kTileFeatures x (kTileRows + pad), kTileFeatures x (columns + pad)

    OTKERN_BOTH void carve(Carver &carver, int threads) {
        carver.take(x, kTileFeatures * (kTileRows + kTilePad));
        carver.take(y, kTileFeatures * (tile_columns(threads) + kTilePad));
    }

    // cost(i, j) to `out` + i pitch + j for rows first .. first + rows of `a` and all columns; by the whole block,
    // which is in step before and after.
    OTKERN_DEVICE void form(const Team &team, Metric metric, const Cloud<T> &a, const Cloud<T> &b, int first, int rows,
                            int columns, T *out, int pitch) {
        const bool differences = metric == Metric::sqeuclidean || metric == Metric::euclidean;
        if constexpr (sizeof(T) == 4)
            if (a.dtype != Dtype::f32 && !differences) {
                form_in_matrix_units(team, metric, a, b, first, rows, columns, out, pitch);
                return;
            }
        const int wide = tile_columns(team.threads);
        const int row = team.thread % (kTileRows / 4) * 4, column = team.thread / (kTileRows / 4) * 4;
        for (int i0 = 0; i0 < rows; i0 += kTileRows)
            for (int j0 = 0; j0 < columns; j0 += wide) {
                T sums[16] = {};
                const bool busy = i0 + row < rows && j0 + column < columns;
                for (int k0 = 0; k0 < a.features; k0 += kTileFeatures) {
                    team.sync();
                    stage(team, a, first + i0, i0, minimum(kTileRows, rows - i0), kTileRows, k0, x);
                    stage(team, b, j0, j0, minimum(wide, columns - j0), wide, k0, y);
                    team.sync();
                    if (!busy) continue;
                    if (differences)
                        multiply<true>(row, column, wide, sums);
                    else
                        multiply<false>(row, column, wide, sums);
                }
                if (busy) write(metric, a, b, i0 + row, j0 + column, rows, columns, sums, out, pitch);
            }
        team.sync();
    }

  private:
    // Features k0 .. of `count` rows from `from` on, feature by feature; zeros up to `room`.
    OTKERN_DEVICE static void stage(const Team &team, const Cloud<T> &cloud, int from, int local, int count, int room,
                                    int k0, T *to) {
        for (int e = team.thread; e < room * kTileFeatures; e += team.threads) {
            const int i = e / kTileFeatures, k = e % kTileFeatures;
            to[k * (room + kTilePad) + i] =
                i < count && k0 + k < cloud.features ? cloud.coordinate(from + i, local + i, k0 + k) : T(0);
        }
    }
    template <bool differences>
    OTKERN_DEVICE void multiply(int row, int column, int wide, T (&sums)[16]) const {
        OTKERN_UNROLL
        for (int k = 0; k < kTileFeatures; ++k) {
            const Four<T> xs = load_four(x + k * (kTileRows + kTilePad) + row);
            const Four<T> ys = load_four(y + k * (wide + kTilePad) + column);
            OTKERN_UNROLL
            for (int r = 0; r < 4; ++r) {
                OTKERN_UNROLL
                for (int c = 0; c < 4; ++c) {
                    const T difference = xs.x[r] - ys.x[c];
                    sums[4 * r + c] += differences ? difference * difference : xs.x[r] * ys.x[c];
                }
            }
        }
    }
    OTKERN_DEVICE static void write(Metric metric, const Cloud<T> &a, const Cloud<T> &b, int i0, int j0, int rows,
                                    int columns, const T (&sums)[16], T *out, int pitch) {
        OTKERN_UNROLL
        for (int r = 0; r < 4; ++r) {
            OTKERN_UNROLL
            for (int c = 0; c < 4; ++c) {
                const int i = i0 + r, j = j0 + c;
                if (i >= rows || j >= columns) continue;
                out[int64_t(i) * pitch + j] = cost_of(metric, a, b, i, j, sums[4 * r + c]);
            }
        }
    }
    // From the sum over features at (i, j); the same number at (j, i) of the exchanged clouds.
    OTKERN_DEVICE static T cost_of(Metric metric, const Cloud<T> &a, const Cloud<T> &b, int i, int j, T sum) {
        if (metric == Metric::cosine) return 1 - sum * (a.inverse_norm[i] * b.inverse_norm[j]);
        if (metric == Metric::dot) return -sum;
        return metric == Metric::euclidean ? root_of(sum) : sum;
    }

    // A warp makes two by two tiles of 16 x 8. Lane 4 g + t holds rows g and g + 8 of the left, columns g of the right
    // and the features 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of both; of the result the columns 2 t and 2 t + 1.
    OTKERN_DEVICE void form_in_matrix_units(const Team &team, Metric metric, const Cloud<T> &a, const Cloud<T> &b,
                                            int first, int rows, int columns, T *out, int pitch) {
        uint16_t *const left = reinterpret_cast<uint16_t *>(x), *const right = reinterpret_cast<uint16_t *>(y);
        const int wide = tile_columns(team.threads), column = team.warp * 16, g = team.lane / 4, t = team.lane % 4;
        for (int i0 = 0; i0 < rows; i0 += kTileRows)
            for (int j0 = 0; j0 < columns; j0 += wide) {
                float sums[2][2][4] = {};
                const bool busy = j0 + column < columns;
                for (int k0 = 0; k0 < a.features; k0 += kMatrixFeatures) {
                    team.sync();
                    stage_bits(team, a, first + i0, i0, minimum(kTileRows, rows - i0), kTileRows, k0, left);
                    stage_bits(team, b, j0, j0, minimum(wide, columns - j0), wide, k0, right);
                    team.sync();
                    if (busy) multiply_tiles(left, right, column, g, t, a.dtype == Dtype::bf16, sums);
                }
                OTKERN_UNROLL
                for (int e = 0; e < 16; ++e) {
                    const int i = i0 + 16 * (e / 8) + 8 * (e / 2 % 2) + g,
                              j = j0 + column + 8 * (e / 4 % 2) + 2 * t + e % 2;
                    if (!busy || i >= rows || j >= columns) continue;
                    out[int64_t(i) * pitch + j] = cost_of(metric, a, b, i, j, sums[e / 8][e / 4 % 2][e % 4]);
                }
            }
        team.sync();
    }
    // Rows of 16 numbers, eight words, of which the halves change places in every second group of four rows: the lanes
    // of a warp then read from 32 banks.
    OTKERN_DEVICE static int word_of(int row, int word) { return 8 * row + (word ^ (row & 4)); }
    OTKERN_DEVICE static void stage_bits(const Team &team, const Cloud<T> &cloud, int from, int local, int count,
                                         int room, int k0, uint16_t *to) {
        for (int e = team.thread; e < room * kMatrixFeatures; e += team.threads) {
            const int i = e / kMatrixFeatures, k = e % kMatrixFeatures;
            to[2 * word_of(i, k / 2) + k % 2] =
                i < count && k0 + k < cloud.features ? cloud.bits(from + i, local + i, k0 + k) : uint16_t(0);
        }
    }
    OTKERN_DEVICE static void multiply_tiles(const uint16_t *left, const uint16_t *right, int column, int g, int t,
                                             bool bf16, float (&sums)[2][2][4]) {
        const uint32_t *const a = reinterpret_cast<const uint32_t *>(left);
        const uint32_t *const b = reinterpret_cast<const uint32_t *>(right);
        OTKERN_UNROLL
        for (int c = 0; c < 2; ++c) {
            const int j = column + 8 * c + g;
            const uint32_t ys[2] = {b[word_of(j, t)], b[word_of(j, t + 4)]};
            OTKERN_UNROLL
            for (int r = 0; r < 2; ++r) {
                const int i = 16 * r + g;
                const uint32_t xs[4] = {a[word_of(i, t)], a[word_of(i + 8, t)], a[word_of(i, t + 4)],
                                        a[word_of(i + 8, t + 4)]};
                multiply_matrices(bf16, xs, ys, sums[r][c]);
            }
        }
    }
};

// Rows first .. first + rows of the cost, null points included, to `out`; by the whole block, in step before and after.
template <class T>
OTKERN_DEVICE void cost_rows(const Team &team, const Problem &p, const Item<T> &item, CostTiles<T> &tiles,
                             const Cloud<T> &a, const Cloud<T> &b, int first, int rows, T *out, int pitch) {
    const int real = maximum(minimum(rows, item.points_a - first), 0);
    if (p.metric == Metric::cost)
        for (int i = team.warp; i < real; i += team.warps)
            for (int j = team.lane; j < item.points_b; j += kWarp)
                out[int64_t(i) * pitch + j] = load_element<T>(
                    p.cost.data, p.dtype,
                    p.cost.stride_b * item.index + (first + i) * p.cost.stride_row + j * p.cost.stride_col);
    else
        tiles.form(team, p.metric, a, b, first, real, item.points_b, out, pitch);
    if (item.m > item.points_b)
        for (int i = team.thread; i < real; i += team.threads) out[int64_t(i) * pitch + item.points_b] = item.null_cost;
    if (item.n > item.points_a && rows > real)
        for (int j = team.thread; j < item.m; j += team.threads)
            out[int64_t(real) * pitch + j] = j < item.points_b ? item.null_cost : T(0);
    team.sync();
}

}  // namespace cuda
}  // namespace otkern
