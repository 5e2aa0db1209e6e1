// See host_executor.h. A switch between fibers saves the registers that a call preserves, and costs about as much as a
// call: swapcontext would make a system call of each.
#include "host_executor.h"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"

// void otkern_switch(void **from, void *to): pushes the preserved registers, leaves the stack in *from, goes on at
// `to`.
extern "C" void otkern_switch(void **from, void *to);

#if defined(__x86_64__)
__asm__(R"(
    .pushsection .text
    .globl otkern_switch
    .hidden otkern_switch
    .type otkern_switch, @function
otkern_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size otkern_switch, .-otkern_switch
    .popsection
)");
// Six registers, the address that `ret` goes to, and a slot that aligns the stack as at a function's entry.
constexpr size_t kFrame = 8, kEntrySlot = 6;
#elif defined(__aarch64__)
__asm__(R"(
    .pushsection .text
    .globl otkern_switch
    .hidden otkern_switch
    .type otkern_switch, %function
otkern_switch:
    stp x29, x30, [sp, #-160]!
    stp x19, x20, [sp, #16]
    stp x21, x22, [sp, #32]
    stp x23, x24, [sp, #48]
    stp x25, x26, [sp, #64]
    stp x27, x28, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #16]
    ldp x21, x22, [sp, #32]
    ldp x23, x24, [sp, #48]
    ldp x25, x26, [sp, #64]
    ldp x27, x28, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    ldp x29, x30, [sp], #160
    ret
    .size otkern_switch, .-otkern_switch
    .popsection
)");
// Twenty registers; the second one is where `ret` goes.
constexpr size_t kFrame = 20, kEntrySlot = 1;
#else
#error "the host executor switches stacks on x86-64 and aarch64"
#endif

namespace otkern {
namespace cuda {
namespace host {

Fiber *current = nullptr;

namespace {

// The odd lines keep the stacks of a block from falling into the same sets of the L1 cache.
constexpr size_t kStack = (32 << 10) + 3 * 64, kWatched = 4096;
constexpr unsigned char kUnset = 0xff, kGuard = 0xa5;  // 0xff in every byte is a NaN

class Executor {
  public:
    ~Executor() {
        if (stacks != nullptr) munmap(stacks, room * kStack);
    }

    void run(const char *name, const Grid &grid, void (*function)(const void *), const void *self);
    void wait_for_block();
    void wait_for_cluster();
    void exchange(const void *mine, size_t size, void *all);
    char *map_address(char *pointer, int rank);
    void end_thread();
    void start_copy(void *to, const void *from);
    void commit_copies();
    void wait_for_copies(int pending);
    void start_barrier(const uint64_t *barrier);
    void end_barrier(const uint64_t *barrier);
    void expect_bytes(const uint64_t *barrier, int bytes);
    void start_bulk_copy(void *to, const void *from, int bytes, const uint64_t *barrier);
    void wait_for_bytes(const uint64_t *barrier, int phase);
    [[noreturn]] void fail(const std::string &what);

    void (*function)(const void *) = nullptr;
    const void *argument = nullptr;
    Order order;

  private:
    struct Copy {
        char *to;
        const char *from;
        size_t bytes;
    };
    struct Barrier {
        int phase = 0;
        bool arrived = false;
        int64_t expected = 0, started = 0;  // bytes
        std::vector<Copy> copies;
        std::vector<Fiber *> waiting;
    };
    typedef std::vector<Copy> Copies;

    Copy copy_of(void *to, const void *from, int bytes);
    Barrier &barrier_of(const uint64_t *barrier);
    void end_phase(Barrier &barrier);
    static void run_copies(Copies &copies) {
        for (const Copy &copy : copies) memcpy(copy.to, copy.from, copy.bytes);
        copies.clear();
    }
    void reserve(const Grid &grid);
    void start_cluster(int64_t first_block, const Grid &grid);
    void check_cluster(const Grid &grid);
    void next();
    void release(int first, int count);
    void push(Fiber *fiber) {
        queue[back] = fiber;
        back = back + 1 == int(queue.size()) ? 0 : back + 1;
    }

    Fiber *pop() {
        const int last = int(queue.size()) - 1;
        if (order.ahead) {
            back = back == 0 ? last : back - 1;
            return queue[back];
        }
        Fiber *const fiber = queue[front];
        front = front == last ? 0 : front + 1;
        return fiber;
    }

    std::string kernel;
    std::vector<Fiber> fibers;
    std::vector<Fiber *> queue;  // a ring of those that can go on; one place more than there are
    int front = 0, back = 0;
    std::vector<int> at_barrier, at_exchange;  // of each block, of each warp
    std::vector<double> lanes;                 // two sets a warp: a fast lane may be one exchange ahead of a slow one
    int at_cluster = 0, ended = 0, threads = 0;
    std::vector<int> ended_in;                // of each block
    std::vector<std::vector<Copies>> pieces;  // of each fiber: its commits, oldest first, and what is not committed
    std::map<const uint64_t *, Barrier> barriers;
    char *stacks = nullptr;
    size_t room = 0;
    std::vector<char> shared;
    size_t shared_stride = 0, shared_bytes = 0;
    void *scheduler = nullptr;  // its stack while fibers run
    std::string error;
};

Executor executor;

void fiber_main() {
    executor.function(executor.argument);
    executor.end_thread();
}

void Executor::fail(const std::string &what) {
    error = kernel + " in thread " + std::to_string(current->thread) + " of block " +
            std::to_string(current->block_index) + ": " + what;
    void *abandoned;
    otkern_switch(&abandoned, scheduler);
    __builtin_unreachable();
}

void Executor::reserve(const Grid &grid) {
    const size_t count = size_t(grid.cluster) * grid.threads;
    threads = grid.threads;
    fibers.resize(count);
    queue.resize(count + 1);
    if (count > room) {
        if (stacks != nullptr) munmap(stacks, room * kStack);
        void *memory =
            mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        stacks = memory == MAP_FAILED ? nullptr : static_cast<char *>(memory);
        room = stacks == nullptr ? 0 : count;
        if (stacks == nullptr) throw std::runtime_error(kernel + ": no memory for the stacks of its threads");
    }
    shared_bytes = size_t(grid.shared_bytes);
    shared_stride = size_t(round_up(grid.shared_bytes, 64)) + kWatched;
    shared.resize(shared_stride * grid.cluster + 64);
}

void Executor::start_cluster(int64_t first_block, const Grid &grid) {
    char *base = shared.data() + (64 - reinterpret_cast<uintptr_t>(shared.data()) % 64) % 64;
    at_barrier.assign(grid.cluster, 0);
    ended_in.assign(grid.cluster, 0);
    at_exchange.assign(size_t(grid.cluster) * (threads / kWarp), 0);
    lanes.resize(at_exchange.size() * 2 * kWarp);
    at_cluster = ended = front = back = 0;
    pieces.assign(fibers.size(), std::vector<Copies>(1));
    barriers.clear();
    for (int block = 0; block < grid.cluster; ++block) {
        char *memory = base + block * shared_stride;
        memset(memory, kUnset, shared_bytes);
        memset(memory + shared_bytes, kGuard, shared_stride - shared_bytes);
        for (int thread = 0; thread < threads; ++thread) {
            const size_t index = size_t(block) * threads + thread;
            void **frame = reinterpret_cast<void **>(stacks + (index + 1) * kStack) - kFrame;
            frame[kEntrySlot] = reinterpret_cast<void *>(&fiber_main);
            fibers[index] = {thread, threads, block, grid.cluster, first_block + block, memory, int(shared_bytes),
                             frame,  0,       false};
        }
    }
    release(0, int(fibers.size()));
}

// Fibers [first, first + count) can go on.
void Executor::release(int first, int count) {
    for (int k = 0; k < count; ++k) push(&fibers[order.backward ? first + count - 1 - k : first + k]);
}

// From a fiber that waits to the next one that can go on; to the scheduler if there is none.
void Executor::next() {
    Fiber *const from = current;
    if (front == back) {
        otkern_switch(&from->stack_pointer, scheduler);
        return;
    }
    current = pop();
    if (current != from) otkern_switch(&from->stack_pointer, current->stack_pointer);
}

void Executor::wait_for_block() {
    const int block = current->block;
    if (ended_in[block] > 0) fail("a barrier that a thread of the block, which has ended, never reaches");
    if (++at_barrier[block] == threads) {
        at_barrier[block] = 0;
        release(block * threads, threads);
    }
    next();
}

void Executor::wait_for_cluster() {
    if (ended > 0) fail("a cluster barrier that a thread of the cluster, which has ended, never reaches");
    if (++at_cluster == int(fibers.size())) {
        at_cluster = 0;
        release(0, int(fibers.size()));
    }
    next();
}

void Executor::exchange(const void *mine, size_t size, void *all) {
    Fiber *const fiber = current;
    const int warp = (fiber->block * threads + fiber->thread) / kWarp;
    double *slots = lanes.data() + (size_t(warp) * 2 + (fiber->exchanges++ & 1)) * kWarp;
    memcpy(slots + fiber->thread % kWarp, mine, size);
    if (++at_exchange[warp] == kWarp) {
        at_exchange[warp] = 0;
        release(warp * kWarp, kWarp);
    }
    next();
    memcpy(all, slots, sizeof(double) * kWarp);
}

char *Executor::map_address(char *pointer, int rank) {
    if (pointer < current->shared || pointer > current->shared + shared_bytes)
        fail("an address that is not of shared memory is mapped to another block");
    if (rank < 0 || rank >= current->blocks) fail("shared memory of a block that the cluster does not have");
    if (ended_in[rank] > 0) fail("shared memory of a block that has ended");
    return pointer + (rank - current->block) * int64_t(shared_stride);
}

Executor::Copy Executor::copy_of(void *to, const void *from, int bytes) {
    char *const start = static_cast<char *>(to);
    if (start < current->shared || start + bytes > current->shared + shared_bytes)
        fail("a copy to where the block has no shared memory");
    if (bytes % 16 != 0 || (start - current->shared) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
        fail("a copy whose size or addresses are no multiples of 16");
    return {start, static_cast<const char *>(from), size_t(bytes)};
}

void Executor::start_copy(void *to, const void *from) {
    const Copy copy = copy_of(to, from, 16);
    if (order.eager) memcpy(copy.to, copy.from, copy.bytes);
    pieces[current - fibers.data()].back().push_back(copy);
}

void Executor::commit_copies() {
    pieces[current - fibers.data()].emplace_back();
}

void Executor::wait_for_copies(int pending) {
    std::vector<Copies> &mine = pieces[current - fibers.data()];
    const int done = int(mine.size()) - 1 - pending;
    for (int k = 0; k < done; ++k) run_copies(mine[k]);
    if (done > 0) mine.erase(mine.begin(), mine.begin() + done);
}

void Executor::start_barrier(const uint64_t *barrier) {
    if (barriers.count(barrier)) fail("a barrier of copies is started where there is one");
    barriers[barrier] = Barrier();
}

Executor::Barrier &Executor::barrier_of(const uint64_t *barrier) {
    const auto found = barriers.find(barrier);
    if (found == barriers.end()) fail("a barrier of copies that was not started");
    return found->second;
}

void Executor::end_barrier(const uint64_t *barrier) {
    const Barrier &ending = barrier_of(barrier);
    if (ending.arrived || ending.started != 0 || !ending.copies.empty() || !ending.waiting.empty())
        fail("a barrier of copies ends before they have arrived");
    barriers.erase(barrier);
}

// The copies arrive with the first thread that waits for them.
void Executor::end_phase(Barrier &barrier) {
    if (!barrier.arrived || barrier.started != barrier.expected) return;
    barrier.arrived = false;
    barrier.started = barrier.expected = 0;
    barrier.phase ^= 1;
    for (Fiber *fiber : barrier.waiting) push(fiber);
    barrier.waiting.clear();
}

void Executor::expect_bytes(const uint64_t *barrier, int bytes) {
    Barrier &mine = barrier_of(barrier);
    if (mine.arrived) fail("a second arrival in one phase of a barrier of copies");
    mine.arrived = true;
    mine.expected = bytes;
    end_phase(mine);
}

void Executor::start_bulk_copy(void *to, const void *from, int bytes, const uint64_t *barrier) {
    Barrier &mine = barrier_of(barrier);
    mine.copies.push_back(copy_of(to, from, bytes));
    if (order.eager) memcpy(mine.copies.back().to, mine.copies.back().from, mine.copies.back().bytes);
    mine.started += bytes;
    end_phase(mine);
}

void Executor::wait_for_bytes(const uint64_t *barrier, int phase) {
    while (barrier_of(barrier).phase == phase) {
        barrier_of(barrier).waiting.push_back(current);
        next();
    }
    run_copies(barrier_of(barrier).copies);
}

void Executor::end_thread() {
    for (const Copies &copies : pieces[current - fibers.data()])
        if (!copies.empty()) fail("it ends before its copies have arrived");
    current->ended = true;
    ++ended;
    ++ended_in[current->block];
    next();
    __builtin_unreachable();
}

void Executor::check_cluster(const Grid &grid) {
    if (!error.empty()) throw std::runtime_error(error);
    if (ended < int(fibers.size())) {
        const Fiber *waiting = nullptr;
        for (const Fiber &fiber : fibers)
            if (!fiber.ended && waiting == nullptr) waiting = &fiber;
        throw std::runtime_error(kernel + " hangs: thread " + std::to_string(waiting->thread) + " of block " +
                                 std::to_string(waiting->block_index) + " waits for threads that wait elsewhere or" +
                                 " have ended");
    }
    if (!barriers.empty()) throw std::runtime_error(kernel + " leaves a barrier of copies in shared memory");
    for (int block = 0; block < grid.cluster; ++block) {
        const char *end = fibers[size_t(block) * threads].shared + shared_bytes;
        for (size_t k = 0; k < kWatched; ++k)
            if (static_cast<unsigned char>(end[k]) != kGuard)
                throw std::runtime_error(kernel + " wrote beyond its " + std::to_string(shared_bytes) +
                                         " bytes of shared memory");
    }
}

void Executor::run(const char *name, const Grid &grid, void (*run)(const void *), const void *self) {
    kernel = name;
    if (grid.threads % kWarp != 0 || grid.threads < kWarp || grid.threads > kThreads || grid.cluster < 1 ||
        grid.cluster > kMostCluster || grid.blocks % grid.cluster != 0)
        throw std::runtime_error(kernel + ": a grid that no device takes");
    function = run;
    argument = self;
    error.clear();
    reserve(grid);
    for (int64_t block = 0; block < grid.blocks; block += grid.cluster) {
        start_cluster(block, grid);
        Fiber outside{};  // stands for the scheduler
        current = &outside;
        current = pop();
        otkern_switch(&scheduler, current->stack_pointer);
        check_cluster(grid);
    }
}

}  // namespace

void wait_for_block() {
    executor.wait_for_block();
}
void wait_for_cluster() {
    executor.wait_for_cluster();
}
void exchange_in_warp(const void *mine, size_t size, void *all) {
    executor.exchange(mine, size, all);
}
char *map_address(char *pointer, int rank) {
    return executor.map_address(pointer, rank);
}
bool has_bulk_copies() {
    return !executor.order.pieces;
}
void start_copy(void *to, const void *from) {
    executor.start_copy(to, from);
}
void commit_copies() {
    executor.commit_copies();
}
void wait_for_copies(int pending) {
    executor.wait_for_copies(pending);
}
void start_barrier(uint64_t *barrier) {
    executor.start_barrier(barrier);
}
void end_barrier(uint64_t *barrier) {
    executor.end_barrier(barrier);
}
void expect_bytes(uint64_t *barrier, int bytes) {
    executor.expect_bytes(barrier, bytes);
}
void start_bulk_copy(void *to, const void *from, int bytes, uint64_t *barrier) {
    executor.start_bulk_copy(to, from, bytes, barrier);
}
void wait_for_bytes(uint64_t *barrier, int phase) {
    executor.wait_for_bytes(barrier, phase);
}
void set_order(const Order &order) {
    executor.order = order;
}

void run_grid(const char *name, const Grid &grid, void (*run)(const void *), const void *self) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    executor.run(name, grid, run, self);
}

}  // namespace host
}  // namespace cuda
}  // namespace otkern
