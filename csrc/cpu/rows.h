// Rows between tensors and scratch: strides, dtypes, norms, the check for non-finite points.
//
// Rows are read where they are when they can be (`readable_in_place`), and else from a copy. In a copy a row of d
// features takes `row_stride(d)` numbers: padded with zeros to whole vectors, and an odd number of cache lines, so that
// the rows of a power-of-two d do not all fall into the same sets of the L1 cache.
#pragma once

#include "simd.h"

namespace otkern {
namespace OTKERN_LEVEL {

template <class T>
OTKERN_INLINE int64_t round_up(int64_t n, T unit) {
    return (n + unit - 1) / unit * unit;
}

template <class T>
OTKERN_INLINE int64_t padded(int64_t n) {
    return round_up(n, Simd<T>::width);
}

template <class T>
OTKERN_INLINE int64_t row_stride(int64_t d) {
    const int64_t line = 64 / int64_t(sizeof(T)), lines = (d + line - 1) / line;
    return (lines | 1) * line;
}

// Up to a vector of numbers, and `fill` behind them: for loops over groups, of which a vector may hold several.
template <class T>
OTKERN_INLINE Vec<T> load_some(const T *p, int64_t count, T fill) {
    constexpr int width = Simd<T>::width;
    if (count >= width) return load(p);
    alignas(64) T lanes[width];
    for (int k = 0; k < width; ++k) lanes[k] = k < count ? p[k] : fill;
    return load(lanes);
}

template <class T>
OTKERN_INLINE void store_some(T *p, int64_t count, Vec<T> x) {
    constexpr int width = Simd<T>::width;
    if (count >= width) return store(p, x);
    alignas(64) T lanes[width];
    store(lanes, x);
    for (int k = 0; k < count; ++k) p[k] = lanes[k];
}

template <class S, class T>
OTKERN_INLINE void read_row(const S *source, int64_t stride, int64_t d, T *row) {
    if (stride == 1)
        for (int64_t k = 0; k < d; ++k) row[k] = T(to_compute(source[k]));
    else
        for (int64_t k = 0; k < d; ++k) row[k] = T(to_compute(source[k * stride]));
}

OTKERN_INLINE const void *element(const void *data, Dtype dtype, int64_t offset) {
    const int64_t bytes = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
    return static_cast<const char *>(data) + offset * bytes;
}

// d numbers of any dtype and stride to compute precision. T is double for f64 and float for the others.
inline void read_row(const void *source, Dtype dtype, int64_t stride, int64_t d, float *row) {
    if (dtype == Dtype::f32)
        read_row(static_cast<const float *>(source), stride, d, row);
    else if (dtype == Dtype::bf16)
        read_row(static_cast<const BFloat16 *>(source), stride, d, row);
    else
        read_row(static_cast<const Half *>(source), stride, d, row);
}
inline void read_row(const void *source, Dtype, int64_t stride, int64_t d, double *row) {
    read_row(static_cast<const double *>(source), stride, d, row);
}

template <class S, class T>
OTKERN_INLINE void write_row(const T *row, int64_t d, S *out) {
    for (int64_t k = 0; k < d; ++k) from_compute(row[k], out + k);
}

inline void write_row(const float *row, int64_t d, void *out, Dtype dtype) {
    if (dtype == Dtype::f32)
        write_row(row, d, static_cast<float *>(out));
    else if (dtype == Dtype::bf16)
        write_row(row, d, static_cast<BFloat16 *>(out));
    else
        write_row(row, d, static_cast<Half *>(out));
}
inline void write_row(const double *row, int64_t d, void *out, Dtype) {
    write_row(row, d, static_cast<double *>(out));
}

template <class T>
OTKERN_INLINE bool is_finite(T x) {
    return x - x == 0;
}

// <x, y> of two rows in scratch; `length` is whole vectors.
template <class T>
inline T dot_rows(const T *x, const T *y, int64_t length) {
    constexpr int width = Simd<T>::width;
    Vec<T> acc[4] = {};
    int64_t k = 0;
    for (; k + 4 * width <= length; k += 4 * width)
        for (int i = 0; i < 4; ++i) acc[i] += load(x + k + i * width) * load(y + k + i * width);
    for (; k < length; k += width) acc[0] += load(x + k) * load(y + k);
    return horizontal_sum<T>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// Whether kernels can read rows of this layout as they are: the right dtype, whole aligned vectors, and a stride that
// does not put all rows into the same sets of the L1 cache.
template <class T>
inline bool readable_in_place(const Matrix &points, Dtype dtype, int64_t d) {
    constexpr int64_t page = 4096;
    const int64_t bytes = points.stride_row * int64_t(sizeof(T));
    return dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32) && points.stride_col == 1 && d % Simd<T>::width == 0 &&
           reinterpret_cast<uintptr_t>(points.data) % kVectorBytes == 0 && bytes % kVectorBytes == 0 &&
           points.stride_b * int64_t(sizeof(T)) % kVectorBytes == 0 && bytes % page != 0;
}

// Sums of squares in this range, and their products, are safe; rows outside it are scaled by a power of two first.
template <class T>
struct Ordinary;
template <>
struct Ordinary<float> {
    static constexpr float least = 1e-12f, most = 1e12f;
};
template <>
struct Ordinary<double> {
    static constexpr double least = 1e-100, most = 1e100;
};

// Brings the largest entry of a row to about 1 by a power of two, which keeps every bit of its direction. Returns that
// power; 1 for a row of zeros and for one that is not finite.
template <class T>
inline T scale_row(T *row, int64_t length) {
    T largest = 0;
    for (int64_t k = 0; k < length; ++k) largest = maximum(row[k] < 0 ? -row[k] : row[k], largest);
    if (!(largest > 0) || !is_finite(largest)) return 1;
    int exponent;
    __builtin_frexp(double(largest), &exponent);
    // Two factors: the smallest subnormal needs more than the largest power of two.
    const T scale = T(__builtin_ldexp(1.0, -exponent / 2)), rest = T(__builtin_ldexp(1.0, -exponent - (-exponent / 2)));
    for (int64_t k = 0; k < length; ++k) row[k] = row[k] * scale * rest;
    // The norm of a subnormal row has no finite inverse; its gradient must not become inf * 0.
    return minimum(scale * rest, T(sizeof(T) == 4 ? 3e38 : 1e308));
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
