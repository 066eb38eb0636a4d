// Frequency tables in the forms that the rANS coders want; see tables.h.

#include "tables.h"

#include <cstring>

namespace tricomp {

static void build_ranks(const Tables& tables, RankTable& ranks) {
    std::memset(&ranks, 0, sizeof ranks);
    size_t start = 0, n_ranks = 0;
    for (size_t symbol = 0; symbol < tables.n_symbols; ++symbol) {
        const size_t freq = tables.freqs[symbol];
        if (!freq) continue;
        ranks.freqs[n_ranks] = static_cast<uint16_t>(freq);
        ranks.starts[n_ranks] = static_cast<uint16_t>(start);
        ranks.symbols[n_ranks] = static_cast<uint8_t>(symbol);
        if (start % BUCKET_SLOTS)
            ranks.begins[start / BUCKET_SLOTS] |= static_cast<uint16_t>(1u << start % BUCKET_SLOTS);
        // Buckets whose first slot is this symbol's.
        for (size_t bucket = (start + BUCKET_SLOTS - 1) / BUCKET_SLOTS; bucket * BUCKET_SLOTS < start + freq; ++bucket)
            ranks.bases[bucket] = static_cast<uint8_t>(n_ranks);
        start += freq;
        ++n_ranks;
    }
    ranks.n_ranks = static_cast<uint32_t>(n_ranks);
}

static uint64_t divisor(uint32_t freq, uint32_t start, uint32_t prob_bits) {
    if (freq == 0) return 0;
    const uint32_t size = 1u << prob_bits;
    const uint64_t rest = uint64_t(size - freq) << (63 - prob_bits);
    if (freq == 1) return 0xFFFFFFFFu | uint64_t(start + size - 1) << 32 | rest;
    uint32_t log2 = 1;  // rounded up
    while (1u << log2 < freq) ++log2;
    const uint64_t reciprocal = ((uint64_t(1) << (31 + log2)) + freq - 1) / freq;
    return reciprocal | uint64_t(start) << 32 | uint64_t(log2 - 1) << 44 | rest;
}

void build_tables(Tables& tables, uint32_t* entries, uint32_t* slots, FastTables* fast) {
    for (size_t context = 0; context < tables.n_contexts; ++context) {
        const uint16_t* freqs = tables.freqs + context * tables.n_symbols;
        uint32_t* entry = entries + context * tables.n_symbols;
        uint32_t* slot = slots + (context << tables.prob_bits);
        uint32_t start = 0, most = 0;
        for (uint32_t symbol = 0; symbol < tables.n_symbols; ++symbol) {
            const uint32_t freq = freqs[symbol];
            entry[symbol] = freq << 16 | start;
            if (fast) fast->divisors[context * tables.n_symbols + symbol] = divisor(freq, start, tables.prob_bits);
            // A frequency of 4096 would not fit above bit 20; prob_bits <= 11 keeps it out.
            for (uint32_t offset = 0; offset < freq; ++offset)
                slot[start + offset] = freq << 20 | symbol << 12 | offset;
            start += freq;
            if (freq > most) {
                most = freq;
                tables.favourites[context] = static_cast<uint8_t>(symbol);
            }
        }
    }
    tables.entries = entries;
    tables.slots = slots;
    tables.fast = fast;
    if (fast) {
        fast->ranks.n_ranks = 0;
        if (tables.n_contexts == 1) build_ranks(tables, fast->ranks);
    }
}

}  // namespace tricomp
