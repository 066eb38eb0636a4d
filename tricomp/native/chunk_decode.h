// Chunks back to words: the stages put together, tile by tile, so that a word is written once and is still in the first
// cache when its digest is taken. Stage header: no STL.
//
// The hard thing: the bytes may be hostile although their checksum is right. Every section is checked against the
// payload before use; streams are read with clamped positions; what cannot be right is a fault. Up to MAX_GROUP chunks
// of one length go side by side, because a rANS lane waits for its own last step.
#pragma once

#include <cstring>

#include "checksum.h"
#include "chunk.h"
#include "digest.h"
#include "isa.h"
#include "pack.h"
#include "predict.h"
#include "rans.h"
#include "stack.h"

TRICOMP_BEGIN

INLINE uint32_t load_u32(const uint8_t* at) {
    uint32_t value;
    std::memcpy(&value, at, 4);
    return value;
}

constexpr size_t stack_word_bytes(size_t word_bytes) { return word_bytes <= 2 ? 2 : 4; }
INLINE size_t packed_bytes(size_t n_rows, unsigned n_bits) { return 4 * LANES * ((n_rows * n_bits + 7) / 8); }

// Memory that will be read or written soon, asked for in shares: a processor waits when too much is asked for at once.
// is_far: it comes as near as the second cache; the first has no room for it beside what is at hand. One stream alone
// has.
struct Ahead {
    const char* at[2];
    size_t left;  // bytes of each
    bool is_far;

    INLINE Ahead(const void* one, const void* other, size_t n_bytes, bool is_far)
        : at{static_cast<const char*>(one), static_cast<const char*>(other)}, left(n_bytes), is_far(is_far) {}

    INLINE void fetch(size_t n_bytes) {
        n_bytes = n_bytes < left ? n_bytes : left;
        if (is_far) ask<2>(n_bytes);
        else ask<3>(n_bytes);
        for (const char*& each : at)
            if (each) each += n_bytes;
        left -= n_bytes;
    }

    template <int NEARNESS>
    INLINE void ask(size_t n_bytes) const {
        for (size_t i = 0; i < n_bytes; i += 64) {
            if (at[0]) __builtin_prefetch(at[0] + i, 0, NEARNESS);
            if (at[1]) __builtin_prefetch(at[1] + i, 0, NEARNESS);
        }
    }
};

// Where the parts of a payload begin, and the decoders that read them.
template <class Word>
struct Sections {
    RansDecoder symbols;
    const uint8_t* indices;
    PlaneMode plane_modes[MAX_PLANES];
    const uint8_t* plane_bytes[MAX_PLANES];
    uint8_t plane_values[MAX_PLANES];
    RansDecoder planes[MAX_PLANES];
    const uint8_t* shifts;
    const uint8_t* heads;
    StackDecoder<Word> stack;
    const uint8_t* positions;  // of patches: u16 each
    const uint8_t* words;
    size_t n_patches, next_patch;
    ChunkFault stack_fault;  // known early, reported after the symbols', as the reference does
    uint8_t largest_index;  // met while decoding
};

// Takes the parts of a payload one after the other, never past its end.
struct Taker {
    const uint8_t* at;
    size_t left;
    bool is_short;

    INLINE const uint8_t* take(uint64_t n_bytes) {
        if (is_short || n_bytes > left) {
            is_short = true;
            return at;
        }
        const uint8_t* part = at;
        at += n_bytes;
        left -= n_bytes;
        return part;
    }

    // Heads or states; the zeros before the words; the words.
    INLINE const uint8_t* stream(uint64_t n_words, size_t word_bytes, size_t head_bytes, const uint8_t*& heads) {
        heads = take(LANES * head_bytes);
        take((16 - n_words * word_bytes % 16) % 16);
        return take(n_words * word_bytes);
    }
};

INLINE void open_rans(RansDecoder& decoder, const uint8_t* states, const uint8_t* words, size_t n_words) {
    std::memcpy(decoder.states, states, STATE_BYTES);
    decoder.words = words;
    decoder.n_words = n_words;
    decoder.at = 0;
}

INLINE bool is_rans_at_end(const RansDecoder& decoder) {
    uint32_t differs = 0;
    for (size_t lane = 0; lane < LANES; lane++) differs |= decoder.states[lane] ^ LOWEST_STATE;
    return differs == 0 && decoder.at == decoder.n_words;
}

INLINE uint8_t largest_of(const uint8_t* values, size_t n) {
    uint8_t largest = 0;
    for (size_t i = 0; i < n; i++) largest = values[i] > largest ? values[i] : largest;
    return largest;
}

// Places in a run of symbols become symbols; those after the last become it.
INLINE void add_first(uint8_t first, uint8_t last, size_t n, uint8_t* places) {
    for (size_t i = 0; i < n; i++) places[i] = uint8_t((places[i] < last ? places[i] : last) + first);
}

// Cut a payload that is not raw into its sections. Returns what is wrong.
template <class Word>
ChunkFault cut_sections(const Model& model, DecodeChunk& chunk, Sections<Word>& parts) {
    const size_t n_rows = (chunk.n_words + ROW - 1) / ROW;
    Taker taker{chunk.payload, chunk.n_bytes, false};
    const uint8_t* heads;
    if (model.predict == RAW) return NOT_RAW;
    if (model.entropy == RANS) {
        const uint32_t n_words = load_u32(chunk.row + 16);
        const uint8_t* words = taker.stream(n_words, 2, 4, heads);
        if (taker.is_short) return SECTIONS_TOO_LONG;
        open_rans(parts.symbols, heads, words, n_words);
    } else if (model.entropy == INDEX) {
        const uint8_t* indices = taker.take(packed_bytes(n_rows, model.index_bits));
        if (taker.is_short) return SECTIONS_TOO_LONG;
        parts.indices = indices;
        parts.largest_index = 0;
    }
    for (size_t plane = 0; plane < model.n_planes; plane++) {
        const uint32_t field = load_u32(chunk.row + 4 * (DIRECTORY_FIELDS + plane));
        const uint32_t value = field & ((1u << 28) - 1), width = model.plane_widths[plane];
        parts.plane_modes[plane] = PlaneMode(field >> 28);
        if (field >> 28 == PLANE_RAW) {
            parts.plane_bytes[plane] = taker.take(packed_bytes(n_rows, width));
        } else if (field >> 28 == PLANE_CONSTANT && value < 1u << width) {
            parts.plane_values[plane] = uint8_t(value);
        } else if (field >> 28 == PLANE_RANS && model.coded_planes >> plane & 1) {
            const uint8_t* words = taker.stream(value, 2, 4, heads);
            if (!taker.is_short) open_rans(parts.planes[plane], heads, words, value);
        } else {
            chunk.details[0] = plane;
            return taker.is_short ? SECTIONS_TOO_LONG : UNKNOWN_PLANE_MODE;
        }
    }
    if (taker.is_short) return SECTIONS_TOO_LONG;
    if (model.remainder == STACK) {
        if (model.has_block_shifts) {
            parts.shifts = taker.take(n_rows);
            taker.take((16 - n_rows % 16) % 16);
        }
        constexpr size_t SIZE = stack_word_bytes(sizeof(Word));
        const uint32_t n_words = load_u32(chunk.row + 20);
        parts.stack.words = taker.stream(n_words, SIZE, SIZE, parts.heads);
        parts.stack.n_words = n_words;
        parts.stack.at = 0;
    }
    parts.n_patches = load_u32(chunk.row + 12);
    parts.next_patch = 0;
    parts.positions = taker.take(2 * uint64_t(parts.n_patches));
    parts.words = taker.take(sizeof(Word) * uint64_t(parts.n_patches));
    if (taker.is_short) return SECTIONS_TOO_LONG;
    uint32_t last = 0;
    for (size_t i = 0; i < parts.n_patches; i++) {
        uint16_t position;
        std::memcpy(&position, parts.positions + 2 * i, 2);
        last = position;
    }
    if (parts.n_patches && last >= chunk.n_words) return PATCH_OUTSIDE;
    for (size_t i = 1; i < parts.n_patches; i++) {
        uint16_t pair[2];
        std::memcpy(pair, parts.positions + 2 * i - 2, 4);
        if (pair[1] <= pair[0]) return PATCHES_UNORDERED;
    }
    if (taker.left) return SECTIONS_TOO_SHORT;
    parts.stack_fault = NO_FAULT;
    if (model.remainder == STACK) {
        if (model.has_block_shifts)
            for (size_t row = 0; row < n_rows; row++)
                if (parts.shifts[row] >= 8 * sizeof(Word)) parts.stack_fault = SHIFT_TOO_LARGE;
        if (parts.stack_fault == NO_FAULT && !stack_open(parts.stack, parts.heads)) parts.stack_fault = HEAD_MISSING;
    }
    return NO_FAULT;
}

template <class Word>
ChunkFault cut(const Model& model, DecodeChunk& chunk, Sections<Word>& parts) {
    parts.indices = nullptr;
    const ChunkFault fault = cut_sections(model, chunk, parts);
    if (parts.indices == nullptr || (fault == NO_FAULT && parts.stack_fault == NO_FAULT)) return fault;
    // Indices are checked while they are decoded. Where that will not happen, now: they stand first, so they are named first.
    alignas(64) uint8_t places[TILE];
    const size_t n_rows = (chunk.n_words + ROW - 1) / ROW;
    for (size_t row = 0; row < n_rows; row += TILE_ROWS) {
        const size_t n = n_rows - row < TILE_ROWS ? n_rows - row : TILE_ROWS;
        unpack_bits(parts.indices + row * model.index_bits * ROW / 8, n, model.index_bits, places);
        if (largest_of(places, n * ROW) >= model.n_dictionary) return INDEX_OUTSIDE;
    }
    return fault;
}

// Put the patches of positions [start, start + n) of the chunk in their places.
template <class Word>
INLINE void apply_patches(Sections<Word>& parts, size_t start, size_t n, Word* words) {
    while (parts.next_patch < parts.n_patches) {
        uint16_t position;
        std::memcpy(&position, parts.positions + 2 * parts.next_patch, 2);
        if (position >= start + n) return;
        std::memcpy(words + (position - start), parts.words + sizeof(Word) * parts.next_patch, sizeof(Word));
        parts.next_patch++;
    }
}

// The remainders of a tile, from planes.
template <class Word>
void decode_planes(const Model& model, Sections<Word>& parts, size_t row, size_t n_rows, Tile<Word>& tile,
                   DecodeScratch& scratch) {
    const uint8_t* planes[MAX_PLANES];
    for (size_t plane = 0; plane < model.n_planes; plane++) {
        const uint32_t width = model.plane_widths[plane];
        planes[plane] = scratch.planes[plane];
        if (parts.plane_modes[plane] == PLANE_CONSTANT) {
            std::memset(scratch.planes[plane], parts.plane_values[plane], n_rows * ROW);
        } else if (parts.plane_modes[plane] == PLANE_RANS) {
            RansDecoder* decoder = &parts.planes[plane];
            uint8_t* octets = scratch.planes[plane];
            rans_decode(model.planes[plane], &decoder, 1, nullptr, &octets, n_rows);
        } else if (width == 8) {
            planes[plane] = parts.plane_bytes[plane] + row * ROW;  // packed, they are in position order
        } else {
            unpack_bits(parts.plane_bytes[plane] + row * width * ROW / 8, n_rows, width, scratch.planes[plane]);
        }
    }
    join_planes<Word>(model, planes, n_rows * ROW, tile.remainders);
}

// What n words, decoded to the chunk's place `start`, and those of its reference if that is wanted, add to digests.
template <class Word>
INLINE void take_sums(DecodeChunk& chunk, const Word* words, size_t start, size_t n) {
    const uint64_t at = (chunk.first + start) * sizeof(Word);
    const auto sum = [&](const void* these) {
        return digest_sum(static_cast<const uint8_t*>(these), n * sizeof(Word), at);
    };
    chunk.digest_sum += sum(words);
    if (chunk.wants_reference_sum) chunk.reference_sum += sum(static_cast<const Word*>(chunk.reference) + start);
}

// Whether words can be written to memory without going through the cache, which would be read from memory first.
INLINE bool is_streamable(const void* words, size_t n_bytes) {
#if TRICOMP_HAS_AVX2
    return reinterpret_cast<uintptr_t>(words) % 64 == 0 && n_bytes % 64 == 0;
#else
    (void)words, (void)n_bytes;
    return false;
#endif
}

INLINE void stream(void* to, const void* from, size_t n_bytes) {
#if TRICOMP_HAS_AVX2
    for (size_t i = 0; i < n_bytes; i += 64) {
        uint8_t* at = static_cast<uint8_t*>(to) + i;
        const uint8_t* source = static_cast<const uint8_t*>(from) + i;
#if TRICOMP_HAS_AVX512
        _mm512_stream_si512(reinterpret_cast<__m512i*>(at), _mm512_load_si512(source));
#else
        for (size_t half = 0; half < 64; half += 32)
            _mm256_stream_si256(reinterpret_cast<__m256i*>(at + half),
                                _mm256_load_si256(reinterpret_cast<const __m256i*>(source + half)));
#endif
    }
#else
    std::memcpy(to, from, n_bytes);
#endif
}

// What was streamed is seen by all who see what this thread does next.
INLINE void end_streams() {
#if TRICOMP_HAS_AVX2
    _mm_sfence();
#endif
}

// Chunks of one frame and of one length, none of them raw or faulty so far.
template <class Word>
void decode_group(const Model& model, DecodeChunk* const* chunks, Sections<Word>* parts, size_t n_chunks,
                  DecodeScratch& scratch) {
    const size_t n_words = chunks[0]->n_words;
    Tile<Word>* tiles[MAX_GROUP];
    RansDecoder* decoders[MAX_GROUP];
    const uint8_t* contexts[MAX_GROUP];
    uint8_t* symbols[MAX_GROUP];
    for (size_t c = 0; c < n_chunks; c++) {
        tiles[c] = reinterpret_cast<Tile<Word>*>(scratch.tiles[c]);
        decoders[c] = &parts[c].symbols;
        contexts[c] = tiles[c]->contexts;
        symbols[c] = tiles[c]->symbols;
    }
    const bool is_symbolic = model.entropy != NO_ENTROPY;
    for (size_t start = 0; start < n_words; start += TILE) {
        const size_t n = n_words - start < TILE ? n_words - start : TILE, n_rows = (n + ROW - 1) / ROW;
        const size_t row = start / ROW;
        for (size_t c = 0; is_symbolic && c < n_chunks; c++) {
            const Word* reference = static_cast<const Word*>(chunks[c]->reference);
            prepare_tile<Word>(model, reference ? reference + start : nullptr, chunks[c]->first + start, n, *tiles[c]);
        }
        if (model.entropy == RANS)
            rans_decode(model.symbols, decoders, n_chunks, model.n_contexts > 1 ? contexts : nullptr, symbols, n_rows);
        for (size_t c = 0; c < n_chunks; c++) {
            Word* target = static_cast<Word*>(chunks[c]->words) + start;
            const bool is_streamed = chunks[c]->is_large && is_streamable(target, n * sizeof(Word));
            Word* words = is_streamed ? reinterpret_cast<Word*>(scratch.words) : target;
            if (n_words - start > TILE) {
                const Word* reference = static_cast<const Word*>(chunks[c]->reference);
                const size_t n_next = n_words - start - TILE < TILE ? n_words - start - TILE : TILE;
                Ahead(is_symbolic && reference ? reference + start + TILE : nullptr,
                      is_streamed ? nullptr : words + TILE, n_next * sizeof(Word), true)
                    .fetch(n_next * sizeof(Word));
            }
            if (is_symbolic) {
                if (parts[c].stack_fault != NO_FAULT) continue;
                if (model.entropy == INDEX) {
                    unpack_bits(parts[c].indices + row * model.index_bits * ROW / 8, n_rows, model.index_bits,
                                tiles[c]->symbols);
                    const uint8_t largest = largest_of(tiles[c]->symbols, n_rows * ROW);
                    parts[c].largest_index = largest > parts[c].largest_index ? largest : parts[c].largest_index;
                    // An index outside is known at the end; until then, no symbol may be one that there is not.
                    if (model.is_run)
                        add_first(model.dictionary[0], uint8_t(model.n_dictionary - 1), n_rows * ROW, tiles[c]->symbols);
                    else
                        look_up(model.dictionary, model.n_dictionary, tiles[c]->symbols, n_rows * ROW, tiles[c]->symbols);
                }
                if (model.n_planes) {
                    decode_planes<Word>(model, parts[c], row, n_rows, *tiles[c], scratch);
                } else if (model.remainder == STACK) {
                    measure_tile<Word>(model, n, *tiles[c]);
                    if (model.has_block_shifts)
                        shorten_lengths<Word>(parts[c].shifts + row, n_rows, tiles[c]->lengths);
                    stack_decode<Word>(parts[c].stack, tiles[c]->lengths, tiles[c]->remainders, n_rows);
                    if (model.has_block_shifts)
                        put_block_shifts<Word>(parts[c].shifts + row, n_rows, tiles[c]->remainders);
                } else {
                    std::memset(tiles[c]->remainders, 0, n_rows * ROW * sizeof(Word));
                }
                merge_tile<Word>(model, n, *tiles[c], words);
            } else {
                base_words<Word>(model, chunks[c]->reference, start, n, words);
            }
            apply_patches<Word>(parts[c], start, n, words);
            take_sums<Word>(*chunks[c], words, start, n);
            if (is_streamed) stream(target, words, n * sizeof(Word));
        }
    }
    end_streams();
    for (size_t c = 0; c < n_chunks; c++) {
        ChunkFault fault = NO_FAULT;
        if (model.entropy == RANS && !is_rans_at_end(parts[c].symbols)) fault = SYMBOLS_UNFINISHED;
        if (model.entropy == INDEX && parts[c].largest_index >= model.n_dictionary) fault = INDEX_OUTSIDE;
        for (size_t plane = 0; plane < model.n_planes; plane++)
            if (fault == NO_FAULT && parts[c].plane_modes[plane] == PLANE_RANS && !is_rans_at_end(parts[c].planes[plane]))
                fault = SYMBOLS_UNFINISHED;
        if (fault == NO_FAULT) fault = parts[c].stack_fault;
        if (fault == NO_FAULT && model.remainder == STACK && !stack_is_at_end(parts[c].stack))
            fault = REMAINDERS_UNFINISHED;
        chunks[c]->fault = fault;
    }
}

// Check and decode up to MAX_GROUP chunks of one frame. What is wrong with each is in its fault.
template <class Word>
void decode_chunks_of(const Model& model, DecodeChunk* chunks, size_t n_chunks, DecodeScratch& scratch) {
    Sections<Word> parts[MAX_GROUP];
    DecodeChunk* group[MAX_GROUP];
    size_t n_group = 0;
    for (size_t c = 0; c < n_chunks; c++) {
        DecodeChunk& chunk = chunks[c];
        const uint64_t stored = load_u32(chunk.row) | uint64_t(load_u32(chunk.row + 4)) << 32;
        const uint64_t computed = chunk.is_checked ? stored : xxh3_64(chunk.payload, chunk.n_bytes);
        chunk.fault = NO_FAULT;
        chunk.digest_sum = chunk.reference_sum = 0;
        if (stored != computed) {
            chunk.fault = WRONG_CHECKSUM;
            chunk.details[0] = stored;
            chunk.details[1] = computed;
            continue;
        }
        if (load_u32(chunk.row + 12) == RAW_FLAG) {
            const size_t n_bytes = chunk.n_words * sizeof(Word);
            uint32_t others = 0;
            for (size_t field = 4; field < DIRECTORY_FIELDS + model.n_planes; field++)
                others |= load_u32(chunk.row + 4 * field);
            if (chunk.n_bytes != n_bytes) {
                chunk.fault = chunk.n_bytes < n_bytes ? SECTIONS_TOO_LONG : SECTIONS_TOO_SHORT;
            } else if (others) {
                chunk.fault = RAW_WITH_FIELDS;
            } else {
                std::memcpy(chunk.words, chunk.payload, n_bytes);
                take_sums<Word>(chunk, static_cast<const Word*>(chunk.words), 0, chunk.n_words);
            }
            continue;
        }
        chunk.fault = cut<Word>(model, chunk, parts[n_group]);
        if (chunk.fault != NO_FAULT) continue;
        if (n_group && group[0]->n_words != chunk.n_words) {
            // Only a frame's last chunk is shorter: it goes alone.
            DecodeChunk* alone = &chunk;
            decode_group<Word>(model, group, parts, n_group, scratch);
            decode_group<Word>(model, &alone, parts + n_group, 1, scratch);
            n_group = 0;
            continue;
        }
        group[n_group++] = &chunk;
    }
    if (n_group) decode_group<Word>(model, group, parts, n_group, scratch);
}

inline void decode_chunks(const Model& model, DecodeChunk* chunks, size_t n_chunks, DecodeScratch& scratch) {
    switch (model.kind.word_bits) {
        case 8: return decode_chunks_of<uint8_t>(model, chunks, n_chunks, scratch);
        case 16: return decode_chunks_of<uint16_t>(model, chunks, n_chunks, scratch);
        case 32: return decode_chunks_of<uint32_t>(model, chunks, n_chunks, scratch);
        default: return decode_chunks_of<uint64_t>(model, chunks, n_chunks, scratch);
    }
}

TRICOMP_END
