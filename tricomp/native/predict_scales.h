// Scales and factors: a number for each row and column of the frame, spread over the positions of a tile, and the
// reference of a scaled delta multiplied by its factors. Stage header: no STL.
//
// The hard thing: rows may be shorter than a vector or longer than the frame's tile; positions are walked row by row,
// with one division a tile.
#pragma once

#include "bits.h"
#include "isa.h"
#include "model.h"
#include "vectors.h"

TRICOMP_BEGIN

// out[i] = join(rows[p / n_columns], columns[p % n_columns]) for p = first + i; where columns is null, join(.., none).
template <class Scale, class Out, class Join>
INLINE void spread_scales(const Scale* rows, const Scale* columns, uint64_t n_columns, uint64_t first, size_t n,
                          Out* out, Join join, Scale none) {
    constexpr size_t SHORT = 32;
    uint64_t row = first / n_columns, column = first % n_columns;
    size_t i = 0;
    if (n_columns == 1) {
        const Scale scale = columns ? columns[0] : none;
        for (; i < n; i++) out[i] = join(rows[row + i], scale);
    }
    Scale pattern[SHORT];
    for (size_t j = 0; n_columns < SHORT && j < SHORT; j++) pattern[j] = columns && j < n_columns ? columns[j] : none;
    for (; i < n; row++, column = 0) {
        const Scale scale = rows[row];
        if (n_columns < SHORT && !column && i + SHORT <= n) {
            // All of the pattern, so that no count is looked at; the next row overwrites the rest.
            for (size_t j = 0; j < SHORT; j++) out[i + j] = join(scale, pattern[j]);
            i += n_columns;
            continue;
        }
        const size_t n_here = n_columns - column < n - i ? size_t(n_columns - column) : n - i;
        if (columns) {
            const Scale* scales = columns + column;
            for (size_t j = 0; j < n_here; j++) out[i + j] = join(scale, scales[j]);
        } else {
            for (size_t j = 0; j < n_here; j++) out[i + j] = join(scale, none);
        }
        i += n_here;
    }
}

// Floats of at most 32 bits multiplied by factors (one = 2^30), with integers only: FORMAT.md, "scaled delta".
//
// The rounded product is the top of a product of up to 56 bits and the bit below. Both lie in the high half of the
// product of significand and factor when these are first shifted up as far as 32 bits allow.
template <class Word>
struct Scaling {
    typedef Vector<uint32_t> Vec;
    typedef Vector<uint64_t> Wide;
    const uint32_t m;  // bits of the mantissa
    const Wide common;  // factor
    const bool can_exceed;  // a factor can be 2^32 or more
    const Vec top, body, one, last_field, limit;

    explicit Scaling(const Model& model)
        : m(model.kind.mantissa_bits),
          common(all<uint64_t>(model.factor)),
          can_exceed(model.factor > 1u << 30),
          top(all<uint32_t>(1u << 31)),
          body(all<uint32_t>(Word(~TOP_BIT<Word>))),
          one(all<uint32_t>(1)),
          last_field(all<uint32_t>((1u << model.kind.exponent_bits) - 2)),
          limit(all<uint32_t>((((1u << model.kind.exponent_bits) - 1) << m) - 1)) {}

    // min((product x factor) >> 30, 2^32 - 1)
    INLINE Vec factors(Vec products) const {
        const Wide even = product(wide_of(products), common), odd = product(wide_of(products) >> 32, common);
        const Vec cut = interleave(narrow_of(even >> 30), narrow_of(odd << 2));
        if (!can_exceed) return cut;
        const Vec high = interleave(narrow_of(even >> 32), narrow_of(odd));
        return select(is_less(high, all<uint32_t>(1u << 30)), cut, all<uint32_t>(~0u));
    }

    INLINE Vec scaled(Vec word, Vec products) const {
        const Vec factor = factors(products), zeros = leading_zeros(factor), normal = shift_up(factor, zeros);
        const Vec significand = (word << (31 - m)) | top;
        const Wide even = product(wide_of(significand), wide_of(normal));
        const Wide odd = product(wide_of(significand) >> 32, wide_of(normal) >> 32);
        const Vec high = interleave(narrow_of(even >> 32), narrow_of(odd));  // its leading one is bit 31 or 30
        const Vec is_large = sign_fill(high), leading = high + (high & ~is_large);
        const Vec rounded = ((leading >> (30 - m)) + one) >> 1;
        const Vec field = (word & body) >> m, below = field - zeros - is_large;  // the new field less 1
        const Vec sum = smaller((below << m) + rounded, limit);
        const Vec value = keep(has_common(factor, factor), sum & ~sign_fill(below));
        return select(is_less(field - one, last_field), (word & ~body) | value, word);
    }
};

// The same of 64 bits, in wider lanes. 53 x 32 bits: the low 24 bits apart, so that nothing passes 2^64.
template <>
struct Scaling<uint64_t> {
    typedef Vector<uint64_t> Vec;
    const uint32_t m;
    const Vec common, mantissa, one, body, last_field, limit, half, bias;

    explicit Scaling(const Model& model)
        : m(model.kind.mantissa_bits),
          common(all<uint64_t>(model.factor)),
          mantissa(all<uint64_t>((uint64_t(1) << m) - 1)),
          one(all<uint64_t>(1)),
          body(all<uint64_t>(~TOP_BIT<uint64_t>)),
          last_field(all<uint64_t>((uint64_t(1) << model.kind.exponent_bits) - 2)),
          limit(all<uint64_t>((((uint64_t(1) << model.kind.exponent_bits) - 1) << m) - 1)),
          half(all<uint64_t>(uint64_t(1) << (61 - m))),
          bias(all<uint64_t>(62 - (m + 2 * FACTOR_BITS - 24))) {}

    INLINE Vec scaled(Vec word, Vec products) const {
        const Vec factor = smaller_signed(product(products, common) >> 2 * FACTOR_BITS, all<uint64_t>(0xFFFFFFFF));
        const Vec magnitude = word & body, field = magnitude >> m, significand = (magnitude & mantissa) + (one << m);
        const Vec low = product(significand & all<uint64_t>(0xFFFFFF), factor);
        const Vec whole = product(significand >> 24, factor) + (low >> 24);
        // The leading one goes to bit 62 and rounded to bit m; a carry reaches the exponent.
        const Vec zeros = leading_zeros(whole), below = field + bias - zeros;
        const Vec rounded = (shift_up(whole, zeros - one) + half) >> (62 - m);
        const Vec sum = smaller((below << m) + rounded, limit);
        const Vec value = keep(has_common(whole, whole), sum & ~sign_fill(below));
        return select(is_less(field - one, last_field), (word & ~body) | value, word);
    }
};

// The scaled reference of a tile. words: n_padded of them; those after n mean nothing, but are written.
template <class Word>
void scale_reference(const Model& model, const Word* words, uint64_t first, size_t n, size_t n_padded, Word* out) {
    typedef LaneOf<Word> Lane;
    typedef Vector<Lane> Vec;
    alignas(64) uint32_t products[TILE];
    spread_scales(model.factor_rows, model.factor_columns, model.n_columns, first, n, products,
                  [](uint32_t row, uint32_t column) { return row * column; }, uint16_t(1u << FACTOR_BITS));
    for (size_t i = n; i < n_padded; i++) products[i] = 0;
    const Scaling<Word> scaling(model);
    for (size_t i = 0; i < n_padded; i += BLOCK) {
        Vec scaled[Vec::A_BLOCK];
        for (size_t j = 0; j < Vec::A_BLOCK; j++) {
            const size_t at = i + j * Vec::N;
            scaled[j] = scaling.scaled(load<Lane>(words + at), load<Lane>(products + at));
        }
        store_words(scaled, out + i);
    }
}

TRICOMP_END
