// The C interface of the native kernels, and the table that each instruction set fills in.
//
// One source (`kernels.inl`) is compiled once per instruction set; `api.cpp` picks a table at run time. All sizes are
// checked by the caller in Python. What a wrong mask or offset can do is bounded here as well: entries are never read
// beyond `entry_bytes`.
#pragma once

#include <cstdint>

extern "C" {

// How numbers are stored. A SIGN delta has one bit per kept entry and one bfloat16 scale per row.
enum Form : int64_t { SIGN = 0, FLOAT32 = 1, FLOAT16 = 2, BFLOAT16 = 3 };

// One sparse matrix (O, I): which entries are kept, and their values row by row.
struct Delta {
    const uint8_t* mask;      // (O, ceil(I / 8)), bit j % 8 of byte j / 8 is column j
    const void* entries;      // signs (one bit each) or values, `entry_bytes` bytes
    int64_t entry_bytes;
    const uint16_t* scales;   // (O,) bfloat16, SIGN only
    const int32_t* offsets;   // (ceil(O / 16),) number of kept entries before each chunk of 16 rows
    int64_t form;
};

// A delta and the rows of the batch that use it.
struct Group {
    Delta delta;
    const int64_t* rows;
    const float* coefficients;
    int64_t num_rows;
};

// out[b] (+)= weight @ x[b] + bias + sum over groups with row b of coefficient * (S @ x[b])
struct Product {
    int64_t num_outputs, num_inputs;
    const void* weight;       // (O, I) or null: then out is added to
    int64_t weight_form;
    const float* bias;        // (O,) or null
    const Group* groups;
    int64_t num_groups;
};

// target = source + coefficient * S, where entries are kept; equal `source` and `target` change it in place.
struct Addition {
    int64_t num_outputs, num_inputs;
    Delta delta;
    float coefficient;
    int32_t unused;
    const void* source;
    void* target;
    int64_t form;
};

// Adding a delta to a float32 weight so that it can be computed back; see `change` in kernels.inl.
enum ChangeMode : int64_t { ADD_OR_MARK = 0, ADD_MARKED = 1, TAKE_UNMARKED = 2 };
struct Change {
    int64_t num_outputs, num_inputs;
    Delta delta;
    float coefficient;
    int32_t low_bits;
    float* weight;
    uint8_t* marks;
    int64_t mode;
};

// Copying the kept entries of a weight out of it (SAVE) or back (BRING_BACK).
enum MoveMode : int64_t { SAVE = 0, BRING_BACK = 1 };
struct Move {
    int64_t num_outputs, num_inputs;
    const uint8_t* mask;
    const int32_t* offsets;
    void* weight;
    void* saved;
    int64_t num_saved;
    int64_t item_size;        // 2 or 4
    int64_t mode;
};

// One difference of a build: minuend - subtrahend, marked against a bracket of magnitudes.
struct Mark {
    const void* minuend;
    const void* subtrahend;
    uint8_t* negative;        // three bitmaps (r, ceil(I / 8))
    uint8_t* above;
    uint8_t* inside;
    double* sums;             // (r, 3)
    float* values;            // room for r * I
    float low, high;
    int64_t num_above, num_inside;  // written
};
}

constexpr int64_t CHUNK_ROWS = 16;

// A product in progress. Threads take chunks of 16 rows from `next`; a chunk is computed by one thread in a fixed order,
// so the result does not depend on the number of threads.
struct ProductCall {
    const Product* product;
    const float* x;
    int64_t batch;
    float* out;
};

struct KernelTable {
    const char* name;
    void (*product)(const void* call, int64_t* next);
    void (*addition)(const void* call, int64_t* next);
    void (*change)(const void* call, int64_t* next);
    void (*move)(const void* call, int64_t* next);
    void (*mark)(int64_t form, int64_t rows, int64_t columns, Mark* jobs, int64_t num_jobs);
    void (*merge)(int64_t form, const void* const* sources, int64_t num_experts, int64_t is_mean, int64_t rows,
                  int64_t columns, void* backbone, double* energies);
    void (*narrow)(const float* source, int64_t count, uint16_t* target);
    void (*take_bits)(const uint8_t* bitmap, const uint8_t* mask, int64_t num_bytes, uint64_t* target);
    void (*put_bits)(const uint8_t* bits, int64_t bit_bytes, uint8_t* mask, int64_t num_bytes);
    void (*count_rows)(const uint8_t* bitmap, int64_t rows, int64_t row_bytes, int64_t* counts);
    void (*keep_first)(uint8_t* bitmap, int64_t num_bytes, int64_t count);
    void (*find_ranked)(const float* values, int64_t count, const int64_t* ranks, int64_t num_ranks, float* scratch,
                        float* found);
};

extern const KernelTable table_baseline;
#if defined(__x86_64__)
extern const KernelTable table_avx2, table_avx512;
#elif defined(__aarch64__)
extern const KernelTable table_neon;
#endif
