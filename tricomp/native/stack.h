// The bit stack of each lane: remainders of varying length. Stage header: isa.h, model.h and lanes.h only, no STL.
//
// The hard thing: a lane takes a word when it holds too few bits, and lanes take words in order, so a step must know
// how many words the step before took. That depends on lengths and counts of bits alone, never on the words: the
// additions that it costs run ahead of everything else.
//
// Both sides get along with numbers of the words' width. With h < B bits in hold and v <= B bits wanted or put:
//
//     taking:   value = (hold | word << h) & mask(v), and what stays is hold >> v | word >> (v - h), with word = 0
//               where none was taken. Its number of bits is (h - v) mod B either way.
//     putting:  with r = (h + v) mod B, a full word is hold << (B - h) | value >> r, and what stays is
//               (hold << v | value) & mask(r) either way.
//
// where a shift by B or more gives 0.
#pragma once

#include "lanes.h"

TRICOMP_BEGIN

template <size_t word_bytes>
struct StackWordOf {
    using type = uint32_t;
};
template <>
struct StackWordOf<1> {
    using type = uint16_t;
};
template <>
struct StackWordOf<2> {
    using type = uint16_t;
};
template <class Word>
using StackWord = typename StackWordOf<sizeof(Word)>::type;

// words: where the words written so far begin. Up to SLACK bytes below may be written, none above.
template <class Word>
struct StackEncoder {
    alignas(64) uint32_t holds[LANES];
    alignas(64) uint32_t n_helds[LANES];
    uint8_t* words;
};

// words: n_words of them, SLACK bytes after them may be read. at: words taken; counts on past n_words.
template <class Word>
struct StackDecoder {
    alignas(64) uint32_t holds[LANES];
    alignas(64) uint32_t n_helds[LANES];
    const uint8_t* words;
    size_t n_words, at;
};

#if TRICOMP_HAS_AVX512

INLINE __m512i load_lanes_16(const uint32_t* lanes) {
    __m256i low = _mm512_cvtepi32_epi16(load_512(lanes)), high = _mm512_cvtepi32_epi16(load_512(lanes + 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

INLINE void store_lanes_16(uint32_t* lanes, __m512i value) {
    store_512(lanes, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(value)));
    store_512(lanes + 16, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(value, 1)));
}

INLINE __m512i or_512(__m512i a, __m512i b) { return _mm512_or_si512(a, b); }
// (a | b) & ~c
INLINE __m512i or_but_not_512(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi32(a, b, c, 0x54); }

// Takes the bits of all lanes for a step.
template <class Unit>
struct StackReader;

template <>
struct StackReader<uint16_t> {
    __m512i hold, held;
    const uint8_t* words;
    size_t n_words, at;

    template <class Decoder>
    INLINE explicit StackReader(const Decoder& from)
        : hold(load_lanes_16(from.holds)), held(load_lanes_16(from.n_helds)), words(from.words), n_words(from.n_words),
          at(from.at) {}

    template <class Decoder>
    INLINE void save(Decoder& to) const {
        store_lanes_16(to.holds, hold);
        store_lanes_16(to.n_helds, held);
        to.at = at;
    }

    INLINE Lanes16 take(Lanes16 lengths) {
        __m512i n = lengths.all;
        __mmask32 is_short = _mm512_cmplt_epu16_mask(held, n);
        __m512i next = load_512(words + 2 * (at < n_words ? at : n_words));
        __m512i word = _mm512_maskz_expand_epi16(is_short, next);
        at += static_cast<size_t>(__builtin_popcount(is_short));
        __m512i above = _mm512_sllv_epi16(_mm512_set1_epi16(-1), n);
        __m512i value = or_but_not_512(hold, _mm512_sllv_epi16(word, held), above);
        hold = or_512(_mm512_srlv_epi16(hold, n), _mm512_srlv_epi16(word, _mm512_sub_epi16(n, held)));
        held = _mm512_and_si512(_mm512_sub_epi16(held, n), _mm512_set1_epi16(15));
        return {value};
    }
};

template <>
struct StackReader<uint32_t> {
    Lanes32 hold, held;
    const uint8_t* words;
    size_t n_words, at;

    template <class Decoder>
    INLINE explicit StackReader(const Decoder& from)
        : hold{load_512(from.holds), load_512(from.holds + 16)},
          held{load_512(from.n_helds), load_512(from.n_helds + 16)}, words(from.words), n_words(from.n_words),
          at(from.at) {}

    template <class Decoder>
    INLINE void save(Decoder& to) const {
        store_512(to.holds, hold.low);
        store_512(to.holds + 16, hold.high);
        store_512(to.n_helds, held.low);
        store_512(to.n_helds + 16, held.high);
        to.at = at;
    }

    INLINE __m512i take_half(__m512i n, __m512i& hold, __m512i& held) {
        __mmask16 is_short = _mm512_cmplt_epu32_mask(held, n);
        __m512i next = load_512(words + 4 * (at < n_words ? at : n_words));
        __m512i word = _mm512_maskz_expand_epi32(is_short, next);
        at += static_cast<size_t>(__builtin_popcount(is_short));
        __m512i above = _mm512_sllv_epi32(_mm512_set1_epi32(-1), n);
        __m512i value = or_but_not_512(hold, _mm512_sllv_epi32(word, held), above);
        hold = or_512(_mm512_srlv_epi32(hold, n), _mm512_srlv_epi32(word, _mm512_sub_epi32(n, held)));
        held = _mm512_and_si512(_mm512_sub_epi32(held, n), _mm512_set1_epi32(31));
        return value;
    }

    INLINE Lanes32 take(Lanes32 n) {
        __m512i low = take_half(n.low, hold.low, held.low);
        return {low, take_half(n.high, hold.high, held.high)};
    }
};

// Puts the bits of all lanes for a step.
template <class Unit>
struct StackWriter;

constexpr LaneIndices<uint16_t> counting_16() {
    LaneIndices<uint16_t> indices{};
    for (size_t i = 0; i < 32; ++i) indices.at[i] = static_cast<uint16_t>(i);
    return indices;
}
constexpr LaneIndices<uint32_t> counting_32() {
    LaneIndices<uint32_t> indices{};
    for (size_t i = 0; i < 16; ++i) indices.at[i] = static_cast<uint32_t>(i);
    return indices;
}
static constexpr LaneIndices<uint16_t> COUNTING_16 = counting_16();
static constexpr LaneIndices<uint32_t> COUNTING_32 = counting_32();

template <>
struct StackWriter<uint16_t> {
    __m512i hold, held;
    uint8_t* words;

    template <class Encoder>
    INLINE explicit StackWriter(const Encoder& from)
        : hold(load_lanes_16(from.holds)), held(load_lanes_16(from.n_helds)), words(from.words) {}

    template <class Encoder>
    INLINE void save(Encoder& to) const {
        store_lanes_16(to.holds, hold);
        store_lanes_16(to.n_helds, held);
        to.words = words;
    }

    INLINE void put(Lanes16 values, Lanes16 lengths) {
        __m512i value = values.all, n = lengths.all, sixteen = _mm512_set1_epi16(16);
        __m512i sum = _mm512_add_epi16(held, n);
        __mmask32 is_full = _mm512_test_epi16_mask(sum, sixteen);
        __m512i rest = _mm512_and_si512(sum, _mm512_set1_epi16(15));
        __m512i word = or_512(_mm512_sllv_epi16(hold, _mm512_sub_epi16(sixteen, held)), _mm512_srlv_epi16(value, rest));
        hold = or_but_not_512(_mm512_sllv_epi16(hold, n), value, _mm512_sllv_epi16(_mm512_set1_epi16(-1), rest));
        held = rest;
        // The words end where those written before begin: compressed to the bottom, then turned to the top.
        int count = __builtin_popcount(is_full);
        __m512i counting = _mm512_load_si512(COUNTING_16.at);
        __m512i turn = _mm512_add_epi16(counting, _mm512_set1_epi16(static_cast<short>(count)));
        store_512(words - 64, _mm512_permutexvar_epi16(turn, _mm512_maskz_compress_epi16(is_full, word)));
        words -= 2 * count;
    }
};

template <>
struct StackWriter<uint32_t> {
    Lanes32 hold, held;
    uint8_t* words;

    template <class Encoder>
    INLINE explicit StackWriter(const Encoder& from)
        : hold{load_512(from.holds), load_512(from.holds + 16)},
          held{load_512(from.n_helds), load_512(from.n_helds + 16)}, words(from.words) {}

    template <class Encoder>
    INLINE void save(Encoder& to) const {
        store_512(to.holds, hold.low);
        store_512(to.holds + 16, hold.high);
        store_512(to.n_helds, held.low);
        store_512(to.n_helds + 16, held.high);
        to.words = words;
    }

    INLINE void put_half(__m512i value, __m512i n, __m512i& hold, __m512i& held) {
        __m512i width = _mm512_set1_epi32(32), sum = _mm512_add_epi32(held, n);
        __mmask16 is_full = _mm512_test_epi32_mask(sum, width);
        __m512i rest = _mm512_and_si512(sum, _mm512_set1_epi32(31));
        __m512i word = or_512(_mm512_sllv_epi32(hold, _mm512_sub_epi32(width, held)), _mm512_srlv_epi32(value, rest));
        hold = or_but_not_512(_mm512_sllv_epi32(hold, n), value, _mm512_sllv_epi32(_mm512_set1_epi32(-1), rest));
        held = rest;
        int count = __builtin_popcount(is_full);
        __m512i turn = _mm512_add_epi32(_mm512_load_si512(COUNTING_32.at), _mm512_set1_epi32(count));
        store_512(words - 64, _mm512_permutexvar_epi32(turn, _mm512_maskz_compress_epi32(is_full, word)));
        words -= 4 * count;
    }

    INLINE void put(Lanes32 value, Lanes32 n) {
        put_half(value.high, n.high, hold.high, held.high);
        put_half(value.low, n.low, hold.low, held.low);
    }
};

INLINE void halve(const Lanes32& n, Lanes32& low, Lanes32& high) {
    __m512i most = _mm512_set1_epi32(32);
    low = {_mm512_min_epu32(n.low, most), _mm512_min_epu32(n.high, most)};
    high = {_mm512_sub_epi32(n.low, low.low), _mm512_sub_epi32(n.high, low.high)};
}

#elif TRICOMP_HAS_AVX2

// For each set of eight lanes: which of the words that follow goes to each lane, and the words of which lanes end up,
// in order, at the top.
struct StackTables {
    alignas(16) uint8_t expand_16[256][16];  // for _mm_shuffle_epi8; 0x80: none
    alignas(16) uint8_t compress_16[256][16];
    alignas(8) uint8_t expand_32[256][8];  // numbers of words
    alignas(8) uint8_t compress_32[256][8];
};

constexpr StackTables stack_tables() {
    StackTables tables{};
    for (size_t set = 0; set < 256; ++set) {
        size_t count = 0;
        for (size_t lane = 0; lane < 8; ++lane) count += set >> lane & 1;
        for (size_t lane = 0, next = 0, top = 8 - count; lane < 8; ++lane) {
            bool is_in = set >> lane & 1;
            tables.expand_32[set][lane] = static_cast<uint8_t>(is_in ? next : 0);
            for (size_t i = 0; i < 2; ++i)
                tables.expand_16[set][2 * lane + i] = static_cast<uint8_t>(is_in ? 2 * next + i : 0x80);
            if (!is_in) continue;
            tables.compress_32[set][top] = static_cast<uint8_t>(lane);
            for (size_t i = 0; i < 2; ++i) tables.compress_16[set][2 * top + i] = static_cast<uint8_t>(2 * lane + i);
            ++next;
            ++top;
        }
    }
    return tables;
}

static constexpr StackTables STACK_TABLES = stack_tables();

INLINE __m256i load_indices(const uint8_t* eight) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight)));
}
INLINE unsigned sign_bits(__m256i value) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(value)));
}

template <class Unit>
struct StackReader {
    static constexpr int BITS = 8 * sizeof(Unit);
    __m256i hold[4], held[4];
    const uint8_t* words;
    size_t n_words, at;

    template <class Decoder>
    INLINE explicit StackReader(const Decoder& from) : words(from.words), n_words(from.n_words), at(from.at) {
        for (size_t p = 0; p < 4; ++p) hold[p] = load_256(from.holds + 8 * p), held[p] = load_256(from.n_helds + 8 * p);
    }

    template <class Decoder>
    INLINE void save(Decoder& to) const {
        for (size_t p = 0; p < 4; ++p) store_256(to.holds + 8 * p, hold[p]), store_256(to.n_helds + 8 * p, held[p]);
        to.at = at;
    }

    // The next words to the lanes that are short, 0 to the others.
    INLINE __m256i deal(__m256i is_short) {
        const uint8_t* next = words + sizeof(Unit) * (at < n_words ? at : n_words);
        unsigned set = sign_bits(is_short);
        at += static_cast<size_t>(__builtin_popcount(set));
        if constexpr (sizeof(Unit) == 2)
            return _mm256_cvtepu16_epi32(_mm_shuffle_epi8(load_128(next), load_128(STACK_TABLES.expand_16[set])));
        else
            return _mm256_and_si256(
                _mm256_permutevar8x32_epi32(load_256(next), load_indices(STACK_TABLES.expand_32[set])), is_short);
    }

    INLINE Lanes32 take(const Lanes32& lengths) {
        Lanes32 values;
        __m256i ones = _mm256_set1_epi32(-1);
#pragma GCC unroll 4
        for (size_t p = 0; p < 4; ++p) {
            __m256i n = lengths.part[p];
            __m256i word = deal(_mm256_cmpgt_epi32(n, held[p]));
            __m256i all = _mm256_or_si256(hold[p], _mm256_sllv_epi32(word, held[p]));
            values.part[p] = _mm256_andnot_si256(_mm256_sllv_epi32(ones, n), all);
            if constexpr (sizeof(Unit) == 2)  // both words fit
                hold[p] = _mm256_srlv_epi32(all, n);
            else
                hold[p] = _mm256_or_si256(_mm256_srlv_epi32(hold[p], n),
                                          _mm256_srlv_epi32(word, _mm256_sub_epi32(n, held[p])));
            held[p] = _mm256_and_si256(_mm256_sub_epi32(held[p], n), _mm256_set1_epi32(BITS - 1));
        }
        return values;
    }
};

template <class Unit>
struct StackWriter {
    static constexpr int BITS = 8 * sizeof(Unit);
    __m256i hold[4], held[4];
    uint8_t* words;

    template <class Encoder>
    INLINE explicit StackWriter(const Encoder& from) : words(from.words) {
        for (size_t p = 0; p < 4; ++p) hold[p] = load_256(from.holds + 8 * p), held[p] = load_256(from.n_helds + 8 * p);
    }

    template <class Encoder>
    INLINE void save(Encoder& to) const {
        for (size_t p = 0; p < 4; ++p) store_256(to.holds + 8 * p, hold[p]), store_256(to.n_helds + 8 * p, held[p]);
        to.words = words;
    }

    // Words of the lanes in the set, below those written before.
    INLINE void lay_16(__m128i eight, unsigned set) {
        __m128i top = _mm_shuffle_epi8(eight, load_128(STACK_TABLES.compress_16[set]));
        store_128(words - 16, top);
        words -= 2 * __builtin_popcount(set);
    }

    INLINE void lay_32(__m256i eight, unsigned set) {
        __m256i top = _mm256_permutevar8x32_epi32(eight, load_indices(STACK_TABLES.compress_32[set]));
        store_256(words - 32, top);
        words -= 4 * __builtin_popcount(set);
    }

    INLINE void put(const Lanes32& values, const Lanes32& lengths) {
        __m256i width = _mm256_set1_epi32(BITS), below = _mm256_set1_epi32(BITS - 1), ones = _mm256_set1_epi32(-1);
        __m256i word[4];
        unsigned set[4];
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; ++i) {
            size_t p = 3 - i;
            __m256i n = lengths.part[p], value = values.part[p], sum = _mm256_add_epi32(held[p], n);
            set[p] = sign_bits(_mm256_slli_epi32(sum, sizeof(Unit) == 2 ? 27 : 26));
            __m256i rest = _mm256_and_si256(sum, below);
            __m256i all = _mm256_or_si256(_mm256_sllv_epi32(hold[p], n), value);
            if constexpr (sizeof(Unit) == 2)  // both words fit
                word[p] = _mm256_srlv_epi32(all, rest);
            else
                word[p] = _mm256_or_si256(_mm256_sllv_epi32(hold[p], _mm256_sub_epi32(width, held[p])),
                                          _mm256_srlv_epi32(value, rest));
            hold[p] = _mm256_andnot_si256(_mm256_sllv_epi32(ones, rest), all);
            held[p] = rest;
            if constexpr (sizeof(Unit) == 4) lay_32(word[p], set[p]);
        }
        if constexpr (sizeof(Unit) == 2) {
#pragma GCC unroll 2
            for (size_t p = 4; p > 0; p -= 2) {
                __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(word[p - 2], word[p - 1]), 0xD8);
                lay_16(_mm256_extracti128_si256(both, 1), set[p - 1]);
                lay_16(_mm256_castsi256_si128(both), set[p - 2]);
            }
        }
    }
};

INLINE void halve(const Lanes32& n, Lanes32& low, Lanes32& high) {
    for (size_t p = 0; p < 4; ++p) {
        low.part[p] = _mm256_min_epu32(n.part[p], _mm256_set1_epi32(32));
        high.part[p] = _mm256_sub_epi32(n.part[p], low.part[p]);
    }
}

#else

template <class Unit>
struct StackReader {
    static constexpr uint32_t BITS = 8 * sizeof(Unit);
    Lanes32 hold, held;
    const uint8_t* words;
    size_t n_words, at;

    template <class Decoder>
    INLINE explicit StackReader(const Decoder& from) : words(from.words), n_words(from.n_words), at(from.at) {
        std::memcpy(hold.lane, from.holds, sizeof hold.lane);
        std::memcpy(held.lane, from.n_helds, sizeof held.lane);
    }

    template <class Decoder>
    INLINE void save(Decoder& to) const {
        std::memcpy(to.holds, hold.lane, sizeof hold.lane);
        std::memcpy(to.n_helds, held.lane, sizeof held.lane);
        to.at = at;
    }

    INLINE Lanes32 take(const Lanes32& lengths) {
        Lanes32 values;
        Unit last[LANES];
        const bool is_enough = n_words >= LANES && at <= n_words - LANES;
        const uint8_t* next = is_enough ? words + sizeof(Unit) * at : copy_last(last);
        size_t n_taken = 0;
        for (size_t lane = 0; lane < LANES; ++lane) {
            const uint32_t n = lengths.lane[lane], n_held = held.lane[lane];
            const uint64_t is_short = n_held < n;
            Unit word;
            std::memcpy(&word, next + sizeof(Unit) * n_taken, sizeof(Unit));
            n_taken += is_short;
            const uint64_t all = hold.lane[lane] | (word & (0 - is_short)) << n_held;
            values.lane[lane] = static_cast<uint32_t>(all & ((uint64_t(1) << n) - 1));
            hold.lane[lane] = static_cast<uint32_t>(all >> n);
            held.lane[lane] = (n_held - n) & (BITS - 1);
        }
        at += n_taken;
        return values;
    }

    // The words that are left, fewer than a step may take; zeros follow.
    const uint8_t* copy_last(Unit* last) const {
        const size_t n_left = at < n_words ? n_words - at : 0;
        std::memset(last, 0, LANES * sizeof(Unit));
        std::memcpy(last, words + sizeof(Unit) * (n_words - n_left), n_left * sizeof(Unit));
        return reinterpret_cast<const uint8_t*>(last);
    }
};

template <class Unit>
struct StackWriter {
    static constexpr uint32_t BITS = 8 * sizeof(Unit);
    Lanes32 hold, held;
    uint8_t* words;

    template <class Encoder>
    INLINE explicit StackWriter(const Encoder& from) : words(from.words) {
        std::memcpy(hold.lane, from.holds, sizeof hold.lane);
        std::memcpy(held.lane, from.n_helds, sizeof held.lane);
    }

    template <class Encoder>
    INLINE void save(Encoder& to) const {
        std::memcpy(to.holds, hold.lane, sizeof hold.lane);
        std::memcpy(to.n_helds, held.lane, sizeof held.lane);
        to.words = words;
    }

    INLINE void put(const Lanes32& values, const Lanes32& lengths) {
        for (size_t lane = LANES; lane-- > 0;) {
            uint32_t n = lengths.lane[lane], sum = held.lane[lane] + n, rest = sum & (BITS - 1);
            uint64_t all = static_cast<uint64_t>(hold.lane[lane]) << n | values.lane[lane];
            Unit word = static_cast<Unit>(all >> rest);
            std::memcpy(words - sizeof(Unit), &word, sizeof(Unit));
            words -= sizeof(Unit) * (sum / BITS);
            hold.lane[lane] = static_cast<uint32_t>(all & ((uint64_t(1) << rest) - 1));
            held.lane[lane] = rest;
        }
    }
};

INLINE void halve(const Lanes32& n, Lanes32& low, Lanes32& high) {
    for (size_t lane = 0; lane < LANES; ++lane) {
        low.lane[lane] = n.lane[lane] < 32 ? n.lane[lane] : 32;
        high.lane[lane] = n.lane[lane] - low.lane[lane];
    }
}

#endif

template <size_t word_bytes>
struct StepLanes {
    using type = Lanes32;
};
template <>
struct StepLanes<1> {
    using type = Lanes16;
};
template <>
struct StepLanes<2> {
    using type = Lanes16;
};

template <class Word>
void stack_begin(StackEncoder<Word>& encoder, uint8_t* end) {
    std::memset(&encoder, 0, sizeof encoder);
    encoder.words = end;
}

// Put rows of remainders, the last step of the last row first. remainders: nothing above their lengths, which are at
// most the word's width.
template <class Word>
void stack_encode(StackEncoder<Word>& encoder, const Word* remainders, const uint8_t* lengths, size_t n_rows) {
    StackWriter<StackWord<Word>> writer(encoder);
    for (size_t row = n_rows; row-- > 0;) {
        typename StepLanes<sizeof(Word)>::type n[STEPS], values[STEPS];
        load_row(lengths + row * ROW, n);
        if constexpr (sizeof(Word) == 8) {
            Lanes32 highs[STEPS];
            load_row(remainders + row * ROW, values, highs);
            for (size_t k = STEPS; k-- > 0;) {
                Lanes32 low, high;
                halve(n[k], low, high);
                writer.put(highs[k], high);
                writer.put(values[k], low);
            }
        } else {
            load_row(remainders + row * ROW, values);
#pragma GCC unroll 4
            for (size_t k = 0; k < STEPS; ++k) writer.put(values[STEPS - 1 - k], n[STEPS - 1 - k]);
        }
    }
    writer.save(encoder);
}

// The first word of each lane: what it holds, below a bit that marks the end. heads: 32 of the stack's words.
template <class Word>
void stack_heads(const StackEncoder<Word>& encoder, uint8_t* heads) {
    using Unit = StackWord<Word>;
    for (size_t lane = 0; lane < LANES; ++lane) {
        Unit head = static_cast<Unit>(encoder.holds[lane] | 1u << encoder.n_helds[lane]);
        std::memcpy(heads + sizeof(Unit) * lane, &head, sizeof(Unit));
    }
}

// Take the heads; words and n_words are there. False: a head is 0.
template <class Word>
bool stack_open(StackDecoder<Word>& decoder, const uint8_t* heads) {
    using Unit = StackWord<Word>;
    bool is_whole = true;
    for (size_t lane = 0; lane < LANES; ++lane) {
        Unit head;
        std::memcpy(&head, heads + sizeof(Unit) * lane, sizeof(Unit));
        is_whole &= head != 0;
        decoder.n_helds[lane] = 31u - static_cast<uint32_t>(__builtin_clz(head | 1u));
        decoder.holds[lane] = head ^ 1u << decoder.n_helds[lane];
    }
    decoder.at = 0;
    return is_whole;
}

// Take rows of remainders. lengths: at most the word's width.
template <class Word>
void stack_decode(StackDecoder<Word>& decoder, const uint8_t* lengths, Word* remainders, size_t n_rows) {
    StackReader<StackWord<Word>> reader(decoder);
    for (size_t row = 0; row < n_rows; ++row) {
        typename StepLanes<sizeof(Word)>::type n[STEPS], values[STEPS];
        load_row(lengths + row * ROW, n);
        if constexpr (sizeof(Word) == 8) {
            Lanes32 highs[STEPS];
            for (size_t k = 0; k < STEPS; ++k) {
                Lanes32 low, high;
                halve(n[k], low, high);
                values[k] = reader.take(low);
                highs[k] = reader.take(high);
            }
            store_row(values, highs, remainders + row * ROW);
        } else {
#pragma GCC unroll 4
            for (size_t k = 0; k < STEPS; ++k) values[k] = reader.take(n[k]);
            store_row(values, remainders + row * ROW);
        }
    }
    reader.save(decoder);
}

// Whether the stream ended where an encoder begins: every word taken, none beyond, nothing held.
template <class Word>
bool stack_is_at_end(const StackDecoder<Word>& decoder) {
    uint32_t left = 0;
    for (size_t lane = 0; lane < LANES; ++lane) left |= decoder.holds[lane] | decoder.n_helds[lane];
    return left == 0 && decoder.at == decoder.n_words;
}

TRICOMP_END
