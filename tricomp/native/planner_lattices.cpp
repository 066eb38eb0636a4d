// What planning reads of a frame: its sample, and the lattices that scales and factors are measured on. Baseline.
//
// Mirrors the choice of rows and columns of reference/estimate.py, planner_full.py and planner_delta.py. The hard thing:
// what is listed here is gathered where the frame lies on another device, so planning must read nothing else.

#include <algorithm>
#include <iterator>

#include "planner_parts.h"

namespace tricomp {
namespace planning {

namespace {

constexpr size_t SPLIT_RUNS = 16;  // runs a row of the lattice that tells whether a split is worth it
constexpr size_t RUN = 4;  // columns of a lattice that is only probed stand in runs of so many
constexpr size_t SCALE_RUNS = 32;  // runs that a row's scale is measured on,
constexpr size_t SCALE_BLOCKS = 16, BLOCK = 8;  // or blocks of columns where runs would stand in a line of memory each
static_assert(SPLIT_RUNS * RUN <= MOST_LATTICE_COLUMNS && SCALE_RUNS * RUN <= ROW && SCALE_BLOCKS * BLOCK <= ROW,
              "rows of lattices have room");
constexpr uint64_t SCALE_COLUMN_ROWS = 256;  // most rows that a column's scale is measured on
constexpr uint64_t FACTOR_COLUMN_ROWS = 512;  // and a column's factor
constexpr uint64_t FACTOR_ROW_COLUMNS = 64;  // most columns that a row's factor is measured on
constexpr size_t PROBE_ROWS = 64, PROBE_COLUMNS = 16;  // of the sample on which factors are tried

// All columns, or n_runs runs of them, of which begin_of gives the first column.
template <class BeginOf>
void take_runs(Lattice& lattice, size_t n_runs, size_t length, BeginOf begin_of) {
    if (lattice.n_columns <= n_runs * length) {
        lattice.starts.push_back(0);
        lattice.length = lattice.n_columns;
    } else {
        for (size_t i = 0; i < n_runs; i++) lattice.starts.push_back(begin_of(i));
        lattice.length = length;
    }
}

// All columns, or short runs at even distances.
void take_short_runs(Lattice& lattice, size_t n_runs) {
    const uint64_t last = lattice.n_columns - RUN;
    take_runs(lattice, n_runs, RUN, [=](size_t i) { return i * last / (n_runs - 1); });
}

// All columns, or blocks of them from multiples of their length, so that few lines of memory hold them.
void take_blocks(Lattice& lattice, size_t n_blocks) {
    const uint64_t n_all = lattice.n_columns / BLOCK;
    take_runs(lattice, n_blocks, BLOCK, [=](size_t i) { return (i * n_all + n_all / 2) / n_blocks * BLOCK; });
}

// Of the columns those below n, each for itself.
void keep_below(Lattice& lattice, uint64_t n) {
    std::vector<uint64_t> kept;
    for (const uint64_t start : lattice.starts)
        for (uint64_t column = start; column < start + lattice.length; column++)
            if (column < n) kept.push_back(column);
    lattice.starts.swap(kept);
    lattice.length = 1;
}

bool is_factors(LatticeUse use) {
    return use == FACTOR_ROWS || use == FACTOR_TAIL || use == FACTOR_COLUMNS || use == PROBED_ROWS || use == PROBED_COLUMNS;
}

bool is_columns(LatticeUse use) { return use == SCALE_COLUMNS || use == FACTOR_COLUMNS || use == PROBED_COLUMNS; }

// first, first + 1 .. to last where it is not there yet. numbers: ascending.
void append(std::vector<uint64_t>& numbers, uint64_t first, uint64_t last) {
    for (first = std::max(first, numbers.empty() ? 0 : numbers.back() + 1); first <= last; first++) numbers.push_back(first);
}

Lattice whole_lattice(uint64_t n_words, const std::vector<std::pair<uint64_t, bool>>& cuts) {
    Lattice lattice;
    lattice.use = WHOLE;
    lattice.has_reference = true;
    lattice.n_columns = cuts.empty() || n_words % cuts[0].first ? n_words : cuts[0].first;
    lattice.n_rows = n_words / lattice.n_columns;
    lattice.starts.push_back(0);
    lattice.length = lattice.n_columns;
    return lattice;
}

}  // namespace

Lattice sample_lattice(uint64_t n_words) {
    Lattice lattice;
    lattice.use = SAMPLE;
    lattice.has_reference = true;
    lattice.starts.push_back(0);
    const uint64_t n_rows = n_words / ROW;
    std::vector<uint64_t>& firsts = lattice.some_rows;
    if (n_rows <= LEAST_SAMPLE_ROWS) {
        lattice.length = std::min<uint64_t>(n_words, ROW);
        for (uint64_t row = 0; row < std::max<uint64_t>(n_rows, 1); row++) firsts.push_back(row * ROW);
        if (n_rows && n_words > n_rows * ROW) firsts.push_back(n_words - ROW);
    } else {
        lattice.length = ROW;
        const uint64_t n = std::min<uint64_t>(std::max<uint64_t>(n_rows / 8, LEAST_SAMPLE_ROWS), SAMPLE_ROWS);
        firsts.reserve(n);
        uint64_t start = 0, rest = 0;  // row * n_rows / n, and what the division leaves
        for (uint64_t row = 0; row < n; row++) {
            rest += n_rows % n;
            const uint64_t gap = n_rows / n + (rest >= n ? 1 : 0);
            rest -= rest >= n ? n : 0;
            firsts.push_back((start + (row * 0x9E3779B1 >> 7) % gap) * ROW);
            start += gap;
        }
    }
    lattice.n_rows = firsts.size();
    return lattice;
}

Lattice lattice_of(LatticeUse use, uint64_t n_columns, uint64_t n_words) {
    const uint64_t n_whole = n_words / n_columns, tail = n_words % n_columns;
    Lattice lattice;
    lattice.use = use;
    lattice.n_columns = n_columns;
    lattice.has_reference = is_factors(use);
    const auto every = [&](uint64_t most) {
        lattice.step = (n_whole + most - 1) / most;
        lattice.n_rows = (n_whole + lattice.step - 1) / lattice.step;
        lattice.starts.push_back(0);
        lattice.length = n_columns;
    };
    switch (use) {
        case SPLIT:
            take_short_runs(lattice, SPLIT_RUNS);
            lattice.n_rows = std::min<uint64_t>(n_whole, MOST_LATTICE_WORDS / lattice.n_some());
            for (uint64_t row = 0; row < lattice.n_rows; row++) lattice.some_rows.push_back(row * n_whole / lattice.n_rows);
            break;
        case SCALE_ROWS:
        case SCALE_TAIL:
            if (n_columns > 2 * SCALE_RUNS * BLOCK) take_blocks(lattice, SCALE_BLOCKS);
            else take_short_runs(lattice, SCALE_RUNS);
            break;
        case FACTOR_ROWS:
        case FACTOR_TAIL: {
            const uint64_t n_some = std::min(std::max<uint64_t>(FIT_WORDS / n_whole, 16), FACTOR_ROW_COLUMNS);
            take_blocks(lattice, size_t(n_some / BLOCK));
            break;
        }
        case SCALE_COLUMNS: every(SCALE_COLUMN_ROWS); break;
        case FACTOR_COLUMNS: every(std::min(std::max<uint64_t>(FIT_WORDS / n_columns, 16), FACTOR_COLUMN_ROWS)); break;
        default: break;  // they are no split's, or a probe's
    }
    if (use == SCALE_ROWS || use == FACTOR_ROWS) lattice.n_rows = n_whole;
    if (use == SCALE_TAIL || use == FACTOR_TAIL) {
        lattice.first_row = n_whole;
        lattice.n_rows = tail ? 1 : 0;
        keep_below(lattice, tail);
    }
    return lattice;
}

SampleRows probe_rows(const SampleRows& thin) {
    SampleRows rows = thin;
    rows.step *= std::max<size_t>(thin.n_rows() / PROBE_ROWS, 1);
    rows.width = std::min(thin.width, PROBE_COLUMNS);
    return rows;
}

Places places_of(const SampleRows& probe, uint64_t n_columns, uint64_t n_words, bool has_column_scale) {
    Places places;
    std::vector<std::pair<uint64_t, uint64_t>> runs;  // of columns, first and last
    for (size_t i = 0; i < probe.n_rows(); i++) {
        const uint64_t first = probe.first(i), last = first + probe.width - 1;
        const uint64_t row = first / n_columns, last_row = last / n_columns;
        append(places.rows, row, last_row);
        if (last_row > row) {
            runs.emplace_back(0, last_row > row + 1 ? n_columns - 1 : last % n_columns);
            runs.emplace_back(first % n_columns, n_columns - 1);
        } else {
            runs.emplace_back(first % n_columns, last % n_columns);
        }
    }
    std::sort(runs.begin(), runs.end());
    for (const auto& run : runs) append(places.columns, run.first, run.second);
    std::vector<uint64_t> fitted, all;
    const Lattice measured = lattice_of(FACTOR_COLUMNS, n_columns, n_words);
    for (uint64_t i = 0; has_column_scale && i < measured.n_rows; i++) fitted.push_back(measured.row(i));
    std::set_union(places.rows.begin(), places.rows.end(), fitted.begin(), fitted.end(), std::back_inserter(all));
    places.rows.swap(all);
    return places;
}

Lattice probed_lattice(LatticeUse use, const Places& places, uint64_t n_columns, uint64_t n_words) {
    Lattice lattice = lattice_of(use == PROBED_ROWS ? FACTOR_ROWS : FACTOR_COLUMNS, n_columns, n_words);
    lattice.use = use;
    if (use == PROBED_ROWS) {
        lattice.some_rows = places.rows;
        if (lattice.some_rows.back() == n_words / n_columns) lattice.some_rows.pop_back();  // the tail has its own
        lattice.n_rows = lattice.some_rows.size();
    } else {
        lattice.starts = places.columns;
        lattice.length = 1;
    }
    return lattice;
}

std::vector<std::pair<uint64_t, bool>> splits(const PlanRequest& request) {
    std::vector<std::pair<uint64_t, bool>> cuts;
    const uint64_t n_words = request.n_words;
    for (size_t axis = 1; axis < request.shape.size(); axis++) {
        uint64_t n_columns = 1;
        for (size_t i = axis; i < request.shape.size(); i++) n_columns *= request.shape[i];
        const uint64_t n_rows = n_words / std::max<uint64_t>(n_columns, 1);
        const bool is_dear = (n_rows + n_columns) * 4 > n_words;  // scales for every few words, and long to fit
        const std::pair<uint64_t, bool> cut(n_columns, true);
        if (n_columns > 1 && n_rows > 1 && !is_dear && std::find(cuts.begin(), cuts.end(), cut) == cuts.end())
            cuts.push_back(cut);
    }
    const auto is_short = [](const std::pair<uint64_t, bool>& cut) { return cut.first < LONG_COLUMNS; };
    if (n_words >= 4 * BLOCK_COLUMNS && std::none_of(cuts.begin(), cuts.end(), is_short))
        cuts.emplace_back(BLOCK_COLUMNS, false);
    return cuts;
}

}  // namespace planning

bool find_lattice(const PlanRequest& request, uint64_t number, uint64_t n_columns, bool has_means, Lattice& lattice) {
    using namespace planning;
    if (!request.n_words || number >= N_LATTICE_USES) return false;
    const LatticeUse use = LatticeUse(number);
    const auto cuts = request.kind.is_float ? splits(request) : std::vector<std::pair<uint64_t, bool>>();
    if (use == SAMPLE) {
        lattice = sample_lattice(request.n_words);
    } else if (use == WHOLE) {
        lattice = whole_lattice(request.n_words, cuts);
    } else {
        const auto is_cut = [=](const std::pair<uint64_t, bool>& cut) { return cut.first == n_columns; };
        const auto cut = std::find_if(cuts.begin(), cuts.end(), is_cut);
        if (cut == cuts.end() || (is_columns(use) && !cut->second) || (is_factors(use) && !request.has_reference)) return false;
        if (use == PROBED_ROWS || use == PROBED_COLUMNS) {
            const Lattice sample = sample_lattice(request.n_words);
            const SampleRows probe = probe_rows(thin_rows(sample.some_rows, size_t(sample.length)));
            lattice = probed_lattice(use, places_of(probe, n_columns, request.n_words, cut->second), n_columns, request.n_words);
        } else {
            lattice = lattice_of(use, n_columns, request.n_words);
        }
    }
    lattice.has_reference = lattice.has_reference && request.has_reference;
    lattice.is_means = has_means && (use == SCALE_ROWS || use == SCALE_TAIL);
    return lattice.n_words() > 0;
}

std::vector<Lattice> lattices_of(const PlanRequest& request) {
    using namespace planning;
    std::vector<Lattice> found;
    uint64_t n_words = 0;
    const uint64_t n_each = request.has_reference ? 2 : 1;
    const auto take = [&](LatticeUse use, uint64_t n_columns) {
        Lattice lattice;
        if (!find_lattice(request, use, n_columns, false, lattice)) return;
        n_words += lattice.n_words() * (lattice.has_reference ? 2 : 1);
        found.push_back(std::move(lattice));
    };
    take(SAMPLE, 1);
    for (const auto& cut : splits(request))
        for (const LatticeUse use : {SPLIT, PROBED_ROWS, PROBED_COLUMNS, FACTOR_TAIL}) take(use, cut.first);
    // Words stand in several lattices, and in the sample; all of the frame may be less than these.
    if (request.n_words / ROW <= LEAST_SAMPLE_ROWS || n_words >= request.n_words * n_each) {
        found.clear();
        take(WHOLE, 0);
    }
    return found;
}

}  // namespace tricomp
