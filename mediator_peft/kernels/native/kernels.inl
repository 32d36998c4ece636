// All kernels, over the sixteen lanes that an `isa_*.h` defines. Included once per instruction set, after it.
//
// Rules that make results equal on every processor and for every number of threads:
// - a sum over columns is sixteen float32 sums (columns 0, 16, 32, ..., of 1, 17, 33, ..., and so on), added up halves
//   first; it never depends on how many rows or inputs are computed together;
// - changes of a weight are computed in float32 (product rounded, then the sum) and rounded once. No contraction:
//   compile with -ffp-contract=off.
// Nothing here calls a function of the standard library that could be shared with another instruction set's copy.

#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

inline int64_t take_next(int64_t* next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
inline int count_bits(uint64_t word) { return __builtin_popcountll(word); }
inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float from_scale(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// ---- numbers as they are stored

template <int64_t FORM>
struct Stored;
template <>
struct Stored<FLOAT32> {
    using Number = float;
    static F widen(const float* p) { return load(p); }
    static void narrow(float* target, F value) { store(target, value); }
    static F expand(const float* p, uint32_t bits) { return expand_load(p, bits); }
    // Lanes without their bit keep what `old` holds, bit for bit.
    static void replace(float* target, const float* old, F value, uint32_t bits) { store(target, select(bits, value, load(old))); }
};
template <>
struct Stored<FLOAT16> {
    using Number = uint16_t;
    static F widen(const uint16_t* p) { return from_f16(load16(p)); }
    static F expand(const uint16_t* p, uint32_t bits) { return expand_f16(p, bits); }
    static void replace(uint16_t* target, const uint16_t* old, F value, uint32_t bits) {
        store16(target, select16(bits, to_f16(value), load16(old)));
    }
};
template <>
struct Stored<BFLOAT16> {
    using Number = uint16_t;
    static F widen(const uint16_t* p) { return from_bf16(load16(p)); }
    static void narrow(uint16_t* target, F value) { store16(target, to_bf16(value)); }
    static F expand(const uint16_t* p, uint32_t bits) { return expand_bf16(p, bits); }
    static void replace(uint16_t* target, const uint16_t* old, F value, uint32_t bits) {
        store16(target, select16(bits, to_bf16(value), load16(old)));
    }
};

// The end of a row, with zeros up to sixteen numbers.
template <typename Number>
struct Padded {
    Number numbers[16] = {};
    Padded(const Number* p, int64_t count) { std::memcpy(numbers, p, size_t(count) * sizeof(Number)); }
};

// ---- bit masks

struct Words {  // of one row of a mask
    int64_t whole, tail_columns, tail_bytes, row_bytes;
    explicit Words(int64_t columns)
        : whole(columns / 64), tail_columns(columns % 64), tail_bytes((columns % 64 + 7) / 8), row_bytes((columns + 7) / 8) {}
};

inline uint64_t load_word(const uint8_t* p) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    return word;
}
inline uint64_t load_bytes(const uint8_t* p, int64_t count) {
    uint64_t word = 0;
    std::memcpy(&word, p, size_t(count));
    return word;
}
// Up to eight bytes of a longer row, from one of them on.
inline uint64_t load_bytes_of(const uint8_t* row, int64_t num_bytes, int64_t at) {
    return num_bytes - at >= 8 ? load_word(row + at) : load_bytes(row + at, num_bytes - at);
}
inline uint64_t tail_word(const Words& words, const uint8_t* row) {
    return load_bytes(row + 8 * words.whole, words.tail_bytes) & ((uint64_t(1) << words.tail_columns) - 1);
}
inline int64_t count_row(const Words& words, const uint8_t* row) {
    int64_t count = 0;
    for (int64_t word = 0; word < words.whole; ++word) count += count_bits(load_word(row + 8 * word));
    return words.tail_columns ? count + count_bits(tail_word(words, row)) : count;
}

// ---- kept entries of 64 columns

// 64 bits from bit `position` on; zeros beyond the end.
inline uint64_t bits_from(const uint8_t* bytes, int64_t num_bytes, int64_t position) {
    const int64_t start = position >> 3;
    const int shift = int(position & 7);
    uint8_t end[9] = {};
    const uint8_t* p = bytes + start;
    if (__builtin_expect(start + 9 > num_bytes, 0)) {
        if (start < num_bytes) std::memcpy(end, p, size_t(num_bytes - start));
        p = end;
    }
    // A shift by 64 is undefined, so the ninth byte moves by one bit and by the rest.
    return load_word(p) >> shift | uint64_t(p[8]) << 1 << (63 - shift);
}

template <int64_t FORM>
struct EntryWord {
    using Number = typename Stored<FORM>::Number;
    const Number* next;
    Number end[64];
    void open(const Delta& delta, uint64_t, int64_t position) {
        const int64_t left = delta.entry_bytes / int64_t(sizeof(Number)) - position;
        next = static_cast<const Number*>(delta.entries) + position;
        if (__builtin_expect(left < 64, 0)) {
            std::memset(end, 0, sizeof end);
            if (left > 0) std::memcpy(end, next, size_t(left) * sizeof(Number));
            next = end;
        }
    }
    // The quarters of a word must be asked for in order.
    Entries quarter(uint32_t kept, int) {
        const Entries entries = values_of(kept, Stored<FORM>::expand(next, kept));
        next += count_bits(kept);
        return entries;
    }
    F shift(F factor, uint32_t kept, int) {
        const F values = Stored<FORM>::expand(next, kept);
        next += count_bits(kept);
        return mul(factor, values);
    }
};
template <>
struct EntryWord<SIGN> {
    uint64_t negative;
    void open(const Delta& delta, uint64_t mask, int64_t position) {
        negative = deposit(bits_from(static_cast<const uint8_t*>(delta.entries), delta.entry_bytes, position), mask);
    }
    Entries quarter(uint32_t kept, int index) { return signs_of(kept, uint32_t(negative >> (16 * index)) & 0xFFFF); }
    F shift(F factor, uint32_t, int index) {
        return select(uint32_t(negative >> (16 * index)) & 0xFFFF, sub(splat(-0.0f), factor), factor);
    }
};

// ---- products

template <int64_t FORM, int ROWS, int INPUTS>
void dot_delta(const Delta& delta, const uint8_t* mask, const Words& words, const int64_t* starts, const float* const* inputs,
               float* sums) {
    F totals[ROWS][INPUTS];
    int64_t places[ROWS];
    UNROLL for (int r = 0; r < ROWS; ++r) {
        places[r] = starts[r];
        UNROLL for (int b = 0; b < INPUTS; ++b) totals[r][b] = zero();
    }
    for (int64_t word = 0; word < words.whole; ++word) {
        uint64_t kept[ROWS];
        EntryWord<FORM> entries[ROWS];
        UNROLL for (int r = 0; r < ROWS; ++r) {
            kept[r] = load_word(mask + r * words.row_bytes + 8 * word);
            entries[r].open(delta, kept[r], places[r]);
            places[r] += count_bits(kept[r]);
        }
        UNROLL for (int quarter = 0; quarter < 4; ++quarter) {
            const int64_t column = 64 * word + 16 * quarter;
            F x[INPUTS];
            UNROLL for (int b = 0; b < INPUTS; ++b) x[b] = load(inputs[b] + column);
            UNROLL for (int r = 0; r < ROWS; ++r) {
                const Entries found = entries[r].quarter(uint32_t(kept[r] >> (16 * quarter)) & 0xFFFF, quarter);
                UNROLL for (int b = 0; b < INPUTS; ++b) {
                    totals[r][b] = multiply_add<FORM == SIGN>(found, x[b], totals[r][b]);
                }
            }
        }
    }
    if (words.tail_columns) {
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const uint64_t kept = tail_word(words, mask + r * words.row_bytes);
            EntryWord<FORM> entries;
            entries.open(delta, kept, places[r]);
            for (int quarter = 0; 16 * quarter < words.tail_columns; ++quarter) {
                const int64_t column = 64 * words.whole + 16 * quarter;
                const int64_t count = at_most(words.tail_columns - 16 * quarter, 16);
                const Entries found = entries.quarter(uint32_t(kept >> (16 * quarter)) & 0xFFFF, quarter);
                UNROLL for (int b = 0; b < INPUTS; ++b) {
                    const F x = load(Padded<float>(inputs[b] + column, count).numbers);
                    totals[r][b] = multiply_add<FORM == SIGN>(found, x, totals[r][b]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; ++r) {
        UNROLL for (int b = 0; b < INPUTS; ++b) sums[r * INPUTS + b] = lane_sum(totals[r][b]);
    }
}

// Adds to the output what one delta gives for `ROWS` rows and `INPUTS` entries of the batch.
template <int64_t FORM, int ROWS, int INPUTS>
void add_tile(const ProductCall& call, const Group& group, const Words& words, int64_t row, const int64_t* starts, int64_t first) {
    const int64_t outputs = call.product->num_outputs, columns = call.product->num_inputs;
    const float* inputs[INPUTS];
    float sums[ROWS * INPUTS];
    UNROLL for (int b = 0; b < INPUTS; ++b) inputs[b] = call.x + group.rows[first + b] * columns;
    dot_delta<FORM, ROWS, INPUTS>(group.delta, group.delta.mask + row * words.row_bytes, words, starts, inputs, sums);
    for (int b = 0; b < INPUTS; ++b) {
        float* out = call.out + group.rows[first + b] * outputs + row;
        for (int r = 0; r < ROWS; ++r) {
            const float scale = FORM == SIGN ? from_scale(group.delta.scales[row + r]) : 1.0f;
            out[r] += group.coefficients[first + b] * scale * sums[r * INPUTS + b];
        }
    }
}

template <int64_t FORM, int ROWS, int INPUTS>
void add_rest(const ProductCall& call, const Group& group, const Words& words, int64_t row, const int64_t* starts, int64_t first) {
    if (group.num_rows - first >= INPUTS) {
        add_tile<FORM, ROWS, INPUTS>(call, group, words, row, starts, first);
    } else if constexpr (INPUTS > 1) {
        add_rest<FORM, ROWS, INPUTS - 1>(call, group, words, row, starts, first);
    }
}

template <int64_t FORM, int ROWS>
void add_rows(const ProductCall& call, const Group& group, const Words& words, int64_t row, int64_t& position) {
    int64_t starts[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        starts[r] = position;
        position += count_row(words, group.delta.mask + (row + r) * words.row_bytes);
    }
    for (int64_t first = 0; first < group.num_rows; first += DELTA_INPUTS) {
        add_rest<FORM, ROWS, DELTA_INPUTS>(call, group, words, row, starts, first);
    }
}

template <int64_t FORM>
void add_chunk(const ProductCall& call, const Group& group, const Words& words, int64_t first, int64_t last) {
    int64_t row = first, position = group.delta.offsets[first / CHUNK_ROWS];
    for (; row + DELTA_ROWS <= last; row += DELTA_ROWS) add_rows<FORM, DELTA_ROWS>(call, group, words, row, position);
    for (; row < last; ++row) add_rows<FORM, 1>(call, group, words, row, position);
}

// The dense product for some rows of the weight: it is read from memory once for a few inputs and as it is stored.
// General matrix products repack the weight at every call, which for a handful of rows takes longer than the product.
template <int64_t FORM, int ROWS, int INPUTS>
void dense_tile(const ProductCall& call, int64_t row, int64_t first) {
    using Number = typename Stored<FORM>::Number;
    const int64_t columns = call.product->num_inputs, whole = columns / 16 * 16;
    const Number* weights = static_cast<const Number*>(call.product->weight) + row * columns;
    const float* x = call.x + first * columns;
    F totals[ROWS][INPUTS];
    UNROLL for (int r = 0; r < ROWS; ++r) {
        UNROLL for (int b = 0; b < INPUTS; ++b) totals[r][b] = zero();
    }
    for (int64_t column = 0; column < whole; column += 16) {
        F values[ROWS];
        UNROLL for (int r = 0; r < ROWS; ++r) values[r] = Stored<FORM>::widen(weights + r * columns + column);
        UNROLL for (int b = 0; b < INPUTS; ++b) {
            const F input = load(x + b * columns + column);
            UNROLL for (int r = 0; r < ROWS; ++r) totals[r][b] = fma(values[r], input, totals[r][b]);
        }
    }
    if (whole < columns) {
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const F values = Stored<FORM>::widen(Padded<Number>(weights + r * columns + whole, columns - whole).numbers);
            UNROLL for (int b = 0; b < INPUTS; ++b) {
                const F input = load(Padded<float>(x + b * columns + whole, columns - whole).numbers);
                totals[r][b] = fma(values, input, totals[r][b]);
            }
        }
    }
    const float* bias = call.product->bias;
    UNROLL for (int r = 0; r < ROWS; ++r) {
        UNROLL for (int b = 0; b < INPUTS; ++b) {
            call.out[(first + b) * call.product->num_outputs + row + r] = (bias ? bias[row + r] : 0.0f) + lane_sum(totals[r][b]);
        }
    }
}

template <int64_t FORM, int ROWS, int INPUTS>
void dense_rest(const ProductCall& call, int64_t row, int64_t first) {
    if (call.batch - first >= INPUTS) {
        dense_tile<FORM, ROWS, INPUTS>(call, row, first);
    } else if constexpr (INPUTS > 1) {
        dense_rest<FORM, ROWS, INPUTS - 1>(call, row, first);
    }
}

template <int64_t FORM, int ROWS>
void dense_rows(const ProductCall& call, int64_t row, int64_t last) {
    for (; row + ROWS <= last; row += ROWS) {
        for (int64_t first = 0; first < call.batch; first += DENSE_INPUTS) {
            dense_rest<FORM, ROWS, DENSE_INPUTS>(call, row, first);
        }
    }
    if constexpr (ROWS > 1) {
        if (row < last) dense_rows<FORM, 1>(call, row, last);
    }
}

template <int64_t FORM>
void dense_chunk(const ProductCall& call, int64_t row, int64_t last) {
    // One input alone fills few registers with sums, and a sum must wait for the one before: more rows at once.
    if (call.batch == 1) {
        dense_rows<FORM, DENSE_ROWS_ALONE>(call, row, last);
    } else {
        dense_rows<FORM, DENSE_ROWS>(call, row, last);
    }
}

void product(const void* argument, int64_t* next) {
    const ProductCall& call = *static_cast<const ProductCall*>(argument);
    const Product& product = *call.product;
    const Words words(product.num_inputs);
    for (;;) {
        const int64_t first = CHUNK_ROWS * take_next(next), last = at_most(first + CHUNK_ROWS, product.num_outputs);
        if (first >= product.num_outputs) return;
        if (product.weight) {
            switch (product.weight_form) {
                case FLOAT32: dense_chunk<FLOAT32>(call, first, last); break;
                case FLOAT16: dense_chunk<FLOAT16>(call, first, last); break;
                case BFLOAT16: dense_chunk<BFLOAT16>(call, first, last); break;
            }
        }
        for (int64_t number = 0; number < product.num_groups; ++number) {
            const Group& group = product.groups[number];
            switch (group.delta.form) {
                case SIGN: add_chunk<SIGN>(call, group, words, first, last); break;
                case FLOAT32: add_chunk<FLOAT32>(call, group, words, first, last); break;
                case FLOAT16: add_chunk<FLOAT16>(call, group, words, first, last); break;
                case BFLOAT16: add_chunk<BFLOAT16>(call, group, words, first, last); break;
            }
        }
    }
}

// ---- changes of a weight

// Calls visit(row, mask of the row, number of its first kept entry) for every row of the matrix.
template <typename Visit>
void each_row(int64_t num_rows, int64_t columns, const uint8_t* mask, const int32_t* offsets, int64_t* next, Visit visit) {
    const Words words(columns);
    for (;;) {
        const int64_t first = CHUNK_ROWS * take_next(next), last = at_most(first + CHUNK_ROWS, num_rows);
        if (first >= num_rows) return;
        int64_t position = offsets[first / CHUNK_ROWS];
        for (int64_t row = first; row < last; ++row) {
            const uint8_t* row_mask = mask + row * words.row_bytes;
            visit(row, row_mask, position);
            position += count_row(words, row_mask);
        }
    }
}

// Calls group(columns from, how many: 16 or fewer, kept bits, shift) for 16 columns at a time, where shift is
// factor * entry. Stops when it returns false.
template <int64_t FORM, typename Group16>
bool each_group(const Delta& delta, const uint8_t* mask, const Words& words, int64_t position, F factor, Group16 group) {
    const int64_t num_words = words.whole + (words.tail_columns ? 1 : 0);
    for (int64_t word = 0; word < num_words; ++word) {
        const bool is_tail = word == words.whole;
        const uint64_t kept = is_tail ? tail_word(words, mask) : load_word(mask + 8 * word);
        const int64_t columns = is_tail ? words.tail_columns : 64;
        EntryWord<FORM> entries;
        entries.open(delta, kept, position);
        position += count_bits(kept);
        for (int quarter = 0; 16 * quarter < columns; ++quarter) {
            const uint32_t bits = uint32_t(kept >> (16 * quarter)) & 0xFFFF;
            const F shift = entries.shift(factor, bits, quarter);
            if (!group(64 * word + 16 * quarter, at_most(columns - 16 * quarter, 16), bits, shift)) return false;
        }
    }
    return true;
}

template <int64_t FORM, int64_t DTYPE>
void add_row(const Delta& delta, const uint8_t* mask, const Words& words, int64_t position, float factor,
             const typename Stored<DTYPE>::Number* source, typename Stored<DTYPE>::Number* target) {
    using Number = typename Stored<DTYPE>::Number;
    each_group<FORM>(delta, mask, words, position, splat(factor), [&](int64_t column, int64_t count, uint32_t kept, F shift) {
        if (count == 16) {
            const F total = add(Stored<DTYPE>::widen(source + column), shift);
            Stored<DTYPE>::replace(target + column, source + column, total, kept);
        } else {
            Padded<Number> numbers(source + column, count);
            const F total = add(Stored<DTYPE>::widen(numbers.numbers), shift);
            Stored<DTYPE>::replace(numbers.numbers, numbers.numbers, total, kept);
            std::memcpy(target + column, numbers.numbers, size_t(count) * sizeof(Number));
        }
        return true;
    });
}

inline float factor_of(const Delta& delta, float coefficient, int64_t row) {
    return delta.form == SIGN ? coefficient * from_scale(delta.scales[row]) : coefficient;
}

template <int64_t FORM, int64_t DTYPE>
void add_to_weight(const Addition& job, int64_t* next) {
    using Number = typename Stored<DTYPE>::Number;
    const Words words(job.num_inputs);
    each_row(job.num_outputs, job.num_inputs, job.delta.mask, job.delta.offsets, next,
             [&](int64_t row, const uint8_t* mask, int64_t position) {
                 add_row<FORM, DTYPE>(job.delta, mask, words, position, factor_of(job.delta, job.coefficient, row),
                                      static_cast<const Number*>(job.source) + row * job.num_inputs,
                                      static_cast<Number*>(job.target) + row * job.num_inputs);
             });
}

template <int64_t FORM>
void add_by_dtype(const Addition& job, int64_t* next) {
    switch (job.form) {
        case FLOAT32: add_to_weight<FORM, FLOAT32>(job, next); break;
        case FLOAT16: add_to_weight<FORM, FLOAT16>(job, next); break;
        case BFLOAT16: add_to_weight<FORM, BFLOAT16>(job, next); break;
    }
}

void addition(const void* argument, int64_t* next) {
    const Addition& job = *static_cast<const Addition*>(argument);
    switch (job.delta.form) {
        case SIGN: add_by_dtype<SIGN>(job, next); break;
        case FLOAT32: add_by_dtype<FLOAT32>(job, next); break;
        case FLOAT16: add_by_dtype<FLOAT16>(job, next); break;
        case BFLOAT16: add_by_dtype<BFLOAT16>(job, next); break;
    }
}

// ---- changes that can be computed back

// Columns of which the sums of a row are kept until it is known that all of them come back.
constexpr int64_t HELD_COLUMNS = 4096;

// Whether (weight + shift) - shift, with the free low bits rounded away, gives every kept weight of the row back. Rows of
// up to HELD_COLUMNS leave weight + shift in `sums`, which has room for 16 more.
template <int64_t FORM>
bool comes_back(const Delta& delta, const uint8_t* mask, const Words& words, int64_t position, float factor, int low_bits,
                const float* weight, float* sums, bool is_held) {
    return each_group<FORM>(delta, mask, words, position, splat(factor), [&](int64_t column, int64_t count, uint32_t kept, F shift) {
        const F old = count == 16 ? load(weight + column) : load(Padded<float>(weight + column, count).numbers);
        const F total = add(old, shift);
        if (is_held) store(sums + column, select(kept, total, old));
        return (bits_differ(round_low_bits(sub(total, shift), low_bits), old) & kept) == 0;
    });
}

template <int64_t FORM>
void subtract_row(const Delta& delta, const uint8_t* mask, const Words& words, int64_t position, float factor, int low_bits,
                  float* weight) {
    each_group<FORM>(delta, mask, words, position, splat(factor), [&](int64_t column, int64_t count, uint32_t kept, F shift) {
        if (count == 16) {
            const F old = load(weight + column);
            store(weight + column, select(kept, round_low_bits(sub(old, shift), low_bits), old));
        } else {
            Padded<float> numbers(weight + column, count);
            const F old = load(numbers.numbers);
            store(numbers.numbers, select(kept, round_low_bits(sub(old, shift), low_bits), old));
            std::memcpy(weight + column, numbers.numbers, size_t(count) * 4);
        }
        return true;
    });
}

template <int64_t FORM>
void change_weight(const Change& job, int64_t* next) {
    const Words words(job.num_inputs);
    const bool is_held = job.num_inputs <= HELD_COLUMNS;
    float sums[HELD_COLUMNS + 16];
    each_row(job.num_outputs, job.num_inputs, job.delta.mask, job.delta.offsets, next,
             [&](int64_t row, const uint8_t* mask, int64_t position) {
                 float* weight = job.weight + row * job.num_inputs;
                 const float factor = factor_of(job.delta, job.coefficient, row);
                 uint8_t& mark = job.marks[row];
                 if (job.mode == TAKE_UNMARKED) {
                     if (!mark) subtract_row<FORM>(job.delta, mask, words, position, factor, job.low_bits, weight);
                 } else if (job.mode == ADD_MARKED) {
                     if (mark) add_row<FORM, FLOAT32>(job.delta, mask, words, position, factor, weight, weight);
                 } else if (comes_back<FORM>(job.delta, mask, words, position, factor, job.low_bits, weight, sums, is_held)) {
                     if (is_held) {
                         std::memcpy(weight, sums, size_t(job.num_inputs) * sizeof(float));
                     } else {
                         add_row<FORM, FLOAT32>(job.delta, mask, words, position, factor, weight, weight);
                     }
                     mark = 0;
                 }
             });
}

void change(const void* argument, int64_t* next) {
    const Change& job = *static_cast<const Change*>(argument);
    switch (job.delta.form) {
        case SIGN: change_weight<SIGN>(job, next); break;
        case FLOAT32: change_weight<FLOAT32>(job, next); break;
        case FLOAT16: change_weight<FLOAT16>(job, next); break;
        case BFLOAT16: change_weight<BFLOAT16>(job, next); break;
    }
}

// Bits of 2 or 4 bytes travel as the bits of floats, which nothing computes with.
template <int64_t DTYPE>
void save_row(const uint8_t* mask, const Words& words, const typename Stored<DTYPE>::Number* weight,
              typename Stored<DTYPE>::Number* saved, int64_t room) {
    using Number = typename Stored<DTYPE>::Number;
    const int64_t num_words = words.whole + (words.tail_columns ? 1 : 0);
    for (int64_t word = 0; word < num_words; ++word) {
        const bool is_tail = word == words.whole;
        const uint64_t kept = is_tail ? tail_word(words, mask) : load_word(mask + 8 * word);
        const int64_t columns = is_tail ? words.tail_columns : 64;
        float packed[80];
        int count = 0;
        for (int quarter = 0; 16 * quarter < columns; ++quarter) {
            const Number* place = weight + 64 * word + 16 * quarter;
            const int64_t some = at_most(columns - 16 * quarter, 16);
            const uint32_t bits = uint32_t(kept >> (16 * quarter)) & 0xFFFF;
            const F values = some == 16 ? Stored<DTYPE>::widen(place) : Stored<DTYPE>::widen(Padded<Number>(place, some).numbers);
            compress_store(packed + count, values, bits);
            count += count_bits(bits);
        }
        const int64_t taken = at_most(count, room);
        if constexpr (sizeof(Number) == 4) {
            std::memcpy(saved, packed, size_t(taken) * 4);
        } else {
            uint16_t halves[80];
            for (int first = 0; first < count; first += 16) store16(halves + first, upper_half(load(packed + first)));
            std::memcpy(saved, halves, size_t(taken) * 2);
        }
        saved += taken;
        room -= taken;
    }
}

template <int64_t DTYPE>
void bring_row_back(const uint8_t* mask, const Words& words, const Delta& saved, int64_t position,
                    typename Stored<DTYPE>::Number* weight) {
    using Number = typename Stored<DTYPE>::Number;
    const auto put = [](Number* target, F values, uint32_t kept) {
        if constexpr (sizeof(Number) == 4) {
            store(target, select(kept, values, load(target)));
        } else {
            store16(target, select16(kept, upper_half(values), load16(target)));
        }
    };
    const int64_t num_words = words.whole + (words.tail_columns ? 1 : 0);
    for (int64_t word = 0; word < num_words; ++word) {
        const bool is_tail = word == words.whole;
        const uint64_t kept = is_tail ? tail_word(words, mask) : load_word(mask + 8 * word);
        const int64_t columns = is_tail ? words.tail_columns : 64;
        EntryWord<DTYPE> entries;
        entries.open(saved, kept, position);
        position += count_bits(kept);
        for (int quarter = 0; 16 * quarter < columns; ++quarter) {
            Number* place = weight + 64 * word + 16 * quarter;
            const int64_t some = at_most(columns - 16 * quarter, 16);
            const uint32_t bits = uint32_t(kept >> (16 * quarter)) & 0xFFFF;
            const F values = Stored<DTYPE>::expand(entries.next, bits);
            entries.next += count_bits(bits);
            if (some == 16) {
                put(place, values, bits);
            } else {
                Padded<Number> numbers(place, some);
                put(numbers.numbers, values, bits);
                std::memcpy(place, numbers.numbers, size_t(some) * sizeof(Number));
            }
        }
    }
}

template <int64_t DTYPE>
void move_entries(const Move& job, int64_t* next) {
    using Number = typename Stored<DTYPE>::Number;
    const Words words(job.num_inputs);
    const Delta saved = {job.mask, job.saved, job.num_saved * job.item_size, nullptr, job.offsets, DTYPE};
    each_row(job.num_outputs, job.num_inputs, job.mask, job.offsets, next,
             [&](int64_t row, const uint8_t* mask, int64_t position) {
                 Number* weight = static_cast<Number*>(job.weight) + row * job.num_inputs;
                 if (job.mode == BRING_BACK) {
                     bring_row_back<DTYPE>(mask, words, saved, position, weight);
                 } else if (position < job.num_saved) {
                     save_row<DTYPE>(mask, words, weight, static_cast<Number*>(job.saved) + position, job.num_saved - position);
                 }
             });
}

void move(const void* argument, int64_t* next) {
    const Move& job = *static_cast<const Move*>(argument);
    if (job.item_size == 4) {
        move_entries<FLOAT32>(job, next);
    } else {
        move_entries<BFLOAT16>(job, next);
    }
}

// ---- inner loops of a build

// Sum of sixteen float32 sums, in float64, halves first.
inline double lane_total(F sums) {
    float lanes[16];
    double totals[8];
    store(lanes, sums);
    for (int i = 0; i < 8; ++i) totals[i] = double(lanes[i]) + double(lanes[i + 8]);
    for (int width = 4; width; width /= 2) {
        for (int i = 0; i < width; ++i) totals[i] += totals[i + width];
    }
    return totals[0];
}

struct MarkedGroup {
    F magnitude;
    uint32_t negative, above, inside;
};

struct RowSums {
    F square = zero(), above_sum = zero(), above_square = zero();
    MarkedGroup look(F minuend, F subtrahend, F low, F high) {
        const F delta = sub(minuend, subtrahend), magnitude = abs(delta), squared = mul(delta, delta);
        const uint32_t above = greater(magnitude, high);
        square = add(square, squared);
        above_sum = add_where(above, above_sum, magnitude);
        above_square = add_where(above, above_square, squared);
        return {magnitude, greater(zero(), delta), above, above ^ at_least(magnitude, low)};
    }
};

inline void put_bytes(uint8_t* target, uint32_t bits, int64_t num_bytes) {
    target[0] = uint8_t(bits);
    if (num_bytes > 1) target[1] = uint8_t(bits >> 8);
}

// Marks rows of minuend - subtrahend against a bracket, and sums them up: see `Mark` for what is read and written.
// Magnitudes inside the bracket are listed, in order, if the bracket is wider than one number.
template <int64_t FORM>
void mark_rows(int64_t first, int64_t last, int64_t columns, Mark& job) {
    using Number = typename Stored<FORM>::Number;
    const int64_t row_bytes = (columns + 7) / 8, whole = columns / 16 * 16;
    const F low = splat(job.low), high = splat(job.high);
    const bool is_wide = job.low != job.high;
    int64_t num_above = 0, num_inside = 0;
    float* values = job.values + (is_wide ? job.num_inside : 0);
    for (int64_t row = first; row < last; ++row) {
        const Number* minuend = static_cast<const Number*>(job.minuend) + row * columns;
        const Number* subtrahend = static_cast<const Number*>(job.subtrahend) + row * columns;
        uint8_t *negative = job.negative + row * row_bytes, *above = job.above + row * row_bytes;
        uint8_t* inside = job.inside + row * row_bytes;
        RowSums sums;
        for (int64_t column = 0; column < whole; column += 16) {
            const MarkedGroup marked =
                sums.look(Stored<FORM>::widen(minuend + column), Stored<FORM>::widen(subtrahend + column), low, high);
            const uint16_t words[3] = {uint16_t(marked.negative), uint16_t(marked.above), uint16_t(marked.inside)};
            std::memcpy(negative + column / 8, &words[0], 2);
            std::memcpy(above + column / 8, &words[1], 2);
            std::memcpy(inside + column / 8, &words[2], 2);
            num_above += count_bits(marked.above);
            num_inside += count_bits(marked.inside);
            if (is_wide) {
                // Sixteen numbers are written and few count. There is room: fewer are listed than columns were seen.
                compress_store(values, marked.magnitude, marked.inside);
                values += count_bits(marked.inside);
            }
        }
        if (whole < columns) {
            const int64_t count = columns - whole, num_bytes = row_bytes - whole / 8;
            MarkedGroup marked = sums.look(Stored<FORM>::widen(Padded<Number>(minuend + whole, count).numbers),
                                           Stored<FORM>::widen(Padded<Number>(subtrahend + whole, count).numbers), low, high);
            // A bracket may hold 0, which the padding is.
            const uint32_t real = (1u << count) - 1;
            marked.above &= real;
            marked.inside &= real;
            put_bytes(negative + whole / 8, marked.negative, num_bytes);
            put_bytes(above + whole / 8, marked.above, num_bytes);
            put_bytes(inside + whole / 8, marked.inside, num_bytes);
            num_above += count_bits(marked.above);
            num_inside += count_bits(marked.inside);
            if (is_wide) {
                float packed[32];
                compress_store(packed, marked.magnitude, marked.inside);
                std::memcpy(values, packed, size_t(count_bits(marked.inside)) * 4);
                values += count_bits(marked.inside);
            }
        }
        job.sums[3 * row] = lane_total(sums.square);
        job.sums[3 * row + 1] = lane_total(sums.above_sum);
        job.sums[3 * row + 2] = lane_total(sums.above_square);
    }
    job.num_above += num_above;
    job.num_inside += num_inside;
}

// Entries that all jobs look at before the next ones: few enough that what they read stays in a core's cache.
constexpr int64_t MARKED_ENTRIES = 1 << 13;

void mark(int64_t form, int64_t rows, int64_t columns, Mark* jobs, int64_t num_jobs) {
    const int64_t step = columns < MARKED_ENTRIES ? MARKED_ENTRIES / (columns ? columns : 1) : 1;
    for (int64_t number = 0; number < num_jobs; ++number) jobs[number].num_above = jobs[number].num_inside = 0;
    for (int64_t first = 0; first < rows; first += step) {
        for (int64_t number = 0; number < num_jobs; ++number) {
            if (form == BFLOAT16) {
                mark_rows<BFLOAT16>(first, at_most(first + step, rows), columns, jobs[number]);
            } else {
                mark_rows<FLOAT32>(first, at_most(first + step, rows), columns, jobs[number]);
            }
        }
    }
}

// The backbone of sixteen columns, and the sum of the task vectors there.
template <typename Load>
inline F merge_group(Load load_source, int64_t num_experts, bool is_mean, F count, F& square) {
    const F base = load_source(0);
    // What is added to -0.0 stays as it is, even -0.0.
    F total = splat(-0.0f);
    for (int64_t expert = 1; expert <= num_experts; ++expert) total = add(total, sub(load_source(expert), base));
    square = add(square, mul(total, total));
    return add(is_mean ? div(total, count) : zero(), base);
}

// Merges rows: sources are the base, then the experts, (r, I) each without gaps. The backbone is the base plus the mean of
// the task vectors, or the base. `energies` receives the squared norm of each row of the sum of the task vectors.
template <int64_t FORM>
void merge_rows(const void* const* sources, int64_t num_experts, int64_t is_mean, int64_t rows, int64_t columns,
                typename Stored<FORM>::Number* backbone, double* energies) {
    using Number = typename Stored<FORM>::Number;
    const int64_t whole = columns / 16 * 16;
    const F count = splat(float(num_experts));
    const auto place = [&](int64_t number, int64_t at) { return static_cast<const Number*>(sources[number]) + at; };
    for (int64_t row = 0; row < rows; ++row) {
        F square = zero();
        for (int64_t column = 0; column < whole; column += 16) {
            const int64_t at = row * columns + column;
            const auto source = [&](int64_t number) { return Stored<FORM>::widen(place(number, at)); };
            Stored<FORM>::narrow(backbone + at, merge_group(source, num_experts, is_mean != 0, count, square));
        }
        if (whole < columns) {
            const int64_t at = row * columns + whole, rest = columns - whole;
            const auto source = [&](int64_t number) {
                return Stored<FORM>::widen(Padded<Number>(place(number, at), rest).numbers);
            };
            Number merged[16];
            Stored<FORM>::narrow(merged, merge_group(source, num_experts, is_mean != 0, count, square));
            std::memcpy(backbone + at, merged, size_t(rest) * sizeof(Number));
        }
        energies[row] = lane_total(square);
    }
}

void merge(int64_t form, const void* const* sources, int64_t num_experts, int64_t is_mean, int64_t rows, int64_t columns,
           void* backbone, double* energies) {
    if (form == BFLOAT16) {
        merge_rows<BFLOAT16>(sources, num_experts, is_mean, rows, columns, static_cast<uint16_t*>(backbone), energies);
    } else {
        merge_rows<FLOAT32>(sources, num_experts, is_mean, rows, columns, static_cast<float*>(backbone), energies);
    }
}

// Rounds numbers to bfloat16.
void narrow(const float* source, int64_t count, uint16_t* target) {
    const int64_t whole = count / 16 * 16;
    for (int64_t at = 0; at < whole; at += 16) store16(target + at, to_bf16(load(source + at)));
    if (whole < count) {
        uint16_t rounded[16];
        store16(rounded, to_bf16(load(Padded<float>(source + whole, count - whole).numbers)));
        std::memcpy(target + whole, rounded, size_t(count - whole) * 2);
    }
}

// The bits of `bitmap` where `mask` has ones, closed up. `target` has room for all of them, in whole words.
void take_bits(const uint8_t* bitmap, const uint8_t* mask, int64_t num_bytes, uint64_t* target) {
    uint64_t word = 0;
    int held = 0;
    for (int64_t byte = 0; byte < num_bytes; byte += 8) {
        const int64_t some = at_most(num_bytes - byte, 8);
        const uint64_t ones = load_bytes(mask + byte, some), taken = extract(load_bytes(bitmap + byte, some), ones);
        const int count = count_bits(ones);
        word |= taken << held;
        held += count;
        if (held >= 64) {
            *target++ = word;
            held -= 64;
            // A shift by 64 is undefined.
            word = held ? taken >> (count - held) : 0;
        }
    }
    if (held) *target = word;
}

// The reverse: bits that follow each other are put where `mask` has ones, over the mask.
void put_bits(const uint8_t* bits, int64_t bit_bytes, uint8_t* mask, int64_t num_bytes) {
    int64_t place = 0;
    for (int64_t byte = 0; byte < num_bytes; byte += 8) {
        const int64_t some = at_most(num_bytes - byte, 8);
        const uint64_t ones = load_bytes(mask + byte, some), put = deposit(bits_from(bits, bit_bytes, place), ones);
        std::memcpy(mask + byte, &put, size_t(some));
        place += count_bits(ones);
    }
}

// Ones in each row of a bitmap.
void count_rows(const uint8_t* bitmap, int64_t rows, int64_t row_bytes, int64_t* counts) {
    for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* bytes = bitmap + row * row_bytes;
        int64_t count = 0;
        for (int64_t at = 0; at < row_bytes; at += 8) count += count_bits(load_bytes_of(bytes, row_bytes, at));
        counts[row] = count;
    }
}

// Clears all ones of a bitmap but the first `left`.
void keep_first(uint8_t* bitmap, int64_t num_bytes, int64_t left) {
    for (int64_t at = 0; at < num_bytes; at += 8) {
        uint64_t word = load_bytes_of(bitmap, num_bytes, at);
        const int count = count_bits(word);
        if (count > left) {
            word = deposit((uint64_t(1) << left) - 1, word);
            std::memcpy(bitmap + at, &word, size_t(at_most(num_bytes - at, 8)));
        }
        left -= at_most(count, left);
    }
}

// The digit in which the bits of the number of a rank lie, from how often each occurs; the rank becomes that among those.
inline uint32_t digit_of_rank(const uint32_t* counts, uint32_t num_digits, int64_t& rank) {
    uint32_t digit = 0;
    while (digit + 1 < num_digits && rank >= counts[digit]) rank -= counts[digit++];
    return digit;
}

// Copies the numbers whose first digit this is; returns how many. Up to sixteen more numbers are written.
inline int64_t take_digit(const float* values, int64_t count, uint32_t digit, float* target) {
    float edges[2];
    const uint32_t bits[2] = {digit << 20, (digit + 1) << 20};
    std::memcpy(edges, bits, sizeof edges);
    const F low = splat(edges[0]), high = splat(edges[1]);
    int64_t taken = 0;
    for (int64_t at = 0; at < count; at += 16) {
        const F some = count - at >= 16 ? load(values + at) : load(Padded<float>(values + at, count - at).numbers);
        const uint32_t real = count - at >= 16 ? 0xFFFF : (1u << (count - at)) - 1;
        // From infinity on the next edge is no number, and nothing reaches it.
        const uint32_t found = (at_least(some, low) ^ at_least(some, high)) & real;
        if (!found) continue;
        compress_store(target + taken, some, found);
        taken += count_bits(found);
    }
    return taken;
}

// Numbers at some places of the ascending order of others, none of them negative: their bits grow with them. Digit by
// digit: 11, 10 and 10 bits. `scratch` has room for sixteen more than all.
void find_ranked(const float* values, int64_t count, const int64_t* ranks, int64_t num_ranks, float* scratch, float* found) {
    // Two tables, since equal numbers that follow each other would wait for each other's count.
    uint32_t counts[2][2048] = {};
    for (int64_t at = 0; at < count; ++at) {
        ++counts[at & 1][bits_of_float(values[at]) >> 20 & 2047];
    }
    for (int digit = 0; digit < 2048; ++digit) counts[0][digit] += counts[1][digit];
    for (int64_t number = 0; number < num_ranks; ++number) {
        int64_t rank = ranks[number];
        uint32_t digit = digit_of_rank(counts[0], 2048, rank), known = digit << 20;
        int64_t left = take_digit(values, count, digit, scratch);
        for (int shift = 10; shift >= 0; shift -= 10) {
            uint32_t finer[1024] = {};
            for (int64_t at = 0; at < left; ++at) ++finer[bits_of_float(scratch[at]) >> shift & 1023];
            digit = digit_of_rank(finer, 1024, rank);
            known |= digit << shift;
            int64_t kept = 0;
            for (int64_t at = 0; at < left; ++at) {
                const float value = scratch[at];
                scratch[kept] = value;
                kept += (bits_of_float(value) >> shift & 1023) == digit;
            }
            left = kept;
        }
        std::memcpy(found + number, &known, 4);
    }
}

}  // namespace

#define TABLE(name, label)                                                                                     \
    const KernelTable name = {label,  product,   addition, change,     move,      mark,       merge,           \
                              narrow, take_bits, put_bits, count_rows, keep_first, find_ranked}
