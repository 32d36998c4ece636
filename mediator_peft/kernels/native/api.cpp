// The exported functions: what is called from Python through ctypes.
#include <cstring>

#include "kernels.h"
#include "sha256.h"
#include "team.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#ifndef MEDIATOR_SOURCE_DIGEST
#define MEDIATOR_SOURCE_DIGEST "unknown"
#endif

namespace {

bool is_supported(const KernelTable& table) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;
    const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    const bool has_avx2 = has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    if (&table == &table_avx2) return has_avx2;
    if (&table == &table_avx512) {
        return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
#endif
    static_cast<void>(table);
    return true;
}

// The fastest first.
const KernelTable* const tables[] = {
#if defined(__x86_64__)
    &table_avx512, &table_avx2,
#elif defined(__aarch64__)
    &table_neon,
#endif
    &table_baseline,
};

const KernelTable* find(const char* name) {
    for (const KernelTable* table : tables) {
        if (is_supported(*table) && (!*name || !std::strcmp(name, table->name))) return table;
    }
    return nullptr;
}

const KernelTable* chosen = find("");

// Entries below which starting a second thread costs more than it saves.
constexpr int64_t TINY_JOB = 1 << 15;

void run(Kernel kernel, const void* call, int64_t num_outputs, int64_t num_entries, int64_t num_threads) {
    const int64_t num_chunks = (num_outputs + CHUNK_ROWS - 1) / CHUNK_ROWS;
    if (num_entries < TINY_JOB) num_threads = 1;
    run_in_threads(kernel, call, int(num_threads < num_chunks ? num_threads : num_chunks));
}

}  // namespace

// Of the sources that this library was made from: the loader compares it, so that old machine code is never used.
EXPORT const char* mediator_source_digest() { return MEDIATOR_SOURCE_DIGEST; }

// Take an instruction set by name ("" for the best one). Returns its name, or null if this processor lacks it.
EXPORT const char* mediator_use_isa(const char* name) {
    const KernelTable* table = find(name);
    if (table) chosen = table;
    return table ? table->name : nullptr;
}

// The address of GOMP_parallel in the OpenMP runtime that the host program uses, or null.
EXPORT void mediator_use_host_team(void* team) { set_host_team(reinterpret_cast<HostTeam>(team)); }

EXPORT void mediator_product(const Product* product, const float* x, int64_t batch, float* out, int64_t num_threads) {
    const ProductCall call = {product, x, batch, out};
    const int64_t num_matrices = product->num_groups + (product->weight != nullptr);
    run(chosen->product, &call, product->num_outputs, product->num_outputs * product->num_inputs * num_matrices, num_threads);
}
EXPORT void mediator_addition(const Addition* job, int64_t num_threads) {
    run(chosen->addition, job, job->num_outputs, job->num_outputs * job->num_inputs, num_threads);
}
EXPORT void mediator_change(const Change* job, int64_t num_threads) {
    run(chosen->change, job, job->num_outputs, job->num_outputs * job->num_inputs, num_threads);
}
EXPORT void mediator_move(const Move* job, int64_t num_threads) {
    run(chosen->move, job, job->num_outputs, job->num_outputs * job->num_inputs, num_threads);
}

EXPORT void mediator_mark(int64_t form, int64_t rows, int64_t columns, Mark* jobs, int64_t num_jobs) {
    chosen->mark(form, rows, columns, jobs, num_jobs);
}
EXPORT void mediator_merge(int64_t form, const void* const* sources, int64_t num_experts, int64_t is_mean, int64_t rows,
                           int64_t columns, void* backbone, double* energies) {
    chosen->merge(form, sources, num_experts, is_mean, rows, columns, backbone, energies);
}
EXPORT void mediator_narrow(const float* source, int64_t count, uint16_t* target) {
    chosen->narrow(source, count, target);
}
EXPORT void mediator_take_bits(const uint8_t* bitmap, const uint8_t* mask, int64_t num_bytes, uint64_t* target) {
    chosen->take_bits(bitmap, mask, num_bytes, target);
}
EXPORT void mediator_put_bits(const uint8_t* bits, int64_t bit_bytes, uint8_t* mask, int64_t num_bytes) {
    chosen->put_bits(bits, bit_bytes, mask, num_bytes);
}
EXPORT void mediator_count_rows(const uint8_t* bitmap, int64_t rows, int64_t row_bytes, int64_t* counts) {
    chosen->count_rows(bitmap, rows, row_bytes, counts);
}
EXPORT void mediator_keep_first(uint8_t* bitmap, int64_t num_bytes, int64_t count) {
    chosen->keep_first(bitmap, num_bytes, count);
}
EXPORT void mediator_find_ranked(const float* values, int64_t count, const int64_t* ranks, int64_t num_ranks, float* scratch,
                                 float* found) {
    chosen->find_ranked(values, count, ranks, num_ranks, scratch, found);
}

EXPORT int64_t mediator_has_sha256() { return has_sha256(); }
EXPORT void mediator_sha256(uint32_t* const* states, const uint8_t* const* data, int64_t num_streams, int64_t num_blocks) {
    hash_side_by_side(states, data, num_streams, num_blocks);
}
