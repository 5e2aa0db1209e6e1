// Backward of one item: plan panels, their products with the points, the metric's derivative, sums over the plan.
//
// The gradient of the cost is W (call.h): dvalue P for the value (envelope theorem), or weights that the caller gives.
// Everything else follows from it. For the value, sums are formed for dvalue = 1 and scaled when they are written.
#include "plan.h"

namespace otkern {
namespace OTKERN_LEVEL {
namespace {

// The weights of call.h, read; those of the value's gradient are scale = 1 and nothing else.
template <class T>
struct PlanWeights {
    bool of_value;
    T scale, cost_scale;
    const T *dense;
    T *row, *col;

    void carve(Carver &carver, const Item<T> &item) {
        carver.take(row, item.rows);
        carver.take(col, item.cols);
    }

    void read(const Item<T> &item, const Team &team, const BackwardCall &call) {
        const Problem &p = item.problem;
        const auto number = [&](const void *from, T otherwise) {
            return from ? static_cast<const T *>(from)[item.index] : otherwise;
        };
        of_value = call.scale == nullptr;
        scale = number(call.scale, 1);
        cost_scale = number(call.cost_scale, 0);
        dense = static_cast<const T *>(call.dense);
        if (dense) dense += item.index * p.max_a * p.max_b;
        if (team.rank != 0) return;
        item.read_vector(call.row, item.first_a, item.n, item.rows, row);
        item.read_vector(call.col, item.first_b, item.m, item.cols, col);
    }
};

// Row i of W to `w`, E_ij (a_i H_ij + row_i) to `of_columns`, from the cost row `c` (may be `w`). Returns the sums
// sum_j E_ij (b_j H_ij + col_j) and sum_j W_ij x_ij, for the value sum_j b_j h(x_ij). Between two points without weight
// E_ij can be anything, infinite too, and must not meet a coefficient of 0.
template <class T>
RowSums weighted_row(const Item<T> &item, const PlanInputs<T> &in, const PlanWeights<T> &given, int64_t i, const T *c,
                     T *w, T *of_columns) {
    constexpr int width = Simd<T>::width;
    const bool real = i < item.n;
    const T a = in.a[i], f = in.f[i], row = given.row[i];
    const T *dense = given.dense && real ? given.dense + i * item.problem.max_b : nullptr;
    const auto product = [](Vec<T> e, Vec<T> by) { return select<T>(by != 0, e * by, Vec<T>{}); };
    Vec<T> ratio{}, entropy{};
    for (int64_t j = 0; j < item.cols; j += width) {
        const Vec<T> entry = load(c + j), b = load(in.b + j), col = load(given.col + j);
        const Bits<T> alive = entry < infinity<T>();
        const Vec<T> x = exponent_of<T>(load(in.g + j), entry, f, alive) * item.inverse_reg, e = vexp<T>(x);
        Vec<T> h = given.scale + given.cost_scale * select<T>(alive, entry, Vec<T>{});
        if (dense && j < item.m) h += load_some(dense + j, item.m - j, T(0));
        const Vec<T> by_column = select<T>(alive, a * h + row, Vec<T>{});
        const Vec<T> by_row = select<T>(alive, b * h + col, Vec<T>{});
        const Vec<T> plan = product(e, b * by_column + select<T>(alive, a * col, Vec<T>{}));
        ratio += product(e, by_row);
        if (given.of_value)
            entropy += select<T>(alive & (b > 0), b * entropy_of<T>(x, e), b);  // h(-inf) = 1
        else
            entropy += select<T>(plan != 0, plan * x, Vec<T>{});
        store(of_columns + j, product(e, by_column));
        store(w + j, plan);
    }
    return {horizontal_sum<T>(ratio), given.of_value && a == 0 ? 0.0 : double(horizontal_sum<T>(entropy))};
}

// Rows of a gradient that are computed together and written before they leave L1.
constexpr int64_t kTileRows = 8;

template <class T>
struct Backward {
    BackwardCall &call;
    const Item<T> &item;
    Team &team;
    PlanInputs<T> in;
    PlanWeights<T> given;
    int64_t panel;
    bool half;            // of a cloud with itself: dx_b is left 0
    bool general;         // rows by weighted_row, which every case could use, or by the faster plan_row
    bool past_caches;     // the gradients of the whole batch are more than the caches hold
    T *plan, *weights;    // panel x cols; the weights of the points' products, or the plan itself where that is them
    T *of_columns;        // panel x cols: the terms of the sums over columns; only if general
    T *tile_sums;         // kTileRows x stride for each thread
    T *sums_y = nullptr;  // cloud rows of y x stride; only where several panels add to them
    T *row_ratio, *row_entropy;  // rows
    T *column_sums;              // cols

    Backward(BackwardCall &call_, const Item<T> &item_, Team &team_)
        : call(call_), item(item_), team(team_), panel(panel_size(item_, team_)) {
        const Problem &p = item.problem;
        const int64_t points = p.cu_seqlens_a ? p.total_a + p.total_b : p.batch * (p.max_a + p.max_b);
        half = item.same && call.scale == nullptr;
        general = call.scale != nullptr || unweighted_points();
        past_caches = kCanStream && points * p.features * int64_t(sizeof(T)) >= (int64_t(8) << 20);
    }

    // Points without weight have a ratio, too. Where the marginals are constraints it is known to be 1.
    bool unweighted_points() const {
        const Problem &p = item.problem;
        if (p.kind == Kind::balanced || !call.sum_a) return false;
        bool found = false;
        for (int64_t i = 0; i < item.n; ++i) found = found || item.weight(p.a, item.first_a, item.n, i) == 0;
        for (int64_t j = 0; j < item.m; ++j) found = found || item.weight(p.b, item.first_b, item.m, j) == 0;
        return found;
    }
    bool separate_weights() const {
        return item.problem.metric == Metric::euclidean || (item.has_directions() && call.sum_b && !general);
    }
    bool differences() const {
        return item.problem.metric == Metric::euclidean || item.problem.metric == Metric::sqeuclidean;
    }

    void carve(Carver &carver) {
        in.carve(carver, item);
        carver.take(row_ratio, item.rows);
        carver.take(row_entropy, item.rows);
        carver.take(column_sums, item.cols);
        carver.take(plan, panel * item.cols);
        weights = plan;
        if (general) {
            given.carve(carver, item);
            carver.take(of_columns, panel * item.cols);
        }
        if (separate_weights()) carver.take(weights, panel * item.cols);
        carver.take(tile_sums, team.size * kTileRows * item.stride);
        if (call.dx_b && !half && panel < item.n) carver.take(sums_y, item.cloud_rows(item.m) * item.stride);
    }

    void run(T dvalue);
    void plan_rows(int64_t first, int64_t begin, int64_t end);
    void row_products(int64_t first, int64_t begin, int64_t end, T dvalue);
    void column_products(int64_t first, int64_t count, int64_t begin, int64_t end, T dvalue);
    void products(const T *w, int64_t w_row, int64_t w_term, const T *const *points, int64_t rows, const T *const *z,
                  int64_t count, bool add, T *sums);
    T *own_sums() const { return tile_sums + team.rank * kTileRows * item.stride; }
    void write_point(const T *sums, const Cloud<T> &cloud, int64_t index, T dvalue, void *out, int64_t row);
    void write_sums();
};

// Rows [begin, end) of the panel that starts at row `first`: cost, plan, weights.
template <class T>
void Backward<T>::plan_rows(int64_t first, int64_t begin, int64_t end) {
    constexpr int width = Simd<T>::width;
    if (begin >= end) return;
    T *c = weights + begin * item.cols;
    cost_rows(item, in.clouds, first + begin, minimum(first + end, item.n), c);
    for (int64_t i = begin; i < end; ++i) {
        c = weights + i * item.cols;
        T *p = plan + i * item.cols;
        const RowSums sums = general ? weighted_row(item, in, given, first + i, c, p, of_columns + i * item.cols)
                                     : plan_row(item, in, first + i, call.sum_reg != nullptr, c, p);
        row_ratio[first + i] = T(sums.ratio);
        row_entropy[first + i] = T(sums.entropy);
        if (item.has_directions()) {
            // Products are formed with the points as they are: W_ij = P_ij / (|x_i| |y_j|).
            const T inverse = first + i < item.n ? in.clouds.x.inverse_norm[first + i] : T(0);
            for (int64_t j = 0; j < item.cols; j += width)
                store(c + j, load(p + j) * (inverse * load(in.clouds.y.inverse_norm + j)));
        } else if (separate_weights()) {
            // d|x - y| / dx = (x - y) / |x - y|, and 0 where the points coincide.
            for (int64_t j = 0; j < item.cols; j += width) {
                const Vec<T> distance = load(c + j);
                store(c + j, select<T>(distance > 0, load(p + j) / distance, Vec<T>{}));
            }
        }
    }
}

// Gradient rows that a panel completes: those of x, and of the cost.
template <class T>
void Backward<T>::row_products(int64_t first, int64_t begin, int64_t end, T dvalue) {
    const Problem &p = item.problem;
    if (call.dx_a)
        for (int64_t i = begin; i < end; i += kTileRows) {
            const int64_t stop = minimum(i + kTileRows, end), last = minimum(first + stop, item.n);
            products(weights + i * item.cols, item.cols, 1, in.clouds.x.rows + first + i, stop - i, in.clouds.y.rows,
                     item.m, false, own_sums());
            for (int64_t row = first + i; row < last; ++row)
                write_point(own_sums() + (row - first - i) * item.stride, in.clouds.x, row, dvalue, call.dx_a,
                            item.first_a + row);
        }
    if (!call.dcost) return;
    for (int64_t i = begin; i < minimum(end, item.n - first); ++i) {
        T *row = plan + i * item.cols;
        for (int64_t j = 0; j < item.m; ++j) row[j] *= dvalue;
        const int64_t out = (item.index * p.max_a + first + i) * p.max_b;
        write_row(row, item.m, const_cast<void *>(element(call.dcost, p.dtype, out)), p.dtype);
    }
}

// Columns [begin, end) take in the panel's `count` rows; after the last panel they are complete.
template <class T>
void Backward<T>::column_products(int64_t first, int64_t count, int64_t begin, int64_t end, T dvalue) {
    if (call.dx_b && !half)
        for (int64_t j = begin; j < end; j += kTileRows) {
            const int64_t stop = minimum(j + kTileRows, end), last = minimum(stop, item.m);
            T *sums = sums_y ? sums_y + j * item.stride : own_sums();
            products(weights + j, 1, item.cols, in.clouds.y.rows + j, stop - j, in.clouds.x.rows + first, count,
                     first > 0, sums);
            if (first + count < item.n) continue;
            for (int64_t row = j; row < last; ++row)
                write_point(sums + (row - j) * item.stride, in.clouds.y, row, dvalue, call.dx_b, item.first_b + row);
        }
    if (!call.sum_b) return;
    const T *terms = general ? of_columns : plan;
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = begin; j < end; ++j)
            column_sums[j] = (first + i > 0 ? column_sums[j] : T(0)) + terms[i * item.cols + j];
}

// sums_i (+)= sum_j w_ij z_j, or sum_j w_ij (point_i - z_j) where the metric is one of differences.
template <class T>
void Backward<T>::products(const T *w, int64_t w_row, int64_t w_term, const T *const *points, int64_t rows,
                           const T *const *z, int64_t count, bool add, T *sums) {
    if (differences())
        weighted_sums<T, true>(w, w_row, w_term, points, rows, z, count, item.length, add, sums, item.stride);
    else
        weighted_sums<T, false>(w, w_row, w_term, points, rows, z, count, item.length, add, sums, item.stride);
}

// One gradient row, from s_i = sum_j W_ij y_j, or sum_j W_ij (x_i - y_j) where the metric is one of differences.
//   dot: -s   cosine: -(s - x <x, s> / |x|^2), times the power of two of a scaled row   sqeuclidean: 2 s   euclidean: s
template <class T>
void Backward<T>::write_point(const T *sums, const Cloud<T> &cloud, int64_t index, T dvalue, void *out, int64_t row) {
    constexpr int width = Simd<T>::width;
    const Problem &p = item.problem;
    const T *point = cloud.rows[index];
    T along = 0, scale = dvalue;
    if (p.metric == Metric::cosine) {
        const T inverse = cloud.inverse_norm[index];
        along = dot_rows(point, sums, item.length) * inverse * inverse;
        scale = -dvalue * cloud.scale[index];
    } else if (p.metric == Metric::dot) {
        scale = -dvalue;
    } else if (p.metric == Metric::sqeuclidean) {
        scale = 2 * dvalue;
    }
    void *to = const_cast<void *>(element(out, p.dtype, row * p.features));
    if (sizeof(T) == (p.dtype == Dtype::f64 ? 8 : p.dtype == Dtype::f32 ? 4 : 0)) {
        T *target = static_cast<T *>(to);
        int64_t k = 0;
        const auto gradient = [&](int64_t at) { return (load(sums + at) - load(point + at) * along) * scale; };
        if (past_caches && (reinterpret_cast<uintptr_t>(target) & 63) == 0)
            for (; k + 64 / int64_t(sizeof(T)) <= p.features; k += 64 / int64_t(sizeof(T)))
                for (int64_t l = 0; l < 64 / int64_t(sizeof(T)); l += width) stream(target + k + l, gradient(k + l));
        for (; k + width <= p.features; k += width) store(target + k, gradient(k));
        for (; k < p.features; ++k) target[k] = (sums[k] - point[k] * along) * scale;
        return;
    }
    constexpr int64_t chunk = 256;
    T part[chunk];
    for (int64_t k = 0; k < p.features; k += chunk) {
        const int64_t count = minimum(chunk, p.features - k);
        for (int64_t l = 0; l < count; ++l) part[l] = (sums[k + l] - point[k + l] * along) * scale;
        write_row(part, count, const_cast<void *>(element(to, p.dtype, k)), p.dtype);
    }
}

template <class T>
void Backward<T>::write_sums() {
    if (call.sum_reg) {
        double sum = 0;
        for (int64_t i = 0; i < item.n; ++i) sum += (call.scale ? 1.0 : double(in.a[i])) * row_entropy[i];
        static_cast<T *>(call.sum_reg)[item.index] = T(sum);
    }
    if (call.sum_a) {
        T *sums = static_cast<T *>(call.sum_a) + item.first_a;
        for (int64_t i = 0; i < item.n; ++i) sums[i] = row_ratio[i];
    }
    if (call.sum_b) {
        T *sums = static_cast<T *>(call.sum_b) + item.first_b;
        for (int64_t j = 0; j < item.m; ++j)
            sums[j] = general ? column_sums[j] : in.b[j] != 0 ? column_sums[j] / in.b[j] : T(1);
    }
}

template <class T>
void Backward<T>::run(T dvalue) {
    in.read(item, team, call.f, call.g);
    if (general) given.read(item, team, call);
    team.barrier();
    int64_t begin, end;
    for (int64_t first = 0; first < item.n; first += panel) {
        const int64_t count = minimum(panel, item.n - first), used = round_up(count, kGroup);
        team.split(used / kGroup, begin, end);
        plan_rows(first, begin * kGroup, end * kGroup);
        team.barrier();
        // Columns before rows: the rows of dcost are scaled in place.
        team.split((item.cols + kTileRows - 1) / kTileRows, begin, end);
        const int64_t columns = item.cloud_rows(item.m);
        column_products(first, count, minimum(begin * kTileRows, columns), minimum(end * kTileRows, columns), dvalue);
        if (call.dcost) team.barrier();
        team.split((used + kTileRows - 1) / kTileRows, begin, end);
        row_products(first, minimum(begin * kTileRows, used), minimum(end * kTileRows, used), dvalue);
        team.barrier();
    }
    if (team.rank == 0) write_sums();
    fence();
}

inline void zero(void *data, Dtype dtype, int64_t first, int64_t count) {
    if (data == nullptr || count <= 0) return;
    char *begin = static_cast<char *>(const_cast<void *>(element(data, dtype, first)));
    memset(begin, 0, size_t(static_cast<const char *>(element(data, dtype, first + count)) - begin));
}

// Zeros in the padding of an item's gradients, or in all of them.
template <class T>
void clear(const BackwardCall &call, const Item<T> &item, bool everything) {
    const Problem &p = item.problem;
    const Dtype compute = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
    const int64_t n = everything ? 0 : item.n, m = everything ? 0 : item.m;
    const int64_t points_b = item.same && call.scale == nullptr ? 0 : m;
    zero(call.dx_a, p.dtype, (item.first_a + n) * p.features, (item.room_a - n) * p.features);
    zero(call.dx_b, p.dtype, (item.first_b + points_b) * p.features, (item.room_b - points_b) * p.features);
    zero(call.sum_a, compute, item.first_a + n, item.room_a - n);
    zero(call.sum_b, compute, item.first_b + m, item.room_b - m);
    if (call.dcost) {
        const int64_t start = item.index * p.max_a * p.max_b;
        for (int64_t i = 0; i < n; ++i) zero(call.dcost, p.dtype, start + i * p.max_b + m, p.max_b - m);
        zero(call.dcost, p.dtype, start + n * p.max_b, (p.max_a - n) * p.max_b);
    }
    if (everything && call.sum_reg) static_cast<T *>(call.sum_reg)[item.index] = 0;
}

template <class T>
void backward_item(BackwardCall &call, int64_t index, Team &team) {
    const Item<T> item(call.problem, index);
    const T dvalue = call.scale ? T(1) : static_cast<const T *>(call.dvalue)[index];
    const bool nothing = item.n == 0 || item.m == 0 || dvalue == 0;
    if (team.rank == 0) clear(call, item, nothing);
    if (nothing) return;
    Backward<T> backward(call, item, team);
    if (!carve_scratch(call, team, [&](Carver &carver) { backward.carve(carver); })) return;
    backward.run(dvalue);
}

}  // namespace

void backward(BackwardCall &call, int64_t item, Team &team) {
    if (call.problem.dtype == Dtype::f64)
        backward_item<double>(call, item, team);
    else
        backward_item<float>(call, item, team);
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
