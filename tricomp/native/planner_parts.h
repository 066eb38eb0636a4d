// What the planner's sources share: the sample, scratch memory, prices, and the functions of each source. Baseline.
//
// Mirrors reference/estimate.py. The hard thing: every double is made by the operations of the reference in their order.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"
#include "planner.h"

namespace tricomp {
namespace planning {

constexpr size_t SAMPLE_ROWS = 1024;  // most rows of 128 words in a sample
constexpr size_t LEAST_SAMPLE_ROWS = 512;  // a frame of no more rows is its own sample; beyond, an eighth of the rows is taken
constexpr size_t THIN_ROWS = 128;  // the search looks at 128 to 255 rows of the sample
constexpr uint64_t LONG_COLUMNS = 4096;  // rows so long may be cut into blocks
constexpr uint64_t BLOCK_COLUMNS = 256;  // the split of frames without two dimensions: a scale for every 256 words
constexpr uint64_t FIT_WORDS = 1 << 16;  // of a lattice that factors are measured on, roughly
constexpr uint64_t STATE_BITS = 1024 + 192;  // of one stream, with its part of the directory
constexpr uint32_t PROB_BITS = 11;
constexpr double LEARNING = 0.72;  // bits that a frequency costs in the words it was not counted on: 1 / (2 ln 2)
constexpr size_t SIMPLE_SYMBOLS = 64;  // one context of so many symbols is decoded fastest
constexpr double SIMPLER_BITS = 0.02;  // what anything slower must save to be taken
constexpr double DOUBLE_BITS = 0.005;  // and for each doubling of the table entries
constexpr double ONE = 65536.0;  // the unit of prices
constexpr size_t MAX_SYMBOLS = 256;
constexpr uint32_t MAX_MANTISSA_BITS = 4;
constexpr uint64_t PART_BYTES = 4 << 20, PART_ROWS = 4096;  // of a pass that threads share: it takes longer than to start one

// log2 of whole numbers below 2^40 in 1/65,536 bit, from their 13 highest bits; 0 for 0.
uint64_t logarithm(uint64_t number);
const uint32_t* prices();  // of frequencies up to 2^11; see TablePrice

// Memory that one frame's planning takes at a time; kept for the next.
struct Scratch {
    std::vector<uint32_t> lanes, counts, more;
    std::vector<uint64_t> few;

    Scratch() : lanes(MOST_LANE_ENTRIES), counts(MOST_LANE_ENTRIES), more(MOST_LANE_ENTRIES) {}
};

// Where the words of a lattice stand in memory, as the functions of Stats take them.
struct Standing {
    const uint8_t *words, *reference;
    uint64_t stride;
    const uint64_t* rows;
    Runs columns;
    bool is_means = false;  // words: int16 of each row
};

// A frame on its way.
struct Frame {
    const PlanRequest& request;
    const Kernels& kernels;
    const Stats& stats;
    Scratch& scratch;
    std::vector<uint64_t> firsts, places;  // of the sample's rows
    SampleRows sample, thin;
    uint64_t n_words, n_sampled = 0;
    size_t n_threads;  // that may share passes over all of the frame; what is found never depends on it

    Frame(const PlanRequest&, Scratch&, size_t n_threads);
    void take_sample();
    uint32_t word_bits() const { return request.kind.word_bits; }
    bool is_dense() const { return !request.is_fast; }
    uint64_t n_chunks() const {
        return (n_words >> request.chunk_log2) + (n_words & ((uint64_t(1) << request.chunk_log2) - 1) ? 1 : 0);
    }
    // The part of the sample on which tables are counted: one table needs less than several.
    SampleRows counted(size_t n_contexts) const;
    // The word at a place of those at hand.
    uint64_t word(uint64_t place) const;
    bool is_elsewhere() const { return !request.gathered.empty(); }
    // The lattice must live as long as what is returned. Throws std::invalid_argument where it was not gathered.
    Standing standing(const Lattice&) const;
};

// Counted symbols: n_contexts rows of n_symbols.
struct Table {
    std::vector<uint32_t> counts;
    size_t n_contexts = 1, n_symbols = 0;
    uint64_t n_missed = 0;  // words outside the window
    size_t first = 0;  // what the window begins with
};

struct Choice {
    double bits;
    std::function<void(PlanResult&)> finish;
};

uint32_t bit_length(uint64_t);

// Calls work(first, n) for parts of 0 .. n_all that cover it, of n_each, on the frame's threads.
void in_parts(const Frame&, uint64_t n_all, uint64_t n_each, const std::function<void(uint64_t first, uint64_t n)>& work);

std::vector<std::pair<uint64_t, bool>> splits(const PlanRequest&);  // columns, whether columns get a scale
Lattice sample_lattice(uint64_t n_words);
SampleRows thin_rows(const std::vector<uint64_t>& firsts, size_t width);
// What a split's lattice of some use is made of; there may be no words in it. Those of a probe are made by probed_lattice.
Lattice lattice_of(LatticeUse, uint64_t n_columns, uint64_t n_words);
// Of the thin sample the words on which factors are tried.
SampleRows probe_rows(const SampleRows& thin);

// Rows and columns of a split, ascending: those that a probe's words stand in, and rows that columns are measured on.
struct Places {
    std::vector<uint64_t> rows, columns;
};

Places places_of(const SampleRows& probe, uint64_t n_columns, uint64_t n_words, bool has_column_scale);
// What is read to measure the factors of these alone.
Lattice probed_lattice(LatticeUse, const Places&, uint64_t n_columns, uint64_t n_words);

template <class Count>
double entropy_bits(const Count* counts, size_t n) {
    uint64_t total = 0, parts = 0;
    for (size_t i = 0; i < n; i++) {
        if (!counts[i]) continue;
        total += counts[i];
        parts += counts[i] * logarithm(counts[i]);
    }
    return double(int64_t(total * logarithm(total) - parts)) / ONE;
}

// Bits of a vector of n values of the side section, roughly. values: all of them or some.
template <class Value> double vector_bits(const std::vector<Value>& values, size_t n);
inline double patch_bits(const Frame& frame, double share) { return share * double(16 + frame.word_bits()); }

// Bits per word of the counted symbols in the tier asked for, with their tables, patches, and extra_bits a frame.
double symbol_cost(const Frame&, const uint32_t* counts, size_t n_contexts, size_t n_symbols, uint64_t n_outside,
                   double extra_bits);
// Fill in the entropy stage of a plan and its tables or dictionary. n_counted: words of the sample they were counted on.
void give_symbols(const Frame&, const Table&, uint64_t n_counted, PlanResult&);
// Frequencies that sum to 2^11, at least 1 for every counted symbol.
void normalise(const uint64_t* counts, size_t n, uint16_t* freqs);

// [first, last) of the counted places, or of the widest window that holds most of them.
std::pair<size_t, size_t> densest(const uint32_t* counts, size_t n, size_t widest);

// rival: bits per word that another prediction costs.
Choice full_choice(Frame&, double rival);
// The splits of which full_choice would fit scales; where there are none, bits: of its choice.
std::vector<std::pair<uint64_t, bool>> promising_splits(Frame&, double rival, double& bits);
Choice delta_choice(Frame&, bool has_reference);
bool scaled_delta_choice(Frame&, Choice&);  // false: there is none
// The columns of the split of which scaled_delta_choice would fit all factors, 0: of none.
uint64_t promising_factors(Frame&);

}  // namespace planning
}  // namespace tricomp
