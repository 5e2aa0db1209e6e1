// What a warp holds of a product of two tiles: 32 x 32 sums, by the matrix units or by multiply-adds.
//
// The matrix units add without rounding to nearest. So they add the products of one step of 32 bytes of features only,
// and the sums of the steps are added outside.
//
// fp32 keeps its accuracy: a number is the sum of two of 11 bits, and of the four products of the parts the smallest
// one, 2^-22 of the largest, is left out ("three-pass TF32"). A number of 16 bits is what it is.
#pragma once

#include "stages.h"

namespace otkern {
namespace cuda {

// x = high + low, each of 11 bits, but for 2^-22 of x. What rounding would make infinite is cut, and infinity has no
// rest.
struct Halves {
    uint32_t high, low;
    OTKERN_DEVICE explicit Halves(float x) {
        const uint32_t rounded = to_tf32(x);
        high = is_finite(from_bits(rounded)) ? rounded : bits_of(x) & 0xffffe000;
        const float rest = x - from_bits(high);
        low = is_finite(rest) ? to_tf32(rest) : 0;
    }
};
template <int count>
OTKERN_DEVICE void halve(const uint32_t (&words)[count], uint32_t (&high)[count], uint32_t (&low)[count]) {
    OTKERN_UNROLL
    for (int k = 0; k < count; ++k) {
        const Halves halves(from_bits(words[k]));
        high[k] = halves.high;
        low[k] = halves.low;
    }
}

// Two by four blocks of 16 x 8. Lane 4 g + t holds of each the rows g and g + 8, and the columns 2 t and 2 t + 1.
struct MatrixSums {
    static constexpr int columns = kTile;
    float sums[2][4][4];

    OTKERN_DEVICE void clear() {
        OTKERN_UNROLL
        for (int e = 0; e < 32; ++e) sums[e / 16][e / 4 % 4][e % 4] = 0;
    }
    // function(row, column, sum)
    template <class F>
    OTKERN_DEVICE void for_each(int lane, F function) const {
        OTKERN_UNROLL
        for (int e = 0; e < 32; ++e)
            function(16 * (e / 16) + 8 * (e / 2 % 2) + lane / 4, 8 * (e / 4 % 4) + 2 * (lane % 4) + e % 2,
                     sums[e / 16][e / 4 % 4][e % 4]);
    }

    // One step of features: the inner products of 32 rows of each side.
    OTKERN_DEVICE void add_inner(const char *left, const char *right, int pitch, Dtype dtype, int lane) {
        uint32_t x[2][4], y[2][4];
        OTKERN_UNROLL
        for (int k = 0; k < 2; ++k) {
            load_matrices(left + (16 * k + lane % 16) * pitch + lane / 16 * kPiece, false, x[k]);
            load_matrices(right + (16 * k + lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * kPiece, false, y[k]);
        }
        if (dtype == Dtype::f32)
            add_in_three_passes(x, y);
        else if (dtype == Dtype::bf16)
            add_products<true>(x, y);
        else
            add_products<false>(x, y);
    }

    // One step of columns of the weights, 16 of them or 8 in fp32: their product with so many rows of the points. Row i
    // of the weights is at `weights` + min(i, last_row) pitch_w, and counts `unit_of(i)` times in fp16.
    template <class F>
    OTKERN_DEVICE void add_weighted(const float *weights, int pitch_w, int last_row, F unit_of, const char *points,
                                    int pitch, Dtype dtype, int lane) {
        const int g = lane / 4, t = lane % 4;
        const auto row_of = [&](int r, int p) { return minimum(16 * r + 8 * (p % 2) + g, last_row); };
        if (dtype == Dtype::f32) {
            uint32_t y_high[4][2], y_low[4][2];
            OTKERN_UNROLL
            for (int c = 0; c < 4; ++c) {
                const float *const column = reinterpret_cast<const float *>(points) + 8 * c + g;
                const int row = pitch / 4;
                const uint32_t words[2] = {bits_of(column[t * row]), bits_of(column[(t + 4) * row])};
                halve(words, y_high[c], y_low[c]);
            }
            OTKERN_UNROLL
            for (int r = 0; r < 2; ++r) {
                uint32_t words[4], high[4], low[4];
                OTKERN_UNROLL
                for (int p = 0; p < 4; ++p) words[p] = bits_of(weights[row_of(r, p) * pitch_w + t + 4 * (p / 2)]);
                halve(words, high, low);
                OTKERN_UNROLL
                for (int c = 0; c < 4; ++c) add_three(high, low, y_high[c], y_low[c], sums[r][c]);
            }
            return;
        }
        const bool bf16 = dtype == Dtype::bf16;
        uint32_t y[2][4];
        OTKERN_UNROLL
        for (int k = 0; k < 2; ++k)
            load_matrices(points + lane % 16 * pitch + (2 * k + lane / 16) * kPiece, true, y[k]);
        OTKERN_UNROLL
        for (int r = 0; r < 2; ++r) {
            uint32_t parts[3][4];
            OTKERN_UNROLL
            for (int p = 0; p < 4; ++p) {
                const int i = row_of(r, p);
                const float *const pair = weights + i * pitch_w + 2 * t + 8 * (p / 2);
                uint32_t words[3];
                if (bf16)
                    split<true>(pair[0], pair[1], words);
                else
                    split<false>(pair[0] * unit_of(i), pair[1] * unit_of(i), words);
                OTKERN_UNROLL
                for (int part = 0; part < 3; ++part) parts[part][p] = words[part];
            }
            OTKERN_UNROLL
            for (int c = 0; c < 4; ++c) {
                const Pair columns = columns_of(y, c);
                float step[4] = {};
                if (bf16) multiply_matrices(true, parts[2], columns.words, step);
                multiply_matrices(bf16, parts[1], columns.words, step);
                multiply_matrices(bf16, parts[0], columns.words, step);
                add(step, sums[r][c]);
            }
        }
    }

  private:
    struct Pair {
        uint32_t words[2];
    };
    // The eight columns `c` of 32, of which four were loaded at once.
    OTKERN_DEVICE static Pair columns_of(const uint32_t (&y)[2][4], int c) {
        return {{y[c / 2][2 * (c % 2)], y[c / 2][2 * (c % 2) + 1]}};
    }
    OTKERN_DEVICE static void add(const float (&step)[4], float (&sum)[4]) {
        OTKERN_UNROLL
        for (int e = 0; e < 4; ++e) sum[e] += step[e];
    }
    OTKERN_DEVICE static void add_three(const uint32_t (&x_high)[4], const uint32_t (&x_low)[4],
                                        const uint32_t (&y_high)[2], const uint32_t (&y_low)[2], float (&sum)[4]) {
        // The small parts each by itself: with the sides exchanged the sum is the same to the bit.
        float step[4] = {}, other[4] = {};
        multiply_matrices_tf32(x_low, y_high, step);
        multiply_matrices_tf32(x_high, y_low, other);
        add(other, step);
        multiply_matrices_tf32(x_high, y_high, step);
        add(step, sum);
    }
    OTKERN_DEVICE void add_in_three_passes(const uint32_t (&x)[2][4], const uint32_t (&y)[2][4]) {
        uint32_t x_high[2][4], x_low[2][4];
        OTKERN_UNROLL
        for (int k = 0; k < 2; ++k) halve(x[k], x_high[k], x_low[k]);
        OTKERN_UNROLL
        for (int c = 0; c < 4; ++c) {
            const Pair columns = columns_of(y, c);
            uint32_t high[2], low[2];
            halve(columns.words, high, low);
            OTKERN_UNROLL
            for (int r = 0; r < 2; ++r) add_three(x_high[r], x_low[r], high, low, sums[r][c]);
        }
    }
    template <bool bf16>
    OTKERN_DEVICE void add_products(const uint32_t (&x)[2][4], const uint32_t (&y)[2][4]) {
        OTKERN_UNROLL
        for (int c = 0; c < 4; ++c) {
            const Pair columns = columns_of(y, c);
            OTKERN_UNROLL
            for (int r = 0; r < 2; ++r) {
                float step[4] = {};
                multiply_matrices(bf16, x[r], columns.words, step);
                add(step, sums[r][c]);
            }
        }
    }
    // Two neighbours as pairs of parts: three of 8 bits, which is all of a number, or, of numbers below 2^15 in size,
    // two of 11; the third is not used then.
    template <bool bf16>
    OTKERN_DEVICE static void split(float x, float y, uint32_t (&words)[3]) {
        const Dtype dtype = bf16 ? Dtype::bf16 : Dtype::f16;
        OTKERN_UNROLL
        for (int part = 0; part < 3; ++part) {
            const uint16_t high_x = bf16 ? uint16_t(bits_of(x) >> 16) : float_to_half(x);
            const uint16_t high_y = bf16 ? uint16_t(bits_of(y) >> 16) : float_to_half(y);
            words[part] = uint32_t(high_x) | uint32_t(high_y) << 16;
            x = is_finite(x) ? x - widened(dtype, high_x) : 0.f;
            y = is_finite(y) ? y - widened(dtype, high_y) : 0.f;
        }
    }
};

// By multiply-adds: 4 x 8 entries a thread (fp64: 4 x 4), of rows and columns that lie 8 and 4 apart. Of inner
// products, or of squared differences as they are: that keeps the relative accuracy of distances, and coincident points
// at exactly 0.
template <class T, bool differences>
struct ThreadSums {
    static constexpr int wide = sizeof(T) == 4 ? 8 : 4, columns = 4 * wide;
    static constexpr int deep = kPiece / sizeof(T);  // features at once
    T sums[4][wide];

    OTKERN_DEVICE void clear() {
        OTKERN_UNROLL
        for (int e = 0; e < 4 * wide; ++e) sums[e / wide][e % wide] = 0;
    }
    template <class F>
    OTKERN_DEVICE void for_each(int lane, F function) const {
        OTKERN_UNROLL
        for (int e = 0; e < 4 * wide; ++e)
            function(8 * (e / wide) + lane % 8, 4 * (e % wide) + lane / 8, sums[e / wide][e % wide]);
    }
    OTKERN_DEVICE void add_inner(const char *left, const char *right, int pitch, Dtype dtype, int lane) {
        const int element = element_bytes(dtype);
        OTKERN_ROLLED
        for (int k = 0; k < kStep; k += deep * element) {
            Features x[4];
            OTKERN_UNROLL
            for (int r = 0; r < 4; ++r) x[r] = load(left + (8 * r + lane % 8) * pitch + k, dtype);
            OTKERN_UNROLL
            for (int c = 0; c < wide; ++c) {
                const Features y = load(right + (4 * c + lane / 8) * pitch + k, dtype);
                OTKERN_UNROLL
                for (int r = 0; r < 4; ++r) {
                    OTKERN_UNROLL
                    for (int q = 0; q < deep; ++q) {
                        const T difference = x[r].x[q] - y.x[q];
                        sums[r][c] += differences ? difference * difference : x[r].x[q] * y.x[q];
                    }
                }
            }
        }
    }

  private:
    struct alignas(kPiece) Features {
        T x[deep];
    };
    OTKERN_DEVICE static Features load(const char *numbers, Dtype dtype) {
        if constexpr (sizeof(T) == 4)
            if (dtype != Dtype::f32) {
                const Four<uint16_t> bits = *reinterpret_cast<const Four<uint16_t> *>(numbers);
                Features wide;
                OTKERN_UNROLL
                for (int q = 0; q < deep; ++q) wide.x[q] = widened(dtype, bits.x[q]);
                return wide;
            }
        return *reinterpret_cast<const Features *>(numbers);
    }
};

}  // namespace cuda
}  // namespace otkern
