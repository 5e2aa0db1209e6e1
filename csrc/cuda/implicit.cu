// The adjoint of the fixed point, one cluster an item; one launch for each size class.
#include "classes.h"
#include "implicit.h"

namespace otkern {
namespace cuda {
namespace {

// An item with an empty side has no plan: p = slope u.
template <class T>
OTKERN_DEVICE void write_without_plan(const ImplicitCall &call, const Item<T> &item) {
    for (int64_t i = thread_rank(); i < item.room_a; i += block_threads()) {
        const T slope = call.slope_a && i < item.n ? item.entry(call.slope_a, item.first_a, int(i)) : T(1);
        static_cast<T *>(call.p)[item.first_a + i] =
            i < item.n ? slope * item.entry(call.u_a, item.first_a, int(i)) : T(0);
    }
    for (int64_t j = thread_rank(); j < item.room_b; j += block_threads()) {
        const T slope = call.slope_b && j < item.m ? item.entry(call.slope_b, item.first_b, int(j)) : T(1);
        static_cast<T *>(call.q)[item.first_b + j] =
            j < item.m ? slope * item.entry(call.u_b, item.first_b, int(j)) : T(0);
    }
    if (thread_rank() != 0) return;
    static_cast<T *>(call.residual)[item.index] = 0;
    call.n_iters[item.index] = 0;
}

template <class T>
OTKERN_BOTH int64_t bytes_of(const SizeClass &size, int64_t n, int64_t m, bool directions) {
    AdjointMemory<T> memory;
    Team team;
    Carver carver;
    memory.carve(carver, team, size, n, m, directions);
    return carver.used;
}

template <class T>
OTKERN_KERNEL implicit_kernel(OTKERN_ARGUMENT ImplicitArguments arguments) {
    const Problem &p = arguments.call.problem;
    const Item<T> item(p, arguments.first_item + block_index() / arguments.size.cluster, false);
    if (!is_of_class(arguments, item, [&](const SizeClass &size, int64_t n, int64_t m) {
            return bytes_of<T>(size, n, m, p.metric == Metric::cosine);
        }))
        return;
    if (item.n == 0 || item.m == 0) {
        write_without_plan(arguments.call, item);
        return;
    }
    Carver carver;
    carver.base = shared_memory();
    Adjoint<T> adjoint(arguments, item, carver);
    adjoint.run();
}

}  // namespace

int64_t implicit_bytes(bool wide, const SizeClass &size, int64_t n, int64_t m, bool directions) {
    return wide ? bytes_of<double>(size, n, m, directions) : bytes_of<float>(size, n, m, directions);
}

void implicit(const ImplicitCall &call, bool exact_sizes, const Limits &limits, const Stream &stream) {
    const Problem &p = call.problem;
    const bool wide = p.dtype == Dtype::f64, directions = p.metric == Metric::cosine;
    ImplicitArguments arguments;
    arguments.call = call;
    launch_classes(
        "implicit_kernel", arguments, implicit_classes(limits), limits, kOtherRegisters, p.max_a, p.max_b, exact_sizes,
        [&](const SizeClass &size, int64_t n, int64_t m) { return implicit_bytes(wide, size, n, m, directions); },
        [&](const ImplicitArguments &part, const Grid &grid) {
            if (wide)
                launch("implicit_kernel<double>", implicit_kernel<double>, grid, part, stream);
            else
                launch("implicit_kernel<float>", implicit_kernel<float>, grid, part, stream);
        });
}

}  // namespace cuda
}  // namespace otkern
