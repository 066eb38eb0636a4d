// The side section of a frame: frequency tables, dictionary, palette, vectors of scales. Baseline, STL allowed.
//
// Mirrors reference/side.py in both directions. The hard thing: it is parsed before anything but its checksum is
// verified. Every length comes from the Plan and is compared with the bytes at hand before use; memory is taken for the
// plan's tables and for n_rows + n_columns values, which the directory's length has bounded by then.
#pragma once

#include <vector>

#include "model.h"
#include "tables.h"

namespace tricomp {

struct EncodeRequest;

// What is wrong with a side section. The texts are in decode.py, in the same order.
enum SideFault : uint32_t {
    SIDE_SOUND,
    SIDE_TOO_SHORT,
    SIDE_TOO_LONG,
    FREQUENCIES_NOT_WHOLE,
    DICTIONARY_MISFIT,
    PALETTE_UNORDERED,
    SCALES_OUT_OF_RANGE,
    VECTOR_UNKNOWN,
    VECTOR_UNFINISHED,
};

// Owns what a Model points to. SLACK bytes after each vector may be read.
struct SideData {
    struct alignas(64) Line {
        uint32_t slots[16];
    };
    std::vector<uint16_t> freqs;
    std::vector<uint32_t> entries;
    std::vector<Line> slots;
    std::vector<FastTables> fast;
    std::vector<uint8_t> dictionary;
    std::vector<uint64_t> palette;
    std::vector<uint16_t> rows, columns;  // two's complement for levels

    SideData() = default;
    SideData(const SideData&) = delete;
    SideData& operator=(const SideData&) = delete;
};

// Fill in what a side section says. The model's other numbers must have passed model_of.
SideFault read_side(Model& model, const uint8_t* section, size_t n_bytes, SideData& side);

// Fill in what an encoder was given. Throws std::invalid_argument where it does not fit the plan.
void set_side(Model& model, const EncodeRequest& request, SideData& side);

// The section's bytes, filled up to 16; none where there is nothing to say.
void write_side(const Model& model, std::vector<uint8_t>& section);

}  // namespace tricomp
