// What a plan and its side section say of every symbol, worked out once a frame: see the end of Model.
//
// Plain C++ of internal linkage: any source may include it, whatever it is compiled for. Mirrors the reference's sizes
// and symbol_bits. The hard thing: a damaged plan may number symbols that cannot be; their lengths are kept in bounds.
#pragma once

#include <cstring>

#include "model.h"

namespace tricomp {

// What symbol s > 0 of a delta says of |d|: see Model.
static inline void derive_size(Model& model, uint32_t s) {
    const uint32_t k = model.k, width = model.kind.word_bits;
    uint32_t code = s + uint32_t(model.base);  // the base of a delta is not negative
    const uint32_t is_negative = model.has_sign ? 0 : code & 1;
    if (!model.has_sign) code >>= 1;
    const uint32_t length = code >> k < width ? code >> k : width;
    const uint32_t lead = (code & ((1u << k) - 1)) | 1u << k;
    const uint32_t up = length > k + 1 ? length - 1 - k : 0, down = length < k + 1 ? k + 1 - length : 0;
    model.n_low[s] = uint8_t(up);
    model.leads[s] = uint8_t(lead >> down | is_negative << 7);
}

// Fill in what is derived. The plan's numbers, the tables' frequencies and the dictionary must be there.
static inline void derive(Model& model) {
    std::memset(model.lengths, 0, sizeof model.lengths);
    std::memset(model.n_low, 0, sizeof model.n_low);
    std::memset(model.leads, 0, sizeof model.leads);
    std::memset(model.stand_ins, 0, sizeof model.stand_ins);
    std::memset(model.places, 0, sizeof model.places);
    std::memset(model.missing, 0, sizeof model.missing);
    model.has_missing = false;
    for (uint32_t s = 1; s < model.n_symbols; s++) {
        if (model.predict == FULL) {
            model.lengths[s] = uint8_t(model.kind.mantissa_bits - model.k + model.has_sign);
        } else if (model.predict == DELTA || model.predict == SCALED_DELTA) {
            derive_size(model, s);
            model.lengths[s] = uint8_t(model.n_low[s] + model.has_sign);
        }
    }
    if (model.entropy == RANS) {
        for (uint32_t c = 0; c < model.n_contexts; c++) {
            const uint16_t* freqs = model.symbols.freqs + c * model.n_symbols;
            for (uint32_t s = 0; s < model.n_symbols; s++) {
                const uint32_t row = c * model.n_symbols + s;
                if (freqs[s] > freqs[model.stand_ins[c]]) model.stand_ins[c] = uint8_t(s);
                if (!freqs[s]) model.missing[row / 16] |= uint16_t(1u << row % 16);
                model.has_missing |= !freqs[s];
            }
        }
    } else if (model.entropy == INDEX) {
        std::memset(model.missing, 0xFF, 2 * 256 / 16);
        model.stand_ins[0] = model.dictionary[0];
        model.is_run = model.dictionary[model.n_dictionary - 1] - model.dictionary[0] + 1u == model.n_dictionary;
        for (uint32_t i = 0; i < model.n_dictionary; i++) {
            const uint32_t s = model.dictionary[i];
            model.places[s] = uint8_t(i);
            model.missing[s / 16] &= uint16_t(~(1u << s % 16));
        }
        for (uint32_t s = 0; s < model.n_symbols; s++) model.has_missing |= model.missing[s / 16] >> s % 16 & 1;
    }
}

}  // namespace tricomp
