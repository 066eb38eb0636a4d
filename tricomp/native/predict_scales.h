// Scales and factors: a number for each row and column of the frame, spread over the positions of a tile, and the
// reference of a scaled delta multiplied by its factors. Stage header: no STL.
//
// The hard thing: rows may be shorter than a vector or longer than the frame's tile; positions are walked row by row, with
// one division a tile.
#pragma once

#include "bits.h"
#include "isa.h"
#include "model.h"
#include "vectors.h"

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

// Floats multiplied by factors (one = 2^30), with integers only: FORMAT.md, "scaled delta". In 64-bit lanes.
template <class Word>
struct Scaling {
    typedef Vector<uint64_t> Vec;
    const uint32_t m;  // bits of the mantissa
    const Vec mantissa, one, body, last_field, limit, half, bias;

    explicit Scaling(const Kind& kind)
        : m(kind.mantissa_bits),
          mantissa(all<uint64_t>((uint64_t(1) << m) - 1)),
          one(all<uint64_t>(1)),
          body(all<uint64_t>(Word(~TOP_BIT<Word>))),
          last_field(all<uint64_t>((uint64_t(1) << kind.exponent_bits) - 2)),
          limit(all<uint64_t>((((uint64_t(1) << kind.exponent_bits) - 1) << m) - 1)),
          half(all<uint64_t>(uint64_t(1) << (61 - m))),
          bias(all<uint64_t>(62 - m - (sizeof(Word) == 8 ? 6 : 2 * FACTOR_BITS))) {}

    INLINE Vec scaled(Vec word, Vec factor) const {
        const Vec magnitude = word & body, field = magnitude >> m;
        const Vec significand = (magnitude & mantissa) + (one << m);
        Vec whole;
        if constexpr (sizeof(Word) == 8) {  // 53 x 32 bits: the low 24 bits apart, so that nothing passes 2^64
            const Vec low = significand & all<uint64_t>(0xFFFFFF);
            whole = product(significand >> 24, factor) + (product(low, factor) >> 24);
        } else {
            whole = product(significand, factor);
        }
        // The leading one goes to bit 62 and rounded to bit m; a carry reaches the exponent.
        const Vec zeros = leading_zeros(whole), below = field + bias - zeros;  // the new field less 1
        const Vec rounded = (shift_up(whole, zeros - one) + half) >> (62 - m);
        const Vec sum = smaller((below << m) + rounded, limit);
        const Vec value = keep(has_common(whole, whole), sum & ~sign_fill(below));
        return select(is_less(field - one, last_field), (word & ~body) | value, word);
    }
};

// The scaled reference of a tile. words: n_padded of them; those after n mean nothing, but are written.
template <class Word>
void scale_reference(const Model& model, const Word* words, uint64_t first, size_t n, size_t n_padded, Word* out) {
    typedef Vector<uint64_t> Vec;
    alignas(64) uint32_t products[TILE];
    spread_scales(model.factor_rows, model.factor_columns, model.n_columns, first, n, products,
                  [](uint32_t row, uint32_t column) { return row * column; }, uint16_t(1u << FACTOR_BITS));
    for (size_t i = n; i < n_padded; i++) products[i] = 0;
    const Scaling<Word> scaling(model.kind);
    const Vec common = all<uint64_t>(model.factor), most = all<uint64_t>(0xFFFFFFFF);
    for (size_t i = 0; i < n_padded; i += BLOCK) {
        Vec scaled[Vec::A_BLOCK];
        for (size_t j = 0; j < Vec::A_BLOCK; j++) {
            const size_t at = i + j * Vec::N;
            const Vec factor = product(load<uint64_t>(products + at), common) >> 2 * FACTOR_BITS;
            scaled[j] = scaling.scaled(load<uint64_t>(words + at), smaller_signed(factor, most));
        }
        store_words(scaled, out + i);
    }
}

TRICOMP_END
