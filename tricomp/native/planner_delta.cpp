// The planner of `delta` and `scaled delta`; see planner_parts.h. Mirrors reference/planner_delta.py.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "planner_parts.h"

namespace tricomp {
namespace planning {

namespace {

constexpr uint32_t K_MOST = 3;  // most bits below the leading one that a delta's symbol may hold
constexpr size_t EXPONENTS = 16;  // of the prediction that contexts are made of, the last one at TOP_PERCENT of the words
constexpr uint64_t TOP_PERCENT = 97;
constexpr size_t TOP_STEP = 4;  // rows of the thin sample of which one is looked at for that
constexpr std::pair<size_t, uint32_t> WINDOWS[] = {{8, 0}, {8, 1}, {4, 1}, {4, 0}};  // contexts, log2 of exponents in one
constexpr double DECAY_BITS = 0.03;  // what a factor must save where numbers have signs
constexpr float RATIO_LOW = 0.26f, RATIO_HIGH = 3.9f;
constexpr int64_t FACTOR_ONE = 1 << FACTOR_BITS;

struct Factors {
    std::vector<uint16_t> rows, columns;
    uint64_t n_columns = 0, common = 1u << 30;

    Predicted of(const void* reference) const {
        return {reference, rows.data(), columns.empty() ? nullptr : columns.data(), n_columns, common};
    }
};

// bits: per word, remainders included.
struct Fit {
    double bits = 0.0;
    uint32_t k = 0;
    bool has_sign = true;
    size_t n_contexts = 1;
    int32_t context_base = 0;
    uint32_t context_shift = 0;
};

// Counts of the codes that occur, in n_rows contexts or exponents, at every k up to the finest and with each place of the
// sign. Each is made when it is first asked for.
class Codes {
  public:
    // counts: [n_rows][(W + 1) << k][2].
    Codes(const uint32_t* counts, size_t n_rows, uint32_t word_bits, uint32_t k)
        : n_rows_(n_rows), n_lengths_(word_bits + 1), zeros_(n_rows) {
        const size_t n_codes = n_lengths_ << k, size = size_t(1) << k;
        std::vector<uint32_t> totals(2 * n_codes, 0);
        for (size_t row = 0; row < n_rows; row++) {
            const uint32_t* given = counts + row * 2 * n_codes;
            zeros_[row] = given[0] + given[1];
            for (size_t i = 2; i < 2 * n_codes; i++) totals[i] += given[i];
        }
        size_t first = 2, last = 2 * n_codes;
        while (first < last && !totals[first]) first++;
        while (first < last && !totals[last - 1]) last--;
        first_ = first / 2 / size;  // whole lengths
        n_used_ = first < last ? (last - 1) / 2 / size + 1 - first_ : 0;
        View& whole = views_[k][0];
        whole.counts.resize(n_rows * n_used_ * size * 2);
        for (size_t row = 0; row < n_rows; row++)
            std::copy_n(counts + (row * n_codes + first_ * size) * 2, n_used_ * size * 2,
                        whole.counts.data() + row * n_used_ * size * 2);
        add_totals(whole, k, false);
    }

    // The counted codes in a window of symbols. context_of: of each row. Symbol 0: no difference.
    template <class ContextOf>
    void fill(uint32_t k, bool has_sign, size_t n_contexts, ContextOf context_of, Table& table) {
        const View& view = at(k, has_sign);
        const auto found =
            densest(view.totals.data(), view.totals.size(), std::min(MAX_SYMBOLS, MAX_ENTRIES / n_contexts) - 1);
        table.first = std::max<size_t>(found.first, 1);
        table.n_contexts = n_contexts;
        table.n_symbols = found.second - table.first + 1;
        table.counts.assign(n_contexts * table.n_symbols, 0);
        const size_t n_each = (has_sign ? 1 : 2) << k, begin = first_ * n_each, n = n_used_ * n_each;
        const size_t first = std::max(table.first, begin), last = std::min(found.second, begin + n);
        for (size_t row = 0; row < n_rows_; row++) {
            uint32_t* out = table.counts.data() + context_of(row) * table.n_symbols;
            out[0] += zeros_[row];
            const uint32_t* given = view.counts.data() + row * n;
            for (size_t code = first; code < last; code++) out[code - table.first + 1] += given[code - begin];
        }
        table.n_missed = 0;
        for (size_t code = begin; code < begin + n; code++)
            if (code < table.first || code >= found.second) table.n_missed += view.totals[code];
    }

    // Bits of the remainders of the table's words.
    uint64_t low_bits(uint32_t k, bool has_sign, const Table& table) {
        const std::vector<uint32_t>& totals = at(k, has_sign).totals;
        uint64_t sum = 0;
        for (size_t code = table.first; code < table.first + table.n_symbols - 1; code++) {
            const size_t length = (has_sign ? code : code >> 1) >> k;
            sum += uint64_t(totals[code]) * ((length > k + 1 ? length - 1 - k : 0) + has_sign);
        }
        return sum;
    }

  private:
    struct View {
        std::vector<uint32_t> counts;  // [n_rows][codes of the lengths that occur], of both signs in turn or together
        std::vector<uint32_t> totals;  // of all codes
    };

    const View& at(uint32_t k, bool has_sign) {
        View& view = views_[k][has_sign];
        if (!view.totals.empty()) return view;
        if (has_sign) {
            const std::vector<uint32_t>& both = at(k, false).counts;
            view.counts.resize(both.size() / 2);
            for (size_t i = 0; i < view.counts.size(); i++) view.counts[i] = both[2 * i] + both[2 * i + 1];
        } else {  // two codes of k + 1 become one
            const std::vector<uint32_t>& finer = at(k + 1, false).counts;
            view.counts.resize(finer.size() / 2);
            for (size_t i = 0; i < view.counts.size(); i += 2) {
                view.counts[i] = finer[2 * i] + finer[2 * i + 2];
                view.counts[i + 1] = finer[2 * i + 1] + finer[2 * i + 3];
            }
        }
        add_totals(view, k, has_sign);
        return view;
    }

    void add_totals(View& view, uint32_t k, bool has_sign) {
        const size_t n_each = (has_sign ? 1 : 2) << k, n = n_used_ * n_each;
        view.totals.assign(n_lengths_ * n_each, 0);
        uint32_t* out = view.totals.data() + first_ * n_each;
        for (size_t row = 0; row < n_rows_; row++)
            for (size_t i = 0; i < n; i++) out[i] += view.counts[row * n + i];
    }

    size_t n_rows_, n_lengths_, first_ = 0, n_used_ = 0;  // lengths of differences that occur
    std::vector<uint32_t> zeros_;
    View views_[K_MOST + 1][2];
};

// The best place of the sign, then the best contexts, then the best k.
Fit best_delta(Frame& frame, const Predicted& predicted, double side_bits) {
    const Kind& kind = frame.request.kind;
    std::vector<uint32_t>& counts = frame.scratch.counts;
    const size_t n_exponents = kind.is_float ? size_t(1) << kind.exponent_bits : kind.word_bits + 1;
    SampleRows some = frame.thin;
    some.step *= TOP_STEP;
    frame.stats.count_exponents(kind, predicted, some, counts.data(), n_exponents, frame.scratch.lanes.data());
    const uint64_t n_words = frame.thin.n_words(), target = some.n_words() * TOP_PERCENT / 100;
    int32_t end = 0;
    uint64_t covered = counts[0];
    while (covered < target) covered += counts[size_t(++end)];
    end++;
    const int32_t base = end - int32_t(EXPONENTS);
    frame.stats.count_codes(kind, K_MOST, EXPONENTS, base, 0, frame.request.words, predicted, frame.thin, counts.data(),
                            frame.scratch.lanes.data());
    Table table;
    Codes codes(counts.data(), EXPONENTS, kind.word_bits, K_MOST);
    const auto fit = [&](uint32_t k, bool has_sign, size_t n_contexts, uint32_t shift) {
        const int32_t start = int32_t(EXPONENTS) - int32_t(n_contexts << shift);
        const auto context_of = [=](size_t place) {
            const int32_t context = (int32_t(place) - start) >> shift;
            return size_t(std::min(std::max(context, 0), int32_t(n_contexts - 1)));
        };
        codes.fill(k, has_sign, n_contexts, context_of, table);
        Fit found;
        found.bits = symbol_cost(frame, table.counts.data(), n_contexts, table.n_symbols, table.n_missed, side_bits);
        found.bits += double(codes.low_bits(k, has_sign, table)) / double(n_words);
        found.k = k;
        found.has_sign = has_sign;
        found.n_contexts = n_contexts;
        found.context_base = n_contexts > 1 ? base + start : 0;
        found.context_shift = shift;
        return found;
    };
    Fit best = fit(frame.is_dense() ? 1 : 0, true, 1, 0);
    const auto consider = [&](const Fit& other) {
        if (other.bits < best.bits) best = other;
    };
    if (frame.is_dense()) {
        consider(fit(1, false, 1, 0));
        for (const auto& window : WINDOWS) consider(fit(1, best.has_sign, window.first, window.second));
        for (const uint32_t k : {0u, 2u, 3u}) consider(fit(k, best.has_sign, best.n_contexts, best.context_shift));
        if (best.k > 1)  // eight contexts may lack the room for so many symbols
            for (const auto& window : WINDOWS) consider(fit(best.k, best.has_sign, window.first, window.second));
    }
    best.bits += double(STATE_BITS * frame.n_chunks()) / double(frame.n_words);
    return best;
}

void finish_delta(Frame& frame, const Fit& fit, const Predicted& predicted, PlanResult& plan) {
    const Kind& kind = frame.request.kind;
    const SampleRows counted = frame.counted(fit.n_contexts);
    std::vector<uint32_t>& counts = frame.scratch.counts;
    frame.stats.count_codes(kind, fit.k, uint32_t(fit.n_contexts), fit.context_base, fit.context_shift, frame.request.words,
                            predicted, counted, counts.data(), frame.scratch.lanes.data());
    Codes codes(counts.data(), fit.n_contexts, kind.word_bits, fit.k);
    Table table;
    codes.fill(fit.k, fit.has_sign, fit.n_contexts, [](size_t row) { return row; }, table);
    plan.remainder = STACK;
    plan.k = fit.k;
    plan.has_sign = fit.has_sign;
    plan.base = int32_t(table.first) - 1;
    plan.context_base = fit.n_contexts > 1 ? fit.context_base : 0;
    plan.context_shift = fit.n_contexts > 1 ? fit.context_shift : 0;
    give_symbols(frame, table, counted.n_words(), plan);
}

// Some words of the sample, copied: probes of factors. room: up to a multiple of 32 words.
struct Probe {
    SampleRows rows;  // where they are from
    std::vector<uint64_t> words, reference;  // as many bytes as are needed
    std::vector<uint32_t> spread;  // factor of row and column, one = 2^15
    size_t n = 0;
};

Probe probe_of(const Frame& frame) {
    Probe probe;
    const SampleRows rows = probe.rows = probe_rows(frame.thin);
    const size_t n_bytes = frame.word_bits() / 8, row_bytes = rows.width * n_bytes;
    probe.n = rows.n_words();
    const size_t room = (probe.n * n_bytes + 32 * n_bytes) / 8 + 1;
    probe.words.assign(room, 0);
    probe.reference.assign(room, 0);
    const uint8_t* words = static_cast<const uint8_t*>(frame.request.words);
    const uint8_t* reference = static_cast<const uint8_t*>(frame.request.reference);
    uint8_t* out = reinterpret_cast<uint8_t*>(probe.words.data());
    uint8_t* old = reinterpret_cast<uint8_t*>(probe.reference.data());
    for (size_t row = 0; row < rows.n_rows(); row++) {
        std::memcpy(out + row * row_bytes, words + rows.place(row) * n_bytes, row_bytes);
        std::memcpy(old + row * row_bytes, reference + rows.place(row) * n_bytes, row_bytes);
    }
    probe.spread.assign(probe.n + 32, uint32_t(FACTOR_ONE));
    return probe;
}

size_t count_negative(const Frame& frame, const Probe& probe) {
    uint64_t whole = 0;
    SampleRows all;
    all.firsts = all.places = &whole;
    all.n_all = 1;
    size_t n = 0;
    for (size_t first = 0; first < probe.n; first += ROW) {
        whole = first;
        all.width = std::min(probe.n - first, ROW);
        n += frame.stats.count_negative(probe.words.data(), all);
    }
    return n;
}

struct Tried {
    uint64_t common;
    double cost, plain;  // bits per word with the common factor, and with the factor one
};

// Positive floats in ascending order: as integers their bits are in the same order.
void sort(std::vector<float>& values) {
    constexpr uint32_t DIGITS = 1 << 9;
    std::vector<uint32_t> keys(values.size()), others(values.size());
    if (values.empty()) return;
    std::memcpy(keys.data(), values.data(), values.size() * sizeof(float));
    const uint32_t least = *std::min_element(keys.begin(), keys.end());
    for (uint32_t& key : keys) key -= least;
    const uint32_t most = *std::max_element(keys.begin(), keys.end());
    for (uint32_t down = 0; down < 32 && most >> down; down += 9) {
        uint32_t places[DIGITS + 1] = {};
        for (const uint32_t key : keys) places[(key >> down & (DIGITS - 1)) + 1]++;
        for (uint32_t digit = 0; digit < DIGITS; digit++) places[digit + 1] += places[digit];
        for (const uint32_t key : keys) others[places[key >> down & (DIGITS - 1)]++] = key;
        keys.swap(others);
    }
    for (uint32_t& key : keys) key += least;
    std::memcpy(values.data(), keys.data(), values.size() * sizeof(float));
}

// The middle one of the most values that are alike but for their lowest 6 bits; the first of several such. values: sorted.
float commonest(const std::vector<float>& values) {
    size_t most = 0, at = 0;
    uint32_t previous = 0;
    for (size_t i = 0, first = 0; i < values.size(); i++) {
        uint32_t bits;
        std::memcpy(&bits, &values[i], sizeof bits);
        if (bits >> 6 != previous) first = i;
        previous = bits >> 6;
        if (i + 1 - first > most) {
            most = i + 1 - first;
            at = first;
        }
    }
    return values[at + most / 2];
}

// The common factor with which the probed words cost least.
Tried best_factor(Frame& frame, const Probe& probe, size_t n_tried) {
    const Kind& kind = frame.request.kind;
    std::vector<float> ratios(probe.n), known;
    frame.stats.ratios(kind, probe.words.data(), probe.reference.data(), probe.n, ratios.data());
    known.reserve(probe.n);
    for (size_t i = 0; i < probe.n; i++) {
        const float ratio = ratios[i] * (float(FACTOR_ONE) / float(probe.spread[i]));
        if (ratio > RATIO_LOW && ratio < RATIO_HIGH) known.push_back(ratio);
    }
    sort(known);
    std::vector<uint64_t> candidates{uint64_t(1) << 30};
    const auto consider = [&](float ratio) { candidates.push_back(uint64_t(double(ratio) * double(1 << 30))); };
    for (size_t i = 0; i < n_tried && !known.empty(); i++) consider(known[known.size() * (2 * i + 1) / (2 * n_tried)]);
    // A power of the decay is a float32 number: what is nearest to it is met more often than anything else. An index
    // gains nothing from differences that are 0 alone.
    if (!known.empty() && frame.is_dense()) consider(commonest(known));
    std::vector<uint32_t> products(probe.n + 32, 0);
    for (size_t i = 0; i < probe.n; i++) products[i] = std::min<uint32_t>(probe.spread[i], 0xFFFF) << FACTOR_BITS;
    Tried best{0, 0.0, 0.0};
    uint32_t counts[130];
    for (size_t i = 0; i < candidates.size(); i++) {
        const uint64_t n_low = frame.stats.try_factor(kind, candidates[i], probe.words.data(), probe.reference.data(),
                                                      products.data(), probe.n, frame.is_dense() ? counts : nullptr);
        const double symbol_bits = frame.is_dense() ? entropy_bits(counts, (kind.word_bits + 1) * 2) : 0.0;
        const double cost = (symbol_bits + double(n_low)) / double(probe.n);
        if (i == 0) best = {candidates[0], cost, cost};
        if (cost < best.cost) {
            best.common = candidates[i];
            best.cost = cost;
        }
    }
    return best;
}

// Factors on a step of at most 255 values about one, so that their vector stays small. In place.
void round_factors(std::vector<uint16_t>& factors) {
    int64_t reach = -1;
    for (const uint16_t factor : factors) {
        const int64_t away = std::abs(std::min<int64_t>(std::max<int64_t>(factor, 328), 65208) - FACTOR_ONE);
        if (away < FACTOR_ONE / 2) reach = std::max(reach, away);
    }
    if (reach < 0) reach = FACTOR_ONE / 2;
    const int64_t step = std::max<int64_t>(2 * reach / 255, 1);
    for (uint16_t& factor : factors) {
        const int64_t away = std::min<int64_t>(std::max<int64_t>(factor, 328), 65208) - FACTOR_ONE;
        const int64_t above = 2 * away + step, below = 2 * step;
        const int64_t steps = above / below - (above % below < 0);
        factor = uint16_t(std::min<int64_t>(std::max<int64_t>(FACTOR_ONE + steps * step, 1), 65535));
    }
}

// The factors that the probe's words are multiplied by; factors: of all rows and columns, or of some.
void spread_factors(const Factors& factors, const Places* some, Probe& probe) {
    const uint64_t n_columns = factors.n_columns;
    const auto place_of = [](const std::vector<uint64_t>& numbers, uint64_t number) {
        return size_t(std::lower_bound(numbers.begin(), numbers.end(), number) - numbers.begin());
    };
    const size_t width = probe.rows.width;
    for (size_t i = 0; i < probe.n; i += width) {
        uint64_t row = probe.rows.first(i / width) / n_columns, column = probe.rows.first(i / width) % n_columns;
        size_t row_place = some ? place_of(some->rows, row) : size_t(row);
        size_t column_place = some ? place_of(some->columns, column) : size_t(column);
        for (size_t j = i; j < i + width; j++) {
            uint64_t spread = factors.rows[row_place];
            if (!factors.columns.empty()) spread = spread * factors.columns[column_place] >> FACTOR_BITS;
            probe.spread[j] = uint32_t(spread);
            column_place++;
            if (++column == n_columns) {
                column = 0;
                column_place = 0;  // what comes before it among some columns is nothing
                row_place++;
            }
        }
    }
}

// Factors of one split, from the reference to the words, and what words then cost.
struct Split {
    Factors factors;
    double bits = 0.0;  // per word
};

// Row and column factors, beside the common one: medians over a lattice. is_probed: for the probe's rows and columns
// alone, which tell as well what a split is worth.
Split try_split(Frame& frame, Probe& probe, uint64_t common, uint64_t n_columns, bool has_column_scale, bool is_probed) {
    const Kind& kind = frame.request.kind;
    const uint64_t n_words = frame.n_words, n_whole = n_words / n_columns, tail = n_words % n_columns;
    const float one = float(FACTOR_ONE), unit = one / (float(common) / float(1 << 30));
    Split split;
    Factors& factors = split.factors;
    factors.n_columns = n_columns;
    factors.common = common;
    Places some;
    if (is_probed) some = places_of(probe.rows, n_columns, n_words, has_column_scale);
    const bool has_tail = is_probed ? some.rows.back() == n_whole : tail > 0;
    const Lattice by_row = is_probed ? probed_lattice(PROBED_ROWS, some, n_columns, n_words)
                                     : lattice_of(FACTOR_ROWS, n_columns, n_words);
    const Standing rows = frame.standing(by_row);
    const uint64_t row_bytes = rows.stride * (kind.word_bits / 8), n_rows = by_row.n_rows;
    factors.rows.resize(size_t(n_rows + has_tail));
    if (rows.rows) {
        frame.stats.row_medians(kind, rows.words, rows.reference, rows.stride, rows.rows, n_rows, rows.columns, unit,
                                factors.rows.data());
    } else {
        in_parts(frame, n_rows, PART_ROWS, [&](uint64_t first, uint64_t n) {
            frame.stats.row_medians(kind, rows.words + first * row_bytes, rows.reference + first * row_bytes, rows.stride,
                                    nullptr, n, rows.columns, unit, factors.rows.data() + first);
        });
    }
    if (has_tail) {
        const Lattice at_end = lattice_of(FACTOR_TAIL, n_columns, n_words);
        const Standing last = frame.standing(at_end);
        frame.stats.row_medians(kind, last.words, last.reference, last.stride, nullptr, 1, last.columns, unit,
                                factors.rows.data() + n_rows);
    }
    round_factors(factors.rows);
    double side_bits = vector_bits(factors.rows, size_t(n_whole + (tail ? 1 : 0)));
    if (has_column_scale) {
        const Lattice by_column = is_probed ? probed_lattice(PROBED_COLUMNS, some, n_columns, n_words)
                                            : lattice_of(FACTOR_COLUMNS, n_columns, n_words);
        const Standing columns = frame.standing(by_column);
        std::vector<float> units;
        for (size_t row = 0; row < n_rows; row++)
            if (by_row.row(row) % by_column.step == 0) units.push_back(unit * (one / float(factors.rows[row])));
        factors.columns.resize(size_t(by_column.n_some()));
        // Some columns stand one after the other where they were gathered.
        const uint64_t* places = is_probed && !frame.is_elsewhere() ? by_column.starts.data() : nullptr;
        frame.stats.column_medians(kind, columns.words, columns.reference, columns.stride, by_column.n_rows, places,
                                   factors.columns.size(), units.data(), factors.columns.data());
        round_factors(factors.columns);
        side_bits += vector_bits(factors.columns, size_t(n_columns));
    }
    spread_factors(factors, is_probed ? &some : nullptr, probe);
    const Tried tried = best_factor(frame, probe, 5);
    split.bits = tried.cost + side_bits / double(frame.n_words);
    factors.common = tried.common;
    return split;
}

}  // namespace

Choice delta_choice(Frame& frame, bool has_reference) {
    Predicted predicted;
    predicted.reference = has_reference ? frame.request.reference : nullptr;
    const Fit fit = best_delta(frame, predicted, 0.0);
    bool has_block_shifts = false;
    double bits = fit.bits;
    if (frame.thin.width == ROW && frame.word_bits() > 8) {
        const uint64_t n_saved = frame.stats.shift_savings(frame.request.kind, fit.k, frame.request.words, predicted, frame.thin);
        const double saved = double(n_saved) / double(frame.thin.n_words()) - 8.0 / double(ROW);
        has_block_shifts = !(saved < 0.5);
        if (has_block_shifts) bits = fit.bits - saved * 0.9;
    }
    return {bits, [&frame, fit, predicted, has_block_shifts, has_reference](PlanResult& plan) {
                plan.predict = DELTA;
                plan.has_reference = has_reference;
                plan.has_block_shifts = has_block_shifts;
                finish_delta(frame, fit, predicted, plan);
            }};
}

namespace {

Factors unsplit(const Frame& frame, uint64_t common) {
    Factors factors;
    factors.rows.assign(1, uint16_t(FACTOR_ONE));
    factors.n_columns = frame.n_words;
    factors.common = common;
    return factors;
}

// The best split by the probe's rows and columns, or by all of them where there are few.
struct Search {
    Probe probe;
    bool is_probed = false;
    Tried common;
    Split best;
    std::pair<uint64_t, bool> chosen;  // no columns: the frame is not split
};

bool search_factors(Frame& frame, Search& search) {
    Probe& probe = search.probe = probe_of(frame);
    // Numbers of both signs change by what is added to them, not by what they are multiplied with, decay aside.
    const bool has_signs = count_negative(frame, probe) * 1000 > probe.n;
    const Tried common = search.common = best_factor(frame, probe, has_signs ? 3 : 5);
    if (has_signs && common.cost > common.plain - DECAY_BITS) return false;
    Split& best = search.best;
    best = {unsplit(frame, common.common), common.cost};
    search.is_probed = frame.n_words > FIT_WORDS;
    if (has_signs) return true;
    for (const auto& cut : splits(frame.request)) {
        Split split = try_split(frame, probe, common.common, cut.first, cut.second, search.is_probed);
        if (split.bits < best.bits) {
            best = std::move(split);
            search.chosen = cut;
        }
    }
    return true;
}

}  // namespace

uint64_t promising_factors(Frame& frame) {
    Search search;
    return search_factors(frame, search) && search.is_probed ? search.chosen.first : 0;
}

bool scaled_delta_choice(Frame& frame, Choice& choice) {
    Search search;
    if (!search_factors(frame, search)) return false;
    Split& best = search.best;
    if (search.is_probed && search.chosen.first) {
        const Tried& common = search.common;
        best = try_split(frame, search.probe, common.common, search.chosen.first, search.chosen.second, false);
        if (!(best.bits < common.cost)) best.factors = unsplit(frame, common.common);
    }
    const Factors& factors = best.factors;
    double side_bits = vector_bits(factors.rows, factors.rows.size());
    side_bits += vector_bits(factors.columns, factors.columns.size());
    const Fit fit = best_delta(frame, factors.of(frame.request.reference), side_bits);
    choice.bits = fit.bits + SIMPLER_BITS;
    choice.finish = [&frame, fit, best = std::move(best.factors)](PlanResult& plan) {
        plan.predict = SCALED_DELTA;
        plan.has_reference = true;
        plan.n_columns = best.n_columns;
        plan.has_column_scale = !best.columns.empty();
        plan.factor = best.common;
        plan.factor_rows = best.rows;
        plan.factor_columns = best.columns;
        finish_delta(frame, fit, best.of(frame.request.reference), plan);
    };
    return true;
}

}  // namespace planning
}  // namespace tricomp
