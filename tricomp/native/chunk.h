// What the drivers hand to the stages for one chunk, and what comes back. Plain data: no STL.
#pragma once

#include "model.h"

namespace tricomp {

constexpr size_t MAX_CHUNK = size_t(1) << 16;  // words
constexpr size_t MAX_PLANES = 8;
constexpr size_t TILE_BYTES = (sizeof(Tile<uint64_t>) + 63) / 64 * 64;  // a Tile of any word

// What is wrong with a chunk. The texts are in decode.py; both must have the same order.
enum ChunkFault : uint32_t {
    NO_FAULT,
    WRONG_CHECKSUM,  // stored, computed
    SECTIONS_TOO_LONG,
    SECTIONS_TOO_SHORT,
    RAW_WITH_FIELDS,
    NOT_RAW,
    INDEX_OUTSIDE,
    UNKNOWN_PLANE_MODE,  // plane
    PATCH_OUTSIDE,
    PATCHES_UNORDERED,
    SYMBOLS_UNFINISHED,
    SHIFT_TOO_LARGE,
    HEAD_MISSING,
    REMAINDERS_UNFINISHED,
    PADDING_NOT_ZERO,
};

struct EncodeChunk {
    const void* words;
    const void* reference;  // null: none
    uint64_t first;  // position in the frame
    size_t n_words;
    bool wants_reference_sum;
};

// A row of the directory, as numbers.
struct Row {
    uint32_t fields[DIRECTORY_FIELDS + MAX_PLANES];
};

struct DecodeChunk {
    const uint8_t* payload;  // SLACK bytes after it may be read
    size_t n_bytes;
    const uint8_t* row;  // of the directory, as stored
    const void* reference;
    void* words;
    uint64_t first;  // position in the frame
    size_t n_words;
    bool wants_reference_sum;
    bool is_checked;  // the checksum of the payload is somebody else's business
    bool is_large;  // the words belong to more than a cache holds, so they need not go through it
    // Results.
    uint64_t digest_sum, reference_sum;  // what the words and the reference add to digests; see digest.h
    ChunkFault fault;
    uint64_t details[2];
};

// A payload in parts, wherever they stand until it is known where the payload goes.
struct Payload {
    struct Part {
        const void* bytes;  // null: zeros
        size_t n_bytes;
    };
    Part parts[48];
    size_t n_parts, n_bytes;
    Row row;  // but for the checksum
    uint64_t digest_sum, reference_sum;  // what the words and the reference add to digests; see digest.h
};

// The checksum of bytes that come one after the other and stay where they are: what is known of the whole blocks taken
// so far. All zero: none was.
struct Xxh3 {
    uint64_t sums[8];
    size_t n_blocks;
};

// Memory that one thread uses while it encodes: 2.1 MiB, whatever the leaf. 64-byte aligned; all of it is scratch.
struct EncodeScratch {
    uint8_t below_rans[SLACK];
    uint8_t rans[2 * MAX_CHUNK];
    uint8_t below_stack[SLACK];
    uint8_t stack[8 * MAX_CHUNK];
    uint8_t planes[MAX_PLANES][MAX_CHUNK];
    uint8_t below_plane_rans[SLACK];
    uint8_t plane_rans[2 * MAX_CHUNK];
    uint8_t packed[MAX_CHUNK];
    uint8_t indices[MAX_CHUNK];
    uint16_t patches[MAX_CHUNK];
    alignas(8) uint8_t patch_words[8 * MAX_CHUNK];
    uint8_t shifts[MAX_CHUNK / ROW];
    uint8_t states[STATE_BYTES], plane_states[MAX_PLANES][STATE_BYTES], heads[4 * LANES];
    uint16_t rows[TILE];
    alignas(64) uint8_t tile[TILE_BYTES];
};

// Memory that one thread uses while it decodes: 118 KiB.
struct DecodeScratch {
    alignas(64) uint8_t words[8 * TILE];
    alignas(64) uint8_t planes[MAX_PLANES][TILE];
    alignas(64) uint8_t tiles[MAX_GROUP][TILE_BYTES];
};

}  // namespace tricomp
