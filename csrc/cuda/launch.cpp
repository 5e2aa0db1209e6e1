#include "launch.h"

#include <algorithm>

namespace otkern {
namespace cuda {

namespace {

constexpr int64_t kKilo = 1024;

// One block: 16, 5 or 2 of them on a multiprocessor, then one; then clusters.
std::vector<SizeClass> one_matrix_or_two(const Limits &limits, bool keeps_cost) {
    std::vector<SizeClass> classes;
    const SizeClass small[] = {
        {1, 64, 12 * kKilo, keeps_cost}, {1, 128, 44 * kKilo, keeps_cost}, {1, kThreads, 99 * kKilo, keeps_cost}};
    for (const SizeClass &size : small)
        if (size.bytes < limits.shared_bytes) classes.push_back(size);
    for (int cluster = 1; cluster <= limits.cluster; cluster *= 2)
        classes.push_back({cluster, kThreads, limits.shared_bytes, keeps_cost});
    return classes;
}

}  // namespace

std::vector<SizeClass> forward_classes(const Limits &limits) {
    std::vector<SizeClass> classes = one_matrix_or_two(limits, true);
    classes.push_back({limits.cluster, kThreads, limits.shared_bytes, false});
    return classes;
}

std::vector<SizeClass> implicit_classes(const Limits &limits) {
    return one_matrix_or_two(limits, false);
}

// More rows read the points less often. But where that leaves multiprocessors without a block, fewer are better; the
// largest devices have about 150.
int plan_rows(const Limits &limits, bool wide, int64_t n, int64_t m, int64_t batch, bool directions) {
    int rows = 128;
    while (rows >= 1 && plan_bytes(wide, rows, m, directions) > limits.shared_bytes) rows /= 2;
    while (rows > 16 && (n + rows - 1) / rows * batch < 150) rows /= 2;
    return rows;
}

int64_t roomy_bytes(const Limits &limits, int64_t bytes, int threads, int registers) {
    constexpr int64_t reserve = kKilo;  // of each block, taken by the system
    const int64_t by_registers = 65536 / (registers * threads);
    const int64_t whole = limits.shared_bytes + reserve;
    const int64_t blocks = std::max<int64_t>(1, std::min(by_registers, whole / (bytes + reserve)));
    return std::max(bytes, (whole / blocks - reserve) / 16 * 16);
}

Problem exchanged(const Problem &p) {
    Problem other = p;
    other.max_a = p.max_b;
    other.max_b = p.max_a;
    other.total_a = p.total_b;
    other.total_b = p.total_a;
    other.x_a = p.x_b;
    other.x_b = p.x_a;
    other.cost.stride_row = p.cost.stride_col;
    other.cost.stride_col = p.cost.stride_row;
    other.a = p.b;
    other.b = p.a;
    other.lengths_a = p.lengths_b;
    other.lengths_b = p.lengths_a;
    other.cu_seqlens_a = p.cu_seqlens_b;
    other.cu_seqlens_b = p.cu_seqlens_a;
    return other;
}

}  // namespace cuda
}  // namespace otkern
