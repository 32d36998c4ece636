// Which lane goes where when eight lanes are expanded or compressed under a bit mask.
#pragma once

#include <cstdint>

namespace {

struct LaneTables {
    alignas(32) uint32_t all_ones[256][8];  // lane j is all ones where bit j is set
    uint8_t expand[256][8];    // lane j takes packed number expand[bits][j]
    uint8_t compress[256][8];  // packed number i comes from lane compress[bits][i]
};

constexpr LaneTables make_lane_tables() {
    LaneTables tables{};
    for (int bits = 0; bits < 256; ++bits) {
        int count = 0;
        for (int lane = 0; lane < 8; ++lane) {
            if (bits >> lane & 1) {
                tables.all_ones[bits][lane] = 0xFFFFFFFF;
                tables.expand[bits][lane] = uint8_t(count);
                tables.compress[bits][count++] = uint8_t(lane);
            }
        }
    }
    return tables;
}

constexpr LaneTables LANE_TABLES = make_lane_tables();

}  // namespace
