// The only file that knows Python: reads addresses, strides and sizes into the structs of cpu/call.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/call.h"
#ifdef OTKERN_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

#if defined(__clang__)
#define OTKERN_COMPILER "clang " __clang_version__
#else
#define OTKERN_COMPILER "g++ " __VERSION__
#endif

namespace {

using Address = std::uintptr_t;
// (address, stride_b, stride_row, stride_col), strides in elements; address 0: absent.
using MatrixArguments = std::array<std::int64_t, 4>;

template <class T = void>
T *pointer(Address address) {
    return reinterpret_cast<T *>(address);
}

otkern::Matrix matrix(const MatrixArguments &from) {
    return {pointer<const void>(Address(from[0])), from[1], from[2], from[3]};
}

otkern::Problem make_problem(std::int64_t batch, std::int64_t max_a, std::int64_t max_b, std::int64_t total_a,
                             std::int64_t total_b, std::int64_t features, int dtype, int metric,
                             const MatrixArguments &x_a, const MatrixArguments &x_b, const MatrixArguments &cost,
                             Address a, Address b, Address reg, int kind, bool entropy, Address relaxation,
                             Address lengths_a, Address lengths_b, Address cu_seqlens_a, Address cu_seqlens_b,
                             std::int64_t n_pairs) {
    otkern::Problem problem;
    problem.batch = batch;
    problem.max_a = max_a;
    problem.max_b = max_b;
    problem.total_a = total_a;
    problem.total_b = total_b;
    problem.features = features;
    problem.dtype = otkern::Dtype(dtype);
    problem.metric = otkern::Metric(metric);
    problem.x_a = matrix(x_a);
    problem.x_b = matrix(x_b);
    problem.cost = matrix(cost);
    problem.a = pointer<const void>(a);
    problem.b = pointer<const void>(b);
    problem.reg = pointer<const void>(reg);
    problem.kind = otkern::Kind(kind);
    problem.entropy = entropy;
    problem.relaxation = pointer<const void>(relaxation);
    problem.lengths_a = pointer<const std::int32_t>(lengths_a);
    problem.lengths_b = pointer<const std::int32_t>(lengths_b);
    problem.cu_seqlens_a = pointer<const std::int32_t>(cu_seqlens_a);
    problem.cu_seqlens_b = pointer<const std::int32_t>(cu_seqlens_b);
    problem.n_pairs = n_pairs;
    return problem;
}

template <class Call>
void run(void (*function)(Call &, int), Call &call, int threads) {
    {
        py::gil_scoped_release release;
        function(call, threads);
    }
    if (call.out_of_memory) throw std::bad_alloc();
}

// Item and argument of the first bad input.
using BadInput = std::optional<std::pair<std::int64_t, int>>;

BadInput bad_input(std::int64_t found) {
    if (found < 0) return std::nullopt;
    return std::make_pair(found / 4, int(found % 4));
}

BadInput forward(const otkern::Problem &problem, Address g_init, Address eps_start, double eps_factor,
                 std::int64_t max_iter, double tol, bool check, std::int64_t store_bytes, Address value, Address f,
                 Address g, Address multipliers, Address marginal_error, Address n_iters, int threads) {
    otkern::ForwardCall call;
    call.problem = problem;
    call.g_init = pointer<const void>(g_init);
    call.eps_start = pointer<const void>(eps_start);
    call.eps_factor = eps_factor;
    call.max_iter = max_iter;
    call.tol = tol;
    call.check = check;
    call.store_bytes = store_bytes;
    call.value = pointer(value);
    call.f = pointer(f);
    call.g = pointer(g);
    call.multipliers = pointer(multipliers);
    call.marginal_error = pointer(marginal_error);
    call.n_iters = pointer<std::int32_t>(n_iters);
    run(otkern::forward, call, threads);
    return bad_input(call.bad_input);
}

BadInput symmetric(const otkern::Problem &problem, Address eps_start, Address n_steps, double eps_factor,
                   double cost_floor, bool check, std::int64_t store_bytes, Address s_a, Address s_b, Address f,
                   Address g, Address r_a, Address r_b, int threads) {
    otkern::SymmetricCall call;
    call.problem = problem;
    call.eps_start = pointer<const void>(eps_start);
    call.n_steps = pointer<const std::int32_t>(n_steps);
    call.eps_factor = eps_factor;
    call.cost_floor = cost_floor;
    call.check = check;
    call.store_bytes = store_bytes;
    call.s_a = pointer(s_a);
    call.s_b = pointer(s_b);
    call.f = pointer(f);
    call.g = pointer(g);
    call.r_a = pointer(r_a);
    call.r_b = pointer(r_b);
    run(otkern::symmetric, call, threads);
    return bad_input(call.bad_input);
}

void run_backward(otkern::BackwardCall &call, Address f, Address g, Address dx_a, Address dx_b, Address dcost,
                  Address sum_a, Address sum_b, Address sum_reg, int threads) {
    call.f = pointer<const void>(f);
    call.g = pointer<const void>(g);
    call.dx_a = pointer(dx_a);
    call.dx_b = pointer(dx_b);
    call.dcost = pointer(dcost);
    call.sum_a = pointer(sum_a);
    call.sum_b = pointer(sum_b);
    call.sum_reg = pointer(sum_reg);
    run(otkern::backward, call, threads);
}

void backward(const otkern::Problem &problem, Address f, Address g, Address dvalue, Address dx_a, Address dx_b,
              Address dcost, Address ratio_a, Address ratio_b, Address entropy, int threads) {
    otkern::BackwardCall call;
    call.problem = problem;
    call.dvalue = pointer<const void>(dvalue);
    run_backward(call, f, g, dx_a, dx_b, dcost, ratio_a, ratio_b, entropy, threads);
}

void plan_backward(const otkern::Problem &problem, Address f, Address g, Address scale, Address cost_scale,
                   Address dense, Address row, Address col, Address dx_a, Address dx_b, Address dcost, Address sum_a,
                   Address sum_b, Address sum_reg, int threads) {
    otkern::BackwardCall call;
    call.problem = problem;
    call.scale = pointer<const void>(scale);
    call.cost_scale = pointer<const void>(cost_scale);
    call.dense = pointer<const void>(dense);
    call.row = pointer<const void>(row);
    call.col = pointer<const void>(col);
    run_backward(call, f, g, dx_a, dx_b, dcost, sum_a, sum_b, sum_reg, threads);
}

void implicit(const otkern::Problem &problem, Address f, Address g, Address slope_a, Address slope_b, Address extra_a,
              Address extra_b, Address u_a, Address u_b, bool singular, double tol, std::int64_t max_iter,
              std::int64_t store_bytes, Address p, Address q, Address residual, Address n_iters, int threads) {
    otkern::ImplicitCall call;
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
    call.store_bytes = store_bytes;
    call.p = pointer(p);
    call.q = pointer(q);
    call.residual = pointer(residual);
    call.n_iters = pointer<std::int32_t>(n_iters);
    run(otkern::implicit, call, threads);
}

void apply(const otkern::Problem &problem, Address f, Address g, Address v, Address out, std::int64_t channels,
           bool transpose, bool times_cost, int threads) {
    otkern::ApplyCall call;
    call.problem = problem;
    call.f = pointer<const void>(f);
    call.g = pointer<const void>(g);
    call.v = pointer<const void>(v);
    call.out = pointer(out);
    call.channels = channels;
    call.transpose = transpose;
    call.times_cost = times_cost;
    run(otkern::apply, call, threads);
}

void plan(const otkern::Problem &problem, Address f, Address g, Address out, int threads) {
    otkern::ApplyCall call;
    call.problem = problem;
    call.f = pointer<const void>(f);
    call.g = pointer<const void>(g);
    call.plan = pointer(out);
    run(otkern::apply, call, threads);
}

std::vector<std::string> cpu_levels() {
    std::vector<std::string> names;
    for (const char *const *name = otkern::levels(); *name; ++name) names.emplace_back(*name);
    return names;
}

py::dict build_info() {
    py::dict info;
    std::string names;
    for (const std::string &name : cpu_levels()) names += (names.empty() ? "" : " ") + name;
#ifdef OTKERN_CUDA
    info["halves"] = "cpu cuda";
#else
    info["halves"] = "cpu";
#endif
    info["compiler"] = OTKERN_COMPILER;
    info["simd"] = names;
    return info;
}

void set_cpu_level(const std::string &name) {
    if (!otkern::set_level(name.c_str()))
        throw py::value_error("name must be one of cpu_levels() on this machine, got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native kernels of otkern. Takes addresses, strides and sizes; knows nothing of torch.";
    py::class_<otkern::Problem>(module, "Problem", "Addresses and sizes of a batch; keeps nothing alive.")
        .def(py::init(&make_problem), py::kw_only(), py::arg("batch"), py::arg("max_a"), py::arg("max_b"),
             py::arg("total_a"), py::arg("total_b"), py::arg("features"), py::arg("dtype"), py::arg("metric"),
             py::arg("x_a"), py::arg("x_b"), py::arg("cost"), py::arg("a"), py::arg("b"), py::arg("reg"),
             py::arg("kind"), py::arg("entropy"), py::arg("relaxation"), py::arg("lengths_a"), py::arg("lengths_b"),
             py::arg("cu_seqlens_a"), py::arg("cu_seqlens_b"), py::arg("n_pairs"));
    module.def("cpu_forward", &forward, py::arg("problem"), py::kw_only(), py::arg("g_init"), py::arg("eps_start"),
               py::arg("eps_factor"), py::arg("max_iter"), py::arg("tol"), py::arg("check"), py::arg("store_bytes"),
               py::arg("value"), py::arg("f"), py::arg("g"), py::arg("multipliers"), py::arg("marginal_error"),
               py::arg("n_iters"), py::arg("threads"),
               "Returns None, or (item, argument) of the first item with bad input: argument 0 x_a, 1 x_b, 2 cost.");
    module.def("cpu_symmetric", &symmetric, py::arg("problem"), py::kw_only(), py::arg("eps_start"), py::arg("n_steps"),
               py::arg("eps_factor"), py::arg("cost_floor"), py::arg("check"), py::arg("store_bytes"), py::arg("s_a"),
               py::arg("s_b"), py::arg("f"), py::arg("g"), py::arg("r_a"), py::arg("r_b"), py::arg("threads"),
               "Returns what cpu_forward returns.");
    module.def("cpu_backward", &backward, py::arg("problem"), py::kw_only(), py::arg("f"), py::arg("g"),
               py::arg("dvalue"), py::arg("dx_a"), py::arg("dx_b"), py::arg("dcost"), py::arg("ratio_a"),
               py::arg("ratio_b"), py::arg("entropy"), py::arg("threads"));
    module.def("cpu_plan_backward", &plan_backward, py::arg("problem"), py::kw_only(), py::arg("f"), py::arg("g"),
               py::arg("scale"), py::arg("cost_scale"), py::arg("dense"), py::arg("row"), py::arg("col"),
               py::arg("dx_a"), py::arg("dx_b"), py::arg("dcost"), py::arg("sum_a"), py::arg("sum_b"),
               py::arg("sum_reg"), py::arg("threads"));
    module.def("cpu_implicit", &implicit, py::arg("problem"), py::kw_only(), py::arg("f"), py::arg("g"),
               py::arg("slope_a"), py::arg("slope_b"), py::arg("extra_a"), py::arg("extra_b"), py::arg("u_a"),
               py::arg("u_b"), py::arg("singular"), py::arg("tol"), py::arg("max_iter"), py::arg("store_bytes"),
               py::arg("p"), py::arg("q"), py::arg("residual"), py::arg("n_iters"), py::arg("threads"));
    module.def("cpu_apply", &apply, py::arg("problem"), py::kw_only(), py::arg("f"), py::arg("g"), py::arg("v"),
               py::arg("out"), py::arg("channels"), py::arg("transpose"), py::arg("times_cost"), py::arg("threads"));
    module.def("cpu_plan", &plan, py::arg("problem"), py::kw_only(), py::arg("f"), py::arg("g"), py::arg("out"),
               py::arg("threads"));
    module.def("build_info", &build_info, "What was built, with what, and the SIMD levels this machine can run.");
    module.def("cpu_levels", &cpu_levels, "SIMD levels this machine can run, best first.");
    module.def("cpu_level", [] { return std::string(otkern::level()); }, "The SIMD level in use.");
    module.def("set_cpu_level", &set_cpu_level, py::arg("name"), "Use a level of cpu_levels(); for tests.");
#ifdef OTKERN_CUDA
    otkern::cuda::bindings::bind(module);
#endif
}
