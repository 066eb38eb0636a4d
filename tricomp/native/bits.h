// Bit fields of words: order-preserving views, magnitudes, exponents, bit lengths, casts, rounding. Integers only.
//
// Stage header: no STL. Mirrors reference/bits.py. The hard thing: every function is called in loops that must become
// vector code, so none branches on data, no shift reaches the width, and what depends on the dtype alone is masks that
// are made once (Order) or template constants.
#pragma once

#include <cstring>

#include "isa.h"
#include "model.h"

TRICOMP_BEGIN

// Signed: two's complement of the same width. Lane: what arithmetic is done in; vectors have shifts by 32 or 64 bits
// everywhere, but by 8 or 16 bits almost nowhere.
template <class Word> struct Widths;
template <> struct Widths<uint8_t> { typedef int8_t Signed; typedef uint32_t Lane; };
template <> struct Widths<uint16_t> { typedef int16_t Signed; typedef uint32_t Lane; };
template <> struct Widths<uint32_t> { typedef int32_t Signed; typedef uint32_t Lane; };
template <> struct Widths<uint64_t> { typedef int64_t Signed; typedef uint64_t Lane; };

template <class Word> constexpr unsigned BITS = 8 * sizeof(Word);
template <class Word> constexpr Word TOP_BIT = Word(Word(1) << (BITS<Word> - 1));
template <class Word> using LaneOf = typename Widths<Word>::Lane;

// All ones where the top bit is set, else 0.
template <class Word>
INLINE Word sign_fill(Word x) {
    return Word(typename Widths<Word>::Signed(x) >> (BITS<Word> - 1));
}

// The order-preserving view of a dtype's words, as masks.
template <class Word>
struct Order {
    Word fill, top;  // signed floats: the bits that a sign inverts; signed: the top bit

    explicit Order(const Kind& kind)
        : fill(kind.is_signed && kind.is_float ? Word(~Word(0)) : Word(0)),
          top(kind.is_signed ? TOP_BIT<Word> : Word(0)) {}
    INLINE Word ordered(Word x) const { return Word(x ^ ((sign_fill(x) & fill) | top)); }
    INLINE Word unordered(Word x) const { return Word(x ^ ((Word(~sign_fill(x)) & fill) | top)); }
};

// A float's word without its sign; an integer's absolute value (so |-2^(W-1)| = 2^(W-1)).
template <class Word>
struct Magnitude {
    Word kept, fill;

    explicit Magnitude(const Kind& kind)
        : kept(kind.is_float && kind.is_signed ? Word(~TOP_BIT<Word>) : Word(~Word(0))),
          fill(kind.is_signed && !kind.is_float ? Word(~Word(0)) : Word(0)) {}
    INLINE Word of(Word x) const {
        const Word negative = Word(sign_fill(x) & fill);
        return Word(((x & kept) ^ negative) - negative);
    }
};

// Bits needed to write x; 0 for 0.
INLINE uint32_t bit_length(uint32_t x) {
#if TRICOMP_LEVEL == 2
    // There is no instruction for it, so the exponent of a float tells. With the bit below the leading one cleared no
    // rounding can carry; from 2^31 on the float is negative, and the sum so large that the minimum tells.
    const float value = float(int32_t(x & ~(x >> 1)));
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const int32_t length = int32_t(bits >> 23) - 126;
    return uint32_t(length < 0 ? 0 : length > 32 ? 32 : length);
#else
    return x ? 32 - uint32_t(__builtin_clz(x)) : 0;
#endif
}

INLINE uint64_t bit_length(uint64_t x) {
#if TRICOMP_LEVEL == 2
    const uint32_t high = uint32_t(x >> 32);
    return bit_length(high ? high : uint32_t(x)) + (high ? 32 : 0);
#else
    return x ? 64 - uint64_t(__builtin_clzll(x)) : 0;
#endif
}

// Zero bits below the lowest set bit; the word's width for 0.
template <class Word>
INLINE uint32_t trailing_zeros(Word x) {
    return x ? uint32_t(__builtin_ctzll(uint64_t(x))) : BITS<Word>;
}

// values / 2^drop to nearest even; negative drops shift up. value: below 2^53.
INLINE uint64_t round_shift(uint64_t value, int32_t drop) {
    const uint32_t up = drop < 0 ? uint32_t(-drop) & 63 : 0;
    const uint32_t down = drop < 0 ? 0 : drop > 63 ? 63 : uint32_t(drop);
    const uint64_t half = (uint64_t(1) << down) >> 1, quotient = value >> down;
    const uint64_t rest = value & ((uint64_t(1) << down) - 1);
    const uint64_t is_up = (rest > half) | ((rest == half) & (down > 0) & (quotient & 1));
    return drop > 0 ? quotient + is_up : value << up;
}

constexpr uint64_t infinity_of(const Kind& kind) {
    return ((uint64_t(1) << kind.exponent_bits) - 1) << kind.mantissa_bits;
}

// A float rounded to nearest even in another dtype. Overflow gives infinity; a NaN keeps its sign and the top of its
// payload, with the quiet bit set.
INLINE uint64_t cast_word(uint64_t word, const Kind& source, const Kind& target) {
    const uint64_t body = word & ((uint64_t(1) << (source.word_bits - 1)) - 1);
    const uint64_t sign = (word >> (source.word_bits - 1)) << (target.word_bits - 1);
    const int32_t m_in = int32_t(source.mantissa_bits), m_out = int32_t(target.mantissa_bits);
    const int32_t bias_in = (1 << (source.exponent_bits - 1)) - 1, bias_out = (1 << (target.exponent_bits - 1)) - 1;
    const uint64_t infinity = infinity_of(target), fraction = body & ((uint64_t(1) << m_in) - 1);
    const int32_t field = int32_t(body >> m_in);
    // A subnormal's significand is brought to the normal form 1.f by shifting its top bit up to bit m_in.
    const int32_t lift = field ? 0 : m_in + 1 - int32_t(bit_length(fraction));
    const uint64_t significand = (fraction | uint64_t(field != 0) << m_in) << lift;
    const int32_t new_field = (field ? field : 1) - lift - bias_in + bias_out;
    // Below the target's normal range more bits are dropped; what is dropped decides the rounding.
    const uint64_t kept = round_shift(significand, m_in - m_out + (new_field < 1 ? 1 - new_field : 0));
    uint64_t value = new_field < 1 ? kept : kept + (uint64_t(new_field < 1 ? 0 : new_field - 1) << m_out);
    value = value > infinity || new_field > bias_out + bias_out ? infinity : value;
    const uint64_t payload = m_in >= m_out ? fraction >> (m_in >= m_out ? m_in - m_out : 0)
                                           : fraction << (m_in >= m_out ? 0 : m_out - m_in);
    const uint64_t nan = infinity | uint64_t(1) << (m_out - 1) | payload;
    value = body >= infinity_of(source) ? (fraction ? nan : infinity) : value;
    return (body ? value : 0) | sign;
}

// The same where the target has fewer exponent bits and mantissa bits, in the source's own width: then what is
// subnormal in the source rounds to 0. A template of numbers, so that it becomes vector code.
template <class Word, uint32_t E_IN, uint32_t M_IN, uint32_t E_OUT, uint32_t M_OUT>
INLINE Word narrow_word(Word word) {
    typedef typename Widths<Word>::Signed Signed;
    constexpr Word INFINITY_IN = ((Word(1) << E_IN) - 1) << M_IN, INFINITY_OUT = ((Word(1) << E_OUT) - 1) << M_OUT;
    constexpr Word ONE = Word(1) << M_IN;
    constexpr Signed REBIAS = Signed((Word(1) << (E_IN - 1)) - (Word(1) << (E_OUT - 1))), CUT = M_IN - M_OUT;
    const Word body = word & ~TOP_BIT<Word>, fraction = body & (ONE - 1);
    const Signed field = Signed(body >> M_IN) - REBIAS;
    // Below the target's normal range more bits are dropped, all if need be.
    constexpr Signed MOST = M_OUT + 2;
    const Signed below = field < 1 ? 1 - field : 0, more = below < MOST ? below : MOST;
    const Word whole = field < 1 ? fraction | ONE : body - (Word(REBIAS) << M_IN), drop = Word(CUT + more);
    const Word rounded = (whole + ((Word(1) << (drop - 1)) - 1) + (whole >> drop & 1)) >> drop;
    const Word finite = rounded < INFINITY_OUT ? rounded : INFINITY_OUT;
    const Word nan = INFINITY_OUT | Word(1) << (M_OUT - 1) | fraction >> CUT;
    return (body > INFINITY_IN ? nan : finite) | (word >> (BITS<Word> - 1)) << (E_OUT + M_OUT);
}

// The same from 8 exponent bits to 8 with fewer mantissa bits, which is all that float32 to bfloat16 takes; and back.
INLINE uint16_t bfloat16_of_float32(uint32_t word) {
    const uint32_t rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16, cut = word >> 16 | 0x40;
    return uint16_t((word & 0x7FFFFFFF) > 0x7F800000 ? cut : rounded);
}

INLINE uint32_t float32_of_bfloat16(uint16_t word) {
    const uint32_t same = uint32_t(word) << 16;
    return (word & 0x7FFF) > 0x7F80 ? same | 0x400000 : same;
}

constexpr Kind FLOAT64{64, 11, 52, true, true}, FLOAT32{32, 8, 23, true, true}, FLOAT16{16, 5, 10, true, true},
    BFLOAT16{16, 8, 7, true, true};

constexpr bool is_same(const Kind& a, const Kind& b) {
    return a.word_bits == b.word_bits && a.exponent_bits == b.exponent_bits && a.mantissa_bits == b.mantissa_bits;
}

template <class Source, class Word, class Function>
INLINE void cast_each(const void* words, size_t first, size_t n, Word* out, Function function) {
    const Source* from = static_cast<const Source*>(words) + first;
    for (size_t i = 0; i < n; i++) out[i] = Word(function(from[i]));
}

// Words [first, first + n) of another dtype, rounded to nearest even in this one.
template <class Word>
void cast(const void* words, const Kind& source, size_t first, size_t n, const Kind& target, Word* out) {
    const auto between = [=](const Kind& from, const Kind& to) { return is_same(source, from) && is_same(target, to); };
    if (between(FLOAT32, BFLOAT16)) {
        cast_each<uint32_t>(words, first, n, out, bfloat16_of_float32);
    } else if (between(FLOAT32, FLOAT16)) {
        cast_each<uint32_t>(words, first, n, out, narrow_word<uint32_t, 8, 23, 5, 10>);
    } else if (between(FLOAT64, FLOAT32)) {
        cast_each<uint64_t>(words, first, n, out, narrow_word<uint64_t, 11, 52, 8, 23>);
    } else if (between(FLOAT64, FLOAT16)) {
        cast_each<uint64_t>(words, first, n, out, narrow_word<uint64_t, 11, 52, 5, 10>);
    } else if (between(FLOAT64, BFLOAT16)) {
        cast_each<uint64_t>(words, first, n, out, narrow_word<uint64_t, 11, 52, 8, 7>);
    } else if (between(BFLOAT16, FLOAT32)) {
        cast_each<uint16_t>(words, first, n, out, float32_of_bfloat16);
    } else if (between(FLOAT16, FLOAT32)) {
        cast_each<uint16_t>(words, first, n, out, [](uint16_t word) { return cast_word(word, FLOAT16, FLOAT32); });
    } else {
        const auto any = [=](uint64_t word) { return cast_word(word, source, target); };
        if (source.word_bits == 8) return cast_each<uint8_t>(words, first, n, out, any);
        if (source.word_bits == 16) return cast_each<uint16_t>(words, first, n, out, any);
        if (source.word_bits == 32) return cast_each<uint32_t>(words, first, n, out, any);
        cast_each<uint64_t>(words, first, n, out, any);
    }
}

// Round floats to nearest even at kept_bits of mantissa. What is not finite stays, and so does what would round past
// largest, the magnitude of the largest finite number. is_minus_zero_nan: of the "fnuz" dtypes.
template <class Word>
void round_mantissa(const Kind& kind, uint32_t kept_bits, uint64_t largest, bool is_minus_zero_nan, const Word* words,
                    size_t n, Word* out) {
    typedef LaneOf<Word> Lane;
    if (kept_bits >= kind.mantissa_bits) {
        std::memmove(out, words, n * sizeof(Word));
        return;
    }
    const uint32_t n_dropped = kind.mantissa_bits - kept_bits;
    const Lane mask = (Lane(1) << n_dropped) - 1, limit = Lane(largest);
    const Lane dropped_sign = is_minus_zero_nan ? 0 : ~Lane(0);
    for (size_t i = 0; i < n; i++) {
        const Lane word = words[i], body = word & Lane(Word(~TOP_BIT<Word>));
        const Lane rounded = (body + (mask >> 1) + (body >> n_dropped & 1)) & ~mask;
        const Lane sign = (word ^ body) & ((rounded == 0) & (body != 0) ? dropped_sign : ~Lane(0));
        out[i] = Word((body > limit) | (rounded > limit) ? word : sign | rounded);
    }
}

TRICOMP_END
