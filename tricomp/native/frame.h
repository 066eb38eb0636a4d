// Frames as the module hands them over: a Plan as numbers, buffers, what comes back. Baseline, STL allowed.
#pragma once

#include <string>
#include <vector>

#include "chunk.h"

namespace tricomp {

// A Plan in the order in which plan_numbers.py packs it.
enum PlanField {
    P_WORD_BITS, P_EXPONENT_BITS, P_MANTISSA_BITS, P_IS_FLOAT, P_IS_SIGNED,
    P_SOURCE_WORD_BITS, P_SOURCE_EXPONENT_BITS, P_SOURCE_MANTISSA_BITS,
    P_PREDICT, P_ENTROPY, P_REMAINDER, P_CHUNK_LOG2, P_N_WORDS, P_N_SYMBOLS, P_BASE, P_PROB_BITS, P_N_CONTEXTS,
    P_CONTEXT_BASE, P_CONTEXT_SHIFT, P_K, P_HAS_SIGN, P_N_COLUMNS, P_HAS_COLUMN_SCALE, P_FACTOR, P_INDEX_BITS, P_SHIFT,
    P_HAS_BLOCK_SHIFTS, P_CODED_PLANES, P_WORD, P_SIDE_BYTES, P_SIDE_CHECK, P_HAS_REFERENCE,
    N_PLAN_FIELDS
};

struct PlanNumbers {
    int64_t fields[N_PLAN_FIELDS];
    uint64_t side_bytes() const { return uint64_t(fields[P_SIDE_BYTES]); }
    uint64_t side_check() const { return uint64_t(fields[P_SIDE_CHECK]); }
};

// Fill a Model from a plan, side section aside. False if the numbers contradict each other: a stage would not be safe.
bool model_of(const PlanNumbers&, Model&);

inline uint64_t n_chunks_of(const Model& model) {
    const uint64_t size = uint64_t(1) << model.chunk_log2;
    return (model.n_words + size - 1) / size;
}
inline size_t row_bytes(const Model& model) { return 4 * (DIRECTORY_FIELDS + model.n_planes); }
inline uint64_t aligned(uint64_t n) { return (n + ALIGN - 1) / ALIGN * ALIGN; }

struct Bytes {
    const uint8_t* data = nullptr;
    size_t n_bytes = 0;
};

// What is wrong with a frame as a whole. The texts are in decode.py, in this order; then those of side.h, then chunks'.
enum FrameFault : uint32_t { HEAD_DAMAGED = 1, END_ELSEWHERE };  // end, bytes there are

struct DecodeRequest {
    PlanNumbers plan;
    Bytes head;  // of the frame, side section and directory, at least
    Bytes payloads;
    uint64_t payloads_at = 0;  // where they stand in the frame
    uint64_t frame_bytes = 0;
    const void* reference = nullptr;  // words [start, stop)
    void* words = nullptr;
    uint64_t start = 0, stop = 0;
    bool wants_reference_sum = false, is_checked = false;
    // Results.
    uint64_t digest_sum = 0, reference_sum = 0;
};

// Where decoding failed. stage: 0 nowhere, 1 the frame, 2 its side section, 3 a chunk.
struct Fault {
    uint32_t stage = 0, code = 0;
    uint64_t request = 0, chunk = 0, details[2] = {0, 0};
};

// Decode all requests, chunks shared among threads. The fault of the first chunk that has one.
Fault decode(std::vector<DecodeRequest>&, size_t n_threads);

struct EncodeRequest {
    PlanNumbers plan;
    Bytes freqs, plane_freqs;  // uint16 each, of all contexts, of all coded planes in a row
    Bytes dictionary, palette, scale_rows, scale_columns;
    const void* words = nullptr;  // of the whole frame
    const void* reference = nullptr;
    uint64_t first_chunk = 0, n_chunks = 0;
    bool wants_side = false, wants_reference_sum = false;
    // Results.
    uint64_t digest_sum = 0, reference_sum = 0;  // what the words and the reference add to digests
    size_t begin = 0, end = 0;  // of the payloads in the output; padded to 16 but after the frame's last chunk
    std::vector<uint8_t> rows;
    std::vector<uint8_t> side;
};

// Encode chunks of all requests, one after the other, into out, which holds output_bytes() of them.
void encode(std::vector<EncodeRequest>&, size_t n_threads, uint8_t* out);
size_t output_bytes(const std::vector<EncodeRequest>&);

// Bytes that stand at first_byte, a multiple of 512, of a leaf.
struct Part {
    Bytes bytes;
    uint64_t first_byte = 0;
};

// The sum of each part, as digest.h defines it.
std::vector<uint64_t> sum_parts(const std::vector<Part>&, size_t n_threads);

}  // namespace tricomp
