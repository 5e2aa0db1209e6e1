// The matrix products of an item: cost tiles from two clouds, and plan times points.
//
// Both take tables of rows (item.h) and hold a tile of results in registers:
//   pair_products   out_ij = sum_k x_ik y_jk              vectors along k, lanes summed at the end
//   weighted_sums   out_ik += sum_j w_ij y_jk             vectors along k, weights broadcast
// For the (squared) Euclidean metrics the same loops run on differences, (x_ik - y_jk)^2 and w_ij (x_ik - y_jk):
// twice the arithmetic of |x|^2 + |y|^2 - 2 <x, y>, but with the relative accuracy of a direct difference, exactly 0
// for coincident points, and gradients that do not drown when matched points are close to each other.
#pragma once

#include "rows.h"

namespace otkern {
namespace OTKERN_LEVEL {

// 4 x 4 (4 x 2) accumulators: twice (1.3 times) as many multiply-adds as loads, and enough of them to hide latency.
constexpr int kPairRows = kGroup, kPairCols = kManyRegisters ? 4 : 2;

template <class T, bool Difference>
OTKERN_INLINE void pair_tile(const T *const *x_rows, const T *const *y_rows, int64_t length, T *out,
                             int64_t out_stride) {
    constexpr int width = Simd<T>::width, count = kPairRows * kPairCols;
    const T *x[kPairRows], *y[kPairCols];
    for (int r = 0; r < kPairRows; ++r) x[r] = x_rows[r];
    for (int c = 0; c < kPairCols; ++c) y[c] = y_rows[c];
    Vec<T> acc[count] = {};
    for (int64_t k = 0; k < length; k += width) {
        Vec<T> ys[kPairCols];
        for (int c = 0; c < kPairCols; ++c) ys[c] = load(y[c] + k);
        for (int r = 0; r < kPairRows; ++r) {
            const Vec<T> xr = load(x[r] + k);
            for (int c = 0; c < kPairCols; ++c) {
                if (Difference) {
                    const Vec<T> difference = xr - ys[c];
                    acc[r * kPairCols + c] += difference * difference;
                } else {
                    acc[r * kPairCols + c] += xr * ys[c];
                }
            }
        }
    }
    constexpr int together = count < width ? count : width;
    T sums[count < width ? width : count];
    for (int i = 0; i < count; i += together) store(sums + i, sum_lanes<T, together>(acc + i));
    for (int r = 0; r < kPairRows; ++r)
        for (int c = 0; c < kPairCols; ++c) out[r * out_stride + c] = sums[r * kPairCols + c];
}

// out_ij for rows [0, rows) of x and [0, cols) of y, both whole groups of four. A block of x stays in L2 while all of y
// passes by, and eight rows of y in L1 while that block does.
template <class T, bool Difference>
inline void pair_products(const T *const *x, int64_t rows, const T *const *y, int64_t cols, int64_t length, T *out,
                          int64_t out_stride) {
    constexpr int64_t resident = 8, block = 64;
    for (int64_t i0 = 0; i0 < rows; i0 += block)
        for (int64_t j0 = 0; j0 < cols; j0 += resident)
            for (int64_t i = i0; i < minimum(i0 + block, rows); i += kPairRows)
                for (int64_t j = j0; j < minimum(j0 + resident, cols); j += kPairCols)
                    pair_tile<T, Difference>(x + i, y + j, length, out + i * out_stride + j, out_stride);
}

// One register tile of weighted sums: R rows of `out` by C vectors from feature k on, over `count` rows of y.
// The weight of row r and term j is w[r * w_row + j * w_term].
template <class T, bool Difference, int R, int C>
OTKERN_INLINE void sum_tile(const T *w, int64_t w_row, int64_t w_term, const T *const *x, const T *const *y, int64_t k,
                            int64_t count, bool add, T *out, int64_t out_stride) {
    constexpr int width = Simd<T>::width;
    out += k;
    Vec<T> acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = add ? load(out + r * out_stride + c * width) : Vec<T>{};
    for (int64_t j = 0; j < count; ++j) {
        const T *yj = y[j] + k;
        __asm__("" : "+r"(yj));  // one address: GCC would hold the three offsets from y[j] in spilled registers
        Vec<T> ys[C];
        for (int c = 0; c < C; ++c) ys[c] = load(yj + c * width);
        for (int r = 0; r < R; ++r) {
            const Vec<T> weight = splat(w[r * w_row + j * w_term]);
            for (int c = 0; c < C; ++c) acc[r][c] += weight * (Difference ? load(x[r] + k + c * width) - ys[c] : ys[c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out + r * out_stride + c * width, acc[r][c]);
}

template <class T, bool Difference, int C>
inline void sum_column(const T *w, int64_t w_row, int64_t w_term, const T *const *x, int64_t rows, const T *const *y,
                       int64_t k, int64_t count, bool add, T *out, int64_t out_stride) {
    int64_t i = 0;
    if (kManyRegisters)
        for (; i + 8 <= rows; i += 8)
            sum_tile<T, Difference, 8, C>(w + i * w_row, w_row, w_term, x + i, y, k, count, add, out + i * out_stride,
                                          out_stride);
    for (; i < rows; i += 4)
        sum_tile<T, Difference, 4, C>(w + i * w_row, w_row, w_term, x + i, y, k, count, add, out + i * out_stride,
                                      out_stride);
}

// out_i = (add ? out_i : 0) + sum_j w_ij y_j, or with differences sum_j w_ij (x_i - y_j), for a whole number of groups
// of rows i. Each number is one chain of multiply-adds over j in order, however the call is cut into pieces.
// A block of y, one tile wide, stays in L1 while the rows pass by. `x` is read only for differences.
template <class T, bool Difference>
inline void weighted_sums(const T *w, int64_t w_row, int64_t w_term, const T *const *x, int64_t rows, const T *const *y,
                          int64_t count, int64_t length, bool add, T *out, int64_t out_stride) {
    constexpr int width = Simd<T>::width;
    constexpr int64_t block = 24 * 1024 / (3 * kVectorBytes);
    for (int64_t k = 0; k < length;) {
        const int64_t vectors = (length - k) / width;
        for (int64_t j = 0; j < count || j == 0; j += block) {
            const int64_t terms = minimum(block, count - j);
            const T *wj = w + j * w_term;
            if (vectors >= 3)
                sum_column<T, Difference, 3>(wj, w_row, w_term, x, rows, y + j, k, terms, add || j > 0, out,
                                             out_stride);
            else
                sum_column<T, Difference, 1>(wj, w_row, w_term, x, rows, y + j, k, terms, add || j > 0, out,
                                             out_stride);
        }
        k += (vectors >= 3 ? 3 : 1) * width;
    }
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
