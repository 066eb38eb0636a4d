// The planner; see planner.h. Mirrors reference/planner.py.

#include "planner.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>

#include "planner_parts.h"
#include "threads.h"

namespace tricomp {

namespace planning {
namespace {

constexpr double HOPELESS_BITS = 1.5;  // a delta that costs so much more than no reference is not tried with scales
constexpr size_t FEW_ROWS = 16;  // rows of the thin sample that tell whether few distinct words are to be expected
constexpr uint64_t FIRST_BYTES = 64 << 10;  // looked at before all others, for most frames that differ do so at once
constexpr double NEAR_BITS = 0.5;  // a sparse frame that seems to cost so much more than another is not counted

// Whether a test of parts of the words, given by their first byte and number, holds for all of them.
template <class Test>
bool holds(const Frame& frame, Test test) {
    const uint64_t word_bytes = frame.word_bits() / 8, n_first = std::min(frame.n_words, FIRST_BYTES / word_bytes);
    if (!test(0, n_first)) return false;
    std::atomic<bool> is_sound{true};
    in_parts(frame, frame.n_words - n_first, PART_BYTES / word_bytes, [&](uint64_t first, uint64_t n) {
        if (is_sound && !test((n_first + first) * word_bytes, n)) is_sound = false;
    });
    return is_sound;
}

// How many words do: count(first byte, n, most) of parts. Any number above `most` once there are more.
template <class Count>
size_t total(const Frame& frame, size_t most, Count count) {
    const uint64_t word_bytes = frame.word_bits() / 8;
    std::atomic<size_t> n_found{0};
    in_parts(frame, frame.n_words, PART_BYTES / word_bytes, [&](uint64_t first, uint64_t n) {
        const size_t before = n_found;
        if (before <= most) n_found += count(first * word_bytes, size_t(n), most - before);
    });
    return n_found;
}

// Constant or copy, if the whole frame is.
bool is_exact(const Frame& frame, PlanResult& plan) {
    const PlanRequest& request = frame.request;
    const uint8_t* words = static_cast<const uint8_t*>(request.words);
    if (request.facts) {
        if (!request.is_exact()) return false;
        const bool is_constant = !request.facts->n_unlike_first;
        plan.predict = is_constant ? CONSTANT : COPY;
        plan.has_reference = !is_constant;
        plan.word = is_constant ? request.facts->first : 0;
        return true;
    }
    const uint64_t word = frame.n_words ? frame.word(0) : 0;
    if (holds(frame, [&](uint64_t at, uint64_t n) { return !frame.stats.count_unequal_to(words + at, word, size_t(n), 0); })) {
        plan.predict = CONSTANT;
        plan.word = word;
        return true;
    }
    if (request.reference == nullptr) return false;
    const uint8_t* reference = static_cast<const uint8_t*>(request.reference);
    if (!holds(frame, [&](uint64_t at, uint64_t n) {
            return frame.kernels.is_equal(words + at, reference + at, size_t(n) * (frame.word_bits() / 8));
        }))
        return false;
    plan.predict = COPY;
    plan.has_reference = true;
    return true;
}

// The words of some rows, widened.
const std::vector<uint64_t>& widened(const Frame& frame, const SampleRows& rows, std::vector<uint64_t>& words) {
    words.resize(rows.n_words());
    for (size_t row = 0; row < rows.n_rows(); row++)
        frame.stats.widen(frame.request.words, rows.place(row), rows.width, words.data() + row * rows.width);
    return words;
}

// The distinct words among others, and how often each occurs.
class Distinct {
  public:
    // False once there are more than MAX_SYMBOLS.
    bool add(const std::vector<uint64_t>& words) {
        for (const uint64_t word : words)
            if (!add(word)) return false;
        return true;
    }

    // Ascending.
    std::vector<std::pair<uint64_t, uint32_t>> found() const {
        std::vector<std::pair<uint64_t, uint32_t>> words;
        for (const auto& place : places_)
            if (place.second) words.push_back(place);
        std::sort(words.begin(), words.end());
        return words;
    }

  private:
    static constexpr size_t PLACES = 1024;

    bool add(uint64_t word) {
        size_t at = size_t(word * 0x9E3779B97F4A7C15u >> 54);
        while (places_[at].second && places_[at].first != word) at = (at + 1) % PLACES;
        if (!places_[at].second) {
            if (n_found_ == MAX_SYMBOLS) return false;
            n_found_++;
            places_[at].first = word;
        }
        places_[at].second++;
        return true;
    }

    std::vector<std::pair<uint64_t, uint32_t>> places_{PLACES};
    size_t n_found_ = 0;
};

SampleRows few_rows(const Frame& frame) {
    SampleRows rows = frame.thin;
    rows.step *= std::max<size_t>(rows.n_rows() / FEW_ROWS, 1);
    return rows;
}

// At most 256 distinct words.
bool palette_choice(const Frame& frame, Choice& choice) {
    if (!Distinct().add(frame.scratch.few)) return false;
    Distinct whole;
    std::vector<uint64_t> sampled;
    if (!whole.add(widened(frame, frame.sample, sampled))) return false;
    const auto words = whole.found();
    if (words.size() > std::max<size_t>(frame.n_sampled / 4, 2)) return false;
    Table table;
    table.n_symbols = words.size();
    for (const auto& word : words) table.counts.push_back(word.second);
    choice.bits = symbol_cost(frame, table.counts.data(), 1, table.n_symbols, 0, double(words.size() * frame.word_bits()));
    choice.finish = [&frame, table, words](PlanResult& plan) {
        plan.predict = PALETTE;
        for (const auto& word : words) plan.palette.push_back(word.first);
        give_symbols(frame, table, frame.n_sampled, plan);
    };
    return true;
}

// Bits per word of a sparse frame but for its patches.
double sparse_overhead(const Frame& frame) {
    return 192.0 / double(std::min<uint64_t>(frame.n_words, uint64_t(1) << frame.request.chunk_log2));
}

// Whether it seems worth it to count how many words a sparse frame would hold. n_unlike: of the thin sample.
bool seems_sparse(const Frame& frame, size_t n_unlike, double rival) {
    const double share = double(n_unlike) / double(frame.thin.n_words());
    return patch_bits(frame, share) + sparse_overhead(frame) < rival + NEAR_BITS;
}

// The word that makes up more than half of some, if any does.
bool commonest_of(const Frame& frame, uint64_t& word) {
    return frame.kernels.majority(frame.scratch.few.data(), frame.scratch.few.size(), &word);
}

// Few words differ from the reference, or from the commonest word. Counted only where it seems worth it.
void consider_sparse(const Frame& frame, Choice& best) {
    const PlanRequest& request = frame.request;
    const uint8_t* words = static_cast<const uint8_t*>(request.words);
    const uint8_t* reference = static_cast<const uint8_t*>(request.reference);
    const double rival = best.bits, n_words = double(frame.n_words);
    const auto weigh = [&](size_t n_unlike, auto count, auto finish) {
        if (!seems_sparse(frame, n_unlike, rival)) return;
        // So many that it costs more than the best.
        const double most = best.bits / double(16 + frame.word_bits()) * n_words;
        const double share = double(count(most < n_words ? size_t(most) + 1 : size_t(frame.n_words))) / n_words;
        const double bits = patch_bits(frame, share) + sparse_overhead(frame);
        if (bits < best.bits) best = {bits, finish};
    };
    uint64_t commonest = 0;
    if (commonest_of(frame, commonest)) {
        weigh(
            frame.stats.count_unequal_rows_to(request.words, commonest, frame.thin),
            [&](size_t most) {
                if (request.facts) {
                    if (!request.facts->n_unlike_commonest)
                        throw std::invalid_argument("a frame of which the words unlike the commonest were not counted");
                    return size_t(*request.facts->n_unlike_commonest);
                }
                return total(frame, most, [&](uint64_t at, size_t n, size_t left) {
                    return frame.stats.count_unequal_to(words + at, commonest, n, left);
                });
            },
            [commonest](PlanResult& plan) {
                plan.predict = SPARSE;
                plan.word = commonest;
            });
    }
    if (reference) {
        weigh(
            frame.stats.count_unequal_rows(words, reference, frame.thin),
            [&](size_t most) {
                if (request.facts) return size_t(request.facts->n_unlike_reference);
                return total(frame, most, [&](uint64_t at, size_t n, size_t left) {
                    return frame.stats.count_unequal(words + at, reference + at, n, left);
                });
            },
            [](PlanResult& plan) {
                plan.predict = SPARSE;
                plan.has_reference = true;
            });
    }
}

// The sample, and the words that tell whether few distinct ones are to be expected.
void look_at(Frame& frame) {
    frame.take_sample();
    widened(frame, few_rows(frame), frame.scratch.few);
}

// The best of all but sparse.
Choice best_choice(Frame& frame) {
    const bool is_float = frame.request.kind.is_float, has_reference = frame.request.reference != nullptr;
    Choice best{double(frame.word_bits()) - SIMPLER_BITS, [](PlanResult&) {}}, other;
    const auto consider = [&](Choice&& choice) {
        if (choice.bits < best.bits) best = std::move(choice);
    };
    if (palette_choice(frame, other)) consider(std::move(other));
    Choice delta;
    if (has_reference) delta = delta_choice(frame, true);
    if (is_float) consider(full_choice(frame, has_reference ? std::min(best.bits, delta.bits) : best.bits));
    else consider(delta_choice(frame, false));
    if (has_reference) {
        const bool is_hopeless = !is_float || delta.bits >= best.bits + HOPELESS_BITS;
        consider(std::move(delta));
        if (!is_hopeless && scaled_delta_choice(frame, other)) consider(std::move(other));
    }
    return best;
}

void plan_one(const PlanRequest& request, Scratch& scratch, size_t n_threads, PlanResult& plan) {
    Frame frame(request, scratch, n_threads);
    if (is_exact(frame, plan)) return;
    look_at(frame);
    Choice best = best_choice(frame);
    consider_sparse(frame, best);
    best.finish(plan);
}

// What may be missing where the frame is elsewhere: never less than planning then asks for.
void find_wants(const PlanRequest& request, bool has_means, Scratch& scratch, size_t n_threads, Wants& wants) {
    if (request.is_exact()) return;
    Frame frame(request, scratch, n_threads);
    look_at(frame);
    uint64_t word;
    const bool has_commonest = commonest_of(frame, word);
    if (!frame.is_elsewhere() && !has_commonest) return;
    const bool is_float = request.kind.is_float, has_reference = request.reference != nullptr;
    double bits = double(frame.word_bits()) - SIMPLER_BITS;  // the best costs no more
    Choice other;
    if (palette_choice(frame, other)) bits = std::min(bits, other.bits);
    const double delta_bits = has_reference ? delta_choice(frame, true).bits : bits;
    std::vector<std::pair<uint64_t, uint64_t>> asked;  // uses and columns of lattices
    bool is_hopeless = !is_float || !has_reference;  // scaled deltas
    if (is_float) {
        double full_bits = bits;
        for (const auto& cut : promising_splits(frame, std::min(bits, delta_bits), full_bits))
            for (const LatticeUse use : {SCALE_ROWS, SCALE_TAIL, SCALE_COLUMNS}) asked.emplace_back(use, cut.first);
        // With scales it costs less, or a little more: nobody knows yet.
        bits = std::min(bits, full_bits);
        is_hopeless = is_hopeless || (asked.empty() && delta_bits >= bits + HOPELESS_BITS);
    } else {
        bits = std::min(bits, delta_choice(frame, false).bits);
    }
    bits = std::min(bits, delta_bits);
    if (frame.is_elsewhere() && !is_hopeless) {
        const uint64_t n_columns = promising_factors(frame);
        for (const LatticeUse use : {FACTOR_ROWS, FACTOR_COLUMNS})
            if (n_columns) asked.emplace_back(use, n_columns);
    }
    for (const auto& one : asked) {
        Lattice lattice;
        if (frame.is_elsewhere() && find_lattice(request, one.first, one.second, has_means, lattice))
            wants.lattices.push_back(std::move(lattice));
    }
    if (!has_commonest) return;
    const size_t n_unlike = frame.stats.count_unequal_rows_to(request.words, word, frame.thin);
    if (seems_sparse(frame, n_unlike, bits)) wants.commonest = word;
}

// Scratch memory that is kept for later calls: fresh memory costs as much as planning. Nobody waits for the lock, which
// may be held for ever in a process that was forked.
class Kept {
  public:
    std::unique_ptr<Scratch> take() {
        std::unique_lock<std::mutex> held(lock_, std::try_to_lock);
        if (!held.owns_lock() || free_.empty()) return std::unique_ptr<Scratch>(new Scratch());
        std::unique_ptr<Scratch> scratch = std::move(free_.back());
        free_.pop_back();
        return scratch;
    }

    void give(std::unique_ptr<Scratch> scratch) {
        std::unique_lock<std::mutex> held(lock_, std::try_to_lock);
        if (held.owns_lock() && free_.size() < MOST) free_.push_back(std::move(scratch));
    }

  private:
    static constexpr size_t MOST = 64;
    std::mutex lock_;
    std::vector<std::unique_ptr<Scratch>> free_;
};

Kept& kept() {
    static Kept found;
    return found;
}

// Scratch memory for as long as this lives.
class Borrowed {
  public:
    Borrowed() : scratch_(kept().take()) {}
    Borrowed(Borrowed&&) = default;
    ~Borrowed() {
        if (scratch_) kept().give(std::move(scratch_));
    }
    Scratch& get() { return *scratch_; }

  private:
    std::unique_ptr<Scratch> scratch_;
};

}  // namespace
}  // namespace planning

void plan_frame(const PlanRequest& request, PlanResult& result) {
    planning::Borrowed scratch;
    planning::plan_one(request, scratch.get(), 1, result);
}

// Calls work(number, scratch memory, threads) for every request, shared among threads.
template <class Work>
static void for_each(const std::vector<PlanRequest>& requests, size_t n_threads, Work work) {
    const size_t n_each = n_threads / std::max<size_t>(requests.size(), 1);
    share(requests.size(), n_threads, [&]() {
        return [&, scratch = planning::Borrowed()](size_t i) mutable { work(i, scratch.get(), n_each); };
    });
}

void plan_frames(const std::vector<PlanRequest>& requests, size_t n_threads, std::vector<PlanResult>& results) {
    results.assign(requests.size(), PlanResult());
    for_each(requests, n_threads, [&](size_t i, planning::Scratch& scratch, size_t n_each) {
        planning::plan_one(requests[i], scratch, n_each, results[i]);
    });
}

void wants_of(const std::vector<PlanRequest>& requests, bool has_means, size_t n_threads, std::vector<Wants>& wants) {
    wants.assign(requests.size(), Wants());
    for_each(requests, n_threads, [&](size_t i, planning::Scratch& scratch, size_t n_each) {
        planning::find_wants(requests[i], has_means, scratch, n_each, wants[i]);
    });
}

}  // namespace tricomp
