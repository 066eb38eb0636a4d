// What the planner asks of the words themselves: the functions of stats.h, once for every instruction set and width.
// Plain data: no STL.
//
// Words and references are given by pointers of the right width and alignment. The hard thing: all of a sample passes
// through these, so they count straight from the frame, row by row, and copy nothing; or, where the frame is elsewhere,
// from what was gathered of it, so a row's place in memory is not its position in the frame.
#pragma once

#include "model.h"

namespace tricomp {

// Rows of a frame: the first of every `step` of them. width: words in a row, at most ROW.
struct SampleRows {
    const uint64_t* firsts = nullptr;  // position of each row in the frame
    const uint64_t* places = nullptr;  // and among the words at hand: the same where they are the whole frame
    size_t n_all = 0, step = 1, width = 0;

    size_t n_rows() const { return (n_all + step - 1) / step; }
    size_t n_words() const { return n_rows() * width; }
    uint64_t first(size_t row) const { return firsts[row * step]; }
    uint64_t place(size_t row) const { return places[row * step]; }
};

// The scale model's part of a prediction. rows: null where there is none.
struct Levels {
    const int16_t *rows = nullptr, *columns = nullptr;
    uint64_t n_columns = 0;
};

// What a difference is taken from. reference: null: zeros. factor_rows: null unless scaled.
struct Predicted {
    const void* reference = nullptr;
    const uint16_t *factor_rows = nullptr, *factor_columns = nullptr;
    uint64_t n_columns = 0, factor = 1u << 30;
};

// Columns of a lattice: n_runs runs of `length`.
struct Runs {
    const uint64_t* starts = nullptr;
    size_t n_runs = 0, length = 0;

    size_t n_columns() const { return n_runs * length; }
};

// Sums over the symbols of some tables, each normalised to 2^11. prices: of a frequency, in 1/65,536 bit; above bit 24 log2 of it.
struct TablePrice {
    uint64_t price = 0, n_counted = 0, n_present = 0, n_once = 0, log_sizes = 0;
};

// Counts of words that are not zero: from the least octave to the greatest, n_before of them, and of what is left of them.
// Room for MOST_LANE_ENTRIES each.
struct SplitCounts {
    uint32_t *before = nullptr, *after = nullptr;
    size_t n_before = 0, n_after = 0;
};

constexpr size_t MOST_LATTICE_WORDS = 4096, MOST_LATTICE_COLUMNS = 64;
constexpr size_t COUNT_LANES = 4;  // histograms are counted in several tables that are added in the end
constexpr size_t MOST_LANE_ENTRIES = 1 << 16;  // of all those tables together

struct Stats {
    size_t (*count_unequal)(const void* words, const void* others, size_t n, size_t most);  // more than `most`: any number above it
    size_t (*count_unequal_to)(const void* words, uint64_t other, size_t n, size_t most);
    uint64_t (*join_low)(const void* words, size_t n, uint64_t mask);  // OR of words & mask; may stop once bit 0 is set

    size_t (*count_negative)(const void* words, const SampleRows&);
    size_t (*count_unequal_rows)(const void* words, const void* others, const SampleRows&);
    size_t (*count_unequal_rows_to)(const void* words, uint64_t other, const SampleRows&);

    // Counts by high part at k, 2^(E + k) of them, then the number of zero words. lanes: MOST_LANE_ENTRIES of scratch.
    void (*count_highs)(const Kind&, uint32_t k, const void* words, const SampleRows&, uint32_t* counts, uint32_t* lanes);
    // The least and the greatest high part less its level, of words that are not zero; the least is greater if there is none.
    void (*range_of_highs)(const Kind&, uint32_t k, const void* words, const SampleRows&, const Levels&, int32_t* range);
    // Counts by high part less its level, from low to low + width, and by phase: 8 a value; then zero words by phase; then
    // what lies outside.
    void (*count_scaled_highs)(const Kind&, uint32_t k, const void* words, const SampleRows&, const Levels&, int32_t low,
                               uint32_t width, uint32_t* counts, uint32_t* lanes);
    // OR of all words & mask, and the sum over the rows of the zeros at the bottom of theirs, n_low at most each.
    void (*low_zeros)(const void* words, const SampleRows&, uint64_t mask, uint32_t n_low, uint64_t* joined,
                      uint64_t* n_saved);
    // Counts of the octets of one byte plane: `width` bits from bit `from` of the remainder, low bits and sign.
    void (*count_plane)(const void* words, const SampleRows&, uint32_t n_low, bool has_sign, uint32_t from, uint32_t width,
                        uint32_t* counts, uint32_t* lanes);

    // Of lattices: stride: words from a row to the next. rows: null: the first n_rows.

    // Counts of the octaves of a lattice, in eighths, and of what rounded means of rows and columns leave of them.
    void (*count_split)(const Kind&, const void* words, uint64_t stride, const uint64_t* rows, size_t n_rows, const Runs&,
                        bool has_column_scale, SplitCounts&, uint32_t* lanes);
    // Rounded mean of the octaves of each of n_rows rows over the lattice; -1 where all are zero.
    void (*row_means)(const Kind&, const void* words, uint64_t stride, uint64_t n_rows, const Runs&, int16_t* means);
    // Rounded mean of each column over n_rows rows of the octaves less the row's level; 0 where all are zero. levels:
    // every step-th of them is a row's.
    void (*column_means)(const Kind&, const void* words, uint64_t stride, uint64_t n_rows, uint64_t n_columns,
                         const int16_t* levels, uint64_t step, int16_t* means);

    // Counts by exponent of the prediction.
    void (*count_exponents)(const Kind&, const Predicted&, const SampleRows&, uint32_t* counts, size_t n, uint32_t* lanes);
    // Counts by context, size code at k, and sign.
    void (*count_codes)(const Kind&, uint32_t k, uint32_t n_contexts, int32_t base, uint32_t shift, const void* words,
                        const Predicted&, const SampleRows&, uint32_t* counts, uint32_t* lanes);
    // Sum of the bits that block shifts save: of each word the zeros that end all remainders of its row, as far as its own reaches.
    uint64_t (*shift_savings)(const Kind&, uint32_t k, const void* words, const Predicted&, const SampleRows&);

    // new / old as float32 of 24-bit significands; 0 where one is zero or special, or the signs differ.
    void (*ratios)(const Kind&, const void* words, const void* reference, size_t n, float* out);
    // What deltas of n words from others, multiplied by products x factor, would cost: bits below the leading ones; counts
    // by length and sign if there is room for them. n: any; there is room up to a multiple of 32.
    uint64_t (*try_factor)(const Kind&, uint64_t factor, const void* words, const void* reference, const uint32_t* products,
                           size_t n, uint32_t* counts);
    // Lower medians of ratio x unit as factors, one = 2^15, of rows over the lattice.
    void (*row_medians)(const Kind&, const void* words, const void* reference, uint64_t stride, const uint64_t* rows,
                        uint64_t n_rows, const Runs&, float unit, uint16_t* medians);
    // The same of columns over n_rows rows; units: of each row. columns: null: the first n_medians.
    void (*column_medians)(const Kind&, const void* words, const void* reference, uint64_t stride, uint64_t n_rows,
                           const uint64_t* columns, uint64_t n_medians, const float* units, uint16_t* medians);

    void (*widen)(const void* words, uint64_t first, size_t n, uint64_t* out);
};

// What hangs on no width. The word that makes up more than half of n, if any does.
typedef bool Majority(const uint64_t* words, size_t n, uint64_t* found);
typedef void PriceTables(const uint32_t* counts, size_t n_contexts, size_t n_symbols, const uint32_t* prices,
                         TablePrice* sums);

}  // namespace tricomp
