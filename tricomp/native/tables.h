// Frequency tables in the forms that the rANS coders want. Baseline code: plain C++, includes model.h alone.
//
// The hard thing: for one context, everything a decoder looks up must fit vector registers. So its table is cut into
// buckets of 16 slots: a bucket knows the rank, among the symbols that occur, of the one that owns its first slot, and in
// which other slots a symbol begins. Counting bits then finds any slot's symbol.
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

// Fills tables from its freqs, prob_bits, n_symbols and n_contexts. entries: room for n_contexts * n_symbols; slots: for
// n_contexts << prob_bits, 64-byte aligned; ranks: room for one, or null, which is slower. Freqs must sum to 2^prob_bits.
void build_tables(Tables& tables, uint32_t* entries, uint32_t* slots, RankTable* ranks = nullptr);

}  // namespace tricomp
