// Scales and factors: a number for each row and column of the frame, spread over the positions of a tile, and the
// reference of a scaled delta multiplied by its factors. Stage header: no STL.
//
// The hard thing: rows may be shorter than a vector or longer than the frame's tile; positions are walked row by row, with
// one division a tile.
#pragma once

#include "bits.h"
#include "isa.h"
#include "model.h"

TRICOMP_BEGIN

// out[i] = join(rows[p / n_columns], columns[p % n_columns]) for p = first + i; where columns is null, join(.., none).
template <class Scale, class Out, class Join>
INLINE void spread_scales(const Scale* rows, const Scale* columns, uint64_t n_columns, uint64_t first, size_t n, Out* out,
                          Join join, Scale none) {
    uint64_t row = first / n_columns, column = first % n_columns;
    for (size_t i = 0; i < n; row++, column = 0) {
        const size_t n_here = n_columns - column < n - i ? size_t(n_columns - column) : n - i;
        const Scale scale = rows[row];
        if (columns) {
            const Scale* scales = columns + column;
            for (size_t j = 0; j < n_here; j++) out[i + j] = join(scale, scales[j]);
        } else {
            for (size_t j = 0; j < n_here; j++) out[i + j] = join(scale, none);
        }
        i += n_here;
    }
}

// A float multiplied by a factor (one = 2^30), with integers only: FORMAT.md, "scaled delta".
template <class Word>
INLINE Word scaled_word(const Kind& kind, Word word, uint64_t factor) {
    const uint32_t m = kind.mantissa_bits;
    const uint64_t one = uint64_t(1) << m, largest = (uint64_t(1) << kind.exponent_bits) - 1;
    const Word body = word & Word(~TOP_BIT<Word>);
    const uint64_t field = uint64_t(body) >> m, significand = (uint64_t(body) & (one - 1)) | one;
    // 53 x 32 bits: the low 24 bits apart, so that nothing passes 2^64.
    const uint64_t product = sizeof(Word) == 8 ? (significand >> 24) * factor + ((significand & 0xFFFFFF) * factor >> 24)
                                               : significand * factor;
    const uint64_t point = m + 2 * FACTOR_BITS - (sizeof(Word) == 8 ? 24 : 0);
    // The leading one goes to bit m; the bit below what is cut rounds it, and a carry reaches the exponent.
    const uint64_t length = bit_length(product);
    const uint64_t down = length > m + 1 ? length - (m + 1) : 0;
    const uint64_t up = sizeof(Word) == 8 ? (length < m + 1 ? m + 1 - length : 0) & 63 : 0;  // else P is 0 or long enough
    const uint64_t rounded = ((product + ((uint64_t(1) << down) >> 1)) >> down) << up;
    const uint64_t new_field = field + length - (1 + point);  // below 1 it is negative: it has the top bit set, or is 0
    const bool is_zero = (int64_t(new_field) < 1) | (product == 0);
    const uint64_t limit = (largest << m) - 1, sum = ((is_zero ? 0 : new_field - 1) << m) + rounded;
    const uint64_t scaled = is_zero ? 0 : sum < limit ? sum : limit;
    return (field == 0) | (field == largest) ? word : Word((word ^ body) | Word(scaled));
}

// The scaled reference of a tile. words: n_padded of them; those after n mean nothing, but are written.
template <class Word>
void scale_reference(const Model& model, const Word* words, uint64_t first, size_t n, size_t n_padded, Word* out) {
    alignas(64) uint32_t products[TILE];
    spread_scales(model.factor_rows, model.factor_columns, model.n_columns, first, n, products,
                  [](uint32_t row, uint32_t column) { return row * column; }, uint16_t(1u << FACTOR_BITS));
    for (size_t i = n; i < n_padded; i++) products[i] = 0;
    const Kind kind = model.kind;
    for (size_t i = 0; i < n_padded; i++) {
        const uint64_t wide = products[i] * model.factor >> 2 * FACTOR_BITS, most = 0xFFFFFFFF;
        out[i] = scaled_word<Word>(kind, words[i], wide < most ? wide : most);
    }
}

TRICOMP_END
