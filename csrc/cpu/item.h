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

// True sizes and addresses of item `index`. Padded sizes are those of scratch: groups of rows, whole vectors of
// columns.
template <class T>
struct Item {
    const Problem &problem;
    int64_t index, n, m;
    int64_t first_a, first_b;    // of the item's rows in (B, N) or (T_a,) tensors
    int64_t room_a, room_b;      // rows the item has there: N, M when padded, n, m when packed
    int64_t offset_a, offset_b;  // of the item's first point, in elements
    int64_t rows, cols;          // n in whole groups, m in whole vectors and groups
    int64_t stride, length;      // of a point in scratch: with and without the extra line
    T reg, inverse_reg;

    Item(const Problem &p, int64_t index_) : problem(p), index(index_) {
        const bool packed = p.cu_seqlens_a != nullptr;
        place(packed ? p.cu_seqlens_a : nullptr, p.lengths_a, p.max_a, p.total_a, first_a, n, room_a);
        place(packed ? p.cu_seqlens_b : nullptr, p.lengths_b, p.max_b, p.total_b, first_b, m, room_b);
        offset_a = packed ? first_a * p.x_a.stride_row : index * p.x_a.stride_b;
        offset_b = packed ? first_b * p.x_b.stride_row : index * p.x_b.stride_b;
        rows = round_up(n, kGroup);
        cols = padded<T>(round_up(m, kGroup));
        stride = row_stride<T>(p.features);
        length = padded<T>(p.features);
        reg = static_cast<const T *>(p.reg)[index];
        inverse_reg = 1 / reg;
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

    bool has_points() const { return problem.metric != Metric::cost; }
    bool has_directions() const { return problem.metric == Metric::cosine; }
    // In scratch, clouds come in groups of rows; columns of the cost come in whole vectors.
    int64_t cloud_rows(int64_t count) const { return round_up(count, kGroup); }

    // The item's weights, zeros up to `room`.
    void read_weights(const void *weights, int64_t first, int64_t count, int64_t room, T *out) const {
        for (int64_t i = 0; i < count; ++i)
            out[i] = weights ? static_cast<const T *>(weights)[first + i] : T(1) / T(count);
        for (int64_t i = count; i < room; ++i) out[i] = 0;
    }
    void read_a(T *out) const { read_weights(problem.a, first_a, n, rows, out); }
    void read_b(T *out) const { read_weights(problem.b, first_b, m, cols, out); }

    void read_vector(const void *source, int64_t first, int64_t count, int64_t room, T *out) const {
        for (int64_t i = 0; i < count; ++i) out[i] = source ? static_cast<const T *>(source)[first + i] : T(0);
        for (int64_t i = count; i < room; ++i) out[i] = 0;
    }
};

template <class T>
struct Clouds {
    Ahead ahead;
    T *x = nullptr, *y = nullptr, *inverse_norm_x = nullptr, *inverse_norm_y = nullptr;

    void carve(Carver &carver, const Item<T> &item) {
        if (!item.has_points()) return;
        const int64_t rows_x = item.cloud_rows(item.n), rows_y = item.cloud_rows(item.m);
        carver.take(x, rows_x * item.stride);
        carver.take(y, rows_y * item.stride);
        carver.take(inverse_norm_x, rows_x);
        carver.take(inverse_norm_y, rows_y);
    }

    // Item `next`, or none (-1), follows on this thread: fetch its points meanwhile, if they lie together.
    void look_ahead(const Problem &p, int64_t next) {
        if (next < 0 || p.metric == Metric::cost) return;
        const Item<T> item(p, next);
        const auto span = [&](const Matrix &points, int64_t offset, int64_t count, const char *&begin,
                              const char *&end) {
            if (points.stride_col != 1 || points.stride_row != p.features) return;
            begin = static_cast<const char *>(element(points.data, p.dtype, offset));
            end = static_cast<const char *>(element(points.data, p.dtype, offset + count * p.features));
        };
        span(p.x_a, item.offset_a, item.n, ahead.at, ahead.end);
        span(p.x_b, item.offset_b, item.m, ahead.then_at, ahead.then_end);
    }

    // Both clouds into scratch, by the whole team. Bit 0, bit 1: x, y holds an entry that is not finite.
    int pack(const Item<T> &item, const Team &team, bool check) {
        if (!item.has_points()) return 0;
        const Problem &p = item.problem;
        int bad = 0;
        int64_t begin, end;
        team.split(item.n, begin, end);
        if (!pack_rows(p.x_a, p.dtype, item.offset_a, begin, end, p.features, item.has_directions(), check, x,
                       inverse_norm_x))
            bad |= 1;
        team.split(item.m, begin, end);
        if (!pack_rows(p.x_b, p.dtype, item.offset_b, begin, end, p.features, item.has_directions(), check, y,
                       inverse_norm_y))
            bad |= 2;
        if (team.rank == 0) {
            for (int64_t i = item.n * item.stride; i < item.cloud_rows(item.n) * item.stride; ++i) x[i] = 0;
            for (int64_t i = item.m * item.stride; i < item.cloud_rows(item.m) * item.stride; ++i) y[i] = 0;
        }
        return bad;
    }
};

// Rows [begin, end) of the cost, of which `begin` starts a group; row `begin` goes to `out`. Whole groups of rows are
// written; columns from m and rows from n on are +inf, which no sum over plan entries sees. Returns false when an
// entry is NaN or -inf.
template <class T>
inline bool cost_rows(const Item<T> &item, Clouds<T> &clouds, int64_t begin, int64_t end, T *out) {
    constexpr int width = Simd<T>::width;
    const Problem &p = item.problem;
    const int64_t cols = item.cols, used = round_up(end - begin, kGroup);
    if (item.has_points()) {
        const T *x = clouds.x + begin * item.stride;
        if (p.metric == Metric::sqeuclidean || p.metric == Metric::euclidean)
            pair_products<T, true>(x, used, clouds.y, item.cloud_rows(item.m), item.stride, item.length, clouds.ahead,
                                   out, cols);
        else
            pair_products<T, false>(x, used, clouds.y, item.cloud_rows(item.m), item.stride, item.length, clouds.ahead,
                                    out, cols);
    }
    Bits<T> bad{};
    for (int64_t i = 0; i < used; ++i) {
        T *row = out + i * cols;
        const int64_t real = begin + i < item.n ? item.m : 0;
        if (p.metric == Metric::cost) {
            const int64_t offset = p.cost.stride_b * item.index + (begin + i) * p.cost.stride_row;
            if (real) read_row(element(p.cost.data, p.dtype, offset), p.dtype, p.cost.stride_col, real, row);
        } else if (p.metric == Metric::cosine) {
            for (int64_t j = 0; j < real; ++j) row[j] = 1 - row[j];
        } else if (p.metric == Metric::dot) {
            for (int64_t j = 0; j < real; ++j) row[j] = -row[j];
        } else if (p.metric == Metric::euclidean) {
            for (int64_t j = 0; j < real; ++j) row[j] = square_root(row[j]);
        }
        for (int64_t j = real; j < cols; ++j) row[j] = infinity<T>();
        for (int64_t j = 0; j < cols; j += width) bad |= ~(load(row + j) > splat(-infinity<T>()));
    }
    bool good = true;
    for (int k = 0; k < width; ++k) good = good && !bad[k];
    return good;
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
