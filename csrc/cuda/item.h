// One item of a batch: where it stands, its weights, its points.
#pragma once

#include "team.h"
#include "tiles.h"

namespace otkern {
namespace cuda {

// True sizes and places of item `index`. With `with_null` the null points of Kind::null are its last row and its last
// column.
template <class T>
struct Item {
    int64_t index;
    int points_a, points_b;      // true sizes
    int n, m;                    // sizes of the cost: the same, or one more
    int64_t first_a, first_b;    // of the item's rows in (B, N) or (T_a,) tensors
    int64_t room_a, room_b;      // rows the item has there: N, M when padded, n, m when packed
    int64_t offset_a, offset_b;  // of the item's first point, in elements
    T reg, inverse_reg, null_cost;
    bool same;  // a cloud with itself

    OTKERN_DEVICE Item(const Problem &p, int64_t index_, bool with_null) : index(index_) {
        const bool packed = p.cu_seqlens_a != nullptr;
        place(packed ? p.cu_seqlens_a : nullptr, p.lengths_a, p.max_a, p.total_a, first_a, points_a, room_a);
        place(packed ? p.cu_seqlens_b : nullptr, p.lengths_b, p.max_b, p.total_b, first_b, points_b, room_b);
        offset_a = packed ? first_a * p.x_a.stride_row : index * p.x_a.stride_b;
        offset_b = packed ? first_b * p.x_b.stride_row : index * p.x_b.stride_b;
        n = points_a + (with_null ? 1 : 0);
        m = points_b + (with_null ? 1 : 0);
        null_cost = with_null ? relaxation(p, 0) : T(0);
        reg = static_cast<const T *>(p.reg)[index];
        inverse_reg = 1 / reg;
        same = index >= p.n_pairs;
    }

    // Sizes are checked in Python where that was asked for; no value of theirs may lead outside the tensors, nor, in a
    // packed batch, beyond the longest that the caller has named.
    OTKERN_DEVICE void place(const int32_t *offsets, const int32_t *lengths, int64_t longest, int64_t total,
                             int64_t &first, int &count, int64_t &room) const {
        if (offsets) {
            first = minimum<int64_t>(maximum<int64_t>(offsets[index], 0), total);
            room = minimum<int64_t>(maximum<int64_t>(offsets[index + 1] - first, 0), total - first);
            count = int(minimum(room, longest));
            return;
        }
        first = index * longest;
        count = int(lengths ? minimum<int64_t>(maximum<int64_t>(lengths[index], 0), longest) : longest);
        room = longest;
    }

    // Column `k` of the item's relaxation.
    OTKERN_DEVICE T relaxation(const Problem &p, int k) const {
        return static_cast<const T *>(p.relaxation)[2 * index + k];
    }
    OTKERN_DEVICE static T weight(const void *weights, int64_t first, int count, int i) {
        return weights ? static_cast<const T *>(weights)[first + i] : T(1) / T(count);
    }
    // Of one side, by the whole team.
    OTKERN_DEVICE static T mass(const void *weights, int64_t first, int count, Team &team) {
        double sum = 0;
        if (team.rank == 0)
            for (int i = team.thread; i < count; i += team.threads) sum += weight(weights, first, count, i);
        return T(team.sum(sum));
    }
    OTKERN_DEVICE static T entry(const void *vector, int64_t first, int i) {
        return vector ? static_cast<const T *>(vector)[first + i] : T(0);
    }
};

// Sums of squares in this range, and their products, are safe; rows outside it are scaled by a power of two first.
template <class T>
struct Ordinary {
    static constexpr T least = T(sizeof(T) == 4 ? 1e-12 : 1e-100), most = T(sizeof(T) == 4 ? 1e12 : 1e100);
};

// Points of one cloud, as they stand in their tensor. `inverse_norm` and `exponent`, of the cosine metric, are in
// shared memory: 1 / |x|, 0 for x = 0, and the power of two by which an extreme row is divided first, which keeps every
// bit of its direction.
template <class T>
struct Cloud {
    const void *data;
    Dtype dtype;
    int64_t offset, stride_row, stride_col;
    int features;
    bool in_pieces = false;  // rows can be copied in pieces of 16 bytes, as they are
    T *inverse_norm = nullptr, *exponent = nullptr;

    OTKERN_BOTH Cloud() {}
    OTKERN_DEVICE void point_at(const Problem &p, const Matrix &points, int64_t first) {
        data = points.data;
        dtype = p.dtype;
        offset = first;
        stride_row = points.stride_row;
        stride_col = points.stride_col;
        features = int(p.features);
        const int64_t element = element_bytes(dtype);
        in_pieces = stride_col == 1 && stride_row * element % kPiece == 0 &&
                    reinterpret_cast<uint64_t>(address(0, 0)) % kPiece == 0;
    }
    OTKERN_DEVICE const char *address(int i, int k) const {
        return static_cast<const char *>(data) + (offset + i * stride_row + k * stride_col) * element_bytes(dtype);
    }
    OTKERN_BOTH void carve(Carver &carver, int count, bool directions) {
        if (!directions) return;
        carver.take(inverse_norm, count);
        carver.take(exponent, count);
    }

    OTKERN_DEVICE T raw(int i, int k) const {
        return load_element<T>(data, dtype, offset + i * stride_row + k * stride_col);
    }
    // `local` is the row's place in `exponent`.
    OTKERN_DEVICE T coordinate(int i, int local, int k) const {
        const T x = raw(i, k);
        if (exponent == nullptr || exponent[local] == 0) return x;
        return scale_by_power(x, -int(exponent[local]));
    }
    // The same in 16 bits, as the matrix units take it. Powers of two lose nothing but what is far below the largest.
    OTKERN_DEVICE uint16_t bits(int i, int local, int k) const {
        if (exponent == nullptr || exponent[local] == 0)
            return static_cast<const uint16_t *>(data)[offset + i * stride_row + k * stride_col];
        const float x = float(coordinate(i, local, k));
        return dtype == Dtype::bf16 ? to_bf16(x) : float_to_half(x);
    }
    // The power of two by which a row was multiplied, as far as a number can hold it.
    OTKERN_DEVICE T scale(int local) const {
        if (exponent == nullptr || exponent[local] == 0) return 1;
        return minimum(scale_by_power(T(1), -int(exponent[local])), T(sizeof(T) == 4 ? 3e38 : 1e308));
    }

    // Of rows first, first + 1, .. to places local, local + 1, .. of `count` rows: to `push`, to those of all blocks.
    // Nothing may read them before a barrier, and then `settle` comes. A warp reads four rows at once.
    OTKERN_DEVICE void measure(const Team &team, int first, int local, int count, bool push) const {
        if (exponent == nullptr) return;
        for (int i = team.warp * kRowsAtOnce; i < count; i += team.warps * kRowsAtOnce) {
            T squares[kRowsAtOnce], largest[kRowsAtOnce];
            sum_squares(team, first + i, minimum(kRowsAtOnce, count - i), squares, largest);
            OTKERN_UNROLL
            for (int r = 0; r < kRowsAtOnce; ++r)
                if (i + r < count)
                    write_norm(team, first + i + r, local + i + r, warp_sum(squares[r]), warp_max(largest[r]), push);
        }
    }
    // Rows that are scaled first are not copied as they are. By the whole block.
    OTKERN_DEVICE void settle(const Team &team, int count) {
        if (exponent == nullptr) return;
        bool scaled = false;
        for (int i = team.thread; i < count; i += team.threads) scaled = scaled || exponent[i] != 0;
        if (team.any(scaled)) in_pieces = false;
    }

  private:
    static constexpr int kRowsAtOnce = 4, kMostNumbers = sizeof(T) == 4 ? 8 : 2;  // of a piece
    struct alignas(kPiece) Piece {
        uint32_t words[4];
    };

    // Of `count` rows from `first` on the lane's sums of squares, and its largest number. A lane has every 32nd piece
    // of 16 bytes, whether it is read as such or number by number.
    OTKERN_DEVICE void sum_squares(const Team &team, int first, int count, T (&squares)[kRowsAtOnce],
                                   T (&largest)[kRowsAtOnce]) const {
        const int numbers = kPiece / element_bytes(dtype);
        OTKERN_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r) squares[r] = largest[r] = 0;
        const auto add = [&](int r, const T(&x)[kMostNumbers]) {
            OTKERN_UNROLL
            for (int q = 0; q < kMostNumbers; ++q) {
                squares[r] += x[q] * x[q];
                largest[r] = maximum(largest[r], absolute(x[q]));
            }
        };
        for (int k = team.lane * numbers; k < features; k += kWarp * numbers) {
            T x[kMostNumbers] = {};
            if (in_pieces && k + numbers <= features) {
                Piece pieces[kRowsAtOnce] = {};
                OTKERN_UNROLL
                for (int r = 0; r < kRowsAtOnce; ++r)
                    if (r < count) pieces[r] = *reinterpret_cast<const Piece *>(address(first + r, k));
                OTKERN_UNROLL
                for (int r = 0; r < kRowsAtOnce; ++r) {
                    numbers_of(pieces[r], x);
                    add(r, x);
                }
            } else {
                OTKERN_UNROLL
                for (int r = 0; r < kRowsAtOnce; ++r) {
                    OTKERN_UNROLL
                    for (int q = 0; q < kMostNumbers; ++q)
                        x[q] = r < count && q < numbers && k + q < features ? raw(first + r, k + q) : T(0);
                    add(r, x);
                }
            }
        }
    }
    OTKERN_DEVICE void numbers_of(const Piece &piece, T (&x)[kMostNumbers]) const {
        if constexpr (sizeof(T) == 8) {
            memcpy(x, piece.words, kPiece);
        } else {
            OTKERN_UNROLL
            for (int word = 0; word < 4; ++word) {
                const uint32_t bits = piece.words[word];
                if (dtype == Dtype::f32) {
                    x[word] = from_bits(bits);
                    x[word + 4] = 0;
                } else {
                    x[2 * word] = widened(dtype, uint16_t(bits));
                    x[2 * word + 1] = widened(dtype, uint16_t(bits >> 16));
                }
            }
        }
    }
    // By the warp, from the sums of a row.
    OTKERN_DEVICE void write_norm(const Team &team, int row, int local, T squares, T largest, bool push) const {
        const bool scaled =
            !(squares > Ordinary<T>::least && squares < Ordinary<T>::most) && largest > 0 && is_finite(largest);
        const int power = scaled ? exponent_of_number(double(largest)) : 0;
        if (power != 0) {
            squares = 0;
            for (int k = team.lane; k < features; k += kWarp) {
                const T x = scale_by_power(raw(row, k), -power);
                squares += x * x;
            }
            squares = warp_sum(squares);
        }
        if (team.lane != 0) return;
        // An error here is common to the whole row: worth a square root in double.
        const T inverse = squares > 0 && is_finite(squares) ? T(1 / root_of(double(squares))) : T(0);
        if (push) {
            team.push(exponent + local, T(power));
            team.push(inverse_norm + local, inverse);
        } else {
            exponent[local] = T(power);
            inverse_norm[local] = inverse;
        }
    }
};

// An item's part of a (B, N) or (T_a,) tensor is written by the blocks that hold it; the rest of its room is zeros.
template <class T>
OTKERN_DEVICE void clear(const Team &team, void *out, int64_t first, int64_t count, int64_t room) {
    if (out == nullptr) return;
    for (int64_t i = count + team.rank * team.threads + team.thread; i < room; i += team.size * team.threads)
        static_cast<T *>(out)[first + i] = 0;
}

}  // namespace cuda
}  // namespace otkern
