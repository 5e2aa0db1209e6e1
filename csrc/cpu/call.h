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

// A batched matrix: element (b, i, k) stands at data[b * stride_b + i * stride_row + k * stride_col].
// A packed tensor (T, D) has stride_b = 0 and its items start at row cu_seqlens[b].
struct Matrix {
    const void *data = nullptr;
    int64_t stride_b = 0, stride_row = 0, stride_col = 0;
};

// What forward, backward and apply share. `dtype` is that of the points (or of the cost); weights, reg and
// potentials are double when it is f64 and float otherwise, and contiguous.
struct Problem {
    int64_t batch = 0, max_a = 0, max_b = 0, features = 0;
    int64_t total_a = 0, total_b = 0;  // rows of a packed tensor
    Dtype dtype = Dtype::f32;
    Metric metric = Metric::sqeuclidean;
    Matrix x_a, x_b, cost;
    const void *a = nullptr, *b = nullptr;                           // nullptr: uniform, 1 / length
    const void *reg = nullptr;                                       // (batch,)
    const int32_t *lengths_a = nullptr, *lengths_b = nullptr;        // (batch,), nullptr: all of max_a, max_b
    const int32_t *cu_seqlens_a = nullptr, *cu_seqlens_b = nullptr;  // (batch + 1,), packed layout
};

struct ForwardCall {
    Problem problem;
    const void *g_init = nullptr;
    int64_t max_iter = 0;
    double tol = -1;  // negative: no stopping test
    bool check = true;
    int64_t store_bytes = 0;  // a larger cost is not kept: its rows are computed again in every iteration
    void *value = nullptr, *f = nullptr, *g = nullptr, *marginal_error = nullptr;
    int32_t *n_iters = nullptr;
    // Smallest item * 4 + argument (0: x_a, 1: x_b, 2: cost) with a non-finite entry; -1: none.
    int64_t bad_input = -1;
    bool out_of_memory = false;
};

struct BackwardCall {
    Problem problem;
    const void *f = nullptr, *g = nullptr, *dvalue = nullptr;
    void *dx_a = nullptr, *dx_b = nullptr, *dcost = nullptr;  // contiguous, in the dtype of the points / the cost
    void *da = nullptr, *db = nullptr, *dreg = nullptr;       // nullptr: not needed
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
};

// Names of the levels this binary carries and this machine can run, best first; NULL-terminated.
const char *const *levels();
const char *level();
bool set_level(const char *name);  // false: unknown here. For tests; takes effect for later calls.

// Each runs a whole call on at most `threads` threads. The bits of the result do not depend on `threads`.
void forward(ForwardCall &call, int threads);
void backward(BackwardCall &call, int threads);
void apply(ApplyCall &call, int threads);

}  // namespace otkern
