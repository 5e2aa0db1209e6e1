// The plain structs that cross the border between Python and the CPU kernels, and the table of kernels.
//
// No torch, no Python: a call is addresses, strides (in elements) and sizes. Every SIMD level compiles the same
// sources into its own namespace and fills one `Kernels` table; dispatch.cpp picks a table once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace otkern {

enum class Dtype : int { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };
enum class Metric : int { sqeuclidean = 0, euclidean = 1, cosine = 2, dot = 3, cost = 4 };
enum class Kind : int { balanced = 0, unbalanced = 1, partial = 2, null = 3 };

// A batched matrix: element (b, i, k) stands at data[b * stride_b + i * stride_row + k * stride_col].
// A packed tensor (T, D) has stride_b = 0 and its items start at row cu_seqlens[b].
struct Matrix {
    const void *data = nullptr;
    int64_t stride_b = 0, stride_row = 0, stride_col = 0;
};

// What all calls share. `dtype` is that of the points (or of the cost); weights, reg, relaxation and potentials are
// double when it is f64 and float otherwise, and contiguous.
struct Problem {
    int64_t batch = 0, max_a = 0, max_b = 0, features = 0;
    int64_t total_a = 0, total_b = 0;  // rows of a packed tensor
    int64_t n_pairs = 0;  // items from this one on match a cloud with itself: one potential serves both sides
    Dtype dtype = Dtype::f32;
    Metric metric = Metric::sqeuclidean;
    Matrix x_a, x_b, cost;
    const void *a = nullptr, *b = nullptr;  // nullptr: uniform, 1 / length
    const void *reg = nullptr;              // (batch,)
    Kind kind = Kind::balanced;
    bool entropy = false;              // the reference measure is exp(-1), not a x b; unbalanced and partial only
    const void *relaxation = nullptr;  // (batch, 2): (rho_a, rho_b), (mass, -) or (null cost, -)
    const int32_t *lengths_a = nullptr, *lengths_b = nullptr;        // (batch,), nullptr: all of max_a, max_b
    const int32_t *cu_seqlens_a = nullptr, *cu_seqlens_b = nullptr;  // (batch + 1,), packed layout
};

struct ForwardCall {
    Problem problem;
    const void *g_init = nullptr;
    const void *eps_start =
        nullptr;  // (batch,): iteration k is done at max(reg, eps_start eps_factor^k), the last at reg
    double eps_factor = 1;
    int64_t max_iter = 0;
    double tol = -1;  // negative: no stopping test
    bool check = true;
    int64_t store_bytes = 0;  // a larger cost is not kept: its rows are computed again in every iteration
    void *value = nullptr, *f = nullptr, *g = nullptr, *multipliers = nullptr, *marginal_error = nullptr;
    int32_t *n_iters = nullptr;
    // Smallest item * 4 + argument (0: x_a, 1: x_b, 2: cost) with a non-finite entry; -1: none.
    int64_t bad_input = -1;
    bool out_of_memory = false;
};

// The annealed loop of GeomLoss, csrc/cpu/symmetric.cpp: one step at eps_start eps_factor^k for each k < n_steps,
// between two at eps_start and one at reg.
struct SymmetricCall {
    Problem problem;
    const void *eps_start = nullptr;   // (batch,)
    const int32_t *n_steps = nullptr;  // (batch,)
    double eps_factor = 1;
    double cost_floor = 0;  // smaller costs count as this
    bool check = true;
    int64_t store_bytes = 0;  // as for the forward
    // The potentials f, g, their soft minima, and the sums r of equation (24), which are 1 but for rounding.
    void *s_a = nullptr, *s_b = nullptr, *f = nullptr, *g = nullptr, *r_a = nullptr, *r_b = nullptr;
    int64_t bad_input = -1;  // as for the forward
    bool out_of_memory = false;
};

// Gradients that need the plan. Two uses, told apart by `scale`:
//   nullptr   the gradient of the value, at fixed potentials: W = dvalue P; ratios r, c and entropies for dvalue = 1.
//             Of a cloud with itself dx_b, which would equal dx_a, is left 0
//   given     W_ij = P_ij H_ij + b_j E_ij row_i + a_i E_ij col_j with H_ij = scale + cost_scale C_ij + dense_ij
struct BackwardCall {
    Problem problem;
    const void *f = nullptr, *g = nullptr, *dvalue = nullptr;
    const void *scale = nullptr, *cost_scale = nullptr;       // (batch,)
    const void *dense = nullptr;                              // (batch, max_a, max_b), contiguous
    const void *row = nullptr, *col = nullptr;                // like f, g; nullptr: 0, as for the two above
    void *dx_a = nullptr, *dx_b = nullptr, *dcost = nullptr;  // contiguous, in the dtype of the points / the cost
    // r_i = sum_j b_j E_ij, c_j = sum_i a_i E_ij; with `scale` sum_j E_ij (b_j H_ij + col_j) and its mirror.
    void *sum_a = nullptr, *sum_b = nullptr;
    // (batch,): sum_ij a_i b_j h(x_ij), x = (f + g - C) / reg, h(x) = 1 - e^x + x e^x; with `scale` sum_ij W_ij x_ij.
    void *sum_reg = nullptr;
    bool out_of_memory = false;
};

// The adjoint of the fixed point, csrc/cpu/implicit.h. Vectors like f or g; nullptr: slopes of 1, no extras.
struct ImplicitCall {
    Problem problem;
    const void *f = nullptr, *g = nullptr;
    const void *slope_a = nullptr, *slope_b = nullptr, *extra_a = nullptr, *extra_b = nullptr;
    const void *u_a = nullptr, *u_b = nullptr;
    bool singular = false;
    double tol = 0;
    int64_t max_iter = 0;
    int64_t store_bytes = 0;  // a larger plan is not kept: its rows are computed again in every product
    void *p = nullptr, *q = nullptr, *residual = nullptr;
    int32_t *n_iters = nullptr;
    bool out_of_memory = false;
};

struct ApplyCall {
    Problem problem;
    const void *f = nullptr, *g = nullptr, *v = nullptr;
    void *out = nullptr;
    void *plan = nullptr;  // (batch, max_a, max_b): write the plan itself; v, out and what follows are not used
    int64_t channels = 0;
    bool transpose = false, times_cost = false;
    bool out_of_memory = false;
};

class Team;

struct Kernels {
    const char *name;
    void (*forward)(ForwardCall &, int64_t item, Team &);
    void (*backward)(BackwardCall &, int64_t item, Team &);
    void (*apply)(ApplyCall &, int64_t item, Team &);
    void (*implicit)(ImplicitCall &, int64_t item, Team &);
    void (*symmetric)(SymmetricCall &, int64_t item, Team &);
};

// Names of the levels this binary carries and this machine can run, best first; NULL-terminated.
const char *const *levels();
const char *level();
bool set_level(const char *name);  // false: unknown here. For tests; takes effect for later calls.

// Each runs a whole call on at most `threads` threads. The bits of the result do not depend on `threads`.
void forward(ForwardCall &call, int threads);
void backward(BackwardCall &call, int threads);
void apply(ApplyCall &call, int threads);
void implicit(ImplicitCall &call, int threads);
void symmetric(SymmetricCall &call, int threads);

}  // namespace otkern
