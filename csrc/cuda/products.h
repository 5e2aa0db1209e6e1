// Products of a block's rows of a matrix with vectors, which an iteration on the kernel and the adjoint are made of.
// The matrix is in shared memory, whose bandwidth is what they cost: everything else is read once for four entries.
#pragma once

#include "team.h"

namespace otkern {
namespace cuda {

constexpr int kGroup = 4;

// function(i, sum_j matrix_ij vector_j), on one lane. A warp makes the sums of four rows.
template <class T, class F>
OTKERN_DEVICE void sum_rows(const Team &team, const T *matrix, int rows, int m, const T *vector, F function) {
    for (int i = team.warp * kGroup; i < rows; i += team.warps * kGroup) {
        T sums[kGroup] = {};
        for (int j = team.lane; j < m; j += kWarp) {
            const T weight = vector[j];
            OTKERN_UNROLL
            for (int r = 0; r < kGroup; ++r)
                if (i + r < rows) sums[r] += matrix[(i + r) * m + j] * weight;
        }
        const T sum = warp_sum_of_four(sums, team.lane);
        const int row = i + of_four(team.lane);
        if (team.lane % 8 == 0 && row < rows) function(row, sum);
    }
}

// A thread sums a column, or several. Where there are fewer columns than threads, warps share the rows of a column.
struct ColumnParts {
    int wide, parts;  // threads side by side; sums of each column that a block makes

    OTKERN_DEVICE ColumnParts(const Team &team, int m)
        : wide(minimum(int(round_up(m, kWarp)), team.threads)), parts(team.threads / wide) {}
};
// How many numbers that takes.
OTKERN_BOTH int64_t column_parts_count(int threads, int64_t m) {
    return maximum<int64_t>(threads, m);
}

// Parts of sum_i weights_i matrix_ij, for all columns.
template <class T>
OTKERN_DEVICE void sum_columns(const Team &team, const T *matrix, int rows, int m, const T *weights, T *out) {
    if (m > team.threads) {
        for (int j = team.thread; j < m; j += kGroup * team.threads) {
            T sums[kGroup] = {};
            for (int i = 0; i < rows; ++i) {
                const T weight = weights[i];
                OTKERN_UNROLL
                for (int c = 0; c < kGroup; ++c)
                    if (j + c * team.threads < m) sums[c] += matrix[i * m + j + c * team.threads] * weight;
            }
            OTKERN_UNROLL
            for (int c = 0; c < kGroup; ++c)
                if (j + c * team.threads < m) out[j + c * team.threads] = sums[c];
        }
        return;
    }
    const ColumnParts columns(team, m);
    const int part = team.thread / columns.wide, j = team.thread % columns.wide;
    if (part >= columns.parts || j >= m) return;
    const int each = int(round_up(ceil_div(rows, columns.parts), kGroup));
    const int last = minimum(rows, (part + 1) * each);
    T sums[kGroup] = {};
    for (int i = part * each; i < last; i += kGroup) {
        const Four<T> four = load_four(weights + i);
        OTKERN_UNROLL
        for (int r = 0; r < kGroup; ++r)
            if (i + r < last) sums[r] += matrix[(i + r) * m + j] * four.x[r];
    }
    out[part * m + j] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The sum of a column's parts, those of one block after the other; between barriers of the cluster.
template <class T>
OTKERN_DEVICE T sum_of_column(const Team &team, T *parts, int m, int j) {
    const int count = ColumnParts(team, m).parts;
    T sum = 0;
    for (int block = 0; block < team.size; ++block) {
        const T *const mine = map_shared(parts + j, block);
        for (int part = 0; part < count; ++part) sum += mine[part * m];
    }
    return sum;
}

}  // namespace cuda
}  // namespace otkern
