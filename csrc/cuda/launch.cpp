#include "launch.h"

namespace otkern {
namespace cuda {

namespace {

constexpr int64_t kKilo = 1024;

}  // namespace

// One block: 16, 5 or 2 of them on a multiprocessor, then one, then clusters, while cost and kernel both fit.
std::vector<SizeClass> forward_classes(const Limits &limits) {
    std::vector<SizeClass> classes;
    const SizeClass small[] = {{1, 64, 12 * kKilo, true}, {1, 128, 40 * kKilo, true}, {1, 256, 99 * kKilo, true}};
    for (const SizeClass &size : small)
        if (size.bytes < limits.shared_bytes) classes.push_back(size);
    for (int cluster = 1; cluster <= limits.cluster; cluster *= 2)
        classes.push_back({cluster, kThreads, limits.shared_bytes, true});
    classes.push_back({limits.cluster, kThreads, limits.shared_bytes, false});
    return classes;
}

int forward_class_of(const std::vector<SizeClass> &classes, bool wide, int64_t n, int64_t m, bool directions) {
    if (n == 0 || m == 0) return 0;
    for (size_t k = 0; k < classes.size(); ++k)
        if (forward_bytes(wide, classes[k], n, m, directions) <= classes[k].bytes) return int(k);
    return -1;
}

}  // namespace cuda
}  // namespace otkern
