// One item of a batch: where it stands, its weights, and rows of its cost.
#pragma once

#include "products.h"
#include "threads.h"

namespace otkern {
namespace OTKERN_LEVEL {

// Hands out pieces of one allocation, each on its own cache lines. Run once without memory to learn the size.
struct Carver {
    char *memory = nullptr;
    size_t used = 0;

    template <class T>
    void take(T *&pointer, int64_t count) {
        pointer = reinterpret_cast<T *>(memory + used);
        used += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    }
};

// Carves `call`'s scratch for an item, the size first. Returns false, and says so in the call, where memory is short.
template <class Call, class F>
bool carve_scratch(Call &call, Team &team, F carve) {
    Carver carver;
    carve(carver);
    carver.memory = static_cast<char *>(team.scratch(carver.used));
    if (carver.memory == nullptr) {
        call.out_of_memory = true;
        return false;
    }
    carver.used = 0;
    carve(carver);
    return true;
}

// True sizes and addresses of item `index`. Padded sizes are those of scratch: groups of rows, whole vectors of
// columns. With `with_null` the null points of Kind::null are its last row and its last column.
template <class T>
struct Item {
    const Problem &problem;
    int64_t index;
    int64_t points_a, points_b;  // true sizes
    int64_t n, m;                // sizes of the cost: the same, or one more
    int64_t first_a, first_b;    // of the item's rows in (B, N) or (T_a,) tensors
    int64_t room_a, room_b;      // rows the item has there: N, M when padded, n, m when packed
    int64_t offset_a, offset_b;  // of the item's first point, in elements
    int64_t rows, cols;          // n in whole groups, m in whole vectors and groups
    int64_t stride, length;      // of a point copied to scratch: with and without the extra line
    T reg, inverse_reg;
    T null_cost = 0;
    bool same;  // a cloud with itself

    Item(const Problem &p, int64_t index_, bool with_null = false) : problem(p), index(index_) {
        const bool packed = p.cu_seqlens_a != nullptr;
        place(packed ? p.cu_seqlens_a : nullptr, p.lengths_a, p.max_a, p.total_a, first_a, points_a, room_a);
        place(packed ? p.cu_seqlens_b : nullptr, p.lengths_b, p.max_b, p.total_b, first_b, points_b, room_b);
        offset_a = packed ? first_a * p.x_a.stride_row : index * p.x_a.stride_b;
        offset_b = packed ? first_b * p.x_b.stride_row : index * p.x_b.stride_b;
        n = points_a + (with_null ? 1 : 0);
        m = points_b + (with_null ? 1 : 0);
        if (with_null) null_cost = relaxation(0);
        rows = round_up(n, kGroup);
        cols = padded<T>(round_up(m, kGroup));
        stride = row_stride<T>(p.features);
        length = padded<T>(p.features);
        reg = static_cast<const T *>(p.reg)[index];
        inverse_reg = 1 / reg;
        same = index >= p.n_pairs;
    }

    // Sizes are checked in Python unless the caller waived it; no value of theirs may lead outside the tensors.
    void place(const int32_t *offsets, const int32_t *lengths, int64_t longest, int64_t total, int64_t &first,
               int64_t &count, int64_t &room) const {
        if (offsets) {
            first = minimum<int64_t>(maximum<int64_t>(offsets[index], 0), total);
            count = room = minimum<int64_t>(maximum<int64_t>(offsets[index + 1] - first, 0), total - first);
            return;
        }
        first = index * longest;
        count = lengths ? minimum<int64_t>(maximum<int64_t>(lengths[index], 0), longest) : longest;
        room = longest;
    }

    // Column `k` of the item's relaxation.
    T relaxation(int k) const { return static_cast<const T *>(problem.relaxation)[2 * index + k]; }
    bool has_points() const { return problem.metric != Metric::cost; }
    bool has_directions() const { return problem.metric == Metric::cosine; }
    // Tables of rows come in whole groups; columns of the cost come in whole vectors.
    int64_t cloud_rows(int64_t count) const { return round_up(count, kGroup); }

    // The item's weights, zeros up to `room`. A null point can take all the mass of the other side.
    void read_a(T *out) const {
        read_weights(problem.a, first_a, points_a, rows, out);
        if (n > points_a) out[points_a] = mass(problem.b, first_b, points_b);
    }
    void read_b(T *out) const {
        read_weights(problem.b, first_b, points_b, cols, out);
        if (m > points_b) out[points_b] = mass(problem.a, first_a, points_a);
    }
    T weight(const void *weights, int64_t first, int64_t count, int64_t i) const {
        return weights ? static_cast<const T *>(weights)[first + i] : T(1) / T(count);
    }
    void read_weights(const void *weights, int64_t first, int64_t count, int64_t room, T *out) const {
        for (int64_t i = 0; i < count; ++i) out[i] = weight(weights, first, count, i);
        for (int64_t i = count; i < room; ++i) out[i] = 0;
    }
    T mass(const void *weights, int64_t first, int64_t count) const {
        double sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += weight(weights, first, count, i);
        return T(sum);
    }

    void read_vector(const void *source, int64_t first, int64_t count, int64_t room, T *out) const {
        for (int64_t i = 0; i < count; ++i) out[i] = source ? static_cast<const T *>(source)[first + i] : T(0);
        for (int64_t i = count; i < room; ++i) out[i] = 0;
    }
};

// One cloud in compute precision: a table of rows, each in the tensor itself or copied into scratch. Beyond the last
// row the table repeats it, up to a whole group.
template <class T>
struct Cloud {
    const T **rows = nullptr;
    // Of the cosine metric: 1 / |x|, 0 for x = 0, and the power of two by which an extreme row was multiplied.
    T *inverse_norm = nullptr, *scale = nullptr;
    T *copies = nullptr;

    void carve(Carver &carver, const Item<T> &item, int64_t count) {
        carver.take(rows, item.cloud_rows(count));
        carver.take(inverse_norm, padded<T>(item.cloud_rows(count)));
        carver.take(scale, item.cloud_rows(count));
        carver.take(copies, count * item.stride);
    }

    // By the whole team. Returns false when `check` is set and an entry is not finite.
    bool read(const Item<T> &item, const Matrix &points, int64_t offset, int64_t count, const Team &team, bool check) {
        const Problem &p = item.problem;
        const bool in_place = readable_in_place<T>(points, p.dtype, p.features), norms = item.has_directions();
        int64_t begin, end;
        team.split(count, begin, end);
        bool finite = true;
        for (int64_t i = begin; i < end; ++i) {
            const void *source = element(points.data, p.dtype, offset + i * points.stride_row);
            if (in_place)
                rows[i] = static_cast<const T *>(source);
            else
                read_row(source, p.dtype, points.stride_col, p.features, copy(item, i));
            if (!check && !norms) continue;
            T squares = dot_rows(rows[i], rows[i], item.length);
            if (check && !is_finite(squares))  // also where the squares of finite numbers overflow: look closer
                for (int64_t k = 0; k < p.features; ++k) finite = finite && is_finite(rows[i][k]);
            if (!norms) continue;
            scale[i] = 1;
            if (!(squares > Ordinary<T>::least && squares < Ordinary<T>::most)) {
                if (in_place) read_row(source, p.dtype, 1, p.features, copy(item, i));
                scale[i] = scale_row(copies + i * item.stride, item.length);
                squares = dot_rows(rows[i], rows[i], item.length);
            }
            // An error here is common to the whole row: worth a square root in double.
            inverse_norm[i] = squares > 0 && is_finite(squares) ? T(1 / square_root(double(squares))) : T(0);
        }
        if (end == count && begin < end) {
            for (int64_t i = count; i < item.cloud_rows(count); ++i) rows[i] = rows[count - 1];
            for (int64_t i = count; i < padded<T>(item.cloud_rows(count)); ++i) inverse_norm[i] = 0;
        }
        return finite;
    }

  private:
    // Row i's place in scratch, from now on its entry in the table, with zeros up to whole vectors.
    T *copy(const Item<T> &item, int64_t i) {
        T *row = copies + i * item.stride;
        for (int64_t k = item.problem.features; k < item.length; ++k) row[k] = 0;
        rows[i] = row;
        return row;
    }
};

template <class T>
struct Clouds {
    Cloud<T> x, y;

    void carve(Carver &carver, const Item<T> &item) {
        if (!item.has_points()) return;
        x.carve(carver, item, item.points_a);
        if (!item.same) y.carve(carver, item, item.points_b);
    }

    // Both clouds, by the whole team. Bit 0, bit 1: x, y holds an entry that is not finite.
    int read(const Item<T> &item, const Team &team, bool check) {
        if (!item.has_points()) return 0;
        const Problem &p = item.problem;
        const bool good_x = x.read(item, p.x_a, item.offset_a, item.points_a, team, check);
        if (item.same) {
            y = x;
            return good_x ? 0 : 1;
        }
        const bool good_y = y.read(item, p.x_b, item.offset_b, item.points_b, team, check);
        return (good_x ? 0 : 1) | (good_y ? 0 : 2);
    }
};

// Rows [begin, end) of the cost, of which `begin` starts a group; row `begin` goes to `out`. Whole groups of rows are
// written; columns from m and rows from n on are +inf, which no sum over plan entries sees. Between the points and
// those stand the null points, if any. Columns before `from`, a whole number of vectors and groups, are left out (or
// not: there stands nothing to read). Returns false when an entry is NaN or -inf.
template <class T>
inline bool cost_rows(const Item<T> &item, Clouds<T> &clouds, int64_t begin, int64_t end, T *out, int64_t from = 0) {
    constexpr int width = Simd<T>::width;
    const Problem &p = item.problem;
    const int64_t cols = item.cols, used = round_up(end - begin, kGroup);
    if (item.has_points()) {
        const T *const *x = clouds.x.rows + begin, *const *y = clouds.y.rows + from;
        const int64_t points = minimum(used, item.cloud_rows(item.points_a) - begin);
        const int64_t others = item.cloud_rows(item.points_b) - from;
        if (p.metric == Metric::sqeuclidean || p.metric == Metric::euclidean)
            pair_products<T, true>(x, points, y, others, item.length, out + from, cols);
        else
            pair_products<T, false>(x, points, y, others, item.length, out + from, cols);
    }
    Bits<T> bad{};
    for (int64_t i = 0; i < used; ++i) {
        T *row = out + i * cols;
        const int64_t real = begin + i < item.points_a ? item.points_b : 0;
        if (p.metric == Metric::cost) {
            const int64_t offset = p.cost.stride_b * item.index + (begin + i) * p.cost.stride_row;
            if (real) read_row(element(p.cost.data, p.dtype, offset), p.dtype, p.cost.stride_col, real, row);
        } else if (p.metric == Metric::cosine) {
            const T inverse = real ? clouds.x.inverse_norm[begin + i] : T(0);
            for (int64_t j = from; j < real; ++j) row[j] = 1 - row[j] * inverse * clouds.y.inverse_norm[j];
        } else if (p.metric == Metric::dot) {
            for (int64_t j = from; j < real; ++j) row[j] = -row[j];
        } else if (p.metric == Metric::euclidean) {
            for (int64_t j = from; j < real; ++j) row[j] = square_root(row[j]);
        }
        for (int64_t j = real; j < cols; ++j) row[j] = infinity<T>();
        if (item.m > item.points_b && begin + i <= item.points_a) {
            if (begin + i < item.points_a)
                row[item.points_b] = item.null_cost;
            else
                for (int64_t j = 0; j <= item.points_b; ++j) row[j] = j < item.points_b ? item.null_cost : T(0);
        }
        for (int64_t j = from; j < cols; j += width) bad |= ~(load(row + j) > splat(-infinity<T>()));
    }
    bool good = true;
    for (int k = 0; k < width; ++k) good = good && !bad[k];
    return good;
}

// An item's part of a (B, N) or (T_a,) tensor, zeros up to `room`.
template <class T>
inline void write_padded(void *out, int64_t first, int64_t room, const T *from, int64_t count, T shift = 0) {
    T *to = static_cast<T *>(out) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] + shift;
    for (int64_t i = count; i < room; ++i) to[i] = 0;
}

// Of bits 0, 1, 2 for bad entries in x, y, the cost. The smallest item wins, whichever thread comes first.
inline void report_bad_input(int64_t &bad_input, int64_t item, int found) {
    const int64_t mine = item * 4 + (found & 1 ? 0 : found & 2 ? 1 : 2);
    int64_t before = __atomic_load_n(&bad_input, __ATOMIC_RELAXED);
    while ((before < 0 || mine < before) &&
           !__atomic_compare_exchange_n(&bad_input, &before, mine, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
