// The planner: which prediction a frame gets, with its tables and scales. Baseline, STL allowed, no Python.
//
// Decides as reference/planner.py does, to the last bit: integers, then doubles in the order written there. The hard thing
// is speed: a frame's plan must cost far less than coding it, so nothing is copied, and little is looked at twice.
#pragma once

#include <cstdint>
#include <vector>

#include "model.h"

namespace tricomp {

struct PlanRequest {
    Kind kind;
    const void* words = nullptr;
    const void* reference = nullptr;  // null: none
    uint64_t n_words = 0;
    std::vector<uint64_t> shape;  // empty: no split but blocks
    uint32_t chunk_log2 = 16;
    bool is_fast = false;  // the tier
};

struct PlanResult {
    // As in Model.
    Predict predict = RAW;
    Entropy entropy = NO_ENTROPY;
    Remainder remainder = NO_REMAINDER;
    bool has_reference = false, has_sign = true, has_column_scale = false, has_block_shifts = false;
    uint32_t n_symbols = 0, n_contexts = 1, context_shift = 0, k = 0, index_bits = 0, shift = 0, coded_planes = 0;
    int32_t base = 0, context_base = 0;
    uint64_t n_columns = 0, factor = 1u << 30, word = 0;
    std::vector<uint16_t> freqs;  // [n_contexts * n_symbols]
    std::vector<std::vector<uint16_t>> plane_freqs;  // of each coded plane, lowest first
    std::vector<uint8_t> dictionary;
    std::vector<uint64_t> palette;
    std::vector<int16_t> level_rows, level_columns;
    std::vector<uint16_t> factor_rows, factor_columns;
};

void plan_frame(const PlanRequest&, PlanResult&);

// Plan all frames, shared among threads.
void plan_frames(const std::vector<PlanRequest>&, size_t n_threads, std::vector<PlanResult>&);

}  // namespace tricomp
