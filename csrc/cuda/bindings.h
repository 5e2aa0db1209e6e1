// The CUDA kernels to Python, in whichever module they are linked into: otkern._native, or otkern._cuda_host where the
// host executor runs them. Addresses, strides and sizes as in ../bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "launch.h"
#include "tiles.h"

namespace otkern {
namespace cuda {
namespace bindings {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T = void>
T *pointer(Address address) {
    return reinterpret_cast<T *>(address);
}

// What a device allows, or is said to allow, as (shared memory of a block in bytes, blocks of a cluster).
using GivenLimits = std::pair<int64_t, int>;

inline Limits limits_of(const GivenLimits &given) {
    Limits limits;
    limits.shared_bytes = given.first;
    limits.cluster = given.second;
    return limits;
}

inline Stream stream_of(Address handle, int device) {
    Stream stream;
    stream.handle = pointer(handle);
    stream.device = device;
    return stream;
}

inline void run_forward(const Problem &problem, Address g_init, Address eps_start, double eps_factor, int64_t max_iter,
                        double tol, Address value, Address f, Address g, Address multipliers, Address marginal_error,
                        Address n_iters, bool exact_sizes, bool log_domain_only, const GivenLimits &limits,
                        Address stream, int device) {
    ForwardCall call;
    call.problem = problem;
    call.g_init = pointer<const void>(g_init);
    call.eps_start = pointer<const void>(eps_start);
    call.eps_factor = eps_factor;
    call.max_iter = max_iter;
    call.tol = tol;
    call.value = pointer(value);
    call.f = pointer(f);
    call.g = pointer(g);
    call.multipliers = pointer(multipliers);
    call.marginal_error = pointer(marginal_error);
    call.n_iters = pointer<int32_t>(n_iters);
    forward(call, exact_sizes, log_domain_only, limits_of(limits), stream_of(stream, device));
}

inline void run_symmetric(const Problem &problem, Address eps_start, Address n_steps, double eps_factor,
                          double cost_floor, Address s_a, Address s_b, Address f, Address g, Address r_a, Address r_b,
                          bool exact_sizes, const GivenLimits &limits, Address stream, int device) {
    SymmetricCall call;
    call.problem = problem;
    call.eps_start = pointer<const void>(eps_start);
    call.n_steps = pointer<const int32_t>(n_steps);
    call.eps_factor = eps_factor;
    call.cost_floor = cost_floor;
    call.s_a = pointer(s_a);
    call.s_b = pointer(s_b);
    call.f = pointer(f);
    call.g = pointer(g);
    call.r_a = pointer(r_a);
    call.r_b = pointer(r_b);
    symmetric(call, exact_sizes, limits_of(limits), stream_of(stream, device));
}

inline void run_plan_sums(BackwardCall &call, const Problem &problem, Address f, Address g, Address dx_a, Address dx_b,
                          Address dcost, Address sum_a, Address sum_b, Address sum_reg, Address terms_reg,
                          const GivenLimits &limits, Address stream, int device) {
    call.problem = problem;
    call.f = pointer<const void>(f);
    call.g = pointer<const void>(g);
    call.dx_a = pointer(dx_a);
    call.dx_b = pointer(dx_b);
    call.dcost = pointer(dcost);
    call.sum_a = pointer(sum_a);
    call.sum_b = pointer(sum_b);
    call.sum_reg = pointer(sum_reg);
    backward(call, pointer(terms_reg), limits_of(limits), stream_of(stream, device));
}

inline void run_backward(const Problem &problem, Address f, Address g, Address dvalue, Address dx_a, Address dx_b,
                         Address dcost, Address ratio_a, Address ratio_b, Address entropy, Address terms_reg,
                         const GivenLimits &limits, Address stream, int device) {
    BackwardCall call;
    call.dvalue = pointer<const void>(dvalue);
    run_plan_sums(call, problem, f, g, dx_a, dx_b, dcost, ratio_a, ratio_b, entropy, terms_reg, limits, stream, device);
}

inline void run_plan_backward(const Problem &problem, Address f, Address g, Address scale, Address cost_scale,
                              Address dense, Address row, Address col, Address dx_a, Address dx_b, Address dcost,
                              Address sum_a, Address sum_b, Address sum_reg, Address terms_reg,
                              const GivenLimits &limits, Address stream, int device) {
    BackwardCall call;
    call.scale = pointer<const void>(scale);
    call.cost_scale = pointer<const void>(cost_scale);
    call.dense = pointer<const void>(dense);
    call.row = pointer<const void>(row);
    call.col = pointer<const void>(col);
    run_plan_sums(call, problem, f, g, dx_a, dx_b, dcost, sum_a, sum_b, sum_reg, terms_reg, limits, stream, device);
}

inline void run_implicit(const Problem &problem, Address f, Address g, Address slope_a, Address slope_b,
                         Address extra_a, Address extra_b, Address u_a, Address u_b, bool singular, double tol,
                         int64_t max_iter, Address p, Address q, Address residual, Address n_iters, bool exact_sizes,
                         const GivenLimits &limits, Address stream, int device) {
    ImplicitCall call;
    call.problem = problem;
    call.f = pointer<const void>(f);
    call.g = pointer<const void>(g);
    call.slope_a = pointer<const void>(slope_a);
    call.slope_b = pointer<const void>(slope_b);
    call.extra_a = pointer<const void>(extra_a);
    call.extra_b = pointer<const void>(extra_b);
    call.u_a = pointer<const void>(u_a);
    call.u_b = pointer<const void>(u_b);
    call.singular = singular;
    call.tol = tol;
    call.max_iter = max_iter;
    call.p = pointer(p);
    call.q = pointer(q);
    call.residual = pointer(residual);
    call.n_iters = pointer<int32_t>(n_iters);
    implicit(call, exact_sizes, limits_of(limits), stream_of(stream, device));
}

// Products with `v`, or the plan itself where `plan` is given.
inline void run_apply(const Problem &problem, Address f, Address g, Address v, Address out, Address plan,
                      int64_t channels, bool transpose, bool times_cost, const GivenLimits &limits, Address stream,
                      int device) {
    ApplyCall call;
    call.problem = problem;
    call.f = pointer<const void>(f);
    call.g = pointer<const void>(g);
    call.v = pointer<const void>(v);
    call.out = pointer(out);
    call.plan = pointer(plan);
    call.channels = channels;
    call.transpose = transpose;
    call.times_cost = times_cost;
    apply(call, limits_of(limits), stream_of(stream, device));
}

inline std::vector<SizeClass> classes_of(const std::string &kernel, const GivenLimits &limits) {
    return (kernel == "forward" ? forward_classes : implicit_classes)(limits_of(limits));
}

inline int64_t bytes_of(const std::string &kernel, const GivenLimits &limits, int number, bool wide, int64_t n,
                        int64_t m, bool directions) {
    const SizeClass size = classes_of(kernel, limits).at(number);
    if (kernel == "forward") return forward_bytes(wide, size, n, m, directions);
    return (kernel == "symmetric" ? symmetric_bytes : implicit_bytes)(wide, size, n, m, directions);
}

inline py::dict describe(const SizeClass &size) {
    py::dict found;
    found["cluster"] = size.cluster;
    found["threads"] = size.threads;
    found["bytes"] = size.bytes;
    found["keeps_cost"] = size.keeps_cost;
    return found;
}

inline void bind(py::module_ &module) {
    module.def("cuda_forward", &run_forward, py::arg("problem"), py::kw_only(), py::arg("g_init"), py::arg("eps_start"),
               py::arg("eps_factor"), py::arg("max_iter"), py::arg("tol"), py::arg("value"), py::arg("f"), py::arg("g"),
               py::arg("multipliers"), py::arg("marginal_error"), py::arg("n_iters"), py::arg("exact_sizes"),
               py::arg("log_domain_only"), py::arg("limits"), py::arg("stream"), py::arg("device"));
    module.def("cuda_symmetric", &run_symmetric, py::arg("problem"), py::kw_only(), py::arg("eps_start"),
               py::arg("n_steps"), py::arg("eps_factor"), py::arg("cost_floor"), py::arg("s_a"), py::arg("s_b"),
               py::arg("f"), py::arg("g"), py::arg("r_a"), py::arg("r_b"), py::arg("exact_sizes"), py::arg("limits"),
               py::arg("stream"), py::arg("device"));
    module.def("cuda_backward", &run_backward, py::arg("problem"), py::kw_only(), py::arg("f"), py::arg("g"),
               py::arg("dvalue"), py::arg("dx_a"), py::arg("dx_b"), py::arg("dcost"), py::arg("ratio_a"),
               py::arg("ratio_b"), py::arg("entropy"), py::arg("terms_reg"), py::arg("limits"), py::arg("stream"),
               py::arg("device"));
    module.def("cuda_plan_backward", &run_plan_backward, py::arg("problem"), py::kw_only(), py::arg("f"), py::arg("g"),
               py::arg("scale"), py::arg("cost_scale"), py::arg("dense"), py::arg("row"), py::arg("col"),
               py::arg("dx_a"), py::arg("dx_b"), py::arg("dcost"), py::arg("sum_a"), py::arg("sum_b"),
               py::arg("sum_reg"), py::arg("terms_reg"), py::arg("limits"), py::arg("stream"), py::arg("device"));
    module.def("cuda_implicit", &run_implicit, py::arg("problem"), py::kw_only(), py::arg("f"), py::arg("g"),
               py::arg("slope_a"), py::arg("slope_b"), py::arg("extra_a"), py::arg("extra_b"), py::arg("u_a"),
               py::arg("u_b"), py::arg("singular"), py::arg("tol"), py::arg("max_iter"), py::arg("p"), py::arg("q"),
               py::arg("residual"), py::arg("n_iters"), py::arg("exact_sizes"), py::arg("limits"), py::arg("stream"),
               py::arg("device"));
    module.def("cuda_apply", &run_apply, py::arg("problem"), py::kw_only(), py::arg("f"), py::arg("g"), py::arg("v"),
               py::arg("out"), py::arg("plan"), py::arg("channels"), py::arg("transpose"), py::arg("times_cost"),
               py::arg("limits"), py::arg("stream"), py::arg("device"));
    module.def(
        "cuda_plan_rows",
        [](const GivenLimits &limits, bool wide, int64_t n, int64_t m, int64_t batch, bool directions) {
            const int rows = plan_rows(limits_of(limits), wide, n, m, batch, directions);
            return std::make_pair(rows, rows ? plan_bytes(wide, rows, m, directions) : 0);
        },
        py::arg("limits"), py::arg("wide"), py::arg("n"), py::arg("m"), py::arg("batch"), py::arg("directions"),
        "Rows of the plan of n x m of each item that a block makes at once, 0 where none fit, and the bytes they "
        "take.");
    module.def(
        "cuda_classes",
        [](const std::string &kernel, const GivenLimits &limits) {
            std::vector<py::dict> classes;
            for (const SizeClass &size : classes_of(kernel, limits)) classes.push_back(describe(size));
            return classes;
        },
        py::arg("kernel"), py::arg("limits"),
        "The size classes of 'forward', 'symmetric' or 'implicit', smallest first.");
    module.def("cuda_bytes", &bytes_of, py::arg("kernel"), py::arg("limits"), py::arg("number"), py::arg("wide"),
               py::arg("n"), py::arg("m"), py::arg("directions"),
               "Shared memory that an item of n x m takes in a class, null points counted.");
    module.def(
        "cuda_roomy_bytes",
        [](const GivenLimits &limits, int64_t bytes, int threads, int registers) {
            return roomy_bytes(limits_of(limits), bytes, threads, registers);
        },
        py::arg("limits"), py::arg("bytes"), py::arg("threads"), py::arg("registers"),
        "Shared memory of a block that needs so much and may have more where that keeps no other block off.");
    module.def(
        "cuda_cost_tiles",
        [](int warps, int rows, int columns, int wide, int64_t feature_bytes, int64_t memory) {
            const CostTiles tiles(warps, rows, columns, wide, feature_bytes, memory);
            return std::make_tuple(tiles.down, tiles.across, tiles.width, tiles.bytes(1, tiles.width));
        },
        py::arg("warps"), py::arg("rows"), py::arg("columns"), py::arg("wide"), py::arg("feature_bytes"),
        py::arg("memory"), "Warps down and across a tile of the cost, bytes of features in a stage, bytes of a stage.");
    module.def(
        "cuda_product_tiles",
        [](int warps, int rows, int m, int features, int element, int64_t memory) {
            const ProductTiles tiles(warps, rows, m, features, element, memory);
            return std::make_tuple(tiles.down, tiles.across, tiles.points, tiles.bytes(1, tiles.points));
        },
        py::arg("warps"), py::arg("rows"), py::arg("m"), py::arg("features"), py::arg("element"), py::arg("memory"),
        "Warps down and across a tile of a product with points, points in a stage, bytes of a stage.");
    module.def(
        "cuda_limits",
        [](int device) {
            const Limits limits = limits_of_device(device);
            return GivenLimits(limits.shared_bytes, limits.cluster);
        },
        py::arg("device"), "Shared memory of a block in bytes, and blocks of a cluster, of a device.");
}

}  // namespace bindings
}  // namespace cuda
}  // namespace otkern
