// Frequency tables in the forms that the rANS coders want. Baseline code: plain C++, includes model.h alone.
//
// The hard thing: for one context, everything a decoder looks up must fit vector registers. So its table is cut into
// buckets of 16 slots: a bucket knows the rank, among the symbols that occur, of the one that owns its first slot, and
// in which other slots a symbol begins. Counting bits then finds any slot's symbol.
#pragma once

#include "model.h"

namespace tricomp {

constexpr size_t BUCKET_SLOTS = 16, MAX_BUCKETS = 128, MAX_RANKS = 256;

// The table of one context, for decoders. A symbol's rank is its place among those of frequency above 0.
struct RankTable {
    alignas(64) uint8_t bases[MAX_BUCKETS];  // the rank that owns a bucket's first slot
    alignas(64) uint16_t begins[MAX_BUCKETS];  // bit i > 0: a rank begins at slot i of the bucket; bit 0 is clear
    alignas(64) uint16_t freqs[MAX_RANKS];  // by rank, as all that follows
    alignas(64) uint16_t starts[MAX_RANKS];
    alignas(64) uint8_t symbols[MAX_RANKS];
    uint32_t n_ranks;
};

struct FastTables {
    RankTable ranks;  // where there is one context; else n_ranks is 0
    // For encoders, by context * n_symbols + symbol, from the bottom: 32 bits of reciprocal, 12 of start, 4 of shift;
    // then 2^prob_bits - frequency, ending below the top bit. state // frequency = (state * reciprocal >> 32) >> shift,
    // exactly, for every state below 2^31. But for frequency 1, where a reciprocal of 32 bits gives state - 1: its
    // start is 2^prob_bits - 1 too high, which makes up for it.
    alignas(64) uint64_t divisors[MAX_ENTRIES];
};

// Fills tables from its freqs, prob_bits, n_symbols and n_contexts. entries: room for n_contexts * n_symbols; slots:
// for n_contexts << prob_bits, 64-byte aligned; fast: room for one (64-byte aligned), or null: coding is then much
// slower. Freqs must sum to 2^prob_bits in every context.
void build_tables(Tables& tables, uint32_t* entries, uint32_t* slots, FastTables* fast = nullptr);

}  // namespace tricomp
