// The planner of `full`; see planner_parts.h. Mirrors reference/planner_full.py.

#include <algorithm>
#include <atomic>
#include <cstring>

#include "planner_parts.h"

namespace tricomp {
namespace planning {

namespace {

constexpr size_t PLANE_ROWS = 32;  // of the sample, to twice as many, on which byte planes are weighed
constexpr double PLANE_BITS = 0.03;  // what coding a byte plane must save
constexpr uint64_t SCALE_BITS = 5;  // of one scale of a vector, roughly
constexpr double NEAR_GAIN = 0.1;  // splits that promise nearly as much as the best are all measured
constexpr double HOPELESS_BITS = 4.0;  // what no scales have been seen to save
constexpr int32_t HINT_OCTAVES = 4;  // about those that the thin sample has, where the rest of the sample may have words
constexpr uint32_t PHASES[3] = {1, 4, 8};

struct Scales {
    std::vector<int16_t> rows, columns;
    uint64_t n_columns = 0;

    Levels levels() const { return {rows.data(), columns.empty() ? nullptr : columns.data(), n_columns}; }
};

// Counts of high parts by phase, of zero words by phase.
struct Grid {
    std::vector<uint32_t> counts;  // [n_values * n_phases]
    size_t n_values = 0, n_phases = 1;  // 1: there are no levels, all is phase 0
    uint32_t zeros[8] = {};
    int32_t low = 0;
    uint64_t n_outside = 0;
};

// Octaves, less those of the levels, that words may be looked for in.
struct Octaves {
    int32_t first = 0;
    size_t n = 0;  // 0: nobody knows
};

void set_octaves(Grid& grid, const uint32_t* octaves, size_t n, int32_t first_octave, uint32_t k) {
    const auto found = densest(octaves, n, MAX_SYMBOLS - 1);
    grid.low = (first_octave + int32_t(found.first)) * (1 << k);
    grid.n_values = (found.second - found.first) << k;
}

// Counts by octave less that of the level, of words that are not zero.
std::vector<uint32_t> count_octaves(const Frame& frame, const SampleRows& rows, const Levels& levels, int32_t first_octave,
                                    size_t n_octaves) {
    const Kind& kind = frame.request.kind;
    std::vector<uint32_t> counts(n_octaves, 0);
    for (size_t row = 0; row < rows.n_rows(); row++) {
        for (size_t i = 0; i < rows.width; i++) {
            const uint64_t word = frame.word(rows.place(row) + i), position = rows.first(row) + i;
            const uint64_t column = position % levels.n_columns;
            if (!word) continue;
            const int32_t octave = int32_t(word >> kind.mantissa_bits & ((uint64_t(1) << kind.exponent_bits) - 1));
            const int32_t level = levels.rows[position / levels.n_columns] + (levels.columns ? levels.columns[column] : 0);
            counts[size_t(octave - (level >> 3) - first_octave)]++;
        }
    }
    return counts;
}

// hint: if all words lie there, they are passed once.
Grid count_highs(Frame& frame, const SampleRows& rows, const Scales* scales, uint32_t k, const Octaves& hint = {}) {
    const Kind& kind = frame.request.kind;
    const void* words = frame.request.words;
    std::vector<uint32_t>& counts = frame.scratch.counts;
    Grid grid;
    if (!scales) {
        const size_t n = size_t(1) << (kind.exponent_bits + k);
        frame.stats.count_highs(kind, k, words, rows, counts.data(), frame.scratch.lanes.data());
        grid.zeros[0] = counts[n];
        std::vector<uint32_t> octaves(n >> k, 0);
        uint64_t n_all = 0;
        for (size_t i = 0; i < n; i++) octaves[i >> k] += counts[i];
        for (const uint32_t count : octaves) n_all += count;
        if (!n_all) {
            grid.n_values = size_t(1) << k;
            grid.counts.assign(grid.n_values, 0);
            return grid;
        }
        set_octaves(grid, octaves.data(), octaves.size(), 0, k);
        grid.counts.assign(counts.begin() + grid.low, counts.begin() + grid.low + long(grid.n_values));
        for (const uint32_t count : grid.counts) n_all -= count;
        grid.n_outside = n_all;
        return grid;
    }
    grid.n_phases = 8;
    const Levels levels = scales->levels();
    uint32_t* const lanes = frame.scratch.lanes.data();
    const auto count = [&](int32_t first_octave, size_t n_octaves) {
        grid.low = first_octave * (1 << k);
        grid.n_values = n_octaves << k;
        frame.stats.count_scaled_highs(kind, k, words, rows, levels, grid.low, uint32_t(grid.n_values), counts.data(), lanes);
        std::copy_n(counts.begin() + long(8 * grid.n_values), 8, grid.zeros);
        grid.n_outside = counts[8 * grid.n_values + 8];
        return grid.n_outside == 0;
    };
    if (hint.n && count(hint.first, hint.n)) {
        const size_t n_each = size_t(8) << k;
        const auto is_in_use = [](uint32_t found) { return found != 0; };
        const auto begin = counts.begin(), end = begin + long(8 * grid.n_values), used = std::find_if(begin, end, is_in_use);
        if (used != end) {
            size_t first = size_t(used - begin) / n_each, last = hint.n;
            while (std::none_of(begin + long((last - 1) * n_each), begin + long(last * n_each), is_in_use)) last--;
            if (last - first <= MAX_SYMBOLS - 1) {
                grid.low = (hint.first + int32_t(first)) * (1 << k);
                grid.n_values = (last - first) << k;
                grid.counts.assign(begin + long(first * n_each), begin + long(last * n_each));
                return grid;
            }
        }
    }
    int32_t range[2];
    frame.stats.range_of_highs(kind, k, words, rows, levels, range);
    const bool is_empty = range[0] > range[1];
    const int32_t first_octave = is_empty ? 0 : range[0] >> k;
    const size_t n_octaves = is_empty ? 1 : size_t((range[1] >> k) - first_octave + 1);
    if (n_octaves > MAX_SYMBOLS - 1) {  // seldom: which octaves are the densest must be counted first
        const std::vector<uint32_t> octaves = count_octaves(frame, rows, levels, first_octave, n_octaves);
        set_octaves(grid, octaves.data(), n_octaves, first_octave, k);
        count(grid.low >> k, grid.n_values >> k);
    } else {
        count(first_octave, n_octaves);
    }
    grid.counts.assign(counts.begin(), counts.begin() + long(8 * grid.n_values));
    return grid;
}

// The grid with the lowest bit of its high parts merged.
void coarsen(Grid& grid) {
    const size_t n = grid.n_phases;
    grid.n_values /= 2;
    for (size_t value = 0; value < grid.n_values; value++)
        for (size_t phase = 0; phase < n; phase++)
            grid.counts[value * n + phase] = grid.counts[2 * value * n + phase] + grid.counts[(2 * value + 1) * n + phase];
}

// The counted values in a window of symbols, of n_contexts phases. Symbol 0: the zero word.
void window(const Grid& grid, size_t n_contexts, Table& table) {
    const size_t n_phases = grid.n_phases, width = n_phases / n_contexts;
    std::vector<uint32_t> totals(grid.n_values, 0);
    uint64_t n_all = 0;
    for (size_t value = 0; value < grid.n_values; value++) {
        for (size_t phase = 0; phase < n_phases; phase++) totals[value] += grid.counts[value * n_phases + phase];
        n_all += totals[value];
    }
    const auto found = densest(totals.data(), totals.size(), std::min(MAX_SYMBOLS, MAX_ENTRIES / n_contexts) - 1);
    table.first = found.first;
    table.n_contexts = n_contexts;
    table.n_symbols = found.second - found.first + 1;
    table.counts.assign(n_contexts * table.n_symbols, 0);
    uint32_t zeros[8] = {}, n_zeros = 0;
    for (size_t phase = 0; phase < n_phases; phase++) {
        zeros[phase / width] += grid.zeros[phase];
        n_zeros += grid.zeros[phase];
    }
    // Where there are zeros, a phase without one in the sample may meet one yet.
    for (size_t context = 0; context < n_contexts; context++)
        table.counts[context * table.n_symbols] = std::max(zeros[context], std::min(n_zeros, 1u));
    for (size_t value = found.first; value < found.second && value < grid.n_values; value++) {
        for (size_t phase = 0; phase < n_phases; phase++)
            table.counts[phase / width * table.n_symbols + value - found.first + 1] += grid.counts[value * n_phases + phase];
        n_all -= totals[value];
    }
    table.n_missed = n_all;
}

// k and phases of one split. bits: per word of the symbols, less k, so that every k compares.
struct Fit {
    double bits = 0.0;
    uint32_t k = 0, n_contexts = 1;
    Octaves octaves;  // of the thin sample, and some about them
};

Fit best_full(Frame& frame, const Scales* scales, double side_bits) {
    const uint32_t k_most = std::min(MAX_MANTISSA_BITS, frame.request.kind.mantissa_bits);
    const bool has_phases = scales && frame.is_dense();
    Grid grid = count_highs(frame, frame.thin, scales, k_most);
    const Octaves octaves{(grid.low >> k_most) - HINT_OCTAVES, (grid.n_values >> k_most) + 2 * HINT_OCTAVES};
    Table table;
    double bits[MAX_MANTISSA_BITS + 1][3];
    for (uint32_t k = k_most + 1; k-- > 0;) {
        if (k < k_most) coarsen(grid);
        for (size_t i = 0; i < (has_phases ? 3 : 1); i++) {
            window(grid, PHASES[i], table);
            bits[k][i] = symbol_cost(frame, table.counts.data(), table.n_contexts, table.n_symbols,
                                     grid.n_outside + table.n_missed, side_bits) - double(k);
        }
    }
    Fit best{bits[0][0], 0, 1, octaves};
    for (uint32_t k = 0; k <= k_most; k++)
        for (size_t i = 0; i < (has_phases ? 3 : 1); i++)
            if (bits[k][i] < best.bits) best = {bits[k][i], k, PHASES[i], octaves};
    return best;
}

// Bits per word that scales of a split would save, by the magnitudes' entropy on a small lattice.
double split_gain(Frame& frame, uint64_t n_columns, bool has_column_scale) {
    Scratch& scratch = frame.scratch;
    const Lattice lattice = lattice_of(SPLIT, n_columns, frame.n_words);
    const Standing some = frame.standing(lattice);
    const uint64_t n_whole = frame.n_words / n_columns, n_rows = lattice.n_rows, n_some = lattice.n_some();
    SplitCounts split;
    split.before = scratch.counts.data();
    split.after = scratch.more.data();
    frame.stats.count_split(frame.request.kind, some.words, some.stride, some.rows, size_t(n_rows),
                            some.columns, has_column_scale, split, scratch.lanes.data());
    if (!split.n_before) return 0.0;
    const double saved = entropy_bits(split.before, split.n_before) - entropy_bits(split.after, split.n_after);
    // Scales fit the words that they are made of better than others.
    double unseen = 1.0 / double(n_some) - 1.0 / double(n_columns);
    if (has_column_scale) unseen += 1.0 / double(n_rows) - 1.0 / double(n_whole);
    const uint64_t n_vector = (frame.n_words + n_columns - 1) / n_columns + (has_column_scale ? n_columns : 0);
    return saved / double(n_rows * n_some) - LEARNING * unseen - double(SCALE_BITS * n_vector) / double(frame.n_words);
}

// The rounded mean of the octaves of each row of a lattice; -1 where all are zero.
void measure_rows(const Frame& frame, const Lattice& lattice, int16_t* means) {
    const Kind& kind = frame.request.kind;
    const Standing some = frame.standing(lattice);
    if (some.is_means) {
        std::memcpy(means, some.words, lattice.n_rows * sizeof(int16_t));
        return;
    }
    const uint64_t row_bytes = some.stride * (kind.word_bits / 8);
    in_parts(frame, lattice.n_rows, PART_ROWS, [&](uint64_t first, uint64_t n) {
        frame.stats.row_means(kind, some.words + first * row_bytes, some.stride, n, some.columns, means + first);
    });
}

// Row and column scales of a frame, in eighths of an octave: means over the nonzero words of a lattice.
Scales fit_scales(Frame& frame, uint64_t n_columns, bool has_column_scale) {
    const Kind& kind = frame.request.kind;
    const uint64_t n_whole = frame.n_words / n_columns, tail = frame.n_words % n_columns;
    Scales scales;
    scales.n_columns = n_columns;
    scales.rows.resize(n_whole + (tail ? 1 : 0));
    measure_rows(frame, lattice_of(SCALE_ROWS, n_columns, frame.n_words), scales.rows.data());
    if (tail) measure_rows(frame, lattice_of(SCALE_TAIL, n_columns, frame.n_words), scales.rows.data() + n_whole);
    if (std::find(scales.rows.begin(), scales.rows.end(), int16_t(-1)) != scales.rows.end()) {
        std::vector<int16_t> known;
        for (const int16_t row : scales.rows)
            if (row >= 0) known.push_back(row);
        int16_t typical = 0;
        if (!known.empty()) {
            const auto middle = known.begin() + long((known.size() - 1) / 2);
            std::nth_element(known.begin(), middle, known.end());
            typical = *middle;
        }
        std::replace(scales.rows.begin(), scales.rows.end(), int16_t(-1), typical);
    }
    if (has_column_scale) {
        scales.columns.resize(n_columns);
        const Lattice lattice = lattice_of(SCALE_COLUMNS, n_columns, frame.n_words);
        const Standing some = frame.standing(lattice);
        frame.stats.column_means(kind, some.words, some.stride, lattice.n_rows, n_columns, scales.rows.data(), lattice.step,
                                 scales.columns.data());
    }
    return scales;
}

// How the remainders of `full` are packed.
struct Packing {
    double bits = 0.0;
    Remainder remainder = NO_REMAINDER;
    uint32_t shift = 0, coded_planes = 0;
    bool has_block_shifts = false;
};

uint32_t trailing_zeros(uint64_t word) { return word ? uint32_t(__builtin_ctzll(word)) : 64; }

// OR of all words & mask; may lack some once bit 0 is set.
uint64_t join_low(const Frame& frame, uint64_t mask) {
    if (frame.request.facts) return frame.request.facts->joined & mask;
    const uint8_t* words = static_cast<const uint8_t*>(frame.request.words);
    const uint64_t word_bytes = frame.word_bits() / 8;
    std::atomic<uint64_t> joined{0};
    in_parts(frame, frame.n_words, PART_BYTES / word_bytes, [&](uint64_t first, uint64_t n) {
        if (!(joined & 1)) joined |= frame.stats.join_low(words + first * word_bytes, size_t(n), mask);
    });
    return joined;
}

Packing pack(Frame& frame, uint32_t k, bool has_sign) {
    const Kind& kind = frame.request.kind;
    const void* words = frame.request.words;
    const uint32_t n_low = kind.mantissa_bits - k, n_bits = n_low + has_sign;
    Packing packing;
    packing.bits = double(k);
    if (n_bits == 0) return packing;
    const uint64_t mask = (uint64_t(1) << n_low) - 1, n_chunks = frame.n_chunks();
    uint64_t joined, n_saved;
    frame.stats.low_zeros(words, frame.thin, mask, n_low, &joined, &n_saved);
    uint32_t shift = std::min(trailing_zeros(joined), n_low);
    if (shift)  // what the sample suggests must hold for every word
        shift = std::min(trailing_zeros(join_low(frame, mask)), n_low);
    double plane_bits = 0.0;
    uint32_t coded_planes = 0;
    SampleRows some = frame.thin;
    some.step *= (std::max<size_t>(frame.thin.n_rows() / PLANE_ROWS, 1) - 1) | 1;
    for (uint32_t from = shift, plane = 0; from < n_bits; from += 8, plane++) {
        const uint32_t width = std::min(n_bits - from, 8u);
        double coded = double(width);
        if (frame.is_dense()) {
            uint32_t* counts = frame.scratch.counts.data();
            frame.stats.count_plane(words, some, n_low, has_sign, from, width, counts, frame.scratch.lanes.data());
            const size_t n_values = size_t(1) << width;
            const double n_present = double(n_values - size_t(std::count(counts, counts + n_values, 0u)));
            const double fixed = double(8 * n_values + STATE_BITS * n_chunks) / double(frame.n_words);
            coded = (entropy_bits(counts, n_values) + LEARNING * n_present) / double(some.n_words()) + fixed + PLANE_BITS;
        }
        plane_bits += std::min(coded, double(width));
        if (coded < double(width)) coded_planes |= 1u << plane;
    }
    // Stack.
    const double n_rows = double(frame.thin.n_rows());
    const double n_zeros = double(frame.thin.n_words() - frame.stats.count_unequal_rows_to(words, 0, frame.thin));
    const bool has_block_shifts = double(n_saved) / n_rows - 8.0 / double(ROW) > SIMPLER_BITS;
    const double width_bits = has_block_shifts ? double(n_bits) - double(n_saved) / n_rows : double(n_bits);
    double stack_bits = (1.0 - n_zeros / double(frame.thin.n_words())) * width_bits;
    stack_bits += double(STATE_BITS * n_chunks) / double(frame.n_words);
    stack_bits += has_block_shifts ? 8.0 / double(ROW) : 0.0;
    if (stack_bits < plane_bits - SIMPLER_BITS) {
        packing.bits = stack_bits + double(k);
        packing.remainder = STACK;
        packing.has_block_shifts = has_block_shifts;
    } else {
        packing.bits = plane_bits + double(k);
        packing.remainder = PLANES;
        packing.shift = shift;
        packing.coded_planes = coded_planes;
    }
    return packing;
}

void finish_full(Frame& frame, const Fit& fit, const Scales& scales, const Packing& packing, bool has_sign,
                 PlanResult& plan) {
    const bool is_scaled = scales.n_columns > 0;
    const SampleRows counted = frame.counted(fit.n_contexts);
    const Grid grid = count_highs(frame, counted, is_scaled ? &scales : nullptr, fit.k, fit.octaves);
    Table table;
    window(grid, fit.n_contexts, table);
    plan.predict = FULL;
    plan.k = fit.k;
    plan.has_sign = has_sign;
    plan.base = grid.low + int32_t(table.first);
    plan.remainder = packing.remainder;
    plan.shift = packing.shift;
    plan.coded_planes = packing.coded_planes;
    plan.has_block_shifts = packing.has_block_shifts;
    plan.n_columns = scales.n_columns;
    plan.has_column_scale = !scales.columns.empty();
    plan.level_rows = scales.rows;
    plan.level_columns = scales.columns;
    give_symbols(frame, table, counted.n_words(), plan);
    const uint32_t n_low = frame.request.kind.mantissa_bits - fit.k, n_bits = n_low + has_sign;
    for (uint32_t from = packing.shift, plane = 0; from < n_bits; from += 8, plane++) {
        if (!(packing.coded_planes >> plane & 1)) continue;
        const uint32_t width = std::min(n_bits - from, 8u);
        const uint32_t* found = frame.scratch.counts.data();
        frame.stats.count_plane(frame.request.words, frame.sample, n_low, has_sign, from, width, frame.scratch.counts.data(),
                                frame.scratch.lanes.data());
        // One count for all, so that a byte which the sample missed can still be coded.
        std::vector<uint64_t> counts(size_t(1) << width);
        for (size_t i = 0; i < counts.size(); i++) counts[i] = 4 * uint64_t(found[i]) + 1;
        plan.plane_freqs.emplace_back(counts.size());
        normalise(counts.data(), counts.size(), plan.plane_freqs.back().data());
    }
}

// Without scales, and the splits of which they seem worth fitting.
struct Unscaled {
    bool has_sign;
    Fit best;
    std::vector<std::pair<uint64_t, bool>> promising;
};

Unscaled unscaled(Frame& frame, double rival) {
    Unscaled found;
    const size_t n_negative = frame.stats.count_negative(frame.request.words, frame.thin);
    found.has_sign = n_negative * 1000 > frame.thin.n_words();
    found.best = best_full(frame, nullptr, 0.0);
    const double rest = double(frame.request.kind.mantissa_bits + found.has_sign);
    if (!(found.best.bits + rest < rival + HOPELESS_BITS)) return found;
    const double least = std::max(SIMPLER_BITS, found.best.bits + rest - rival);
    const std::vector<std::pair<uint64_t, bool>> cuts = splits(frame.request);
    std::vector<double> gains;
    for (const auto& cut : cuts) gains.push_back(split_gain(frame, cut.first, cut.second));
    const double first = gains.empty() ? 0.0 : *std::max_element(gains.begin(), gains.end());
    for (size_t i = 0; i < cuts.size(); i++)
        if (!(gains[i] <= least || gains[i] < first - NEAR_GAIN)) found.promising.push_back(cuts[i]);
    return found;
}

}  // namespace

std::vector<std::pair<uint64_t, bool>> promising_splits(Frame& frame, double rival, double& bits) {
    const Unscaled found = unscaled(frame, rival);
    if (found.promising.empty()) bits = found.best.bits + pack(frame, found.best.k, found.has_sign).bits;
    return found.promising;
}

Choice full_choice(Frame& frame, double rival) {
    const Unscaled found = unscaled(frame, rival);
    const bool has_sign = found.has_sign;
    Fit best = found.best;
    Scales scales;
    for (const auto& cut : found.promising) {
        Scales fitted = fit_scales(frame, cut.first, cut.second);
        const double side_bits =
            vector_bits(fitted.rows, fitted.rows.size()) + vector_bits(fitted.columns, fitted.columns.size());
        const Fit scaled = best_full(frame, &fitted, side_bits);
        if (scaled.bits < best.bits) {
            best = scaled;
            scales = std::move(fitted);
        }
    }
    const Packing packing = pack(frame, best.k, has_sign);
    return {best.bits + packing.bits, [&frame, best, packing, has_sign, scales = std::move(scales)](PlanResult& plan) {
                finish_full(frame, best, scales, packing, has_sign, plan);
            }};
}

}  // namespace planning
}  // namespace tricomp
