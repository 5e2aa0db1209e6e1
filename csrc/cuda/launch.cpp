#include "launch.h"

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

int plan_rows(const Limits &limits, bool wide, int64_t m, bool directions) {
    for (int rows = 32; rows >= 1; rows /= 2)
        if (plan_bytes(wide, rows, m, directions) <= limits.shared_bytes) return rows;
    return 0;
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
