// Rows of the transport plan from the potentials; the plan is never held as a whole.
//
// A block makes a tile of an item's rows, with all columns, in its shared memory; blocks need nothing of each other. A
// row's numbers are made in the same order whatever the tile: neither its rows nor the batch show in the bits. Sums
// over columns are those over the rows of the exchanged problem, whose cost is formed a second time: a third more
// arithmetic, in place of partial sums of all features that would have to cross the cluster.
#pragma once

#include <stdexcept>
#include <string>

#include "cost.h"
#include "launch.h"

namespace otkern {
namespace cuda {

template <class T>
struct PlanMemory {
    T *b, *g, *col;   // of all columns; the weights of call.h where they are given
    Cloud<T> x, y;    // the tile's rows, all columns
    T *along, *unit;  // of the tile's rows: see for_entries
    T *rows;          // rows x pitch: the cost, then the weights of the products
    int pitch;
    char *stages;  // of what is on its way, with all that lies behind it

    OTKERN_BOTH void carve(Carver &carver, Team &team, int count, int64_t m, bool directions) {
        // The matrix units take up to 16 columns; rows that lie 8 words apart, modulo 16, share few banks.
        pitch = int(round_up(m, 16)) + 8;
        team.carve(carver);
        carver.take(b, m);
        carver.take(g, m);
        carver.take(col, m);
        x.carve(carver, count, directions);
        y.carve(carver, int(m), directions);
        carver.take(along, count);
        carver.take(unit, count);
        carver.take(rows, int64_t(count) * pitch);
        carver.take(stages, maximum(CostTiles::least_bytes(), ProductTiles::least_bytes(int(sizeof(T)))));
    }
};

template <class T>
OTKERN_BOTH int64_t plan_bytes_of(int rows, int64_t m, bool directions) {
    PlanMemory<T> memory;
    Team team;
    Carver carver;
    memory.carve(carver, team, rows, m, directions);
    return carver.used;
}

// h(x) = 1 - exp(x) + x exp(x), the entropy of one entry; `e` is exp(x). Near 0, where a large reg leads, it is
// x^2 / 2 and the terms cancel: there the series sum_k x^k (k - 1) / k!.
template <class T>
OTKERN_DEVICE T entropy_of(T x, T e) {
    constexpr int terms = sizeof(T) == 4 ? 10 : 18;
    if (!(x > T(-0.7) && x < T(0.7))) return 1 + e * (maximum(x, T(-1e4)) - 1);  // masked entries: 0 * -inf is 0 here
    T series = 0, factorial = 1;
    T coefficients[terms + 1];
    OTKERN_UNROLL
    for (int k = 2; k <= terms; ++k) {
        factorial *= T(k);
        coefficients[k] = T(k - 1) / factorial;
    }
    OTKERN_UNROLL
    for (int k = terms; k >= 2; --k) series = series * x + coefficients[k];
    return series * x * x;
}

// g + f - c with one rounding: what the two sums lose is collected (Knuth) and added. A small reg multiplies this
// error, and nothing after it can undo that.
template <class T>
OTKERN_DEVICE T exponent_of(T g, T c, T f) {
    const T s = g - c, minus_c = s - g;
    const T lost = (g - (s - minus_c)) - (c + minus_c);
    const T t = s + f, just_f = t - s;
    return t + (lost + ((s - (t - just_f)) + (f - just_f)));
}

// A weight as factor exp(-joined). A point of nearly no weight may have entries E that are too large for a number, and
// P is one: their logarithms join. All others are as they are.
template <class T>
struct Weight {
    T factor, joined;
    OTKERN_DEVICE explicit Weight(T weight) {
        const bool light = weight > 0 && weight < (sizeof(T) == 4 ? T(1e-20) : T(1e-150));
        factor = light ? T(1) : weight;
        joined = light ? -log_of(weight) : T(0);
    }
};

template <class T>
struct Entry {
    T plan;     // what stands at (i, j) of W
    T sum;      // its part in the row's sum
    T entropy;  // in the row's term for reg
};

// One row of the plan of call.h, or of its weighted sum.
template <class T>
class PlanRow {
  public:
    OTKERN_DEVICE PlanRow(const PlanArguments &arguments, const Item<T> &item, int row_)
        : given(arguments.scale != nullptr),
          with_entropy(arguments.terms != nullptr),
          row(row_),
          a(item.weight(arguments.problem.a, item.first_a, item.points_a, row_)),
          f(item.entry(arguments.f, item.first_a, row_)),
          inverse_reg(item.inverse_reg),
          own(a) {
        if (!given) return;
        scale = static_cast<const T *>(arguments.scale)[item.index];
        if (arguments.cost_scale) cost_scale = static_cast<const T *>(arguments.cost_scale)[item.index];
        if (arguments.row) extra = item.entry(arguments.row, item.first_a, row);
        const int64_t first = item.index * arguments.problem.max_a * arguments.problem.max_b;
        if (arguments.dense) dense = static_cast<const T *>(arguments.dense) + first + row * arguments.dense_row;
        dense_col = arguments.dense_col;
    }

    // At column j of weight b and potential g.
    OTKERN_DEVICE Entry<T> at(int j, T b, T g, T col, T cost) const {
        return given ? weighted(j, b, g, col, cost) : of_value(b, g, cost);
    }

    const bool given, with_entropy;
    const int row;
    const T a;

  private:
    // P_ij = a_i b_j E_ij with E_ij = exp((f_i + g_j - C_ij) / reg). 0 without weight, whatever the potential. The sum
    // is of b_j E_ij.
    OTKERN_DEVICE Entry<T> of_value(T b, T g, T cost) const {
        if (!(b > 0 && cost < infinity<T>())) return {0, 0, b};  // h(-inf) = 1
        const Weight<T> other(b);
        const T x = exponent_of(g, cost, f) * inverse_reg, joined = own.joined + other.joined;
        const T e = exp_of(x - joined), part = other.factor * e;
        T entropy = 0;
        if (with_entropy) entropy = b * entropy_of(x, joined > 0 ? exp_of(x) : e);
        return {a > 0 ? own.factor * part : T(0), a > 0 && own.joined > 0 ? part / a : part, entropy};
    }

    // W_ij, E_ij (b_j H_ij + col_j), W_ij x_ij. Between two points without weight E_ij can be anything, infinite too,
    // and must not meet a coefficient of 0.
    OTKERN_DEVICE Entry<T> weighted(int j, T b, T g, T col, T cost) const {
        if (!(cost < infinity<T>())) return {0, 0, 0};
        const T x = exponent_of(g, cost, f) * inverse_reg, e = exp_of(x);
        const T h = scale + cost_scale * cost + (dense ? dense[j * dense_col] : T(0));
        const T by_plan = b * (a * h + extra) + a * col, by_row = b * h + col;
        const T plan = by_plan != 0 ? e * by_plan : T(0);
        return {plan, by_row != 0 ? e * by_row : T(0), plan != 0 ? plan * x : T(0)};
    }

    const T f, inverse_reg;
    const Weight<T> own;
    T scale = 1, cost_scale = 0, extra = 0;
    const T *dense = nullptr;
    int64_t dense_col = 0;
};

// A tile of rows, by a block.
template <class T>
class PlanTile {
  public:
    OTKERN_DEVICE PlanTile(const PlanArguments &arguments_, const Item<T> &item_, int first_)
        : arguments(arguments_), item(item_), first(first_) {
        const Problem &p = arguments.problem;
        count = maximum(0, minimum(arguments.rows, item.n - first));
        Carver carver;
        carver.base = shared_memory();
        at.carve(carver, team, arguments.rows, item.m, p.metric == Metric::cosine);
        team.join();
        at.x.point_at(p, p.x_a, item.offset_a);
        at.y.point_at(p, p.x_b, item.offset_b);
    }

    // The cost of the tile's rows, and what its columns have.
    OTKERN_DEVICE void read() {
        const Problem &p = arguments.problem;
        for (int j = team.thread; j < item.m; j += team.threads) {
            at.b[j] = item.weight(p.b, item.first_b, item.points_b, j);
            at.g[j] = item.entry(arguments.g, item.first_b, j);
            at.col[j] = item.entry(arguments.col, item.first_b, j);
        }
        measure_points(team, p.metric, at.x, first, count, at.y, 0, item.m, item.m);
        cost_rows(team, p, item, at.x, at.y, first, count, at.rows, at.pitch, at.stages);
    }

    // function(i, row, j, entry, cost) returns what takes the place of cost(i, j), i in the tile; finish(i, row, sum,
    // entropy) comes once for every row, on one lane. Beyond the last column there are zeros up to the pitch. `unit` is
    // the power of two by which a row has to be multiplied to be below 2^15 in size.
    template <class F, class G>
    OTKERN_DEVICE void for_entries(F function, G finish) {
        for (int i = team.warp; i < count; i += team.warps) {
            const PlanRow<T> row(arguments, item, first + i);
            T *const entries = at.rows + i * at.pitch;
            T sum = 0, entropy = 0, along = 0, largest = 0;
            for (int j = team.lane; j < at.pitch; j += kWarp) {
                if (j >= item.m) {
                    entries[j] = 0;
                    continue;
                }
                const T cost = entries[j];
                const Entry<T> entry = row.at(j, at.b[j], at.g[j], at.col[j], cost);
                sum += entry.sum;
                entropy += entry.entropy;
                const T value = function(i, row, j, entry, cost, along);
                largest = maximum(absolute(value), largest);
                entries[j] = value;
            }
            sum = warp_sum(sum);
            entropy = warp_sum(entropy);
            along = warp_sum(along);
            largest = warp_max(largest);
            if (team.lane != 0) continue;
            at.along[i] = along;
            at.unit[i] = unit_of(largest);
            finish(row, sum, entropy);
        }
        team.sync();
    }

    // fp16 ends at 2^-24: what it loses of such a row is below 2^-39 of its largest weight.
    OTKERN_DEVICE static T unit_of(T largest) {
        const bool ordinary = largest > T(1e-30) && is_finite(largest);
        return ordinary ? scale_by_power(T(1), 15 - exponent_of_number(double(largest))) : T(1);
    }

    const PlanArguments &arguments;
    const Item<T> &item;
    int first, count;  // rows
    Team team;
    PlanMemory<T> at;
};

// run(arguments, grid) for the launches that cover the rows of a batch.
template <class F>
void launch_plan(PlanArguments arguments, const Limits &limits, F run) {
    const Problem &p = arguments.problem;
    const bool wide = p.dtype == Dtype::f64, directions = p.metric == Metric::cosine;
    const int64_t m = maximum<int64_t>(p.max_b, 1);
    arguments.rows = plan_rows(limits, wide, p.max_a, m, p.batch, directions);
    if (arguments.rows == 0)
        throw std::runtime_error("rows of the plan of " + std::to_string(m) + " columns do not fit");
    arguments.tiles = ceil_div(p.max_a, arguments.rows);
    const int64_t tiles = arguments.tiles * p.batch;
    Grid grid;
    grid.threads = kThreads;
    grid.shared_bytes =
        roomy_bytes(limits, plan_bytes(wide, arguments.rows, m, directions), grid.threads, kOtherRegisters);
    for (int64_t first = 0; first < tiles; first += kMostBlocks) {
        arguments.first_tile = first;
        grid.blocks = minimum(kMostBlocks, tiles - first);
        run(arguments, grid);
    }
}

// write(i, k, sum) for rows i of the tile and features k of `z`, of which sum = sum_j w_ij z_jk, in the matrix units.
//
// A warp makes 32 x 32 sums. As many warps as the tile has rows for lie one below the other, the others side by side,
// and all go through the features together; a stage holds some rows of z.
template <class T, class F>
OTKERN_DEVICE void matrix_sums(const PlanTile<T> &tile, const Cloud<T> &z, int features, F write) {
    const Team &team = tile.team;
    const int element = element_bytes(z.dtype), m = tile.item.m;
    const ProductTiles tiles(team.warps, tile.count, m, features, element, Stages<T>::memory_from(tile.at.stages));
    const int across = tiles.across, rows = tiles.points, wide = tiles.columns();
    Stages<T> stages(tile.at.stages, z.dtype, rows, tiles.width());
    const int loads = int(ceil_div(m, rows));  // of a tile of features
    const int i0 = team.warp / across * kTile, column = team.warp % across * kTile;
    const int step = z.dtype == Dtype::f32 ? kProductRows / 2 : kProductRows;
    MatrixSums sums;
    stages.run(
        team, int(ceil_div(features, wide)) * loads,
        [&](int c) {
            const int first = c % loads * rows, count = minimum(rows, m - first);
            StageLoad<T> load;
            load.rows[0] = {&z, first, first, count, 0, int(round_up(count, kProductRows))};
            load.feature = c / loads * wide;
            return load;
        },
        [&](int c, const char *stage) {
            const int k0 = c / loads * wide + column, first = c % loads * rows;
            if (i0 >= tile.count || k0 >= features) return;
            if (c % loads == 0) sums.clear();
            const float *const weights = tile.at.rows + i0 * tile.at.pitch + first;
            OTKERN_ROLLED
            for (int j = 0; j < rows && first + j < m; j += step)
                sums.add_weighted(
                    weights + j, tile.at.pitch, tile.count - 1 - i0, [&](int i) { return tile.at.unit[i0 + i]; },
                    stage + j * stages.pitch + column * element, stages.pitch, z.dtype, team.lane);
            if (c % loads != loads - 1) return;
            sums.for_each(team.lane, [&](int r, int k, T sum) {
                const int i = i0 + r;
                if (i < tile.count && k0 + k < features)
                    write(i, k0 + k, z.dtype == Dtype::f16 ? sum / tile.at.unit[i] : sum);
            });
        });
}

// By multiply-adds: rows of sum_j w_ij z_j, or of sum_j w_ij (x_i - z_j), that a thread makes at once, and the
// features of each.
constexpr int kSumRows = 8, kSumFeatures = 2;

template <class T, bool differences, class F>
OTKERN_DEVICE void weighted_sums(const PlanTile<T> &tile, const Cloud<T> &z, int features, F write) {
    const Team &team = tile.team;
    const int groups = maximum(tile.arguments.rows / kSumRows, 1), lanes = team.threads / groups;
    const int i0 = team.thread / lanes * kSumRows, lane = team.thread % lanes, m = tile.item.m;
    if (i0 >= tile.count) return;
    for (int k0 = lane; k0 < features; k0 += kSumFeatures * lanes) {
        T sums[kSumRows][kSumFeatures] = {}, x[kSumRows][kSumFeatures] = {};
        if (differences) {
            OTKERN_UNROLL
            for (int r = 0; r < kSumRows; ++r) {
                OTKERN_UNROLL
                for (int c = 0; c < kSumFeatures; ++c) {
                    const int k = k0 + c * lanes;
                    if (i0 + r < tile.count && k < features) x[r][c] = tile.at.x.raw(tile.first + i0 + r, k);
                }
            }
        }
        for (int j0 = 0; j0 < m; j0 += 4) {
            T points[4][kSumFeatures];
            OTKERN_UNROLL
            for (int q = 0; q < 4; ++q) {
                OTKERN_UNROLL
                for (int c = 0; c < kSumFeatures; ++c) {
                    const int k = k0 + c * lanes;
                    points[q][c] = j0 + q < m && k < features ? z.coordinate(j0 + q, j0 + q, k) : T(0);
                }
            }
            OTKERN_UNROLL
            for (int r = 0; r < kSumRows; ++r) {
                if (i0 + r >= tile.count) continue;
                const Four<T> weights = load_four(tile.at.rows + (i0 + r) * tile.at.pitch + j0);
                OTKERN_UNROLL
                for (int q = 0; q < 4; ++q) {
                    OTKERN_UNROLL
                    for (int c = 0; c < kSumFeatures; ++c)
                        sums[r][c] += weights.x[q] * (differences ? x[r][c] - points[q][c] : points[q][c]);
                }
            }
        }
        OTKERN_UNROLL
        for (int r = 0; r < kSumRows; ++r) {
            OTKERN_UNROLL
            for (int c = 0; c < kSumFeatures; ++c) {
                const int k = k0 + c * lanes;
                if (i0 + r < tile.count && k < features) write(i0 + r, k, sums[r][c]);
            }
        }
    }
}

}  // namespace cuda
}  // namespace otkern
