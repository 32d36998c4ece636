// Every instruction set of this processor against the baseline, with random shapes, offsets and truncated inputs.
//
// All buffers have exactly the size they need, so that a sanitizer sees any read or write beyond it. Products may differ
// by rounding; all else must be the same bit for bit. Built and run by `sanitize.sh` and `aarch64.sh`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"
#include "sha256.h"

namespace {

std::mt19937 generator(1);
int below(int limit) { return int(generator() % unsigned(limit)); }
float normal() { return std::normal_distribution<float>()(generator); }

// A block of exactly this many numbers, at an address that need not be aligned to more than the number.
template <typename Number>
struct Block {
    std::unique_ptr<Number[]> numbers;
    size_t size;
    explicit Block(size_t count) : numbers(new Number[count]), size(count) { std::memset(data(), 0x5A, bytes()); }
    Block(const Block& other) : Block(other.size) { std::memcpy(data(), other.data(), bytes()); }
    Number* data() { return numbers.get(); }
    const Number* data() const { return numbers.get(); }
    const Number& operator[](size_t i) const { return numbers[i]; }
    size_t bytes() const { return size * sizeof(Number); }
    Number& operator[](size_t i) { return numbers[i]; }
    Block(Block&&) = default;
    Block& operator=(Block&&) = default;
    bool operator==(const Block& other) const { return size == other.size && !std::memcmp(data(), other.data(), bytes()); }
};

uint16_t to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t(bits >> 16);
}

int num_faults = 0;
void expect(bool is_right, const char* isa, const char* what, int rows, int columns) {
    if (!is_right && ++num_faults < 20) std::printf("%s: %s is wrong for %d x %d\n", isa, what, rows, columns);
}

struct RandomDelta {
    Block<uint8_t> mask;
    Block<int32_t> offsets;
    Block<uint16_t> scales;
    Block<uint8_t> entries;
    int64_t num_kept = 0;
    Delta delta;

    RandomDelta(int rows, int columns, int64_t form, double density, int missing)
        : mask(size_t(rows) * ((columns + 7) / 8)), offsets((rows + 15) / 16), scales(rows), entries(0) {
        const int row_bytes = (columns + 7) / 8;
        std::memset(mask.data(), 0, mask.bytes());
        for (int row = 0; row < rows; ++row) {
            if (row % 16 == 0) offsets[row / 16] = int32_t(num_kept);
            scales[row] = to_bfloat(0.5f + float(below(100)) / 64);
            for (int column = 0; column < columns; ++column) {
                if (std::uniform_real_distribution<>()(generator) < density) {
                    mask[size_t(row) * row_bytes + column / 8] |= uint8_t(1 << column % 8);
                    ++num_kept;
                }
            }
        }
        const int64_t item = form == SIGN ? 0 : form == FLOAT32 ? 4 : 2;
        int64_t num_bytes = form == SIGN ? (num_kept + 7) / 8 : num_kept * item;
        num_bytes -= num_bytes < missing * item ? num_bytes : missing * item;
        entries = Block<uint8_t>(size_t(num_bytes));
        for (size_t i = 0; i < entries.size; ++i) entries[i] = uint8_t(generator());
        for (int64_t i = 0; form != SIGN && i < num_bytes / item; ++i) {
            const float value = normal();
            const uint16_t half = form == BFLOAT16 ? to_bfloat(value) : uint16_t(0x3000 + below(0x0C00));
            std::memcpy(entries.data() + i * item, item == 4 ? static_cast<const void*>(&value) : &half, size_t(item));
        }
        delta = {mask.data(), entries.data(), int64_t(entries.bytes()), scales.data(), offsets.data(), form};
    }
};

template <typename Job>
void run(void (*kernel)(const void*, int64_t*), const Job& job) {
    int64_t next = 0;
    kernel(&job, &next);
}

Block<float> random_floats(size_t count, bool has_free_bits = false) {
    Block<float> block(count);
    for (size_t i = 0; i < count; ++i) {
        block[i] = normal();
        if (has_free_bits) {
            const uint32_t bits = uint32_t(to_bfloat(block[i])) << 16;
            std::memcpy(&block[i], &bits, 4);
        }
    }
    return block;
}

void check_product(const KernelTable& table, int rows, int columns, int64_t form, double density, int missing) {
    const RandomDelta first(rows, columns, form, density, missing), second(rows, columns, form, density, 0);
    const int batch = 1 + below(9);
    std::vector<int64_t> some, all;
    std::vector<float> factors;
    for (int row = 0; row < batch; ++row) {
        all.push_back(row);
        factors.push_back(normal());
        if (row % 2) some.push_back(row);
    }
    const Group groups[2] = {{first.delta, all.data(), factors.data(), batch},
                             {second.delta, some.data(), factors.data(), int64_t(some.size())}};
    const Block<float> x = random_floats(size_t(batch) * columns), bias = random_floats(rows);
    const Block<float> weights = random_floats(size_t(rows) * columns);
    Block<uint16_t> halves(size_t(rows) * columns);
    for (size_t i = 0; i < halves.size; ++i) halves[i] = uint16_t(0x3000 + below(0x0C00));
    const int64_t weight_form = below(4);
    const void* weight = weight_form == 0 ? nullptr : weight_form == FLOAT32 ? static_cast<const void*>(weights.data()) : halves.data();
    const Product product = {rows, columns, weight, weight_form, below(2) ? bias.data() : nullptr, groups, below(3)};
    const Block<float> start = random_floats(size_t(batch) * rows);
    Block<float> found(start), expected(start);
    run(table.product, ProductCall{&product, x.data(), batch, found.data()});
    run(table_baseline.product, ProductCall{&product, x.data(), batch, expected.data()});
    bool is_near = true;
    for (size_t i = 0; i < found.size; ++i) is_near &= std::fabs(found[i] - expected[i]) <= 1e-4f * (1 + std::sqrt(float(columns)) + std::fabs(expected[i]));
    expect(is_near, table.name, "product", rows, columns);
}

void check_changes(const KernelTable& table, int rows, int columns, int64_t form, double density, int missing) {
    const RandomDelta random(rows, columns, form, density, missing);
    const size_t size = size_t(rows) * columns;
    for (int64_t dtype = FLOAT32; dtype <= BFLOAT16; ++dtype) {
        Block<uint8_t> source(size * (dtype == FLOAT32 ? 4 : 2));
        const Block<float> numbers = random_floats(size);
        for (size_t i = 0; i < size; ++i) {
            const uint16_t half = dtype == BFLOAT16 ? to_bfloat(numbers.data()[i]) : uint16_t(generator());
            if (dtype == FLOAT32) std::memcpy(source.data() + 4 * i, numbers.data() + i, 4);
            if (dtype != FLOAT32) std::memcpy(source.data() + 2 * i, &half, 2);
        }
        Block<uint8_t> found(source), expected(source);
        const bool in_place = below(2);
        run(table.addition, Addition{rows, columns, random.delta, 0.37f, 0, in_place ? found.data() : source.data(), found.data(), dtype});
        run(table_baseline.addition, Addition{rows, columns, random.delta, 0.37f, 0, source.data(), expected.data(), dtype});
        bool is_same = true;
        for (size_t i = 0; dtype == FLOAT16 && i < size; ++i) {  // what a NaN's payload becomes is not laid down
            uint16_t a, b;
            std::memcpy(&a, found.data() + 2 * i, 2);
            std::memcpy(&b, expected.data() + 2 * i, 2);
            is_same &= a == b || ((a & 0x7FFF) > 0x7C00 && (b & 0x7FFF) > 0x7C00);
        }
        expect(dtype == FLOAT16 ? is_same : found == expected, table.name, "addition", rows, columns);
        if (dtype == FLOAT16) continue;
        const int64_t item = dtype == FLOAT32 ? 4 : 2;
        Block<uint8_t> saved(size_t(random.num_kept * item)), other(saved);
        Block<uint8_t> weight(source);
        Move move = {rows, columns, random.mask.data(), random.offsets.data(), weight.data(), saved.data(), random.num_kept, item, SAVE};
        run(table.move, move);
        Move baseline = move;
        baseline.saved = other.data();
        run(table_baseline.move, baseline);
        expect(saved == other, table.name, "saving", rows, columns);
        run(table.addition, Addition{rows, columns, random.delta, 5.0f, 0, weight.data(), weight.data(), dtype});
        move.mode = BRING_BACK;
        run(table.move, move);
        expect(weight == source, table.name, "bringing back", rows, columns);
    }
    const Block<float> source = random_floats(size, true);
    Block<float> found(source), expected(source);
    Block<uint8_t> marks(rows), others(rows);
    std::memset(marks.data(), 1, marks.bytes());
    std::memset(others.data(), 1, others.bytes());
    Change change = {rows, columns, random.delta, 0.5f, 16, found.data(), marks.data(), ADD_OR_MARK};
    Change baseline = {rows, columns, random.delta, 0.5f, 16, expected.data(), others.data(), ADD_OR_MARK};
    run(table.change, change);
    run(table_baseline.change, baseline);
    expect(found == expected && marks == others, table.name, "adding what comes back", rows, columns);
    change.mode = TAKE_UNMARKED;
    run(table.change, change);
    expect(found == source, table.name, "taking out", rows, columns);
}

// Counts of a bitmap's rows and its first ones, against bits looked at one by one.
void check_bitmap(const KernelTable& table, const Block<uint8_t>& bitmap, int rows, int columns, int64_t num_ones) {
    const int row_bytes = (columns + 7) / 8;
    Block<int64_t> counts(rows);
    table.count_rows(bitmap.data(), rows, row_bytes, counts.data());
    const int64_t first = num_ones ? below(int(num_ones) + 2) : 0;
    Block<uint8_t> kept(bitmap);
    table.keep_first(kept.data(), int64_t(kept.size), first);
    bool is_right = true;
    int64_t seen = 0;
    for (int row = 0; row < rows; ++row) {
        const int64_t before = seen;
        for (int bit = 0; bit < 8 * row_bytes; ++bit) {
            const size_t place = size_t(row) * row_bytes + bit / 8;
            const bool is_one = bitmap[place] >> bit % 8 & 1;
            is_right &= bool(kept[place] >> bit % 8 & 1) == (is_one && seen < first);
            seen += is_one;
        }
        is_right &= counts[row] == seen - before;
    }
    expect(is_right, table.name, "counting ones", rows, columns);
}

// Numbers of three ranks, against sorting.
void check_ranked(const KernelTable& table, const Block<float>& source, int rows, int columns) {
    Block<float> magnitudes(source), scratch(source.size + 16), found(3);
    for (size_t i = 0; i < source.size; ++i) magnitudes[i] = below(40) ? std::fabs(source[i]) : INFINITY;
    std::vector<float> sorted(magnitudes.data(), magnitudes.data() + source.size);
    std::sort(sorted.begin(), sorted.end());
    const int64_t ranks[3] = {0, below(int(source.size)), int64_t(source.size) - 1};
    table.find_ranked(magnitudes.data(), int64_t(source.size), ranks, 3, scratch.data(), found.data());
    bool is_right = true;
    for (int number = 0; number < 3; ++number) is_right &= found[number] == sorted[size_t(ranks[number])];
    expect(is_right, table.name, "ranking", rows, columns);
}

template <typename Number>
void check_build(const KernelTable& table, int rows, int columns, int64_t form) {
    const size_t size = size_t(rows) * columns, map = size_t(rows) * ((columns + 7) / 8);
    std::vector<Block<Number>> sources;
    for (int number = 0; number < 4; ++number) {
        sources.emplace_back(size);
        for (size_t i = 0; i < size; ++i) {
            const float value = below(6) ? normal() : below(2) ? 0.0f : -0.0f;
            if constexpr (sizeof(Number) == 4) sources.back()[i] = value;
            if constexpr (sizeof(Number) == 2) sources.back()[i] = to_bfloat(value);
        }
    }
    const float low = float(below(3)) / 2, high = low + float(below(2));
    Mark jobs[2];
    std::vector<Block<uint8_t>> maps;
    std::vector<Block<double>> sums;
    std::vector<Block<float>> values;
    for (int which = 0; which < 2; ++which) {
        for (int number = 0; number < 3; ++number) maps.emplace_back(map);
        sums.emplace_back(size_t(rows) * 3);
        values.emplace_back(size);
        Block<uint8_t>* three = &maps[size_t(which) * 3];
        jobs[which] = {sources[0].data(), sources[1].data(), three[0].data(), three[1].data(), three[2].data(),
                       sums.back().data(), values.back().data(), low, high, 0, 0};
        (which ? table_baseline : table).mark(form, rows, columns, &jobs[which], 1);
    }
    const bool same_maps = maps[0] == maps[3] && maps[1] == maps[4] && maps[2] == maps[5] && sums[0] == sums[1];
    const bool same_counts = jobs[0].num_above == jobs[1].num_above && jobs[0].num_inside == jobs[1].num_inside;
    expect(same_maps && same_counts, table.name, "marking", rows, columns);
    if (low != high) {
        const size_t count = size_t(jobs[1].num_inside) * 4;
        expect(!count || !std::memcmp(values[0].data(), values[1].data(), count), table.name, "listing", rows, columns);
    }
    int64_t num_ones = 0;
    for (size_t i = 0; i < map; ++i) num_ones += __builtin_popcount(maps[1][i]);
    Block<uint64_t> taken(size_t(num_ones + 63) / 64), also(taken);
    table.take_bits(maps[0].data(), maps[1].data(), int64_t(map), taken.data());
    table_baseline.take_bits(maps[0].data(), maps[1].data(), int64_t(map), also.data());
    expect(taken == also, table.name, "taking bits", rows, columns);
    Block<uint8_t> bits(size_t(num_ones + 7) / 8), put(maps[1]), expected(maps[1]);
    if (bits.size) std::memcpy(bits.data(), taken.data(), bits.bytes());
    table.put_bits(bits.data(), int64_t(bits.size), put.data(), int64_t(map));
    for (size_t i = 0; i < map; ++i) expected[i] &= maps[0][i];
    expect(put == expected, table.name, "putting bits", rows, columns);
    check_bitmap(table, maps[1], rows, columns, num_ones);
    {
        const void* places[4] = {sources[0].data(), sources[1].data(), sources[2].data(), sources[3].data()};
        Block<Number> merged(size), plain(size);
        Block<double> energies(rows), others(rows);
        const int64_t is_mean = below(2);
        table.merge(form, places, 3, is_mean, rows, columns, merged.data(), energies.data());
        table_baseline.merge(form, places, 3, is_mean, rows, columns, plain.data(), others.data());
        expect(merged == plain && energies == others, table.name, "merging", rows, columns);
    }
    if constexpr (sizeof(Number) == 4) {
        check_ranked(table, sources[0], rows, columns);
        Block<uint16_t> rounded(size), plain(size);
        table.narrow(sources[0].data(), int64_t(size), rounded.data());
        table_baseline.narrow(sources[0].data(), int64_t(size), plain.data());
        expect(rounded == plain, table.name, "rounding", rows, columns);
    }
}

// The example "abc" of FIPS 180-4 among streams of other bytes, and several blocks at once as one after the other.
void check_sha256() {
    const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                               0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const uint32_t digest[8] = {0xba7816bf, 0x8f01cfea, 0x414140de, 0x5dae2223,
                                0xb00361a3, 0x96177a9c, 0xb410ff61, 0xf20015ad};
    const int num_streams = 1 + below(3), num_blocks = 1 + below(5), known = below(num_streams);
    std::vector<Block<uint8_t>> bytes(num_streams, Block<uint8_t>(size_t(64 * num_blocks)));
    std::vector<Block<uint32_t>> together(num_streams, Block<uint32_t>(8)), alone = together;
    uint32_t* states[3];
    const uint8_t* places[3];
    for (int n = 0; n < num_streams; ++n) {
        for (int i = 0; i < 64 * num_blocks; ++i) bytes[n][i] = uint8_t(below(256));
        std::copy_n(start, 8, together[n].data());
        std::copy_n(start, 8, alone[n].data());
        states[n] = together[n].data();
        places[n] = bytes[n].data();
    }
    std::fill_n(bytes[known].data(), 64, uint8_t(0));
    std::copy_n("abc\x80", 4, bytes[known].data());
    bytes[known][63] = 24;  // bits
    hash_side_by_side(states, places, num_streams, num_blocks);
    for (int n = 0; n < num_streams; ++n) {
        for (int block = 0; block < num_blocks; ++block) {
            uint32_t* state = alone[n].data();
            const uint8_t* place = bytes[n].data() + 64 * block;
            hash_side_by_side(&state, &place, 1, 1);
            if (n == known && block == 0) expect(std::equal(state, state + 8, digest), "sha256", "the digest of abc", 1, 1);
        }
    }
    expect(together == alone, "sha256", "streams side by side", num_streams, num_blocks);
}

bool is_here(const KernelTable& table) {
#if defined(__x86_64__)
    if (&table == &table_avx512) return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (&table == &table_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
#endif
    static_cast<void>(table);
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 200;
#if defined(__x86_64__)
    const KernelTable* tables[] = {&table_baseline, &table_avx2, &table_avx512};
#elif defined(__aarch64__)
    const KernelTable* tables[] = {&table_baseline, &table_neon};
#else
    const KernelTable* tables[] = {&table_baseline};
#endif
    for (const KernelTable* table : tables) {
        if (!is_here(*table)) {
            std::printf("%s: not on this processor\n", table->name);
            continue;
        }
        for (int round = 0; round < rounds; ++round) {
            const int rows = 1 + below(40), columns = below(4) ? 1 + below(300) : 16 * (1 + below(20));
            const double density = std::vector<double>{0, 0.02, 0.2, 0.9, 1}[size_t(below(5))];
            const int missing = below(3) ? 0 : 1 + below(70);
            check_product(*table, rows, columns, below(4), density, missing);
            check_changes(*table, rows, columns, below(4), density, missing);
            check_build<uint16_t>(*table, rows, columns, BFLOAT16);
            check_build<float>(*table, rows, columns, FLOAT32);
        }
        std::printf("%s: %d rounds\n", table->name, rounds);
    }
    for (int round = 0; has_sha256() && round < rounds; ++round) check_sha256();
    std::printf(num_faults ? "%d faults\n" : "all right\n", num_faults);
    return num_faults != 0;
}
