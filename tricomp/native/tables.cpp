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

void build_tables(Tables& tables, uint32_t* entries, uint32_t* slots, RankTable* ranks) {
    for (size_t context = 0; context < tables.n_contexts; ++context) {
        const uint16_t* freqs = tables.freqs + context * tables.n_symbols;
        uint32_t* entry = entries + context * tables.n_symbols;
        uint32_t* slot = slots + (context << tables.prob_bits);
        uint32_t start = 0, most = 0;
        for (uint32_t symbol = 0; symbol < tables.n_symbols; ++symbol) {
            const uint32_t freq = freqs[symbol];
            entry[symbol] = freq << 16 | start;
            // A frequency of 4096 would not fit above bit 20; prob_bits <= 11 keeps it out.
            for (uint32_t offset = 0; offset < freq; ++offset) slot[start + offset] = freq << 20 | symbol << 12 | offset;
            start += freq;
            if (freq > most) {
                most = freq;
                tables.favourites[context] = static_cast<uint8_t>(symbol);
            }
        }
    }
    tables.entries = entries;
    tables.slots = slots;
    tables.ranks = nullptr;
    if (ranks && tables.n_contexts == 1) {
        build_ranks(tables, *ranks);
        tables.ranks = ranks;
    }
}

}  // namespace tricomp
