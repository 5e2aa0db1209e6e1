// Threads for a call: torch's own OpenMP team where the process has one, plain std::threads elsewhere.
//
// Why borrow: after a parallel region, OpenMP's idle workers spin for milliseconds, and a second pool would share
// its cores with them. The symbols are looked up at run time, so that the module links no OpenMP runtime and works
// without torch. Why not after a fork: an OpenMP pool does not survive it; a child starts its own threads.
#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <thread>
#include <vector>

namespace otkern {

struct TeamShared {
    std::atomic<int> arrived{0};
    std::atomic<unsigned> generation{0};
    void *memory = nullptr;
};

namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kKeep = size_t(64) << 20;  // a thread keeps at most this much between calls
// Below this many multiply-adds (tens of microseconds) waking a second thread costs more than it saves.
constexpr double kWorthAThread = 1e6;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Arena {
    void *memory = nullptr;
    size_t bytes = 0;

    void *reserve(size_t wanted) {
        if (wanted <= bytes) return memory;
        release();
        size_t align = wanted >= kHugePage / 2 ? kHugePage : 64;
        size_t rounded = (wanted + align - 1) / align * align;
        if (posix_memalign(&memory, align, rounded) != 0) {
            memory = nullptr;
            return nullptr;
        }
        bytes = rounded;
#if defined(MADV_HUGEPAGE)
        if (align == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
        return memory;
    }
    void release() {
        std::free(memory);
        memory = nullptr;
        bytes = 0;
    }
    ~Arena() { release(); }
};

thread_local Arena arena;

using OmpBody = void (*)(void *);
struct OpenMp {
    void (*parallel)(OmpBody, void *, unsigned, unsigned) = nullptr;
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;
    int (*in_parallel)() = nullptr;
    bool found() const { return parallel && thread_num && num_threads && in_parallel; }
};

std::atomic<bool> forked{false};
// When the module is loaded, because the fork may come before the first call.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

template <class F>
void look_up(F &function, const char *name) {
    function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
}

const OpenMp &open_mp() {
    static const OpenMp found = [] {
        OpenMp omp;
        look_up(omp.parallel, "GOMP_parallel");
        look_up(omp.thread_num, "omp_get_thread_num");
        look_up(omp.num_threads, "omp_get_num_threads");
        look_up(omp.in_parallel, "omp_in_parallel");
        return omp;
    }();
    return found;
}

struct Run {
    ItemFunction function;
    void *call;
    std::vector<int64_t> shared_items, single_items;
    std::atomic<size_t> next_single{0};
    TeamShared team;

    // What one thread of `size` does: its part of every shared item, then single items while there are any.
    void work(int rank, int size) {
        Team all;
        all.rank = rank;
        all.size = size;
        all.shared = size > 1 ? &team : nullptr;
        for (size_t i = 0; i < shared_items.size(); ++i) {
            function(call, shared_items[i], all);
            all.barrier();
        }
        Team alone;
        for (size_t i = next_single.fetch_add(1); i < single_items.size(); i = next_single.fetch_add(1))
            function(call, single_items[i], alone);
        if (arena.bytes > kKeep) arena.release();
    }
};

void omp_body(void *data) {
    static_cast<Run *>(data)->work(open_mp().thread_num(), open_mp().num_threads());
}

void run_on_std_threads(Run &run, int threads) {
    // The size of the team must be known before the first barrier, so the helpers wait for the word to go.
    std::vector<std::thread> helpers;
    std::atomic<int> size{0};
    const auto body = [&](int rank) {
        while (size.load(std::memory_order_acquire) == 0) sched_yield();
        run.work(rank, size.load());
    };
    helpers.reserve(threads - 1);
    try {
        for (int rank = 1; rank < threads; ++rank) helpers.emplace_back(body, rank);
    } catch (const std::exception &) {
        // Fewer threads than asked for is no error: the result is the same.
    }
    size.store(int(helpers.size()) + 1, std::memory_order_release);
    run.work(0, int(helpers.size()) + 1);
    for (std::thread &helper : helpers) helper.join();
}

}  // namespace

void Team::barrier() {
    if (size == 1) return;
    const unsigned generation = shared->generation.load(std::memory_order_acquire);
    if (shared->arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
        shared->arrived.store(0, std::memory_order_relaxed);
        shared->generation.store(generation + 1, std::memory_order_release);
        return;
    }
    for (int spin = 0; shared->generation.load(std::memory_order_acquire) == generation; ++spin) {
        if (spin < 2000)
            relax();
        else
            sched_yield();
    }
}

void *Team::scratch(size_t bytes) {
    if (size == 1) return arena.reserve(bytes);
    barrier();
    if (rank == 0) shared->memory = arena.reserve(bytes);
    barrier();
    return shared->memory;
}

void run_items(ItemFunction function, void *call, const double *work, int64_t count, int threads) {
    const double total = std::accumulate(work, work + count, 0.0);
    if (total < kWorthAThread) threads = 1;
    Run run;
    run.function = function;
    run.call = call;
    for (int64_t i = 0; i < count; ++i) {
        const bool shared = threads > 1 && work[i] * 2 * threads > total && work[i] > kWorthAThread;
        (shared ? run.shared_items : run.single_items).push_back(i);
    }
    std::stable_sort(run.single_items.begin(), run.single_items.end(),
                     [&](int64_t i, int64_t j) { return work[i] > work[j]; });
    if (run.shared_items.empty()) threads = int(std::min<int64_t>(threads, std::max<int64_t>(1, count)));

    const OpenMp &omp = open_mp();
    if (threads == 1)
        run.work(0, 1);
    else if (omp.found() && !forked.load()) {
        if (omp.in_parallel())
            run.work(0, 1);
        else
            omp.parallel(omp_body, &run, unsigned(threads), 0);
    } else
        run_on_std_threads(run, threads);
}

}  // namespace otkern
