// What choices cost; see planner_parts.h. Mirrors reference/estimate.py.

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "planner_parts.h"
#include "threads.h"

namespace tricomp {
namespace planning {

namespace {

// log2(1 + i / 4096) in 1/65,536, by squaring: 16 bits, each rounded down.
constexpr std::array<uint16_t, 4096> logarithms() {
    std::array<uint16_t, 4096> logs{};
    for (uint64_t i = 0; i < 4096; i++) {
        uint64_t square = (4096 + i) << 18, log = 0;
        for (int bit = 0; bit < 16; bit++) {
            square = square * square >> 30;
            const uint64_t is_over = square >> 31;
            square >>= is_over;
            log = log << 1 | is_over;
        }
        logs[i] = uint16_t(log);
    }
    return logs;
}

constexpr std::array<uint16_t, 4096> LOGARITHMS = logarithms();

std::array<uint32_t, (1 << PROB_BITS) + 1> all_prices() {
    std::array<uint32_t, (1 << PROB_BITS) + 1> found;
    for (uint64_t freq = 0; freq < found.size(); freq++) {
        const uint64_t log = logarithm(freq);
        found[freq] = uint32_t((PROB_BITS << 16) - log) | uint32_t(log >> 16) << 24;
    }
    return found;
}

}  // namespace

uint32_t bit_length(uint64_t number) { return number ? 64 - uint32_t(__builtin_clzll(number)) : 0; }

uint64_t logarithm(uint64_t number) {
    if (!number) return 0;
    const uint32_t power = bit_length(number) - 1;
    return uint64_t(power) << 16 | LOGARITHMS[(number << 12 >> power) & 4095];
}

const uint32_t* prices() {
    static const std::array<uint32_t, (1 << PROB_BITS) + 1> found = all_prices();
    return found.data();
}

Frame::Frame(const PlanRequest& given, Scratch& memory, size_t threads)
    : request(given),
      kernels(tricomp::kernels()),
      stats(kernels.stats[given.kind.word_bits == 8 ? 0 : given.kind.word_bits == 16 ? 1 : given.kind.word_bits == 32 ? 2 : 3]),
      scratch(memory),
      n_words(given.n_words),
      n_threads(threads) {}

void in_parts(const Frame& frame, uint64_t n_all, uint64_t n_each, const std::function<void(uint64_t, uint64_t)>& work) {
    if (frame.n_threads < 2 || n_all < 2 * n_each) {
        work(0, n_all);
        return;
    }
    share(size_t((n_all + n_each - 1) / n_each), frame.n_threads, [&]() {
        return [&](size_t part) { work(part * n_each, std::min<uint64_t>(n_all - part * n_each, n_each)); };
    });
}

void Frame::take_sample() {
    Lattice lattice = sample_lattice(n_words);
    firsts = std::move(lattice.some_rows);
    thin = thin_rows(firsts, size_t(lattice.length));
    if (is_elsewhere()) {
        for (size_t row = 0; row < firsts.size(); row++) places.push_back(row * thin.width);
        thin.places = places.data();
    }
    sample = thin;
    sample.step = 1;
    n_sampled = sample.n_words();
}

SampleRows thin_rows(const std::vector<uint64_t>& firsts, size_t width) {
    SampleRows thin;
    thin.firsts = thin.places = firsts.data();
    thin.n_all = firsts.size();
    thin.width = width;
    thin.step = (std::max<size_t>(firsts.size() / THIN_ROWS, 1) - 1) | 1;  // odd: rows that take turns are met alike
    return thin;
}

Standing Frame::standing(const Lattice& lattice) const {
    static const uint64_t ALL = 0;
    if (!is_elsewhere()) {
        const uint64_t first = lattice.first_row * lattice.n_columns * (word_bits() / 8);
        const auto from = [=](const void* words) { return words ? static_cast<const uint8_t*>(words) + first : nullptr; };
        return {from(request.words), from(request.reference), lattice.step * lattice.n_columns,
                lattice.some_rows.empty() ? nullptr : lattice.some_rows.data(),
                {lattice.starts.data(), lattice.starts.size(), size_t(lattice.length)}};
    }
    Standing found{nullptr, nullptr, lattice.n_some(), nullptr, {&ALL, 1, size_t(lattice.n_some())}};
    const auto is_same = [&](const GatheredWords& some) {
        return some.use == lattice.use && some.n_columns == lattice.n_columns;
    };
    const auto some = std::find_if(request.gathered.begin(), request.gathered.end(), is_same);
    if (some != request.gathered.end()) {
        found.words = static_cast<const uint8_t*>(some->words);
        found.reference = static_cast<const uint8_t*>(some->reference);
        found.is_means = some->is_means;
    } else if (lattice.n_words()) {
        throw std::invalid_argument("a frame of which a lattice was not gathered");
    }
    return found;
}

SampleRows Frame::counted(size_t n_contexts) const {
    SampleRows rows = sample;
    if (n_contexts == 1 && firsts.size() >= 2 * LEAST_SAMPLE_ROWS) rows.step = 2;
    return rows;
}

uint64_t Frame::word(uint64_t place) const {
    const size_t n_bytes = word_bits() / 8;
    uint64_t found = 0;  // little-endian
    std::memcpy(&found, static_cast<const uint8_t*>(request.words) + place * n_bytes, n_bytes);
    return found;
}

template <class Value>
double vector_bits(const std::vector<Value>& values, size_t n) {
    if (values.empty()) return 0.0;
    const auto ends = std::minmax_element(values.begin(), values.end());
    const int32_t least = *ends.first;
    uint32_t step = 0;  // the largest on which all values lie
    for (const Value value : values) {
        const uint32_t above = uint32_t(value - least);
        if (step ? above % step != 0 : above != 0) step = std::gcd(step, above);
        if (step == 1) break;
    }
    step = std::max(step, 1u);
    const uint32_t most = uint32_t(*ends.second - least) / step, width = bit_length(most);
    double packed = double(width * n);
    if (width <= 8 && packed > 4096) {
        uint32_t counts[256] = {};
        for (const Value value : values) counts[uint32_t(value - least) / step]++;
        double coded = entropy_bits(counts, most + 1);
        if (values.size() < n) {
            const size_t n_present = most + 1 - size_t(std::count(counts, counts + most + 1, 0u));
            coded = (coded + LEARNING * double(n_present)) / double(values.size()) * double(n);
        }
        packed = std::min(packed, coded + double(STATE_BITS + 1500));
    }
    return 80 + packed;
}

template double vector_bits(const std::vector<int16_t>&, size_t);
template double vector_bits(const std::vector<uint16_t>&, size_t);

std::pair<size_t, size_t> densest(const uint32_t* counts, size_t n, size_t widest) {
    size_t first = 0, last = n;
    while (first < n && !counts[first]) first++;
    if (first == n) return n > 1 ? std::make_pair<size_t, size_t>(1, 2) : std::make_pair<size_t, size_t>(0, 1);
    while (!counts[last - 1]) last--;
    if (last - first <= widest) return {first, last};
    uint64_t sum = 0;
    for (size_t i = 0; i < widest; i++) sum += counts[i];
    uint64_t most = sum;
    first = 0;
    for (size_t i = widest; i < n; i++) {
        sum = sum + counts[i] - counts[i - widest];
        if (sum > most) {
            most = sum;
            first = i - widest + 1;
        }
    }
    return {first, first + widest};
}

namespace {

struct Index {
    uint32_t width;
    uint64_t n_missed;
};

constexpr uint64_t RUN_GAIN = 50;  // see reference/estimate.py

std::vector<uint64_t> totals_of(const uint32_t* counts, size_t n_contexts, size_t n_symbols) {
    std::vector<uint64_t> totals(n_symbols, 0);
    for (size_t i = 0; i < n_contexts * n_symbols; i++) totals[i % n_symbols] += counts[i];
    return totals;
}

// The width of an index of the counted symbols, and how many words the dictionary then lacks.
Index index_of(const Frame& frame, std::vector<uint64_t> totals) {
    const uint64_t n_all = std::accumulate(totals.begin(), totals.end(), uint64_t(0));
    // The most frequent 2^width come first, for ever smaller widths.
    uint64_t covered[9];
    for (uint32_t width = 8; width >= 1; width--) {
        const size_t n = size_t(1) << width;
        if (n < totals.size()) {
            std::nth_element(totals.begin(), totals.begin() + long(n), totals.end(), std::greater<uint64_t>());
            totals.resize(n);
        }
        covered[width] = std::accumulate(totals.begin(), totals.end(), uint64_t(0));
    }
    Index best{0, 0};
    uint64_t least = 0;
    for (uint32_t width = 1; width <= 8; width++) {
        const uint64_t n_missed = n_all - covered[width], cost = width * n_all + n_missed * (16 + frame.word_bits());
        if (width == 1 || cost < least) {
            least = cost;
            best = {width, n_missed};
        }
    }
    return best;
}

}  // namespace

double symbol_cost(const Frame& frame, const uint32_t* counts, size_t n_contexts, size_t n_symbols, uint64_t n_outside,
                   double extra_bits) {
    const double n_words = double(frame.n_words), n_sampled = double(frame.n_sampled);
    if (!frame.is_dense()) {
        const std::vector<uint64_t> totals = totals_of(counts, n_contexts, n_symbols);
        const double n_counted = double(std::accumulate(totals.begin(), totals.end(), uint64_t(0)) + n_outside);
        const Index index = index_of(frame, totals);
        const double share = double(n_outside + index.n_missed) / n_counted;
        return double(index.width) + patch_bits(frame, share) + (extra_bits + double(8u << index.width)) / n_words;
    }
    TablePrice sums;
    frame.kernels.price_tables(counts, n_contexts, n_symbols, prices(), &sums);
    const double n_counted = double(sums.n_counted + n_outside);
    const uint64_t n_entries = n_contexts * n_symbols;
    const uint64_t states = STATE_BITS * std::max<uint64_t>(frame.n_chunks(), 1);
    const double fixed = double(4 * n_entries + sums.log_sizes + states) + extra_bits;
    double bits = double(sums.price) / (ONE * n_counted) + fixed / n_words;
    // What was counted once tells how much there is that was not counted at all.
    const double fresh = 1.0 / n_sampled - 1.0 / n_words;
    bits += patch_bits(frame, double(n_outside) / n_counted + double(sums.n_once) * fresh);
    bits += LEARNING * double(sums.n_present) * (fresh + (1.0 / n_counted - 1.0 / n_words));
    if (n_contexts > 1 || n_symbols > SIMPLE_SYMBOLS)
        bits += SIMPLER_BITS + DOUBLE_BITS * double(bit_length((n_entries - 1) / SIMPLE_SYMBOLS));
    return bits;
}

void normalise(const uint64_t* counts, size_t n, uint16_t* freqs) {
    constexpr uint64_t SIZE = 1 << PROB_BITS;
    std::fill(freqs, freqs + n, uint16_t(0));
    const uint64_t total = std::accumulate(counts, counts + n, uint64_t(0));
    if (!total) {
        freqs[0] = SIZE;
        return;
    }
    const uint64_t spare = SIZE - uint64_t(n - size_t(std::count(counts, counts + n, uint64_t(0))));
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        freqs[i] = counts[i] ? uint16_t(1 + counts[i] * spare / total) : 0;
        sum += freqs[i];
    }
    uint16_t& favourite = freqs[std::max_element(counts, counts + n) - counts];
    favourite = uint16_t(favourite + (SIZE - sum));
}

namespace {

// Counts, four to one, and one for what a context lacks where that is cheaper than patches; see the reference.
void smooth(const Frame& frame, uint64_t* counts, size_t n) {
    size_t begin = 0, end = n;
    while (begin < n && !counts[begin]) begin++;
    if (begin == n) return;
    while (!counts[end - 1]) end--;
    uint64_t* const first = counts + (begin ? begin - 1 : 0);
    uint64_t* const last = counts + (end < n ? end + 1 : n);
    const uint64_t n_once = uint64_t(std::count(first, last, uint64_t(4)));
    const uint64_t n_lacking = uint64_t(std::count(first, last, uint64_t(0)));
    const uint64_t sum = std::accumulate(first, last, uint64_t(0));
    if (n_once * (16 + frame.word_bits()) << (PROB_BITS + 6) > 23 * n_lacking * sum)
        std::replace(first, last, uint64_t(0), uint64_t(1));
}

// The commonest symbols that an index has places for; or a run of symbols, where that costs little more.
std::vector<uint8_t> dictionary_of(const Frame& frame, const std::vector<uint64_t>& totals, uint32_t width) {
    const size_t n = totals.size(), n_run = std::min(n, size_t(1) << width);
    const size_t n_present = n - size_t(std::count(totals.begin(), totals.end(), uint64_t(0)));
    std::vector<uint8_t> order(n);
    std::iota(order.begin(), order.end(), uint8_t(0));
    std::stable_sort(order.begin(), order.end(), [&](uint8_t a, uint8_t b) { return totals[a] > totals[b]; });
    order.resize(std::min(n_run, std::max<size_t>(n_present, 1)));
    uint64_t n_chosen = 0, n_all = 0, inside = 0, most = 0;
    for (uint8_t symbol : order) n_chosen += totals[symbol];
    size_t first = 0;
    for (size_t i = 0; i < n; i++) {
        n_all += totals[i];
        inside += totals[i];
        if (i >= n_run) inside -= totals[i - n_run];
        if (i + 1 == n_run || (i + 1 > n_run && inside > most)) {
            most = inside;
            first = i + 1 - n_run;
        }
    }
    size_t last = first + n_run;
    while (first < last && totals[first] == 0) first++;
    while (first < last && totals[last - 1] == 0) last--;
    if (first < last && RUN_GAIN * (n_chosen - most) * (16 + frame.word_bits()) <= n_all) {
        order.resize(last - first);
        std::iota(order.begin(), order.end(), uint8_t(first));
    }
    std::sort(order.begin(), order.end());
    return order;
}

}  // namespace

void give_symbols(const Frame& frame, const Table& table, uint64_t n_counted, PlanResult& plan) {
    const size_t n = table.n_symbols;
    plan.n_contexts = uint32_t(table.n_contexts);
    plan.n_symbols = uint32_t(n);
    if (frame.is_dense()) {
        plan.entropy = RANS;
        plan.freqs.resize(table.n_contexts * n);
        std::vector<uint64_t> counts(n);
        for (size_t context = 0; context < table.n_contexts; context++) {
            const uint32_t* row = table.counts.data() + context * n;
            const bool is_part = n_counted < frame.n_words;
            for (size_t i = 0; i < n; i++) counts[i] = is_part ? 4 * uint64_t(row[i]) : row[i];
            if (is_part) smooth(frame, counts.data(), n);
            normalise(counts.data(), n, plan.freqs.data() + context * n);
        }
        return;
    }
    const std::vector<uint64_t> totals = totals_of(table.counts.data(), table.n_contexts, n);
    plan.entropy = INDEX;
    plan.index_bits = index_of(frame, totals).width;
    plan.dictionary = dictionary_of(frame, totals, plan.index_bits);
}

}  // namespace planning
}  // namespace tricomp
