// Points on their way into shared memory, some features at a time: while one stage is used, the next ones arrive.
//
// A stage holds features of rows of one or two clouds, as they stand in their tensors. Its rows lie `pitch` bytes
// apart, 16 more than their features take, a multiple of 32: eight rows one below the other then lie in different
// banks. Rows that can be copied in pieces of 16 bytes are, by the copy engine or by the threads, and nobody waits for
// them before they are used. All others, with odd strides or addresses, scaled first, or shorter, go through registers.
// The bits are the same.
#pragma once

#include "item.h"

namespace otkern {
namespace cuda {

// Rows [from, from + count) of a cloud, to rows [place, place + room) of a stage: zeros where there are none. `local`
// is the place of the first one in what is measured of the cloud.
template <class T>
struct StageRows {
    const Cloud<T> *cloud = nullptr;
    int from = 0, local = 0, count = 0, place = 0, room = 0;
};
template <class T>
struct StageLoad {
    StageRows<T> rows[2];
    int feature = 0;  // the first one
};

template <class T>
class Stages {
  public:
    // Stages of `rows` rows and of `width` bytes of features, a multiple of 32, in the block's shared memory from
    // `memory` to its end.
    OTKERN_DEVICE Stages(char *memory, Dtype dtype, int rows, int width_)
        : width(width_),
          pitch(width_ + kPiece),
          barriers(reinterpret_cast<uint64_t *>(memory)),
          first(memory + kMostStages * sizeof(uint64_t)),
          element(element_bytes(dtype)),
          bytes(rows * pitch) {
        const int64_t room = memory_from(memory);
        count = kMostStages;
        while (count > 1 && stage_bytes(count, rows, width) > room) --count;
    }
    OTKERN_DEVICE static int64_t memory_from(const char *memory) { return shared_memory() + shared_bytes() - memory; }

    OTKERN_DEVICE int features() const { return width / element; }

    // Of 32 bytes of features, in a stage of `cloud` from `feature` on; what is missing from the last one is zero.
    OTKERN_DEVICE int steps(const Cloud<T> &cloud, int feature) const {
        return int(ceil_div(bytes_from(cloud, feature), kStep));
    }

    // use(c, stage) for the loads c of load(0) .. load(loads - 1), one after the other, by the whole block, which is in
    // step before and after.
    template <class F, class G>
    OTKERN_DEVICE void run(const Team &team, int loads, F load, G use) {
        if (has_bulk_copies() && team.thread == 0)
            for (int k = 0; k < count; ++k) start_barrier(barriers + k);
        publish_stores();
        team.sync();
        const auto start_next = [&](int c) {
            if (c < loads) start(team, load(c), c % count);
            if (!has_bulk_copies()) commit_copies();
        };
        for (int c = 0; c < count - 1; ++c) start_next(c);
        for (int c = 0; c < loads; ++c) {
            if (count == 1) {
                team.sync();
                start_next(c);
            }
            wait(c % count);
            team.sync();
            // Into the stage that all have used before they came here.
            if (count > 1) start_next(c + count - 1);
            use(c, first + c % count * bytes);
        }
        team.sync();
        if (!has_bulk_copies()) return;
        if (team.thread == 0)
            for (int k = 0; k < count; ++k) end_barrier(barriers + k);
        team.sync();
    }

    const int width, pitch;

  private:
    // Of each row, from a feature on.
    OTKERN_DEVICE int bytes_from(const Cloud<T> &cloud, int feature) const {
        return minimum(width, (cloud.features - feature) * element);
    }

    OTKERN_DEVICE void start(const Team &team, const StageLoad<T> &load, int stage) {
        const int given = bytes_from(*load.rows[0].cloud, load.feature);
        int announced = 0;
        bool stored = false;
        OTKERN_UNROLL
        for (int side = 0; side < 2; ++side) {
            const StageRows<T> &rows = load.rows[side];
            if (rows.room == 0) continue;
            const bool copied = rows.cloud->in_pieces && given % kPiece == 0;
            char *const to = first + stage * bytes + rows.place * pitch;
            if (copied) copy(team, rows, load.feature, given, to, barriers + stage);
            if (copied) announced += rows.count * given;
            if (!copied || given % kStep != 0 || rows.room > rows.count) {
                store(team, rows, load.feature, given, copied, to);
                stored = true;
            }
        }
        if (stored) publish_stores();
        if (!has_bulk_copies() || announced == 0) return;
        if (team.thread == 0) expect_bytes(barriers + stage, announced);
        awaited |= 1u << stage;
    }
    OTKERN_DEVICE void copy(const Team &team, const StageRows<T> &rows, int feature, int given, char *to,
                            uint64_t *barrier) const {
        const Cloud<T> &cloud = *rows.cloud;
        if (has_bulk_copies()) {
            if (team.warp == 0)
                for (int i = team.lane; i < rows.count; i += kWarp)
                    start_bulk_copy(to + i * pitch, cloud.address(rows.from + i, feature), given, barrier);
            return;
        }
        const int pieces = given / kPiece;
        for (int e = team.thread; e < rows.count * pieces; e += team.threads) {
            const int i = e / pieces, k = e % pieces * kPiece;
            start_copy(to + i * pitch + k, cloud.address(rows.from + i, feature) + k);
        }
    }
    // What is not copied.
    OTKERN_DEVICE void store(const Team &team, const StageRows<T> &rows, int feature, int given, bool copied,
                             char *to) const {
        const Cloud<T> &cloud = *rows.cloud;
        const int wide = int(round_up(given, kStep)) / element;
        for (int e = team.thread; e < rows.room * wide; e += team.threads) {
            const int i = e / wide, k = e % wide;
            const bool real = i < rows.count && k * element < given;
            if (real && copied) continue;
            const int row = rows.from + i, local = rows.local + i;
            char *const place = to + i * pitch + k * element;
            if (element == 2)
                *reinterpret_cast<uint16_t *>(place) = real ? cloud.bits(row, local, feature + k) : uint16_t(0);
            else
                *reinterpret_cast<T *>(place) = real ? cloud.coordinate(row, local, feature + k) : T(0);
        }
    }
    OTKERN_DEVICE void wait(int stage) {
        if (!has_bulk_copies()) {
            wait_for_copies(maximum(count - 2, 0));
            return;
        }
        const uint32_t bit = 1u << stage;
        if (!(awaited & bit)) return;
        wait_for_bytes(barriers + stage, phases & bit ? 1 : 0);
        phases ^= bit;
        awaited ^= bit;
    }

    uint64_t *const barriers;
    char *const first;
    const int element, bytes;          // of a number, of a stage
    int count;                         // stages
    uint32_t awaited = 0, phases = 0;  // a bit a stage: copies are on their way; the phase of its barrier
};

}  // namespace cuda
}  // namespace otkern
