// Which SIMD level runs, and how a call is spread over threads. The only place that asks the machine what it can.
#include <cstring>
#include <vector>

#include "call.h"
#include "threads.h"

namespace otkern {

#define OTKERN_DECLARE(level)                                                         \
    namespace level {                                                                 \
    void forward(ForwardCall &, int64_t, Team &);                                     \
    void backward(BackwardCall &, int64_t, Team &);                                   \
    void apply(ApplyCall &, int64_t, Team &);                                         \
    void implicit(ImplicitCall &, int64_t, Team &);                                   \
    void symmetric(SymmetricCall &, int64_t, Team &);                                 \
    constexpr Kernels kernels{#level, forward, backward, apply, implicit, symmetric}; \
    }

OTKERN_DECLARE(baseline)
#if defined(__x86_64__)
OTKERN_DECLARE(avx2)
OTKERN_DECLARE(avx512)
#endif

namespace {

struct Available {
    const Kernels *tables[4] = {};
    const char *names[4] = {};
    int count = 0;

    void add(const Kernels &kernels) {
        tables[count] = &kernels;
        names[count++] = kernels.name;
    }
    Available() {
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
            add(avx512::kernels);
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add(avx2::kernels);
#endif
        add(baseline::kernels);
    }
};

const Available &available() {
    static const Available found;
    return found;
}

const Kernels *chosen = nullptr;

const Kernels &kernels() {
    return chosen ? *chosen : *available().tables[0];
}

// Multiply-adds of every item: `products` matrix products over the features, `passes` passes over the cost.
std::vector<double> work_of(const Problem &p, double products, double passes) {
    std::vector<double> work(p.batch);
    for (int64_t i = 0; i < p.batch; ++i) {
        const double n = p.cu_seqlens_a ? p.cu_seqlens_a[i + 1] - p.cu_seqlens_a[i]
                         : p.lengths_a  ? p.lengths_a[i]
                                        : p.max_a;
        const double m = p.cu_seqlens_b ? p.cu_seqlens_b[i + 1] - p.cu_seqlens_b[i]
                         : p.lengths_b  ? p.lengths_b[i]
                                        : p.max_b;
        const double features = p.metric == Metric::cost ? 0 : double(p.features);
        work[i] = (n * m * (products * features + passes) + (n + m) * features) * (i < p.n_pairs ? 1 : 0.5);
    }
    return work;
}

template <class Call>
using ItemKernel = void (*)(Call &, int64_t, Team &);

template <class Call>
struct Bound {
    Call &call;
    ItemKernel<Call> kernel;
    static void run(void *self, int64_t item, Team &team) {
        const Bound *bound = static_cast<Bound *>(self);
        bound->kernel(bound->call, item, team);
    }
};

template <class Call>
void run_call(Call &call, ItemKernel<Call> kernel, const std::vector<double> &work, int threads) {
    Bound<Call> bound{call, kernel};
    run_items(Bound<Call>::run, &bound, work.data(), int64_t(work.size()), threads < 1 ? 1 : threads);
}

}  // namespace

const char *const *levels() {
    return available().names;
}

const char *level() {
    return kernels().name;
}

bool set_level(const char *name) {
    for (int i = 0; i < available().count; ++i)
        if (strcmp(available().names[i], name) == 0) {
            chosen = available().tables[i];
            return true;
        }
    return false;
}

void forward(ForwardCall &call, int threads) {
    run_call(call, kernels().forward, work_of(call.problem, 1, 20 + 3 * double(call.max_iter)), threads);
}

void backward(BackwardCall &call, int threads) {
    run_call(call, kernels().backward, work_of(call.problem, 3, 20), threads);
}

void apply(ApplyCall &call, int threads) {
    run_call(call, kernels().apply, work_of(call.problem, 1, 20 + double(call.channels)), threads);
}

void implicit(ImplicitCall &call, int threads) {
    run_call(call, kernels().implicit, work_of(call.problem, 1, 60 + 2 * double(call.max_iter)), threads);
}

void symmetric(SymmetricCall &call, int threads) {
    std::vector<double> work = work_of(call.problem, 1, 20);
    const std::vector<double> step = work_of(call.problem, 0, 30);
    for (int64_t i = 0; i < call.problem.batch; ++i) work[i] += (4 + call.n_steps[i]) * step[i];
    run_call(call, kernels().symmetric, work, threads);
}

}  // namespace otkern
