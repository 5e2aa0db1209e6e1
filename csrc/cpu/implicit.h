// The adjoint of the fixed point f = update(softmin g), g = update(softmin f) of one item: for given u find p, q with
//   p_i / slope_i + sum_j tau_ij q_j = u_i,  tau_ij = a_i E_ij / c_j,   c_j = sum_i a_i E_ij + extra_j
//   q_j / slope_j + sum_i pi_ij p_i = u_j,   pi_ij = b_j E_ij / r_i,    r_i = sum_j b_j E_ij + extra_i
//
// In p_i = sqrt(slope_i a_i r_i) x_i and q_j = sqrt(slope_j b_j c_j) y_j it is symmetric, x + S y = u', S^T x + y = v',
// with a matrix whose entries and singular values are at most 1:
//   S_ij = sqrt(slope_i a_i / r_i) E_ij sqrt(slope_j b_j / c_j)
// y is eliminated, and (1 - S S^T) x = u' - S v' solved by conjugate gradients. Points outside the system have rows of
// zeros: those with a slope of 0, for which p = 0, and the bare ones, without mass, for which p = slope u: they depend
// on no other point, and the others' right-hand sides lose what depends on them.
#pragma once

#include "plan.h"

namespace otkern {
namespace OTKERN_LEVEL {

template <class T>
class Adjoint {
  public:
    Adjoint(ImplicitCall &call_, const Item<T> &item_, Team &team_) : call(call_), item(item_), team(team_) {
        block = maximum<int64_t>(32, round_up((item.rows + 63) / 64, kGroup));
        blocks = (item.rows + block - 1) / block;
        stored = item.rows * item.cols * int64_t(sizeof(T)) <= call.store_bytes;
        panel = stored ? block : minimum(block, maximum<int64_t>(kGroup, (1 << 20) / item.cols / kGroup * kGroup));
    }

    void carve(Carver &carver) {
        in.carve(carver, item);
        T **const over_rows[] = {&slope_a, &r, &u_a, &scale_a, &x, &residual, &direction, &image};
        T **const over_columns[] = {&slope_b, &c, &u_b, &scale_b, &rhs_b, &y};
        for (T **vector : over_rows) carver.take(*vector, item.rows);
        for (T **vector : over_columns) carver.take(*vector, item.cols);
        carver.take(partial_sums, blocks * item.cols);
        carver.take(matrix, stored ? item.rows * item.cols : panel * item.cols * team.size);
    }

    void run();

  private:
    // function(rows, begin, end, k) for the panels of this thread's blocks k; of E, or of S when `scaled`.
    template <class F>
    void for_panels(bool scaled, F function) {
        int64_t first, last;
        team.split(blocks, first, last);
        for (int64_t k = first; k < last; ++k)
            for (int64_t i = k * block; i < minimum((k + 1) * block, item.rows); i += panel) {
                const int64_t stop = minimum(minimum(i + panel, (k + 1) * block), item.rows);
                if (!stored) make_rows(i, stop, matrix + team.rank * panel * item.cols, scaled);
                function(stored ? matrix + i * item.cols : matrix + team.rank * panel * item.cols, i, stop, k);
            }
    }
    template <class F>
    void own_rows(F function) {
        int64_t first, last;
        team.split(blocks, first, last);
        for (int64_t i = first * block; i < minimum(last * block, item.rows); ++i) function(i);
    }
    template <class F>
    void own_columns(F function) {
        int64_t begin, end;
        team.split(item.cols, begin, end);
        for (int64_t j = begin; j < end; ++j) function(j);
    }
    // By every thread alike, so that no sum has to be shared.
    double dot(const T *v, const T *w) const {
        double sum = 0;
        for (int64_t i = 0; i < item.n; ++i) sum += double(v[i]) * double(w[i]);
        return sum;
    }

    // A mass that no other point feels; one over its root still has a finite square.
    static bool is_bare(T weight, T sum) { return !(double(weight) * sum > 1e-30); }

    void read();
    void make_rows(int64_t begin, int64_t end, T *out, bool scaled);
    void scale_rows(int64_t begin, int64_t end, T *rows) const;
    static void weigh(const T *weights, const T *sums, const T *slopes, const T *u, int64_t count, T *scale, T *rhs);
    void normalise();
    void settle_bare();
    void times_columns(const T *v, T *out);
    void times_rows(const T *v, T *out);
    void remove_constant(T *v);
    void start();
    void iterate();
    void write(void *out, int64_t first, int64_t room, int64_t count, const T *weights, const T *sums, const T *slopes,
               const T *u, const T *solution) const;

    ImplicitCall &call;
    const Item<T> &item;
    Team &team;
    PlanInputs<T> in;
    int64_t block, blocks, panel;
    bool stored;
    double target = 0, square = 0;  // of the residual's norm, at the start and now
    int64_t iterations = 0;
    T *slope_a, *slope_b, *u_a, *u_b;
    T *r, *c;              // with the extras
    T *scale_a, *scale_b;  // sqrt(slope a / r); 0 outside the system
    T *rhs_b;              // v'
    T *x, *y, *residual, *direction, *image;
    T *partial_sums;  // blocks x cols
    T *matrix;        // E, later S; or a panel of it for each thread
};

template <class T>
void Adjoint<T>::read() {
    in.read(item, team, call.f, call.g);
    if (team.rank == 0) {
        item.read_vector(call.u_a, item.first_a, item.n, item.rows, u_a);
        item.read_vector(call.u_b, item.first_b, item.m, item.cols, u_b);
        item.read_vector(call.extra_a, item.first_a, item.n, item.rows, r);
        item.read_vector(call.extra_b, item.first_b, item.m, item.cols, c);
        item.read_vector(call.slope_a, item.first_a, item.n, item.rows, slope_a);
        item.read_vector(call.slope_b, item.first_b, item.m, item.cols, slope_b);
        for (int64_t i = 0; i < item.n && !call.slope_a; ++i) slope_a[i] = 1;
        for (int64_t j = 0; j < item.m && !call.slope_b; ++j) slope_b[j] = 1;
    }
    team.barrier();
}

// Rows [begin, end) of E, of which begin starts a group. Between two points without weight E could be infinite; no
// sum wants it, and it is 0. At one such point it may leave the range of T and has to stay a number.
template <class T>
void Adjoint<T>::make_rows(int64_t begin, int64_t end, T *out, bool scaled) {
    constexpr int width = Simd<T>::width;
    cost_rows(item, in.clouds, begin, minimum(end, item.n), out);
    for (int64_t i = begin; i < end; ++i) {
        T *row = out + (i - begin) * item.cols;
        const Bits<T> weighted = splat(in.a[i]) > 0;
        for (int64_t j = 0; j < item.cols; j += width) {
            const Vec<T> entry = load(row + j);
            const Bits<T> alive = (entry < infinity<T>()) & (weighted | (load(in.b + j) > 0));
            const Vec<T> e = exponent_of<T>(load(in.g + j), entry, in.f[i], alive) * item.inverse_reg;
            store(row + j, vmin<T>(vexp<T>(e), splat(huge<T>())));
        }
    }
    if (scaled) scale_rows(begin, end, out);
}

template <class T>
void Adjoint<T>::scale_rows(int64_t begin, int64_t end, T *rows) const {
    for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < item.cols; j += Simd<T>::width) {
            T *entry = rows + (i - begin) * item.cols + j;
            store(entry, load(entry) * scale_a[i] * load(scale_b + j));
        }
}

// r and c: the extras, and the sums of the plan over the weights.
template <class T>
void Adjoint<T>::normalise() {
    constexpr int width = Simd<T>::width;
    if (stored) {
        int64_t first, last;
        team.split(blocks, first, last);
        for (int64_t k = first; k < last; ++k)
            make_rows(k * block, minimum((k + 1) * block, item.rows), matrix + k * block * item.cols, false);
    }
    for_panels(false, [&](const T *rows, int64_t begin, int64_t end, int64_t k) {
        T *sums = partial_sums + k * item.cols;
        for (int64_t i = begin; i < end; ++i) {
            const T *row = rows + (i - begin) * item.cols;
            Vec<T> sum{};
            for (int64_t j = 0; j < item.cols; j += width) {
                const Vec<T> e = load(row + j), before = i > k * block ? load(sums + j) : Vec<T>{};
                sum += load(in.b + j) * e;
                store(sums + j, before + in.a[i] * e);
            }
            r[i] += horizontal_sum<T>(sum);
        }
    });
    team.barrier();
    own_columns([&](int64_t j) {
        for (int64_t k = 0; k < blocks; ++k) c[j] += partial_sums[k * item.cols + j];
    });
    team.barrier();
}

template <class T>
void Adjoint<T>::settle_bare() {
    const auto bare_a = [&](int64_t i) { return is_bare(in.a[i], r[i]); };
    const auto bare_b = [&](int64_t j) { return is_bare(in.b[j], c[j]); };
    bool any = false;
    for (int64_t i = 0; i < item.n; ++i) any = any || bare_a(i);
    for (int64_t j = 0; j < item.m; ++j) any = any || bare_b(j);
    if (!any) return;
    for_panels(false, [&](const T *rows, int64_t begin, int64_t end, int64_t k) {
        T *sums = partial_sums + k * item.cols;
        for (int64_t j = 0; j < item.cols && begin == k * block; ++j) sums[j] = 0;
        for (int64_t i = begin; i < end; ++i) {
            const T *row = rows + (i - begin) * item.cols;
            for (int64_t j = 0; j < item.m && bare_a(i) && r[i] > 0; ++j)
                sums[j] += in.b[j] * row[j] / r[i] * (slope_a[i] * u_a[i]);
            for (int64_t j = 0; j < item.m && !bare_a(i); ++j)
                if (bare_b(j) && c[j] > 0) u_a[i] -= in.a[i] * row[j] / c[j] * (slope_b[j] * u_b[j]);
        }
    });
    team.barrier();
    own_columns([&](int64_t j) {
        for (int64_t k = 0; k < blocks && !bare_b(j); ++k) u_b[j] -= partial_sums[k * item.cols + j];
    });
    team.barrier();
}

// Whether a point is in the system, and then the factors sqrt(slope w / sum) of S and sqrt(slope / (w sum)) of u.
template <class T>
void Adjoint<T>::weigh(const T *weights, const T *sums, const T *slopes, const T *u, int64_t count, T *scale, T *rhs) {
    for (int64_t i = 0; i < count; ++i) {
        const double weight = weights[i], sum = sums[i], slope = slopes[i];
        const bool inside = !is_bare(weights[i], sums[i]) && slope > 0;
        scale[i] = inside ? T(square_root(slope * weight / sum)) : T(0);
        rhs[i] = inside ? T(u[i] * square_root(slope / (weight * sum))) : T(0);
    }
}

// out = S^T v. Ends when all of it is there.
template <class T>
void Adjoint<T>::times_columns(const T *v, T *out) {
    constexpr int width = Simd<T>::width, vectors = 4;
    for_panels(true, [&](const T *rows, int64_t begin, int64_t end, int64_t k) {
        T *sums = partial_sums + k * item.cols;
        const bool add = begin > k * block;
        for (int64_t j = 0; j < item.cols; j += vectors * width) {
            const int count = int(minimum<int64_t>(vectors, (item.cols - j) / width));
            Vec<T> acc[vectors] = {};
            for (int l = 0; l < count && add; ++l) acc[l] = load(sums + j + l * width);
            for (int64_t i = begin; i < end; ++i)
                for (int l = 0; l < count; ++l) acc[l] += load(rows + (i - begin) * item.cols + j + l * width) * v[i];
            for (int l = 0; l < count; ++l) store(sums + j + l * width, acc[l]);
        }
    });
    team.barrier();
    own_columns([&](int64_t j) {
        T sum = 0;
        for (int64_t k = 0; k < blocks; ++k) sum += partial_sums[k * item.cols + j];
        out[j] = sum;
    });
    team.barrier();
}

// out = S v, each thread its own rows.
template <class T>
void Adjoint<T>::times_rows(const T *v, T *out) {
    constexpr int width = Simd<T>::width;
    for_panels(true, [&](const T *rows, int64_t begin, int64_t end, int64_t) {
        for (int64_t i = begin; i < end; i += kGroup) {
            const T *row = rows + (i - begin) * item.cols;
            Vec<T> acc[kGroup] = {};
            for (int64_t j = 0; j < item.cols; j += width)
                for (int l = 0; l < kGroup; ++l) acc[l] += load(row + l * item.cols + j) * load(v + j);
            for (int l = 0; l < kGroup; ++l) out[i + l] = horizontal_sum<T>(acc[l]);
        }
    });
}

// Two constraints leave f + t, g - t: x = sqrt(a r) is in the null space, and the right-hand side, but for rounding,
// has no part of it.
template <class T>
void Adjoint<T>::remove_constant(T *v) {
    double along = 0, square = 0;
    const auto constant = [&](int64_t i) { return scale_a[i] > 0 ? square_root(double(in.a[i]) * r[i]) : 0.0; };
    for (int64_t i = 0; i < item.n; ++i) {
        along += constant(i) * v[i];
        square += constant(i) * constant(i);
    }
    team.barrier();
    if (square > 0) own_rows([&](int64_t i) { v[i] -= T(along / square * constant(i)); });
    team.barrier();
}

template <class T>
void Adjoint<T>::write(void *out, int64_t first, int64_t room, int64_t count, const T *weights, const T *sums,
                       const T *slopes, const T *u, const T *solution) const {
    T *to = static_cast<T *>(out) + first;
    for (int64_t i = 0; i < count; ++i) {
        const double mass = double(weights[i]) * sums[i];
        to[i] = is_bare(weights[i], sums[i]) ? slopes[i] * u[i] : T(square_root(slopes[i] * mass) * solution[i]);
    }
    for (int64_t i = count; i < room; ++i) to[i] = 0;
}

// x = u' - S v', the solution where S S^T is small, and the residual S S^T x, small where it is. A point of little mass
// has a large entry in the right-hand side and next to none in this residual; against the former, the points that
// matter would count as solved before the first iteration.
template <class T>
void Adjoint<T>::start() {
    times_rows(rhs_b, image);
    own_rows([&](int64_t i) { x[i] = residual[i] - image[i]; });
    team.barrier();
    // Where the right-hand side is nothing but a constant, what is left of it is rounding, and so is the residual.
    constexpr double rounding = sizeof(T) == 4 ? 1e-12 : 1e-28;
    const double scale = dot(residual, residual) + dot(image, image);
    for (int pass = 0; call.singular && pass < 2; ++pass) remove_constant(x);  // the second one its rounding
    const double rest = dot(x, x);
    times_columns(x, y);
    times_rows(y, residual);
    team.barrier();
    for (int pass = 0; call.singular && pass < 2; ++pass) remove_constant(residual);
    target = dot(residual, residual);
    if (call.singular && (rest <= rounding * scale || target <= rounding * rest)) target = 0;
    own_rows([&](int64_t i) { direction[i] = residual[i]; });
}

template <class T>
void Adjoint<T>::iterate() {
    square = target;
    while (iterations < call.max_iter && square > call.tol * call.tol * target && square > 0) {
        times_columns(direction, y);
        times_rows(y, image);
        own_rows([&](int64_t i) { image[i] = direction[i] - image[i]; });
        team.barrier();
        const double curvature = dot(direction, image);
        // Below this the system is singular as far as T can tell, and a step would only amplify rounding.
        if (!(curvature > (sizeof(T) == 4 ? 1.2e-7 : 2.2e-16) * dot(direction, direction))) break;
        const double step = square / curvature;
        own_rows([&](int64_t i) {
            x[i] += T(step) * direction[i];
            residual[i] -= T(step) * image[i];
        });
        team.barrier();
        if (call.singular) remove_constant(residual);
        const double before = square;
        square = dot(residual, residual);
        own_rows([&](int64_t i) { direction[i] = residual[i] + T(square / before) * direction[i]; });
        ++iterations;
    }
}

template <class T>
void Adjoint<T>::run() {
    read();
    normalise();
    settle_bare();
    if (team.rank == 0) {
        weigh(in.a, r, slope_a, u_a, item.rows, scale_a, residual);
        weigh(in.b, c, slope_b, u_b, item.cols, scale_b, rhs_b);
    }
    team.barrier();
    if (stored) for_panels(true, [&](T *rows, int64_t begin, int64_t end, int64_t) { scale_rows(begin, end, rows); });
    start();
    iterate();
    times_columns(x, y);
    if (team.rank != 0) return;
    for (int64_t j = 0; j < item.m; ++j) y[j] = rhs_b[j] - y[j];
    write(call.p, item.first_a, item.room_a, item.n, in.a, r, slope_a, u_a, x);
    write(call.q, item.first_b, item.room_b, item.m, in.b, c, slope_b, u_b, y);
    static_cast<T *>(call.residual)[item.index] = T(target > 0 ? square_root(square / target) : 0);
    call.n_iters[item.index] = int32_t(iterations);
}

// An item with an empty side has no plan: p = slope u.
template <class T>
void write_without_plan(ImplicitCall &call, const Item<T> &item) {
    const auto write = [](void *out, const void *slope, const void *u, int64_t first, int64_t room, int64_t count) {
        T *to = static_cast<T *>(out);
        for (int64_t i = first; i < first + room; ++i) {
            const T factor = slope ? static_cast<const T *>(slope)[i] : T(1);
            to[i] = i < first + count ? factor * static_cast<const T *>(u)[i] : T(0);
        }
    };
    write(call.p, call.slope_a, call.u_a, item.first_a, item.room_a, item.n);
    write(call.q, call.slope_b, call.u_b, item.first_b, item.room_b, item.m);
    static_cast<T *>(call.residual)[item.index] = 0;
    call.n_iters[item.index] = 0;
}

template <class T>
void implicit_item(ImplicitCall &call, int64_t index, Team &team) {
    const Item<T> item(call.problem, index);
    if (item.n == 0 || item.m == 0) {
        if (team.rank == 0) write_without_plan(call, item);
        return;
    }
    Adjoint<T> adjoint(call, item, team);
    if (!carve_scratch(call, team, [&](Carver &carver) { adjoint.carve(carver); })) return;
    adjoint.run();
}

}  // namespace OTKERN_LEVEL
}  // namespace otkern
