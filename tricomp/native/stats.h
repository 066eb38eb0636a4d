// What the planner counts and sums over words: histograms of symbols, means and medians over lattices, savings.
//
// Stage header: no STL. Mirrors the passes over words of reference/planner_full.py and planner_delta.py. The hard thing is
// speed: the loops that make indices become vector code, and the counting, which cannot, goes to several tables in turn,
// so that a symbol that repeats does not wait for itself.
#pragma once

#include <cstring>

#include "bits.h"
#include "compare.h"
#include "isa.h"
#include "model.h"
#include "predict_scales.h"
#include "stats_kernels.h"

TRICOMP_BEGIN
namespace stats {

// Counts of indices below n_entries, in up to COUNT_LANES tables.
class Histogram {
  public:
    Histogram(uint32_t* lanes, size_t n_entries) : lanes_(lanes), n_entries_(n_entries) {
        n_lanes_ = n_entries <= 1024 ? 4 : n_entries <= 16384 ? 2 : 1;
        std::memset(lanes, 0, n_lanes_ * n_entries * sizeof(uint32_t));
    }

    INLINE void add(const uint16_t* indices, size_t n) {
        uint32_t* const tables[COUNT_LANES] = {lanes_, lanes_ + (n_lanes_ > 1) * n_entries_,
                                               lanes_ + (n_lanes_ > 2 ? 2 : 0) * n_entries_,
                                               lanes_ + (n_lanes_ > 2 ? 3 : n_lanes_ > 1) * n_entries_};
        size_t i = 0;
        for (; i + 4 <= n; i += 4) {
            tables[0][indices[i]]++;
            tables[1][indices[i + 1]]++;
            tables[2][indices[i + 2]]++;
            tables[3][indices[i + 3]]++;
        }
        for (; i < n; i++) lanes_[indices[i]]++;
    }

    void finish(uint32_t* counts) const {
        std::memcpy(counts, lanes_, n_entries_ * sizeof(uint32_t));
        for (size_t lane = 1; lane < n_lanes_; lane++)
            for (size_t i = 0; i < n_entries_; i++) counts[i] += lanes_[lane * n_entries_ + i];
    }

  private:
    uint32_t* lanes_;
    size_t n_entries_, n_lanes_;
};

// Calls f of 0 .. n - 1. Nearly all rows are whole: of those the compiler knows the length.
template <class Function>
INLINE void each(size_t n, Function f) {
    if (n == ROW) {
        for (size_t i = 0; i < ROW; i++) f(i);
    } else {
        for (size_t i = 0; i < n; i++) f(i);
    }
}

template <class Word>
INLINE const Word* words_of(const void* words) {
    return static_cast<const Word*>(words);
}

// Asks for a row some rows ahead, for rows of a sample stand so far apart that no processor foresees the next.
template <class Word>
INLINE void prefetch_row(const Word* words, const SampleRows& rows, size_t row) {
    constexpr size_t AHEAD = 6, LINE = 64 / sizeof(Word);
    const size_t ahead = (row + AHEAD) * rows.step;
    if (ahead >= rows.n_all) return;
    const Word* part = words + rows.places[ahead];
    for (size_t i = 0; i < rows.width; i += LINE) __builtin_prefetch(part + i);
    __builtin_prefetch(part + rows.width - 1);
}

// Exact passes over a frame.

template <class Word>
size_t count_unequal(const void* words, const void* others, size_t n, size_t most) {
    return TRICOMP_ISA::count_unequal(words_of<Word>(words), words_of<Word>(others), n, most);
}

template <class Word>
size_t count_unequal_to(const void* words, uint64_t other, size_t n, size_t most) {
    return TRICOMP_ISA::count_unequal_to(words_of<Word>(words), Word(other), n, most);
}

template <class Word>
Word join(const Word* words, size_t n) {
    Word joined = 0;
    for (size_t i = 0; i < n; i++) joined = Word(joined | words[i]);
    return joined;
}

template <class Word>
uint64_t join_low(const void* words, size_t n, uint64_t mask) {
    constexpr size_t PART = 2048;
    Word joined = 0;
    for (size_t first = 0; first < n && !(joined & 1); first += PART)
        joined = Word(joined | join(words_of<Word>(words) + first, n - first < PART ? n - first : PART));
    return joined & mask;
}

// Sums over the words of a sample's rows.

template <class Word>
size_t count_negative(const void* words, const SampleRows& rows) {
    size_t n_negative = 0;
    for (size_t row = 0; row < rows.n_rows(); row++) {
        prefetch_row(words_of<Word>(words), rows, row);
        const Word* part = words_of<Word>(words) + rows.place(row);
        Word n_here = 0;  // at most ROW
        each(rows.width, [&](size_t i) { n_here = Word(n_here + Word(part[i] >> (BITS<Word> - 1))); });
        n_negative += size_t(n_here);
    }
    return n_negative;
}

template <class Word, class Test>
INLINE size_t count_rows(const SampleRows& rows, Test test) {
    size_t n_found = 0;
    for (size_t row = 0; row < rows.n_rows(); row++) {
        const uint64_t place = rows.place(row);
        Word n_here = 0;
        each(rows.width, [&](size_t i) { n_here = Word(n_here + Word(test(place + i))); });
        n_found += size_t(n_here);
    }
    return n_found;
}

template <class Word>
size_t count_unequal_rows(const void* words, const void* others, const SampleRows& rows) {
    const Word *a = words_of<Word>(words), *b = words_of<Word>(others);
    return count_rows<Word>(rows, [=](uint64_t i) { return a[i] != b[i]; });
}

template <class Word>
size_t count_unequal_rows_to(const void* words, uint64_t other, const SampleRows& rows) {
    const Word *a = words_of<Word>(words), b = Word(other);
    return count_rows<Word>(rows, [=](uint64_t i) { return a[i] != b; });
}

// Full.

template <class Word>
void count_highs(const Kind& kind, uint32_t k, const void* words, const SampleRows& rows, uint32_t* counts,
                 uint32_t* lanes) {
    const uint32_t shift = kind.mantissa_bits - k;
    const uint32_t n_values = 1u << (kind.exponent_bits + k);
    Histogram histogram(lanes, size_t(n_values) + 1);
    uint16_t indices[ROW];
    for (size_t row = 0; row < rows.n_rows(); row++) {
        prefetch_row(words_of<Word>(words), rows, row);
        const Word* part = words_of<Word>(words) + rows.place(row);
        each(rows.width, [&](size_t i) {
            const uint16_t high = uint16_t(Word(part[i] & Word(~TOP_BIT<Word>)) >> shift);
            indices[i] = part[i] ? high : uint16_t(n_values);
        });
        histogram.add(indices, rows.width);
    }
    histogram.finish(counts);
}

// L = R + C of the words of a row of the sample.
INLINE void spread_levels(const Levels& levels, uint64_t first, size_t n, int16_t* out) {
    spread_scales(levels.rows, levels.columns, levels.n_columns, first, n, out,
                  [](int16_t row, int16_t column) { return int16_t(row + column); }, int16_t(0));
}

template <class Word>
void range_of_highs(const Kind& kind, uint32_t k, const void* words, const SampleRows& rows, const Levels& levels,
                    int32_t* range) {
    const uint32_t shift = kind.mantissa_bits - k;
    int32_t leasts[ROW], greatests[ROW];
    for (size_t i = 0; i < ROW; i++) {
        leasts[i] = INT32_MAX;
        greatests[i] = INT32_MIN;
    }
    int16_t level[ROW];
    for (size_t row = 0; row < rows.n_rows(); row++) {
        prefetch_row(words_of<Word>(words), rows, row);
        const Word* part = words_of<Word>(words) + rows.place(row);
        spread_levels(levels, rows.first(row), rows.width, level);
        each(rows.width, [&](size_t i) {
            const int32_t high = int32_t(Word(part[i] & Word(~TOP_BIT<Word>)) >> shift) - (level[i] >> 3) * (1 << k);
            const int32_t low_end = part[i] ? high : INT32_MAX, high_end = part[i] ? high : INT32_MIN;
            leasts[i] = low_end < leasts[i] ? low_end : leasts[i];
            greatests[i] = high_end > greatests[i] ? high_end : greatests[i];
        });
    }
    range[0] = INT32_MAX;
    range[1] = INT32_MIN;
    for (size_t i = 0; i < ROW; i++) {
        range[0] = leasts[i] < range[0] ? leasts[i] : range[0];
        range[1] = greatests[i] > range[1] ? greatests[i] : range[1];
    }
}

template <class Word>
void count_scaled_highs(const Kind& kind, uint32_t k, const void* words, const SampleRows& rows, const Levels& levels,
                        int32_t low, uint32_t width, uint32_t* counts, uint32_t* lanes) {
    const uint32_t shift = kind.mantissa_bits - k;
    Histogram histogram(lanes, 8 * size_t(width) + 9);
    uint16_t indices[ROW];
    int16_t level[ROW];
    for (size_t row = 0; row < rows.n_rows(); row++) {
        prefetch_row(words_of<Word>(words), rows, row);
        const Word* part = words_of<Word>(words) + rows.place(row);
        spread_levels(levels, rows.first(row), rows.width, level);
        each(rows.width, [&](size_t i) {
            const int32_t high = int32_t(Word(part[i] & Word(~TOP_BIT<Word>)) >> shift) - (level[i] >> 3) * (1 << k);
            const uint32_t place = uint32_t(high) - uint32_t(low), phase = uint32_t(level[i]) & 7;
            const uint32_t some = place < width ? place << 3 | phase : width * 8 + 8;
            indices[i] = uint16_t(part[i] ? some : width * 8 + phase);
        });
        histogram.add(indices, rows.width);
    }
    histogram.finish(counts);
}

template <class Word>
void low_zeros(const void* words, const SampleRows& rows, uint64_t mask, uint32_t n_low, uint64_t* joined,
               uint64_t* n_saved) {
    *joined = *n_saved = 0;
    for (size_t row = 0; row < rows.n_rows(); row++) {
        const Word low = Word(join(words_of<Word>(words) + rows.place(row), rows.width) & Word(mask));
        const uint32_t zeros = trailing_zeros(low);
        *joined |= low;
        *n_saved += zeros < n_low ? zeros : n_low;
    }
}

template <class Word>
void count_plane(const void* words, const SampleRows& rows, uint32_t n_low, bool has_sign, uint32_t from, uint32_t width,
                 uint32_t* counts, uint32_t* lanes) {
    typedef LaneOf<Word> Lane;
    const Lane low_mask = (Lane(1) << n_low) - 1, sign_mask = Lane(has_sign) << n_low, octet = (Lane(1) << width) - 1;
    const uint32_t down = BITS<Word> - 1 - n_low;
    Histogram histogram(lanes, size_t(1) << width);
    uint16_t indices[ROW];
    for (size_t row = 0; row < rows.n_rows(); row++) {
        prefetch_row(words_of<Word>(words), rows, row);
        const Word* part = words_of<Word>(words) + rows.place(row);
        each(rows.width, [&](size_t i) {
            const Lane word = part[i];
            indices[i] = uint16_t(((word & low_mask) | (word >> down & sign_mask)) >> from & octet);
        });
        histogram.add(indices, rows.width);
    }
    histogram.finish(counts);
}

// Magnitude of floats in eighths of an octave, as the scale model counts them.
template <class Word>
struct Octaves {
    typedef LaneOf<Word> Lane;
    const uint32_t down, up;

    explicit Octaves(const Kind& kind)
        : down(kind.mantissa_bits > 3 ? kind.mantissa_bits - 3 : 0),
          up(kind.mantissa_bits < 3 ? 3 - kind.mantissa_bits : 0) {}
    INLINE int32_t of(Word word) const { return int32_t(Lane(word & Word(~TOP_BIT<Word>)) >> down << up); }
};

INLINE int16_t rounded_mean(int32_t sum, int32_t count, int16_t unknown) {
    if (count == 0) return unknown;
    const int32_t above = 2 * sum + count, below = 2 * count, quotient = above / below;
    return int16_t(quotient - (above % below < 0));
}

template <size_t N>
struct Number {
    static constexpr size_t value = N;
};

// Asks for the words of a lattice's row.
template <class Word>
INLINE void prefetch_lattice(const Word* words, const Runs& runs) {
    constexpr size_t LINE = 64 / sizeof(Word);
    if (runs.n_runs == 1) {
        for (size_t i = 0; i < runs.length; i += LINE) __builtin_prefetch(words + i);
    } else {
        for (size_t run = 0; run < runs.n_runs; run++) __builtin_prefetch(words + runs.starts[run]);
    }
}

// The words of a lattice's row, one after the other.
template <class Word>
INLINE void gather_row(const Word* words, const Runs& runs, Word* out) {
    const auto copy = [&](auto length) {
        constexpr size_t N = decltype(length)::value;
        for (size_t run = 0; run < runs.n_runs; run++) std::memcpy(out + N * run, words + runs.starts[run], N * sizeof(Word));
    };
    if (runs.length == 4) {
        copy(Number<4>());
    } else if (runs.length == 8) {
        copy(Number<8>());
    } else if (runs.length == 16) {
        copy(Number<16>());
    } else {
        for (size_t run = 0; run < runs.n_runs; run++)
            for (size_t i = 0; i < runs.length; i++) *out++ = words[runs.starts[run] + i];
    }
}

// Counts of values[i] where is_counted[i], from the least one on; how many values there are from the least to the greatest.
INLINE size_t count_range(const int16_t* values, const int16_t* is_counted, size_t n, uint16_t* indices, uint32_t* counts,
                          uint32_t* lanes) {
    int32_t least = INT16_MAX, greatest = INT16_MIN;
    for (size_t i = 0; i < n; i++) {
        const int16_t low_end = is_counted[i] ? values[i] : int16_t(INT16_MAX);
        const int16_t high_end = is_counted[i] ? values[i] : int16_t(INT16_MIN);
        least = low_end < least ? low_end : least;
        greatest = high_end > greatest ? high_end : greatest;
    }
    if (least > greatest) return 0;
    const size_t n_values = size_t(greatest - least) + 1;
    for (size_t i = 0; i < n; i++) indices[i] = uint16_t(is_counted[i] ? values[i] - least : int32_t(n_values));
    Histogram histogram(lanes, n_values + 1);
    histogram.add(indices, n);
    histogram.finish(counts);
    return n_values;
}

template <class Word>
void count_split(const Kind& kind, const void* words, uint64_t stride, const uint64_t* rows, size_t n_rows,
                 const Runs& runs, bool has_column_scale, SplitCounts& split, uint32_t* lanes) {
    const Octaves<Word> octave(kind);
    const size_t n_some = runs.n_columns(), n = n_rows * n_some;
    int16_t octaves[MOST_LATTICE_WORDS], offsets[MOST_LATTICE_WORDS], is_counted[MOST_LATTICE_WORDS];
    uint16_t indices[MOST_LATTICE_WORDS];
    int32_t sums[MOST_LATTICE_COLUMNS] = {}, counts[MOST_LATTICE_COLUMNS] = {};
    for (size_t row = 0; row < n_rows; row++) {
        Word some[MOST_LATTICE_COLUMNS];
        gather_row(words_of<Word>(words) + (rows ? rows[row] : row) * stride, runs, some);
        int16_t *of_row = octaves + row * n_some, *offset = offsets + row * n_some, *counted = is_counted + row * n_some;
        int32_t sum = 0, count = 0;
        for (size_t i = 0; i < n_some; i++) {  // the octave of a zero word is 0
            const int32_t found = octave.of(some[i]);
            of_row[i] = int16_t(found);
            counted[i] = some[i] != 0;
            sum += found;
            count += some[i] != 0;
        }
        const int16_t mean = rounded_mean(sum, count, 0);
        for (size_t i = 0; i < n_some; i++) {
            offset[i] = int16_t(counted[i] ? of_row[i] - mean : 0);
            sums[i] += offset[i];
            counts[i] += counted[i];
        }
    }
    split.n_before = count_range(octaves, is_counted, n, indices, split.before, lanes);
    if (has_column_scale) {
        int16_t means[MOST_LATTICE_COLUMNS];
        for (size_t i = 0; i < n_some; i++) means[i] = rounded_mean(sums[i], counts[i], 0);
        for (size_t row = 0; row < n_rows; row++)
            for (size_t i = 0; i < n_some; i++) {
                int16_t& offset = offsets[row * n_some + i];
                offset = int16_t(offset - means[i]);
            }
    }
    split.n_after = count_range(offsets, is_counted, n, indices, split.after, lanes);
}

template <class Word>
void row_means(const Kind& kind, const void* words, uint64_t stride, uint64_t n_rows, const Runs& runs,
               int16_t* means) {
    const Octaves<Word> octave(kind);
    const Word* row_words = words_of<Word>(words);
    const size_t n = runs.n_columns();
    constexpr uint64_t AHEAD = 4;
    for (uint64_t row = 0; row < n_rows; row++, row_words += stride) {
        if (runs.length > 4 && row + AHEAD < n_rows) prefetch_lattice(row_words + AHEAD * stride, runs);
        Word some[ROW];
        gather_row(row_words, runs, some);
        int32_t sum = 0, count = 0;
        each(n, [&](size_t i) {
            sum += octave.of(some[i]);
            count += some[i] != 0;
        });
        means[row] = rounded_mean(sum, count, -1);
    }
}

template <class Word>
void column_means(const Kind& kind, const void* words, uint64_t stride, uint64_t n_rows, uint64_t n_columns,
                  const int16_t* levels, uint64_t step, int16_t* means) {
    constexpr size_t PART = 512;
    const Octaves<Word> octave(kind);
    int32_t sums[PART], counts[PART];
    for (uint64_t first = 0; first < n_columns; first += PART) {
        const size_t n = size_t(n_columns - first < PART ? n_columns - first : PART);
        std::memset(sums, 0, sizeof sums);
        std::memset(counts, 0, sizeof counts);
        for (uint64_t row = 0; row < n_rows; row++) {
            const Word* part = words_of<Word>(words) + row * stride + first;
            const int32_t level = levels[row * step];
            for (size_t i = 0; i < n; i++) {
                const int32_t offset = octave.of(part[i]) - level;
                sums[i] += part[i] ? offset : 0;
                counts[i] += part[i] != 0;
            }
        }
        for (size_t i = 0; i < n; i++) means[first + i] = rounded_mean(sums[i], counts[i], 0);
    }
}

// Delta.

// The predicted words of a sample's rows; always whole rows, filled up with anything.
template <class Word>
class PredictedRows {
  public:
    PredictedRows(const Kind& kind, const Predicted& predicted) : reference_(words_of<Word>(predicted.reference)) {
        model_.kind = kind;
        model_.factor = predicted.factor;
        model_.factor_rows = predicted.factor_rows;
        model_.factor_columns = predicted.factor_columns;
        model_.n_columns = predicted.n_columns;
        std::memset(row_, 0, sizeof row_);
        std::memset(given_, 0, sizeof given_);
    }

    INLINE void prefetch(const SampleRows& rows, size_t row) const {
        if (reference_) prefetch_row(reference_, rows, row);
    }

    INLINE const Word* of(const SampleRows& rows, size_t row) {
        if (!reference_) return row_;
        const size_t n = rows.width;
        const Word* given = reference_ + rows.place(row);
        if (n < ROW) {
            std::memcpy(given_, given, n * sizeof(Word));
            given = given_;
        }
        if (!model_.factor_rows) return given;
        scale_reference<Word>(model_, given, rows.first(row), n, ROW, row_);
        return row_;
    }

  private:
    const Word* reference_;
    Model model_;
    alignas(64) Word row_[ROW], given_[ROW];
};

template <class Word>
struct Exponents {
    typedef LaneOf<Word> Lane;
    const Magnitude<Word> magnitude;
    const uint32_t m;

    explicit Exponents(const Kind& kind) : magnitude(kind), m(kind.mantissa_bits) {}
    template <bool IS_FLOAT>
    INLINE int32_t of(Word word) const {
        const Lane body = Lane(magnitude.of(word));
        return int32_t(IS_FLOAT ? body >> m : bit_length(body));
    }
};

template <class Word, bool IS_FLOAT>
INLINE void count_exponents_of(const Kind& kind, const Predicted& predicted, const SampleRows& rows,
                               Histogram& histogram) {
    const Exponents<Word> exponent(kind);
    PredictedRows<Word> predictions(kind, predicted);
    uint16_t indices[ROW];
    for (size_t row = 0; row < rows.n_rows(); row++) {
        predictions.prefetch(rows, row);
        const Word* old = predictions.of(rows, row);
        each(rows.width, [&](size_t i) { indices[i] = uint16_t(exponent.template of<IS_FLOAT>(old[i])); });
        histogram.add(indices, rows.width);
    }
}

template <class Word>
void count_exponents(const Kind& kind, const Predicted& predicted, const SampleRows& rows, uint32_t* counts, size_t n,
                     uint32_t* lanes) {
    Histogram histogram(lanes, n);
    if (kind.is_float) count_exponents_of<Word, true>(kind, predicted, rows, histogram);
    else count_exponents_of<Word, false>(kind, predicted, rows, histogram);
    histogram.finish(counts);
}

template <class Word>
INLINE Word absolute_of(Word change) {
    const Word fill = sign_fill(change);
    return Word(Word(change ^ fill) - fill);
}

// Indices of a block of words: ((context << k) * n_lengths + code) * 2 + sign.
template <class Word, bool IS_FLOAT>
struct CodePlaces {
    // Exponents of integers are bit lengths: they want the same lanes as the codes.
    typedef ShiftingLane<Word> Lane;
    typedef Vector<Lane> Vec;
    static constexpr Lane LANE_BITS = Lane(BITS<Lane>);
    const OrderOf<Word, Lane> order;
    const uint32_t m, k, down, shift;
    const bool is_signed;
    const Lane stride;
    const Vec one, ones, body, base, last, offset;

    CodePlaces(const Kind& kind, uint32_t bits, uint32_t n_contexts, int32_t first, uint32_t up)
        : order(kind),
          m(kind.mantissa_bits),
          k(bits),
          down(LANE_BITS - 1 - k),
          shift(up),
          is_signed(kind.is_signed),
          stride(Lane(((BITS<Word> + 1) << k) * 2)),
          one(all<Lane>(1)),
          ones(all<Lane>(Lane(~Lane(0)))),
          body(all<Lane>(IS_FLOAT ? Word(~TOP_BIT<Word>) : Word(~Word(0)))),
          base(all<Lane>(Lane(first))),
          last(all<Lane>(Lane(n_contexts - 1))),
          // What the leading one of a size, shifted to the top, adds to its code.
          offset(all<Lane>(Lane((Lane(LANE_BITS) << k) - (Lane(1) << k)))) {}

    INLINE Vec of(const Word* words, const Word* predicted) const {
        const Vec old = load_signed<Lane>(predicted);
        const Vec change = wrap<Word>(order.ordered(load_signed<Lane>(words)) - order.ordered(old));
        const Vec size = absolute(change), zeros = leading_zeros(size);
        const Vec code = keep(has_common(size, size), (shift_up(size, zeros) >> down) - (zeros << k) + offset);
        Vec exponent = old & body;
        if constexpr (IS_FLOAT) exponent = exponent >> m;
        else exponent = bit_length(is_signed ? absolute(old) : exponent);
        const Vec place = exponent - base;
        const Vec context = smaller((place & ~sign_fill(place)) >> shift, last);  // below the window: 0
        const Vec doubled = subtract_where(is_negative(change), code + code, ones);
        return {doubled.raw + context.raw * stride};
    }
};

template <class Word, bool IS_FLOAT>
void count_codes_of(const Kind& kind, uint32_t k, uint32_t n_contexts, int32_t base, uint32_t shift, const Word* words,
                    const Predicted& predicted, const SampleRows& rows, Histogram& histogram) {
    typedef Vector<ShiftingLane<Word>> Vec;
    const CodePlaces<Word, IS_FLOAT> places(kind, k, n_contexts, base, shift);
    PredictedRows<Word> predictions(kind, predicted);
    alignas(64) uint16_t indices[ROW];
    Word padded[ROW] = {};
    for (size_t row = 0; row < rows.n_rows(); row++) {
        prefetch_row(words, rows, row);
        predictions.prefetch(rows, row);
        const Word *part = words + rows.place(row), *old = predictions.of(rows, row);
        if (rows.width < ROW) {  // of frames that are shorter than a row
            std::memcpy(padded, part, rows.width * sizeof(Word));
            part = padded;
        }
        for (size_t i = 0; i < ROW; i += BLOCK) {
            Vec found[Vec::A_BLOCK];
            for (size_t j = 0; j < Vec::A_BLOCK; j++) found[j] = places.of(part + i + j * Vec::N, old + i + j * Vec::N);
            store_block(found, indices + i);
        }
        histogram.add(indices, rows.width);
    }
}

template <class Word>
void count_codes(const Kind& kind, uint32_t k, uint32_t n_contexts, int32_t base, uint32_t shift, const void* words,
                 const Predicted& predicted, const SampleRows& rows, uint32_t* counts, uint32_t* lanes) {
    Histogram histogram(lanes, size_t(n_contexts) * ((BITS<Word> + 1) << k) * 2);
    const Word* some = words_of<Word>(words);
    if (kind.is_float) count_codes_of<Word, true>(kind, k, n_contexts, base, shift, some, predicted, rows, histogram);
    else count_codes_of<Word, false>(kind, k, n_contexts, base, shift, some, predicted, rows, histogram);
    histogram.finish(counts);
}

template <class Word>
uint64_t shift_savings(const Kind& kind, uint32_t k, const void* words, const Predicted& predicted,
                       const SampleRows& rows) {
    typedef LaneOf<Word> Lane;
    const Order<Word> order(kind);
    PredictedRows<Word> predictions(kind, predicted);
    uint64_t n_saved = 0;
    uint32_t lengths[ROW];
    for (size_t row = 0; row < rows.n_rows(); row++) {
        const Word *part = words_of<Word>(words) + rows.place(row), *old = predictions.of(rows, row);
        Lane joined = 0;
        for (size_t i = 0; i < rows.width; i++) {
            const Lane size = Lane(absolute_of(Word(order.ordered(part[i]) - order.ordered(old[i]))));
            const Lane length = Lane(bit_length(size));
            lengths[i] = uint32_t(length);
            joined |= size & ~(Lane(1) << (length ? length - 1 : 0));  // of 0 nothing is left either way
        }
        const uint32_t zeros = trailing_zeros(Word(joined));
        if (!zeros) continue;
        uint32_t n_here = 0;
        for (size_t i = 0; i < rows.width; i++) {
            const uint32_t n_low = lengths[i] > k + 1 ? lengths[i] - 1 - k : 0;
            n_here += n_low < zeros ? n_low : zeros;
        }
        n_saved += n_here;
    }
    return n_saved;
}

// Scaled delta.

template <class Word>
struct Ratio {
    typedef LaneOf<Word> Lane;
    const Magnitude<Word> magnitude;
    const uint32_t m, down, up;
    const int32_t largest;
    const Lane mask;

    explicit Ratio(const Kind& kind)
        : magnitude(kind),
          m(kind.mantissa_bits),
          down(m > 23 ? m - 23 : 0),
          up(m < 23 ? 23 - m : 0),
          largest((1 << kind.exponent_bits) - 1),
          mask((Lane(1) << m) - 1) {}

    INLINE float of(Word word, Word other) const {
        const Lane body = Lane(magnitude.of(word)), old = Lane(magnitude.of(other));
        const int32_t field = int32_t(body >> m), old_field = int32_t(old >> m);
        const int32_t above = int32_t(uint32_t((body & mask) >> down) << up | 1u << 23);
        const int32_t below = int32_t(uint32_t((old & mask) >> down) << up | 1u << 23);
        int32_t octaves = field - old_field;
        octaves = octaves < -30 ? -30 : octaves > 30 ? 30 : octaves;
        const int32_t power_bits = (127 + octaves) << 23;
        float power;
        std::memcpy(&power, &power_bits, sizeof power);
        const float ratio = float(above) / float(below) * power;  // times a power of two: exact
        const bool is_normal = (field > 0) & (old_field > 0) & (field < largest) & (old_field < largest) &
                               (Word(word ^ other) >> (BITS<Word> - 1) == 0);
        int32_t bits;
        std::memcpy(&bits, &ratio, sizeof bits);
        bits &= -int32_t(is_normal);
        float kept;
        std::memcpy(&kept, &bits, sizeof kept);
        return kept;
    }
};

template <class Word>
void ratios(const Kind& kind, const void* words, const void* reference, size_t n, float* out) {
    const Ratio<Word> ratio(kind);
    const Word *some = words_of<Word>(words), *old = words_of<Word>(reference);
    for (size_t i = 0; i < n; i++) out[i] = ratio.of(some[i], old[i]);
}

template <class Word>
uint64_t try_factor(const Kind& kind, uint64_t factor, const void* words, const void* reference, const uint32_t* products,
                    size_t n, uint32_t* counts) {
    typedef LaneOf<Word> Lane;
    typedef Vector<Lane> Vec;
    Model model;
    model.kind = kind;
    model.factor = factor;
    const Scaling<Word> scaling(model);
    const Order<Word> order(kind);
    const Word *some = words_of<Word>(words), *old = words_of<Word>(reference);
    uint32_t tables[COUNT_LANES][(BITS<Word> + 1) * 2];
    if (counts) std::memset(tables, 0, sizeof tables);
    uint64_t n_low = 0;
    for (size_t first = 0; first < n; first += ROW) {
        alignas(64) Word predicted[ROW];
        uint8_t places[ROW];
        const size_t n_here = n - first < ROW ? n - first : ROW;
        for (size_t i = 0; i < n_here; i += BLOCK) {
            Vec scaled[Vec::A_BLOCK];
            for (size_t j = 0; j < Vec::A_BLOCK; j++) {
                const size_t at = first + i + j * Vec::N;
                scaled[j] = scaling.scaled(load<Lane>(old + at), load<Lane>(products + at));
            }
            store_words(scaled, predicted + i);
        }
        uint32_t n_low_here = 0;
        for (size_t i = 0; i < n_here; i++) {
            const Word change = Word(order.ordered(some[first + i]) - order.ordered(predicted[i]));
            const uint32_t length = uint32_t(bit_length(Lane(absolute_of(change))));
            n_low_here += length ? length - 1 : 0;
            places[i] = uint8_t(length * 2 + uint32_t(Word(change >> (BITS<Word> - 1))));
        }
        n_low += n_low_here;
        if (counts)
            for (size_t i = 0; i < n_here; i++) tables[i % COUNT_LANES][places[i]]++;
    }
    if (counts)
        for (size_t i = 0; i < (BITS<Word> + 1) * 2; i++)
            counts[i] = tables[0][i] + tables[1][i] + tables[2][i] + tables[3][i];
    return n_low;
}

constexpr size_t MEDIAN_LANES = 32;

// The lower median of what is not 0 among n values of each lane; one = 2^15 where nothing is left.
INLINE void medians_of(const uint16_t (*values)[MEDIAN_LANES], size_t n, uint16_t* medians) {
    uint16_t ranks[MEDIAN_LANES] = {}, found[MEDIAN_LANES] = {}, n_zeros[MEDIAN_LANES] = {};
    for (size_t j = 0; j < n; j++)
        for (size_t lane = 0; lane < MEDIAN_LANES; lane++) n_zeros[lane] = uint16_t(n_zeros[lane] + (values[j][lane] == 0));
    for (size_t lane = 0; lane < MEDIAN_LANES; lane++) {
        const size_t n_some = n - n_zeros[lane];
        ranks[lane] = uint16_t(n_zeros[lane] + (n_some ? n_some - 1 : 0) / 2);
    }
    // The greatest number that no more values than the rank are less than, bit by bit.
    for (uint32_t bit = 1u << 15; bit; bit >>= 1) {
        uint16_t tried[MEDIAN_LANES], n_less[MEDIAN_LANES] = {};
        for (size_t lane = 0; lane < MEDIAN_LANES; lane++) tried[lane] = uint16_t(found[lane] | bit);
        for (size_t j = 0; j < n; j++)
            for (size_t lane = 0; lane < MEDIAN_LANES; lane++)
                n_less[lane] = uint16_t(n_less[lane] + (values[j][lane] < tried[lane]));
        for (size_t lane = 0; lane < MEDIAN_LANES; lane++)
            found[lane] = n_less[lane] <= ranks[lane] ? tried[lane] : found[lane];
    }
    for (size_t lane = 0; lane < MEDIAN_LANES; lane++)
        medians[lane] = n_zeros[lane] == n ? uint16_t(1u << FACTOR_BITS) : found[lane];
}

INLINE uint16_t factor_of(float ratio, float unit) {
    const float rounded = ratio * unit + 0.5f;
    return uint16_t(int32_t(rounded < 65535.0f ? rounded : 65535.0f));
}

template <class Word>
void row_medians(const Kind& kind, const void* words, const void* reference, uint64_t stride, const uint64_t* rows,
                 uint64_t n_rows, const Runs& runs, float unit, uint16_t* medians) {
    constexpr size_t MOST = 64;  // columns of the lattice
    constexpr uint64_t AHEAD = 16;  // rows
    const Ratio<Word> ratio(kind);
    alignas(64) uint16_t values[MOST][MEDIAN_LANES], found[MEDIAN_LANES];
    const size_t n = runs.n_columns();
    std::memset(values, 0, sizeof values);
    const auto start = [=](uint64_t row) { return (rows ? rows[row] : row) * stride; };
    for (uint64_t first = 0; first < n_rows; first += MEDIAN_LANES) {
        const size_t n_here = size_t(n_rows - first < MEDIAN_LANES ? n_rows - first : MEDIAN_LANES);
        for (size_t lane = 0; lane < n_here; lane++) {
            Word some[MOST], old[MOST];
            uint16_t factors[MOST];
            const uint64_t at = start(first + lane);
            if (first + lane + AHEAD < n_rows) {
                const uint64_t next = start(first + lane + AHEAD);
                prefetch_lattice(words_of<Word>(words) + next, runs);
                prefetch_lattice(words_of<Word>(reference) + next, runs);
            }
            gather_row(words_of<Word>(words) + at, runs, some);
            gather_row(words_of<Word>(reference) + at, runs, old);
            for (size_t j = 0; j < n; j++) factors[j] = factor_of(ratio.of(some[j], old[j]), unit);
            for (size_t j = 0; j < n; j++) values[j][lane] = factors[j];
        }
        medians_of(values, n, found);
        std::memcpy(medians + first, found, n_here * sizeof(uint16_t));
    }
}

template <class Word>
void column_medians(const Kind& kind, const void* words, const void* reference, uint64_t stride, uint64_t n_rows,
                    const uint64_t* columns, uint64_t n_medians, const float* units, uint16_t* medians) {
    constexpr size_t MOST = 512;  // rows
    constexpr size_t AHEAD = 8, LINE = 8;  // rows; columns that most likely share a line of memory
    const Ratio<Word> ratio(kind);
    Word some[MEDIAN_LANES] = {}, old[MEDIAN_LANES] = {};
    alignas(64) uint16_t values[MOST][MEDIAN_LANES], found[MEDIAN_LANES];
    for (uint64_t first = 0; first < n_medians; first += MEDIAN_LANES) {
        const size_t n_here = size_t(n_medians - first < MEDIAN_LANES ? n_medians - first : MEDIAN_LANES);
        for (uint64_t row = 0; row < n_rows; row++) {
            const Word *part = words_of<Word>(words) + row * stride, *old_part = words_of<Word>(reference) + row * stride;
            if (columns) {
                for (size_t lane = 0; lane < n_here; lane++) {
                    some[lane] = part[columns[first + lane]];
                    old[lane] = old_part[columns[first + lane]];
                }
            } else if (n_here < MEDIAN_LANES) {
                std::memcpy(some, part + first, n_here * sizeof(Word));
                std::memcpy(old, old_part + first, n_here * sizeof(Word));
            }
            if (row + AHEAD < n_rows) {
                const uint64_t next = AHEAD * stride;
                for (size_t lane = 0; lane < n_here; lane += LINE) {
                    const uint64_t column = columns ? columns[first + lane] : first + lane;
                    __builtin_prefetch(part + next + column);
                    __builtin_prefetch(old_part + next + column);
                }
            }
            const bool is_copied = columns || n_here < MEDIAN_LANES;
            const Word *new_words = is_copied ? some : part + first, *old_words = is_copied ? old : old_part + first;
            const float unit = units[row];
            for (size_t lane = 0; lane < MEDIAN_LANES; lane++)
                values[row][lane] = factor_of(ratio.of(new_words[lane], old_words[lane]), unit);
        }
        medians_of(values, size_t(n_rows), found);
        std::memcpy(medians + first, found, n_here * sizeof(uint16_t));
    }
}

// Normalise each row of counts to 2^11 and price it. n_symbols: at most 256. Counts of a row: below 2^19 together.
inline void price_tables(const uint32_t* counts, size_t n_contexts, size_t n_symbols, const uint32_t* prices,
                         TablePrice* sums) {
    constexpr uint32_t SIZE = 1 << 11, MOST = 256;
    alignas(64) uint32_t row[MOST], freqs[MOST], entries[MOST];
    const size_t n = (n_symbols + 15) / 16 * 16;  // whole vectors: no loop has a rest
    TablePrice found;
    for (size_t context = 0; context < n_contexts; context++, counts += n_symbols) {
        for (size_t i = n_symbols; i < n; i++) row[i] = 0;
        std::memcpy(row, counts, n_symbols * sizeof(uint32_t));
        uint32_t total = 0, n_present = 0, n_once = 0, most = 0;
        for (size_t i = 0; i < n; i++) {
            total += row[i];
            n_present += row[i] != 0;
            n_once += row[i] == 1;
            most = row[i] > most ? row[i] : most;
        }
        found.n_counted += total;
        found.n_present += n_present;
        found.n_once += n_once;
        if (!total) {  // all of the table goes to symbol 0
            found.log_sizes += 11;
            continue;
        }
        const uint32_t spare = SIZE - n_present;
        const float shares = float(int32_t(spare)) / float(int32_t(total));
        uint32_t sum = 0;
        for (size_t i = 0; i < n; i++) {
            // Off by one at most, which the remainder tells.
            const int32_t guess = int32_t(float(int32_t(row[i])) * shares);
            const int32_t rest = int32_t(row[i] * spare - uint32_t(guess) * total);
            const uint32_t share = uint32_t(guess + (rest >= int32_t(total)) - (rest < 0));
            freqs[i] = (1 + share) & (0u - uint32_t(row[i] != 0));
            sum += freqs[i];
        }
        size_t favourite = 0;
        while (row[favourite] != most) favourite++;
        freqs[favourite] += SIZE - sum;
        for (size_t i = 0; i < n; i++) entries[i] = prices[freqs[i]];
        uint64_t price = 0;
        uint32_t log_sizes = 0;
        for (size_t i = 0; i < n; i++) {
            price += uint64_t(row[i]) * (entries[i] & 0xFFFFFF);
            log_sizes += entries[i] >> 24;
        }
        found.price += price;
        found.log_sizes += log_sizes;
    }
    *sums = found;
}

template <class Word>
void widen(const void* words, uint64_t first, size_t n, uint64_t* out) {
    const Word* part = words_of<Word>(words) + first;
    for (size_t i = 0; i < n; i++) out[i] = part[i];
}

// The word that makes up more than half of all, if any does. By votes in several parts: it has more than half of one.
inline bool majority(const uint64_t* words, size_t n, uint64_t* found) {
    constexpr size_t PARTS = 8;
    uint64_t candidates[PARTS] = {}, leads[PARTS] = {}, n_equal[PARTS] = {};
    const size_t n_whole = n / PARTS * PARTS;
    for (size_t i = 0; i < n_whole; i += PARTS) {
        for (size_t j = 0; j < PARTS; j++) {
            const uint64_t word = words[i + j], candidate = leads[j] ? candidates[j] : word;
            leads[j] = candidate == word ? leads[j] + 1 : leads[j] - 1;
            candidates[j] = candidate;
        }
    }
    for (size_t i = 0; i < n_whole; i += PARTS)
        for (size_t j = 0; j < PARTS; j++) n_equal[j] += words[i + j] == candidates[j];
    for (size_t j = 0; j <= PARTS; j++) {
        if (j < PARTS && n_equal[j] * PARTS * 2 <= n_whole) continue;
        for (size_t other = j < PARTS ? 0 : n_whole; other < (j < PARTS ? 1 : n); other++) {  // the rest is a part too
            const uint64_t candidate = j < PARTS ? candidates[j] : words[other];
            size_t n_here = 0;
            for (size_t i = 0; i < n; i++) n_here += words[i] == candidate;
            if (n_here * 2 > n) {
                *found = candidate;
                return true;
            }
        }
    }
    return false;
}

template <class Word>
constexpr Stats stats_of() {
    return {count_unequal<Word>,   count_unequal_to<Word>,   join_low<Word>,
            count_negative<Word>,  count_unequal_rows<Word>, count_unequal_rows_to<Word>,
            count_highs<Word>,     range_of_highs<Word>,     count_scaled_highs<Word>, low_zeros<Word>,
            count_plane<Word>,     count_split<Word>,        row_means<Word>,          column_means<Word>,
            count_exponents<Word>, count_codes<Word>,        shift_savings<Word>,      ratios<Word>,
            try_factor<Word>,      row_medians<Word>,        column_medians<Word>,     widen<Word>};
}

}  // namespace stats
TRICOMP_END
