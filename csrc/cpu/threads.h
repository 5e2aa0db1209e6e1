// Teams of threads: who runs an item, and the memory it works in.
//
// An item is computed by a team of one or more threads. Kernels split an item into row blocks that are fixed by
// the item's own size and combine them in block order, so the size of the team never shows in the bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace otkern {

struct TeamShared;

class Team {
  public:
    int rank = 0, size = 1;
    TeamShared *shared = nullptr;  // nullptr for a team of one

    // Returns when every thread of the team has arrived. Waits by spinning, then by yielding the core.
    void barrier();

    // 64-byte aligned memory shared by the team, valid until the team's next call of `scratch` or the end of the
    // call. nullptr when there is none. Not cleared.
    void *scratch(size_t bytes);

    // This thread's part [begin, end) of `count` equal pieces.
    void split(int64_t count, int64_t &begin, int64_t &end) const {
        begin = count * rank / size;
        end = count * (rank + 1) / size;
    }
};

using ItemFunction = void (*)(void *call, int64_t item, Team &team);

// Runs `function` once for every item. `work[i]` is item i's cost in multiply-adds: an item that is more than its
// share of the whole gets the full team, the others go to one thread each, the longest first.
void run_items(ItemFunction function, void *call, const double *work, int64_t count, int threads);

}  // namespace otkern
