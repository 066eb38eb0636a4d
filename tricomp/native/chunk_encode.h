// Words to the payload of a chunk: the stages put together, tile by tile from the last to the first, because rANS and
// stacks are written backwards. Each word is read from memory once. Stage header: no STL.
//
// The hard thing: no part's size is known before its end, so parts grow in scratch memory that holds the worst case; and
// where the payload goes is known after its size, so that the parts are laid one after the other then.
#pragma once

#include <cstring>

#include "checksum.h"
#include "chunk_decode.h"

TRICOMP_BEGIN

INLINE void put(Payload& payload, const void* bytes, size_t n_bytes) {
    if (n_bytes) payload.parts[payload.n_parts++] = {bytes, n_bytes};
    payload.n_bytes += n_bytes;
}

// Heads or states, zeros, then the words, so that the words end on a multiple of 16 bytes.
INLINE void put_stream(Payload& payload, const void* heads, size_t n_head_bytes, const uint8_t* words, size_t n_word_bytes) {
    put(payload, heads, n_head_bytes);
    put(payload, nullptr, (16 - n_word_bytes % 16) % 16);
    put(payload, words, n_word_bytes);
}

INLINE void begin_rans(RansEncoder& encoder, uint8_t* end) {
    for (size_t lane = 0; lane < LANES; lane++) encoder.states[lane] = LOWEST_STATE;
    encoder.words = end;
}

// One byte plane in its cheapest mode. Returns its field of the directory.
inline uint32_t put_plane(const Model& model, size_t plane, size_t n_rows, EncodeScratch& scratch, Payload& payload) {
    uint8_t* octets = scratch.planes[plane];
    const uint32_t width = model.plane_widths[plane];
    if (is_one_value(octets, n_rows * ROW)) return PLANE_CONSTANT << 28 | octets[0];
    const size_t n_packed = packed_bytes(n_rows, width);
    if (model.coded_planes >> plane & 1) {
        RansEncoder encoder;
        uint8_t* end = scratch.plane_rans + sizeof scratch.plane_rans;
        begin_rans(encoder, end);
        for (size_t row = (n_rows - 1) / TILE_ROWS * TILE_ROWS;; row -= TILE_ROWS) {
            const size_t n = n_rows - row < TILE_ROWS ? n_rows - row : TILE_ROWS;
            for (size_t i = 0; i < n * ROW; i++) scratch.rows[i] = octets[row * ROW + i];
            rans_encode(model.planes[plane], encoder, scratch.rows, n);
            if (!row) break;
        }
        const size_t n_word_bytes = size_t(end - encoder.words);
        if (STATE_BYTES + (n_word_bytes + 15) / 16 * 16 < n_packed) {
            // Smaller than the octets, which are not needed any more.
            std::memcpy(octets, encoder.words, n_word_bytes);
            std::memcpy(scratch.plane_states[plane], encoder.states, STATE_BYTES);
            put_stream(payload, scratch.plane_states[plane], STATE_BYTES, octets, n_word_bytes);
            return PLANE_RANS << 28 | uint32_t(n_word_bytes / 2);
        }
    }
    if (width < 8) {  // the uppermost plane alone
        pack_bits(octets, n_rows, width, scratch.packed);
        octets = scratch.packed;
    }
    put(payload, octets, n_packed);
    return PLANE_RAW << 28;
}

// The payload of one chunk, and its row of the directory. The parts stand in scratch memory, or among the words.
template <class Word>
void encode_chunk_of(const Model& model, const EncodeChunk& chunk, EncodeScratch& scratch, Payload& payload) {
    const size_t n_raw = chunk.n_words * sizeof(Word), n_rows = (chunk.n_words + ROW - 1) / ROW;
    const Word* words = static_cast<const Word*>(chunk.words);
    const Word* reference = static_cast<const Word*>(chunk.reference);
    Row& row = payload.row;
    std::memset(&row, 0, sizeof row);
    payload.n_parts = payload.n_bytes = 0;
    payload.digest_sum = payload.reference_sum = 0;
    const auto take_sums = [&](size_t start, size_t n) {
        const uint64_t at = (chunk.first + start) * sizeof(Word);
        const auto sum = [&](const Word* these) {
            return digest_sum(reinterpret_cast<const uint8_t*>(these + start), n * sizeof(Word), at);
        };
        payload.digest_sum += sum(words);
        if (chunk.wants_reference_sum) payload.reference_sum += sum(reference);
    };
    if (model.predict == RAW) {
        take_sums(0, chunk.n_words);
    } else {
        constexpr size_t SHARE = TILE * sizeof(Word) / 4;
        Tile<Word>& tile = *reinterpret_cast<Tile<Word>*>(scratch.tile);
        const bool is_symbolic = model.entropy != NO_ENTROPY;
        uint16_t* patches = scratch.patches + MAX_CHUNK;  // grows downwards, as tiles come
        Word* patch_words = reinterpret_cast<Word*>(scratch.patch_words) + MAX_CHUNK;  // so do these
        size_t n_patches = 0;
        uint8_t* rans_end = scratch.rans + sizeof scratch.rans;
        uint8_t* stack_end = scratch.stack + sizeof scratch.stack;
        RansEncoder symbols;
        StackEncoder<Word> stack;
        begin_rans(symbols, rans_end);
        stack_begin(stack, stack_end);
        for (size_t start = (chunk.n_words - 1) / TILE * TILE;; start -= TILE) {
            const size_t n = chunk.n_words - start < TILE ? chunk.n_words - start : TILE;
            const size_t n_tile_rows = (n + ROW - 1) / ROW, first_row = start / ROW;
            // Processors do not foresee that the tile below comes next.
            Ahead next(start ? words + start - TILE : nullptr, start && reference ? reference + start - TILE : nullptr,
                       start ? TILE * sizeof(Word) : 0, reference != nullptr);
            next.fetch(SHARE);
            if (is_symbolic) {
                prepare_tile<Word>(model, reference ? reference + start : nullptr, chunk.first + start, n, tile);
                next.fetch(SHARE);
                split_tile<Word>(model, words + start, n, tile);
            } else {
                base_patches<Word>(model, words + start, chunk.reference, start, n, tile);
            }
            take_sums(start, n);  // while the words are in the first cache
            next.fetch(SHARE);
            patches -= tile.n_patches;
            n_patches += tile.n_patches;
            patch_words -= tile.n_patches;
            for (size_t i = 0; i < tile.n_patches; i++) {
                patches[i] = uint16_t(start + tile.patches[i]);
                patch_words[i] = words[patches[i]];
            }
            if (model.entropy == RANS) {
                rans_encode(model.symbols, symbols, tile.rows, n_tile_rows);
            } else if (model.entropy == INDEX) {
                pack_bits(tile.symbols, n_tile_rows, model.index_bits,
                          scratch.indices + first_row * model.index_bits * ROW / 8);
            }
            next.fetch(TILE * sizeof(Word));
            if (model.n_planes) {
                uint8_t* planes[MAX_PLANES];
                for (size_t plane = 0; plane < model.n_planes; plane++) planes[plane] = scratch.planes[plane] + start;
                split_planes<Word>(model, tile.remainders, n_tile_rows * ROW, planes);
            } else if (model.remainder == STACK) {
                if (model.has_block_shifts)
                    take_block_shifts<Word>(tile.remainders, tile.lengths, n_tile_rows, scratch.shifts + first_row);
                stack_encode<Word>(stack, tile.remainders, tile.lengths, n_tile_rows);
            }
            if (!start) break;
        }
        if (model.entropy == RANS) {
            const size_t n_word_bytes = size_t(rans_end - symbols.words);
            std::memcpy(scratch.states, symbols.states, STATE_BYTES);
            put_stream(payload, scratch.states, STATE_BYTES, symbols.words, n_word_bytes);
            row.fields[4] = uint32_t(n_word_bytes / 2);
        } else if (model.entropy == INDEX) {
            put(payload, scratch.indices, packed_bytes(n_rows, model.index_bits));
        }
        for (size_t plane = 0; plane < model.n_planes; plane++)
            row.fields[DIRECTORY_FIELDS + plane] = put_plane(model, plane, n_rows, scratch, payload);
        if (model.remainder == STACK) {
            constexpr size_t SIZE = stack_word_bytes(sizeof(Word));
            if (model.has_block_shifts) {
                put(payload, scratch.shifts, n_rows);
                put(payload, nullptr, (16 - n_rows % 16) % 16);
            }
            stack_heads(stack, scratch.heads);
            const size_t n_word_bytes = size_t(stack_end - stack.words);
            put_stream(payload, scratch.heads, LANES * SIZE, stack.words, n_word_bytes);
            row.fields[5] = uint32_t(n_word_bytes / SIZE);
        }
        put(payload, patches, 2 * n_patches);
        put(payload, patch_words, sizeof(Word) * n_patches);
        row.fields[3] = uint32_t(n_patches);
    }
    if (model.predict == RAW || payload.n_bytes >= n_raw) {
        payload.n_parts = payload.n_bytes = 0;
        put(payload, words, n_raw);
        std::memset(&row, 0, sizeof row);
        row.fields[3] = RAW_FLAG;
    }
    row.fields[2] = uint32_t(payload.n_bytes);
}

inline void encode_chunk(const Model& model, const EncodeChunk& chunk, EncodeScratch& scratch, Payload& payload) {
    switch (model.kind.word_bits) {
        case 8: return encode_chunk_of<uint8_t>(model, chunk, scratch, payload);
        case 16: return encode_chunk_of<uint16_t>(model, chunk, scratch, payload);
        case 32: return encode_chunk_of<uint32_t>(model, chunk, scratch, payload);
        default: return encode_chunk_of<uint64_t>(model, chunk, scratch, payload);
    }
}

// Lay a payload down where it goes, and put its checksum into its row.
inline void lay_down(Payload& payload, uint8_t* out) {
    uint8_t* at = out;
    for (size_t i = 0; i < payload.n_parts; i++) {
        const Payload::Part part = payload.parts[i];
        if (part.bytes) std::memcpy(at, part.bytes, part.n_bytes);
        else std::memset(at, 0, part.n_bytes);
        at += part.n_bytes;
    }
    const uint64_t checksum = xxh3_64(out, payload.n_bytes);
    payload.row.fields[0] = uint32_t(checksum);
    payload.row.fields[1] = uint32_t(checksum >> 32);
}

TRICOMP_END
