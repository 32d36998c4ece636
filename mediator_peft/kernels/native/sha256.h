// SHA-256 of several streams at a time.
#pragma once

#include <cstdint>

// Whether this processor has instructions for it, and this library uses them.
bool has_sha256();

// Take `num_blocks` blocks of 64 bytes of each of 1 to 3 streams into its state (8 words).
void hash_side_by_side(uint32_t* const* states, const uint8_t* const* data, int64_t num_streams, int64_t num_blocks);
