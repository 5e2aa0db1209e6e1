// The adjoint of the fixed point of one item, by a team: what is solved, and how, is explained in cpu/implicit.h. The
// matrix S stays on the chip, a slice of rows in each block; a product with its transpose adds the blocks' parts of a
// column at the column's owner, in the order of the blocks.
#pragma once

#include "plan.h"
#include "products.h"

namespace otkern {
namespace cuda {

template <class T>
struct AdjointMemory {
    T *a, *slope_a, *r, *u_a, *x, *residual, *direction, *image;  // of the block's rows
    T *f, *scale_a;                // the same memory as `image` and `direction`, until the matrix is made and scaled
    T *b, *g, *y;                  // of all columns
    T *slope_b, *c, *u_b, *rhs_b;  // of the block's columns
    Cloud<T> points_x, points_y;
    T *matrix;        // rows x m: the cost, then E, then S
    T *partial_sums;  // of all columns, several of each where there are few
    char *stages;     // while the cost is formed: in place of the partial sums and of all that lies behind them

    OTKERN_BOTH void carve(Carver &carver, Team &team, const SizeClass &size, int64_t n, int64_t m, bool directions) {
        const int64_t rows = ceil_div(n, size.cluster), columns = ceil_div(m, size.cluster);
        team.carve(carver);
        carver.take(a, rows);
        carver.take(slope_a, rows);
        carver.take(r, rows);
        carver.take(u_a, rows);
        carver.take(x, rows);
        carver.take(residual, rows);
        carver.take(direction, rows);
        carver.take(image, rows);
        f = image;
        scale_a = direction;
        carver.take(b, m);
        carver.take(g, m);
        carver.take(y, m);
        carver.take(slope_b, columns);
        carver.take(c, columns);
        carver.take(u_b, columns);
        carver.take(rhs_b, columns);
        points_x.carve(carver, int(rows), directions);
        points_y.carve(carver, int(m), directions);
        carver.take(matrix, rows * m);
        Carver over = carver;
        over.take(stages, CostTiles::least_bytes());
        carver.take(partial_sums, column_parts_count(size.threads, m));
        carver.used = maximum(carver.used, over.used);
    }
};

template <class T>
class Adjoint {
  public:
    OTKERN_DEVICE Adjoint(const ImplicitArguments &arguments, const Item<T> &item_, Carver &carver)
        : call(arguments.call), item(item_) {
        const Problem &p = call.problem;
        at.carve(carver, team, arguments.size, item.n, item.m, p.metric == Metric::cosine);
        team.join();
        at.points_x.point_at(p, p.x_a, item.offset_a);
        at.points_y.point_at(p, p.x_b, item.offset_b);
        team.slice(item.n, first_row, rows);
        team.slice(item.m, first_column, columns);
    }

    OTKERN_DEVICE void run();

  private:
    template <class F>
    OTKERN_DEVICE void for_rows(F function) const {
        for (int i = team.thread; i < rows; i += team.threads) function(i);
    }
    // By their places in the block's own vectors, and among all columns.
    template <class F>
    OTKERN_DEVICE void for_columns(F function) const {
        for (int c = team.thread; c < columns; c += team.threads) function(c, first_column + c);
    }
    OTKERN_DEVICE double dot(const T *v, const T *w) {
        double sum = 0;
        for_rows([&](int i) { sum += double(v[i]) * double(w[i]); });
        return team.sum(sum);
    }

    // A mass that no other point feels; one over its root still has a finite square.
    OTKERN_DEVICE static bool is_bare(T weight, T sum) { return !(double(weight) * double(sum) > 1e-30); }
    // Whether a point is in the system of equations.
    OTKERN_DEVICE static bool is_inside(T weight, T sum, T slope) { return !is_bare(weight, sum) && slope > 0; }
    // What a bare point adds to the others for one unit of E.
    OTKERN_DEVICE static T bare_part(T weight, T sum, T product) {
        if (!is_bare(weight, sum) || !(sum > 0)) return 0;
        return minimum(maximum(product / sum, -huge<T>()), huge<T>());
    }

    OTKERN_DEVICE void read();
    OTKERN_DEVICE void make_matrix();
    OTKERN_DEVICE void normalise();
    OTKERN_DEVICE void settle_bare();
    OTKERN_DEVICE static void weigh(T weight, T sum, T slope, T u, T &scale, T &rhs);
    OTKERN_DEVICE void scale_matrix();
    template <class F>
    OTKERN_DEVICE void times_columns(const T *v, F function);
    OTKERN_DEVICE void times_columns_to_y(const T *v);
    template <class F>
    OTKERN_DEVICE void times_rows(F function);
    OTKERN_DEVICE void times_rows_to(T *out);
    OTKERN_DEVICE void remove_constant(T *v);
    OTKERN_DEVICE void start();
    OTKERN_DEVICE void iterate();
    OTKERN_DEVICE T result(T weight, T sum, T slope, T u, T solution) const;
    OTKERN_DEVICE void write();

    const ImplicitCall &call;
    const Item<T> &item;
    AdjointMemory<T> at;
    Team team;
    int first_row, rows, first_column, columns;  // of the block
    double target = 0, square = 0;               // of the residual's norm, at the start and now
    int64_t iterations = 0;
};

template <class T>
OTKERN_DEVICE void Adjoint<T>::read() {
    const Problem &p = call.problem;
    for_rows([&](int i) {
        const int row = first_row + i;
        at.a[i] = item.weight(p.a, item.first_a, item.points_a, row);
        at.f[i] = item.entry(call.f, item.first_a, row);
        at.u_a[i] = item.entry(call.u_a, item.first_a, row);
        at.r[i] = item.entry(call.extra_a, item.first_a, row);
        at.slope_a[i] = call.slope_a ? item.entry(call.slope_a, item.first_a, row) : T(1);
    });
    for (int j = team.thread; j < item.m; j += team.threads) {
        at.b[j] = item.weight(p.b, item.first_b, item.points_b, j);
        at.g[j] = item.entry(call.g, item.first_b, j);
    }
    for_columns([&](int k, int j) {
        at.u_b[k] = item.entry(call.u_b, item.first_b, j);
        at.c[k] = item.entry(call.extra_b, item.first_b, j);
        at.slope_b[k] = call.slope_b ? item.entry(call.slope_b, item.first_b, j) : T(1);
    });
    measure_points(team, p.metric, at.points_x, first_row, rows, at.points_y, first_column, columns, item.m);
}

// E. Between two points without weight E could be infinite; no sum wants it, and it is 0. At one such point it may
// leave the range of T and has to stay a number.
template <class T>
OTKERN_DEVICE void Adjoint<T>::make_matrix() {
    cost_rows(team, call.problem, item, at.points_x, at.points_y, first_row, rows, at.matrix, item.m, at.stages);
    for (int i = team.warp; i < rows; i += team.warps)
        for (int j = team.lane; j < item.m; j += kWarp) {
            const T cost = at.matrix[i * item.m + j];
            const bool alive = cost < infinity<T>() && (at.a[i] > 0 || at.b[j] > 0);
            const T e = alive ? exp_of(exponent_of(at.g[j], cost, at.f[i]) * item.inverse_reg) : T(0);
            at.matrix[i * item.m + j] = minimum(e, huge<T>());
        }
    team.sync_all();
}

// function(c, j, sum_i matrix_ij v_i) for the block's columns. Ends in step.
template <class T>
template <class F>
OTKERN_DEVICE void Adjoint<T>::times_columns(const T *v, F function) {
    team.sync();
    sum_columns(team, at.matrix, rows, item.m, v, at.partial_sums);
    team.sync_all();
    for_columns([&](int c, int j) { function(c, j, sum_of_column(team, at.partial_sums, item.m, j)); });
    team.sync_all();
}

template <class T>
OTKERN_DEVICE void Adjoint<T>::times_columns_to_y(const T *v) {
    times_columns(v, [&](int, int j, T sum) { team.push(at.y + j, sum); });
}

// function(i, sum_j matrix_ij y_j) for the block's rows, on one lane. Ends in step.
template <class T>
template <class F>
OTKERN_DEVICE void Adjoint<T>::times_rows(F function) {
    sum_rows(team, at.matrix, rows, item.m, at.y, function);
    team.sync_all();
}

template <class T>
OTKERN_DEVICE void Adjoint<T>::times_rows_to(T *out) {
    times_rows([&](int i, T sum) { out[i] = sum; });
}

// r and c: the extras, and the sums of the plan over the weights.
template <class T>
OTKERN_DEVICE void Adjoint<T>::normalise() {
    for (int j = team.thread; j < item.m; j += team.threads) at.y[j] = at.b[j];
    team.sync();
    times_rows([&](int i, T sum) { at.r[i] += sum; });
    times_columns(at.a, [&](int c, int, T sum) { at.c[c] += sum; });
}

// p = slope u at bare points, which depend on no other; the others' right-hand sides lose what depends on them.
template <class T>
OTKERN_DEVICE void Adjoint<T>::settle_bare() {
    T any = 0;
    for_rows([&](int i) { any = is_bare(at.a[i], at.r[i]) ? T(1) : any; });
    for_columns([&](int c, int j) { any = is_bare(at.b[j], at.c[c]) ? T(1) : any; });
    if (team.max(any) == 0) return;
    for_rows([&](int i) { at.image[i] = bare_part(at.a[i], at.r[i], at.slope_a[i] * at.u_a[i]); });
    for_columns([&](int c, int j) { team.push(at.y + j, bare_part(at.b[j], at.c[c], at.slope_b[c] * at.u_b[c])); });
    team.sync_all();
    times_rows([&](int i, T sum) {
        if (!is_bare(at.a[i], at.r[i])) at.u_a[i] -= at.a[i] * sum;
    });
    times_columns(at.image, [&](int c, int j, T sum) {
        if (!is_bare(at.b[j], at.c[c])) at.u_b[c] -= at.b[j] * sum;
    });
}

// Of points in the system the factors sqrt(slope w / sum) of S and sqrt(slope / (w sum)) of u; of others 0.
template <class T>
OTKERN_DEVICE void Adjoint<T>::weigh(T weight, T sum, T slope, T u, T &scale, T &rhs) {
    const double w = weight, s = sum, k = slope;
    const bool inside = is_inside(weight, sum, slope);
    scale = inside ? T(root_of(k * w / s)) : T(0);
    rhs = inside ? T(double(u) * root_of(k / (w * s))) : T(0);
}

template <class T>
OTKERN_DEVICE void Adjoint<T>::scale_matrix() {
    for_rows([&](int i) { weigh(at.a[i], at.r[i], at.slope_a[i], at.u_a[i], at.scale_a[i], at.residual[i]); });
    for_columns([&](int c, int j) {
        T scale;
        weigh(at.b[j], at.c[c], at.slope_b[c], at.u_b[c], scale, at.rhs_b[c]);
        team.push(at.y + j, scale);
    });
    team.sync_all();
    for (int i = team.warp; i < rows; i += team.warps)
        for (int j = team.lane; j < item.m; j += kWarp) at.matrix[i * item.m + j] *= at.scale_a[i] * at.y[j];
    team.sync_all();
}

// Two constraints leave f + t, g - t: x = sqrt(a r) is in the null space, and the right-hand side, but for rounding,
// has no part of it.
template <class T>
OTKERN_DEVICE void Adjoint<T>::remove_constant(T *v) {
    const auto constant = [&](int i) {
        return is_inside(at.a[i], at.r[i], at.slope_a[i]) ? root_of(double(at.a[i]) * double(at.r[i])) : 0.0;
    };
    double sums[2] = {};
    for_rows([&](int i) {
        sums[0] += constant(i) * double(v[i]);
        sums[1] += constant(i) * constant(i);
    });
    team.reduce(sums, 3);
    if (sums[1] > 0) for_rows([&](int i) { v[i] -= T(sums[0] / sums[1] * constant(i)); });
}

// x = u' - S v', the solution where S S^T is small, and the residual S S^T x, small where it is. A point of little mass
// has a large entry in the right-hand side and next to none in this residual; against the former, the points that
// matter would count as solved before the first iteration.
template <class T>
OTKERN_DEVICE void Adjoint<T>::start() {
    for_columns([&](int c, int j) { team.push(at.y + j, at.rhs_b[c]); });
    team.sync_all();
    times_rows_to(at.image);
    for_rows([&](int i) { at.x[i] = at.residual[i] - at.image[i]; });
    // Where the right-hand side is nothing but a constant, what is left of it is rounding, and so is the residual.
    const double rounding = sizeof(T) == 4 ? 1e-12 : 1e-28;
    const double scale = dot(at.residual, at.residual) + dot(at.image, at.image);
    for (int pass = 0; call.singular && pass < 2; ++pass) remove_constant(at.x);  // the second one its rounding
    const double rest = dot(at.x, at.x);
    times_columns_to_y(at.x);
    times_rows_to(at.residual);
    for (int pass = 0; call.singular && pass < 2; ++pass) remove_constant(at.residual);
    target = dot(at.residual, at.residual);
    if (call.singular && (rest <= rounding * scale || target <= rounding * rest)) target = 0;
    for_rows([&](int i) { at.direction[i] = at.residual[i]; });
}

template <class T>
OTKERN_DEVICE void Adjoint<T>::iterate() {
    square = target;
    while (iterations < call.max_iter && square > call.tol * call.tol * target && square > 0) {
        times_columns_to_y(at.direction);
        times_rows_to(at.image);
        for_rows([&](int i) { at.image[i] = at.direction[i] - at.image[i]; });
        double products[2] = {};
        for_rows([&](int i) {
            products[0] += double(at.direction[i]) * double(at.image[i]);
            products[1] += double(at.direction[i]) * double(at.direction[i]);
        });
        team.reduce(products, 3);
        // Below this the system is singular as far as T can tell, and a step would only amplify rounding.
        if (!(products[0] > (sizeof(T) == 4 ? 1.2e-7 : 2.2e-16) * products[1])) break;
        const double step = square / products[0];
        for_rows([&](int i) {
            at.x[i] += T(step) * at.direction[i];
            at.residual[i] -= T(step) * at.image[i];
        });
        if (call.singular) remove_constant(at.residual);
        const double before = square;
        square = dot(at.residual, at.residual);
        for_rows([&](int i) { at.direction[i] = at.residual[i] + T(square / before) * at.direction[i]; });
        ++iterations;
    }
}

template <class T>
OTKERN_DEVICE T Adjoint<T>::result(T weight, T sum, T slope, T u, T solution) const {
    if (is_bare(weight, sum)) return slope * u;
    return T(root_of(double(slope) * (double(weight) * double(sum))) * double(solution));
}

template <class T>
OTKERN_DEVICE void Adjoint<T>::write() {
    T *const p = static_cast<T *>(call.p) + item.first_a, *const q = static_cast<T *>(call.q) + item.first_b;
    for_rows([&](int i) { p[first_row + i] = result(at.a[i], at.r[i], at.slope_a[i], at.u_a[i], at.x[i]); });
    for_columns(
        [&](int c, int j) { q[j] = result(at.b[j], at.c[c], at.slope_b[c], at.u_b[c], at.rhs_b[c] - at.y[j]); });
    clear<T>(team, call.p, item.first_a, item.n, item.room_a);
    clear<T>(team, call.q, item.first_b, item.m, item.room_b);
    if (team.rank != 0 || team.thread != 0) return;
    static_cast<T *>(call.residual)[item.index] = T(target > 0 ? root_of(square / target) : 0);
    call.n_iters[item.index] = int32_t(iterations);
}

template <class T>
OTKERN_DEVICE void Adjoint<T>::run() {
    // Kernels write into each other's shared memory: every block has to be there.
    team.sync_all();
    read();
    make_matrix();
    normalise();
    settle_bare();
    scale_matrix();
    start();
    iterate();
    times_columns_to_y(at.x);
    write();
}

}  // namespace cuda
}  // namespace otkern
