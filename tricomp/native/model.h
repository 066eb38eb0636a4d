// A Plan as the stages see it, the numbers that format 1 froze, and what a tile holds. Plain data: no STL, no Python.
//
// Every number in a Model was checked against FORMAT.md before a stage sees it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tricomp {

// Frozen since format 1.
constexpr size_t LANES = 32;
constexpr size_t ROW = 128;  // positions of four steps: lane l holds positions 128 q + 4 l + k at step 4 q + k
constexpr uint32_t LOWEST_STATE = 1u << 15;
constexpr size_t STATE_BYTES = 4 * LANES;
constexpr size_t ALIGN = 16;
constexpr size_t DIRECTORY_FIELDS = 6;
constexpr uint32_t RAW_FLAG = 1u << 31;
constexpr int FACTOR_BITS = 15;

// Ours; none of these changes a byte.
constexpr size_t TILE_ROWS = 8;  // eight rows of values of b bits fill b words of a lane exactly
constexpr size_t TILE = TILE_ROWS * ROW;  // words that pass through all stages while they are in the first cache
constexpr size_t SLACK = 256;  // bytes that may be read after the end of a stream, and written around a scratch buffer
constexpr size_t MAX_ENTRIES = 1024;  // contexts x symbols
constexpr size_t MAX_GROUP = 4;  // chunks decoded at a time, so that one's latency hides behind another's work

enum Predict : uint8_t { RAW, CONSTANT, COPY, PALETTE, SPARSE, FULL, DELTA, SCALED_DELTA, CAST };
enum Entropy : uint8_t { NO_ENTROPY, INDEX, RANS };
enum Remainder : uint8_t { NO_REMAINDER, PLANES, STACK };
enum PlaneMode : uint32_t { PLANE_RAW, PLANE_CONSTANT, PLANE_RANS };

struct Kind {  // a dtype
    uint32_t word_bits = 0, exponent_bits = 0, mantissa_bits = 0;
    bool is_float = false, is_signed = false;
};

struct FastTables;  // see tables.h

// Frequencies of one leaf's symbols (a row a context), or of one coded plane, in the forms that coding wants.
struct Tables {
    uint32_t prob_bits = 0, n_symbols = 0, n_contexts = 0;
    const uint16_t* freqs = nullptr;  // [n_contexts * n_symbols]; a row sums to 2^prob_bits
    const uint32_t* entries = nullptr;  // [n_contexts * n_symbols]: frequency << 16 | start
    const uint32_t* slots = nullptr;  // [n_contexts << prob_bits]: frequency << 20 | symbol << 12 | offset; 64-byte aligned
    const FastTables* fast = nullptr;  // what fast coding wants besides; null: there is none
    uint8_t favourites[8] = {};  // the most frequent symbol of each context, lowest first
};

struct Model {
    Kind kind, source;  // source: of the reference's words, for cast
    Predict predict = RAW;
    Entropy entropy = NO_ENTROPY;
    Remainder remainder = NO_REMAINDER;
    uint32_t chunk_log2 = 16, n_symbols = 0, prob_bits = 11, n_contexts = 1, context_shift = 0, k = 0, index_bits = 0;
    int32_t base = 0, context_base = 0;
    bool has_sign = true, has_column_scale = false, has_block_shifts = false, has_reference = false;
    uint64_t n_words = 0, n_columns = 0, factor = 1u << 30, word = 0;
    uint32_t shift = 0, coded_planes = 0, n_planes = 0;
    uint32_t plane_widths[8] = {};
    // The side section.
    Tables symbols;
    Tables planes[8];
    const uint8_t* dictionary = nullptr;
    uint32_t n_dictionary = 0;
    const void* palette = nullptr;  // words, ascending
    const int16_t* level_rows = nullptr;  // full: in eighths of an octave
    const int16_t* level_columns = nullptr;
    const uint16_t* factor_rows = nullptr;  // scaled delta: one = 2^15
    const uint16_t* factor_columns = nullptr;
    // Derived from the plan once a frame; see derive.h.
    uint8_t lengths[256] = {};  // bits of the remainder that go with each symbol
    uint8_t leads[256] = {};  // delta: the leading one and the k bits below; without has_sign the top bit: d < 0
    uint8_t n_low[256] = {};  // delta: bits below those
    uint8_t stand_ins[8] = {};  // the symbol that stands in for patches and padding, of each context
    uint8_t places[256] = {};  // index: of each symbol in the dictionary
    uint16_t missing[MAX_ENTRIES / 16] = {};  // a bit a row (context * n_symbols + symbol): it cannot be coded
    bool has_missing = false;
    bool is_run = false;  // index: the dictionary is a run of symbols
};

// One tile on its way. Words from n to the end of the last row are padding.
template <class Word>
struct Tile {
    alignas(64) Word predicted[TILE];  // delta, scaled delta: ord of what the difference is taken from
    alignas(64) Word remainders[TILE];
    alignas(64) int16_t levels[TILE];  // full with scales: L = R + C
    alignas(64) uint16_t rows[TILE];  // encoding: context * n_symbols + symbol
    alignas(64) uint8_t symbols[TILE];  // decoding, and encoding for an index: places in the dictionary
    alignas(64) uint8_t contexts[TILE];
    alignas(64) uint8_t lengths[TILE];  // bits of each remainder; 0 in padding
    uint16_t patches[TILE];  // encoding: positions in the tile, ascending
    size_t n_patches = 0;
};

}  // namespace tricomp
