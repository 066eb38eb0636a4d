// The planner: which prediction a frame gets, with its tables and scales. Baseline, STL allowed, no Python.
//
// Decides as reference/planner.py does, to the last bit: integers, then doubles in the order written there. The hard thing
// is speed: a frame's plan must cost far less than coding it, so nothing is copied, and little is looked at twice. And a
// frame may lie on another device: then its lattices are at hand, and what was counted there.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "model.h"

namespace tricomp {

// What a lattice is read for: all but the first two belong to a split. TAIL: what the last, partial row has of the columns.
enum LatticeUse : uint32_t {
    SAMPLE, WHOLE, SPLIT, PROBED_ROWS, PROBED_COLUMNS, FACTOR_TAIL,  // known from sizes alone
    SCALE_ROWS, SCALE_TAIL, SCALE_COLUMNS, FACTOR_ROWS, FACTOR_COLUMNS, N_LATTICE_USES  // where the former promise something
};

// Places in a frame: some columns of some of its rows of n_columns words.
struct Lattice {
    LatticeUse use = WHOLE;
    uint64_t n_columns = 1, n_rows = 0;
    uint64_t first_row = 0, step = 1;  // of rows at even distances
    std::vector<uint64_t> some_rows;  // of others
    std::vector<uint64_t> starts;  // of runs of columns,
    uint64_t length = 0;  // of so many each
    bool has_reference = false;  // the reference is read there too
    bool is_means = false;  // no words are wanted but the rounded means of the octaves of each row, as int16

    uint64_t row(uint64_t i) const { return some_rows.empty() ? first_row + i * step : some_rows[i]; }
    uint64_t n_some() const { return starts.size() * length; }  // columns
    uint64_t n_words() const { return n_rows * n_some(); }
    uint64_t n_bytes(uint32_t word_bits) const { return is_means ? 2 * n_rows : n_words() * (word_bits / 8); }
};

// The words of a lattice, row by row, or its means.
struct GatheredWords {
    LatticeUse use = WHOLE;
    uint64_t n_columns = 0;
    const void *words = nullptr, *reference = nullptr;
    bool is_means = false;
};

// What was counted over all of a frame of which only lattices are at hand.
struct Facts {
    uint64_t first = 0, n_unlike_first = 0, n_unlike_reference = 0, joined = 0;
    std::optional<uint64_t> n_unlike_commonest;
};

struct PlanRequest {
    Kind kind;
    const void* words = nullptr;  // all of them; of a frame elsewhere, those of the sample
    const void* reference = nullptr;  // null: none
    uint64_t n_words = 0;
    std::vector<uint64_t> shape;  // empty: no split but blocks
    uint32_t chunk_log2 = 16;
    bool is_fast = false;  // the tier
    // Of frames elsewhere.
    std::optional<Facts> facts;
    bool has_reference = false;
    std::vector<GatheredWords> gathered;  // empty: words and reference are whole

    bool is_exact() const {
        return facts && (!facts->n_unlike_first || (has_reference && !facts->n_unlike_reference));
    }
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

// Plan all frames, shared among threads. Throws std::invalid_argument where a frame elsewhere lacks a lattice, or the count
// of words that are unlike its commonest.
void plan_frames(const std::vector<PlanRequest>&, size_t n_threads, std::vector<PlanResult>&);

// What is read of every frame elsewhere: known from its kind, sizes and has_reference alone.
std::vector<Lattice> lattices_of(const PlanRequest&);
// A lattice of a frame. False: there is none. has_means: means are gathered where they are enough.
bool find_lattice(const PlanRequest&, uint64_t use, uint64_t n_columns, bool has_means, Lattice&);

// What planning may want to know besides: more lattices, and how many words are unlike one.
struct Wants {
    std::vector<Lattice> lattices;
    std::optional<uint64_t> commonest;
};

void wants_of(const std::vector<PlanRequest>&, bool has_means, size_t n_threads, std::vector<Wants>&);

}  // namespace tricomp
