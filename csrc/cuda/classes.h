// Launches of the kernels that hold a whole item: one for each size class that the batch may hold.
#pragma once

#include <stdexcept>
#include <string>

#include "item.h"
#include "launch.h"

namespace otkern {
namespace cuda {

// Whether this launch's class is the first that the item fits into. Nothing but its sizes counts, and an item with an
// empty side is of the first class. `bytes(size, n, m)` is the shared memory it takes.
template <class T, class Arguments, class F>
OTKERN_DEVICE bool is_of_class(const Arguments &arguments, const Item<T> &item, F bytes) {
    const bool first = arguments.smaller.threads == 0;
    if (item.n == 0 || item.m == 0) return first;
    return bytes(arguments.size, item.n, item.m) <= arguments.size.bytes &&
           (first || bytes(arguments.smaller, item.n, item.m) > arguments.smaller.bytes);
}

template <class F>
int first_class(const std::vector<SizeClass> &classes, int64_t n, int64_t m, F bytes) {
    if (n == 0 || m == 0) return 0;
    for (size_t k = 0; k < classes.size(); ++k)
        if (bytes(classes[k], n, m) <= classes[k].bytes) return int(k);
    return -1;
}

// run(arguments, grid) for the launches that serve a batch whose longest sides are n and m, null points counted. With
// `exact_sizes` every item has them.
template <class Arguments, class F, class G>
void launch_classes(const char *kernel, Arguments arguments, const std::vector<SizeClass> &classes,
                    const Limits &limits, int registers, int64_t n, int64_t m, bool exact_sizes, F bytes, G run) {
    const int largest = first_class(classes, n, m, bytes);
    if (largest < 0)
        throw std::runtime_error(std::string(kernel) + " has no size class for items of " + std::to_string(n) + " x " +
                                 std::to_string(m));
    const int64_t batch = arguments.call.problem.batch;
    for (int k = exact_sizes ? largest : 0; k <= largest; ++k) {
        arguments.size = classes[k];
        arguments.smaller = k > 0 ? classes[k - 1] : SizeClass();
        Grid grid;
        grid.cluster = classes[k].cluster;
        grid.threads = classes[k].threads;
        // No more than the longest sides can need: that leaves room for other blocks, and the class as it is.
        const int64_t needed = bytes(classes[k], maximum<int64_t>(n, 1), maximum<int64_t>(m, 1));
        grid.shared_bytes = roomy_bytes(limits, minimum(classes[k].bytes, needed), grid.threads, registers);
        const int64_t items = kMostBlocks / grid.cluster;
        for (int64_t first = 0; first < batch; first += items) {
            arguments.first_item = first;
            grid.blocks = minimum(items, batch - first) * grid.cluster;
            run(arguments, grid);
        }
    }
}

}  // namespace cuda
}  // namespace otkern
