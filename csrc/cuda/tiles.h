// How a block divides its work into tiles of warps and stages of points: arithmetic on sizes. Nothing of it shows in a
// bit.
#pragma once

#include "device.h"

namespace otkern {
namespace cuda {

constexpr int kPiece = 16, kMostStages = 4;  // bytes of a copy; stages
constexpr int kStep = 32;                    // bytes of features that are multiplied at once
constexpr int kTile = 32;                    // rows of a warp, and columns, but for half of them in fp64: registers
// Rows of points that meet the weights of a plan in one step of the matrix units; in fp32 in two.
constexpr int kProductRows = 16;

// Of stages of `rows` rows and `width` bytes of features, and of their barriers.
OTKERN_BOTH constexpr int64_t stage_bytes(int stages, int rows, int width) {
    return kMostStages * int64_t(sizeof(uint64_t)) + int64_t(stages) * rows * (width + kPiece);
}

// Tiles of a cost of rows x columns entries, of warps of 32 x `wide` of them, from points of `feature_bytes`.
struct CostTiles {
    int down, across, width;  // warps one below the other and side by side; bytes of features in a stage
    int wide;

    OTKERN_BOTH CostTiles(int warps, int rows_, int columns_, int wide_, int64_t feature_bytes, int64_t memory)
        : down(rows_ > kTile && warps >= 4 ? 2 : 1), across(warps / down), width(8 * kStep), wide(wide_) {
        while (across > 1 && (across / 2 * wide >= columns_ || bytes(1, kStep) > memory)) across /= 2;
        if (bytes(1, kStep) > memory) down = 1;
        // Three stages are enough to hide what a copy takes, and wide ones need fewer barriers.
        while (width > kStep && (width / 2 >= feature_bytes || bytes(3, width) > memory)) width /= 2;
    }
    OTKERN_BOTH int rows() const { return kTile * down; }
    OTKERN_BOTH int columns() const { return wide * across; }
    OTKERN_BOTH int64_t bytes(int stages, int width_) const { return stage_bytes(stages, rows() + columns(), width_); }
    // One tile of one warp.
    OTKERN_BOTH static constexpr int64_t least_bytes() { return stage_bytes(1, 2 * kTile, kStep); }
};

// Tiles of the product of rows x m weights with m points of `features` numbers of `element` bytes.
struct ProductTiles {
    int down, across, points;  // warps one below the other and side by side; points in a stage
    int element;

    OTKERN_BOTH ProductTiles(int warps, int rows, int m, int features, int element_, int64_t memory)
        : down(minimum(int(ceil_div(rows, kTile)), warps)),
          across(warps / down),
          points(4 * kProductRows),
          element(element_) {
        while (across > 1 && (across / 2 * kTile >= features || bytes(1, kProductRows) > memory)) across /= 2;
        while (points > kProductRows && (points / 2 >= m || bytes(2, points) > memory)) points /= 2;
    }
    OTKERN_BOTH int columns() const { return kTile * across; }
    OTKERN_BOTH int width() const { return columns() * element; }
    OTKERN_BOTH int64_t bytes(int stages, int points_) const { return stage_bytes(stages, points_, width()); }
    OTKERN_BOTH static constexpr int64_t least_bytes(int element) {
        return stage_bytes(1, kProductRows, kTile * element);
    }
};

}  // namespace cuda
}  // namespace otkern
