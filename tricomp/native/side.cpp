// The side section of a frame; see side.h.

#include "side.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "frame.h"
#include "kernels.h"

namespace tricomp {

namespace {

constexpr uint32_t VECTOR_PROB_BITS = 11;
constexpr uint64_t MOST_CODED_VALUES = 1 << 20;  // of a vector in one rANS stream, which only 32 lanes decode
constexpr int64_t LEVEL_LIMIT = 1 << 14;
constexpr size_t VECTOR_HEAD = 8;

uint64_t n_rows_of(const Model& model) {
    return model.n_columns ? (model.n_words + model.n_columns - 1) / model.n_columns : 0;
}

size_t n_symbol_freqs(const Model& model) {
    return model.entropy == RANS ? size_t(model.n_contexts) * model.n_symbols : 0;
}

bool is_coded(const Model& model, uint32_t plane) { return model.coded_planes >> plane & 1; }

// Everything of the tables but their freqs, which side.freqs holds: of the symbols, then of each coded plane.
void build(Model& model, SideData& side) {
    Tables* all[1 + 8];
    size_t n_tables = 0;
    if (model.entropy == RANS) {
        model.symbols.n_symbols = model.n_symbols;
        model.symbols.n_contexts = model.n_contexts;
        all[n_tables++] = &model.symbols;
    }
    for (uint32_t plane = 0; plane < model.n_planes; plane++) {
        if (!is_coded(model, plane)) continue;
        model.planes[plane].n_symbols = 1u << model.plane_widths[plane];
        model.planes[plane].n_contexts = 1;
        all[n_tables++] = &model.planes[plane];
    }
    size_t n_contexts = 0;
    for (size_t i = 0; i < n_tables; i++) n_contexts += all[i]->n_contexts;
    side.entries.resize(side.freqs.size());
    side.slots.resize((n_contexts << model.prob_bits) / 16);
    side.fast.resize(n_tables);
    const uint16_t* freqs = side.freqs.data();
    uint32_t* entries = side.entries.data();
    uint32_t* slots = reinterpret_cast<uint32_t*>(side.slots.data());
    for (size_t i = 0; i < n_tables; i++) {
        Tables& tables = *all[i];
        tables.prob_bits = model.prob_bits;
        tables.freqs = freqs;
        build_tables(tables, entries, slots, &side.fast[i]);
        freqs += size_t(tables.n_contexts) * tables.n_symbols;
        entries += size_t(tables.n_contexts) * tables.n_symbols;
        slots += size_t(tables.n_contexts) << tables.prob_bits;
    }
}

void point_at_scales(Model& model, const SideData& side) {
    if (!model.n_columns) return;
    const uint16_t* rows = side.rows.data();
    const uint16_t* columns = model.has_column_scale ? side.columns.data() : nullptr;
    if (model.predict == SCALED_DELTA) {
        model.factor_rows = rows;
        model.factor_columns = columns;
    } else {
        model.level_rows = reinterpret_cast<const int16_t*>(rows);
        model.level_columns = reinterpret_cast<const int16_t*>(columns);
    }
}

bool are_whole(const uint16_t* freqs, size_t n_tables, size_t n_symbols, uint32_t prob_bits) {
    for (size_t table = 0; table < n_tables; table++, freqs += n_symbols)
        if (std::accumulate(freqs, freqs + n_symbols, 0u) != 1u << prob_bits) return false;
    return true;
}

template <class Word>
bool is_ascending(const void* words, size_t n) {
    const Word* values = static_cast<const Word*>(words);
    for (size_t i = 1; i < n; i++)
        if (values[i] <= values[i - 1]) return false;
    return true;
}

bool is_ascending(const void* words, size_t n, uint32_t word_bits) {
    switch (word_bits) {
        case 8: return is_ascending<uint8_t>(words, n);
        case 16: return is_ascending<uint16_t>(words, n);
        case 32: return is_ascending<uint32_t>(words, n);
        default: return is_ascending<uint64_t>(words, n);
    }
}

// Takes the parts of a side section one after the other, never past its end. A part that fails says so in `fault`.
class Reader {
  public:
    Reader(const uint8_t* section, size_t n_bytes) : at_(n_bytes ? section : &NOTHING), end_(at_ + n_bytes) {}

    SideFault fault = SIDE_SOUND;

    // The next bytes, or null where there are too few.
    const uint8_t* take(uint64_t n_bytes) {
        if (n_bytes > n_left()) {
            fault = SIDE_TOO_SHORT;
            return nullptr;
        }
        at_ += n_bytes;
        return at_ - n_bytes;
    }

    bool finish() {
        const bool is_end = n_left() < ALIGN && std::all_of(at_, end_, [](uint8_t octet) { return octet == 0; });
        if (!is_end) fault = SIDE_TOO_LONG;
        return is_end;
    }

    // Frequencies of some tables, one after the other. At most MAX_ENTRIES.
    bool freqs(size_t n_tables, size_t n_symbols, uint32_t prob_bits, uint16_t* freqs) {
        // A table that could be right has less than 16 bits a symbol, so what stands further on is not looked at; a wrong
        // one may ask for up to 18, which are zero.
        uint8_t window[18 * MAX_ENTRIES / 8 + 8] = {};
        const size_t n = n_tables * n_symbols;
        std::memcpy(window, at_, std::min(2 * n, n_left()));
        size_t n_bits = 0;
        for (size_t i = 0; i < n; i++) {
            uint32_t bits;
            std::memcpy(&bits, window + n_bits / 8, 4);
            bits >>= n_bits % 8;
            const uint32_t length = bits & 15, n_below = length ? length - 1 : 0;
            freqs[i] = uint16_t(length ? 1u << n_below | (bits >> 4 & ((1u << n_below) - 1)) : 0);
            n_bits += 4 + n_below;
        }
        if (!take((n_bits + 7) / 8)) return false;
        if (are_whole(freqs, n_tables, n_symbols, prob_bits)) return true;
        fault = FREQUENCIES_NOT_WHOLE;
        return false;
    }

    // A vector of values in [low, high), with SLACK bytes after them; is_in_range turns false where one is not.
    bool vector(uint64_t n_values, int64_t low, int64_t high, std::vector<uint16_t>& values, bool& is_in_range) {
        const uint8_t* head = take(VECTOR_HEAD);
        if (!head) return false;
        const uint32_t kind = head[0], width = head[1];
        uint16_t step;
        int32_t least;
        std::memcpy(&step, head + 2, 2);
        std::memcpy(&least, head + 4, 4);
        if (kind > 1 || width > (kind ? 8 : 17) || (kind && n_values > MOST_CODED_VALUES)) {
            fault = VECTOR_UNKNOWN;
            return false;
        }
        std::vector<uint8_t> symbols;
        const uint8_t* packed = nullptr;
        const uint64_t n_packed = (n_values * width + 7) / 8;
        if (kind == 0 ? !(packed = take(n_packed)) : !coded(width, n_values, symbols)) return false;
        values.assign(size_t(n_values) + SLACK / 2, 0);
        uint32_t fewest = UINT32_MAX, most = 0;
        // Values are wanted modulo 2^16; whether they all are in range, the least and the largest offset tell.
        const auto fill = [&](size_t first, size_t last, auto offset_of) {
            uint16_t* out = values.data();
            uint32_t low_offset = UINT32_MAX, high_offset = 0;
            for (size_t i = first; i < last; i++) {
                const uint32_t offset = offset_of(i);
                low_offset = std::min(low_offset, offset);
                high_offset = std::max(high_offset, offset);
                out[i] = uint16_t(uint32_t(least) + step * offset);
            }
            fewest = std::min(fewest, low_offset);
            most = std::max(most, high_offset);
        };
        if (kind == 0) {
            const uint32_t mask = (1u << width) - 1;
            // As long as four bytes may be read; then the last few.
            const size_t n_easy = width && n_packed >= 4 ? size_t((n_packed - 4) * 8 / width) : 0;
            fill(0, n_easy, [=](size_t i) {
                uint32_t bits;
                std::memcpy(&bits, packed + i * width / 8, 4);
                return bits >> i * width % 8 & mask;
            });
            fill(n_easy, size_t(n_values), [=](size_t i) {
                uint32_t bits = 0;
                std::memcpy(&bits, packed + i * width / 8, size_t(std::min<uint64_t>(4, n_packed - i * width / 8)));
                return bits >> i * width % 8 & mask;
            });
        } else {
            fill(0, size_t(n_values), [octets = symbols.data()](size_t i) { return uint32_t(octets[i]); });
        }
        is_in_range &= !n_values || (low <= least + int64_t(step) * fewest && least + int64_t(step) * most < high);
        return true;
    }

  private:
    static constexpr uint8_t NOTHING = 0;

    size_t n_left() const { return size_t(end_ - at_); }

    // The offsets of a vector of kind 1, and what fills up their last row.
    bool coded(uint32_t width, uint64_t n_values, std::vector<uint8_t>& symbols) {
        const uint8_t* count = take(4);
        if (!count) return false;
        uint32_t n_words;
        std::memcpy(&n_words, count, 4);
        uint16_t table[256];
        if (!freqs(1, size_t(1) << width, VECTOR_PROB_BITS, table)) return false;
        const uint8_t* states = take(STATE_BYTES);
        const uint8_t* stored = states ? take(2 * uint64_t(n_words)) : nullptr;
        if (!stored) return false;
        std::vector<uint8_t> words(2 * size_t(n_words) + SLACK);
        std::memcpy(words.data(), stored, 2 * size_t(n_words));
        Tables tables;
        tables.prob_bits = VECTOR_PROB_BITS;
        tables.n_symbols = 1u << width;
        tables.n_contexts = 1;
        tables.freqs = table;
        uint32_t entries[256];
        alignas(64) uint32_t slots[1 << VECTOR_PROB_BITS];
        FastTables fast;
        build_tables(tables, entries, slots, &fast);
        const size_t n_rows = size_t((n_values + ROW - 1) / ROW);
        symbols.resize(n_rows * ROW + SLACK);
        if (kernels().decode_stream(tables, states, words.data(), n_words, symbols.data(), n_rows)) return true;
        fault = VECTOR_UNFINISHED;
        return false;
    }

    const uint8_t* at_;
    const uint8_t* end_;
};

}  // namespace

SideFault read_side(Model& model, const uint8_t* section, size_t n_bytes, SideData& side) {
    Reader reader(section, n_bytes);
    const size_t n_freqs = n_symbol_freqs(model);
    side.freqs.resize(n_freqs);
    if (n_freqs && !reader.freqs(model.n_contexts, model.n_symbols, model.prob_bits, side.freqs.data()))
        return reader.fault;
    for (uint32_t plane = 0; plane < model.n_planes; plane++) {
        if (!is_coded(model, plane)) continue;
        const size_t before = side.freqs.size(), n = size_t(1) << model.plane_widths[plane];
        side.freqs.resize(before + n);
        if (!reader.freqs(1, n, model.prob_bits, side.freqs.data() + before)) return reader.fault;
    }
    if (model.entropy == INDEX) {
        const uint8_t* count = reader.take(1);
        const size_t n = count ? size_t(*count) + 1 : 0;
        const uint8_t* dictionary = count ? reader.take(n) : nullptr;
        if (!dictionary) return reader.fault;
        if (n > size_t(1) << model.index_bits || !is_ascending<uint8_t>(dictionary, n) ||
            dictionary[n - 1] >= model.n_symbols)
            return DICTIONARY_MISFIT;
        side.dictionary.assign(n + SLACK, 0);
        std::memcpy(side.dictionary.data(), dictionary, n);
        model.dictionary = side.dictionary.data();
        model.n_dictionary = uint32_t(n);
    }
    if (model.predict == PALETTE) {
        const size_t n_palette = model.n_symbols * model.kind.word_bits / 8;
        const uint8_t* palette = reader.take(n_palette);
        if (!palette) return reader.fault;
        side.palette.assign((n_palette + SLACK) / 8 + 1, 0);
        std::memcpy(side.palette.data(), palette, n_palette);
        if (!is_ascending(side.palette.data(), model.n_symbols, model.kind.word_bits)) return PALETTE_UNORDERED;
        model.palette = side.palette.data();
    }
    if (model.n_columns) {
        const bool is_factor = model.predict == SCALED_DELTA;
        const int64_t low = is_factor ? 0 : -LEVEL_LIMIT, high = is_factor ? 1 << 16 : LEVEL_LIMIT;
        bool is_in_range = true;
        if (!reader.vector(n_rows_of(model), low, high, side.rows, is_in_range)) return reader.fault;
        if (model.has_column_scale && !reader.vector(model.n_columns, low, high, side.columns, is_in_range))
            return reader.fault;
        if (!is_in_range) return SCALES_OUT_OF_RANGE;
        point_at_scales(model, side);
    }
    if (!reader.finish()) return reader.fault;
    build(model, side);
    return SIDE_SOUND;
}

void set_side(Model& model, const EncodeRequest& request, SideData& side) {
    auto require = [](bool holds, const char* text) {
        if (!holds) throw std::invalid_argument(text);
    };
    auto copy = [](const Bytes& bytes, auto& values, size_t n_slack) {
        using Value = std::decay_t<decltype(values[0])>;
        values.assign(bytes.n_bytes / sizeof(Value) + (n_slack + sizeof(Value) - 1) / sizeof(Value) + 1, 0);
        if (bytes.n_bytes) std::memcpy(values.data(), bytes.data, bytes.n_bytes);
    };
    const size_t n_freqs = n_symbol_freqs(model);
    require(request.freqs.n_bytes == 2 * n_freqs, "frequencies of another number");
    size_t n_all = n_freqs;
    for (uint32_t plane = 0; plane < model.n_planes; plane++)
        if (is_coded(model, plane)) n_all += size_t(1) << model.plane_widths[plane];
    require(request.plane_freqs.n_bytes == 2 * (n_all - n_freqs), "frequencies of planes of another number");
    side.freqs.resize(n_all);
    if (n_freqs) std::memcpy(side.freqs.data(), request.freqs.data, 2 * n_freqs);
    if (n_all > n_freqs) std::memcpy(side.freqs.data() + n_freqs, request.plane_freqs.data, 2 * (n_all - n_freqs));
    const char* not_whole = "frequencies that do not sum to the size of the table";
    require(!n_freqs || are_whole(side.freqs.data(), model.n_contexts, model.n_symbols, model.prob_bits), not_whole);
    const uint16_t* freqs = side.freqs.data() + n_freqs;
    for (uint32_t plane = 0; plane < model.n_planes; plane++) {
        if (!is_coded(model, plane)) continue;
        const size_t n = size_t(1) << model.plane_widths[plane];
        require(are_whole(freqs, 1, n, model.prob_bits), not_whole);
        freqs += n;
    }
    if (model.entropy == INDEX) {
        const size_t n = request.dictionary.n_bytes;
        require(n > 0 && n <= size_t(1) << model.index_bits && is_ascending<uint8_t>(request.dictionary.data, n) &&
                    request.dictionary.data[n - 1] < model.n_symbols,
                "a dictionary that does not fit its plan");
        copy(request.dictionary, side.dictionary, SLACK);
        model.dictionary = side.dictionary.data();
        model.n_dictionary = uint32_t(n);
    }
    if (model.predict == PALETTE) {
        require(request.palette.n_bytes == model.n_symbols * model.kind.word_bits / 8, "a palette of another size");
        copy(request.palette, side.palette, SLACK);
        model.palette = side.palette.data();
    }
    if (model.n_columns) {
        require(request.scale_rows.n_bytes == 2 * n_rows_of(model), "scales of another number of rows");
        copy(request.scale_rows, side.rows, SLACK);
        if (model.has_column_scale) {
            require(request.scale_columns.n_bytes == 2 * model.n_columns, "scales of another number of columns");
            copy(request.scale_columns, side.columns, SLACK);
        }
        point_at_scales(model, side);
    }
    build(model, side);
}

namespace {

void put(std::vector<uint8_t>& out, uint64_t value, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i++) out.push_back(uint8_t(value >> 8 * i));
}

// Appends numbers of up to 17 bits, lowest bits first; padded to a byte at the end. most: the bits of all of them.
class BitWriter {
  public:
    BitWriter(std::vector<uint8_t>& out, size_t most) : out_(out), begin_(out.size()) {
        out_.resize(begin_ + most / 8 + 4);
        at_ = out_.data() + begin_;
    }
    ~BitWriter() {
        std::memcpy(at_, &held_, 4);
        out_.resize(size_t(at_ - out_.data()) + (n_held_ + 7) / 8);
    }

    void put(uint32_t bits, uint32_t n_bits) {
        held_ |= uint64_t(bits) << n_held_;
        n_held_ += n_bits;
        if (n_held_ < 32) return;
        std::memcpy(at_, &held_, 4);
        at_ += 4;
        held_ >>= 32;
        n_held_ -= 32;
    }

  private:
    std::vector<uint8_t>& out_;
    size_t begin_;
    uint8_t* at_;
    uint64_t held_ = 0;
    uint32_t n_held_ = 0;
};

uint32_t bit_length(uint32_t x) { return x ? 32 - uint32_t(__builtin_clz(x)) : 0; }

// Each frequency as 4 bits of length, then the bits below its leading one.
void put_freqs(std::vector<uint8_t>& out, const uint16_t* freqs, size_t n) {
    BitWriter writer(out, 16 * n);
    for (size_t i = 0; i < n; i++) {
        const uint32_t length = bit_length(freqs[i]);
        writer.put(length, 4);
        if (length > 1) writer.put(freqs[i] - (1u << (length - 1)), length - 1);
    }
}

// Frequencies that sum to 2^prob_bits, at least 1 for every counted symbol. There must be one, and less than 2^50 in all.
void normalise(const std::vector<uint64_t>& counts, uint32_t prob_bits, uint16_t* freqs) {
    const uint64_t total = std::accumulate(counts.begin(), counts.end(), uint64_t(0));
    const uint64_t n_present = counts.size() - size_t(std::count(counts.begin(), counts.end(), 0));
    const uint64_t size = uint64_t(1) << prob_bits, spare = size - n_present;
    uint64_t sum = 0;
    for (size_t i = 0; i < counts.size(); i++) {
        freqs[i] = uint16_t(counts[i] ? 1 + counts[i] * spare / total : 0);
        sum += freqs[i];
    }
    const size_t most = size_t(std::max_element(counts.begin(), counts.end()) - counts.begin());
    freqs[most] = uint16_t(freqs[most] + size - sum);
}

// A vector of small integers: kind, width, step, least value, then (value - least) / step, packed or as rANS.
template <class Value>
void put_vector(std::vector<uint8_t>& out, const Value* values, size_t n) {
    Value low = n ? values[0] : Value(0), high = low;
    for (size_t i = 0; i < n; i++) {
        low = std::min(low, values[i]);
        high = std::max(high, values[i]);
    }
    const int32_t least = low, most = high;
    std::vector<uint64_t> counts(size_t(most - least) + 1);
    for (size_t i = 0; i < n; i++) counts[size_t(values[i] - least)]++;
    uint32_t step = 0;
    for (uint32_t i = 1; i < counts.size(); i++)
        if (counts[i]) step = std::gcd(step, i);
    step = std::max(step, 1u);
    std::vector<uint16_t> places(counts.size());
    for (uint32_t i = 0; i < counts.size(); i++) places[i] = uint16_t(i / step);
    const uint32_t width = bit_length(places.back());

    const size_t n_packed = VECTOR_HEAD + (n * width + 7) / 8;
    const auto put_head = [&](uint8_t kind) {
        put(out, kind, 1);
        put(out, width, 1);
        put(out, step, 2);
        put(out, uint32_t(least), 4);
    };
    if (width <= 8 && n_packed >= 2 * STATE_BYTES && n <= MOST_CODED_VALUES) {
        std::vector<uint64_t> of_place(size_t(1) << width);
        for (uint32_t i = 0; i < counts.size(); i += step) of_place[i / step] = counts[i];
        uint16_t freqs[256];
        normalise(of_place, VECTOR_PROB_BITS, freqs);
        Tables tables;
        tables.prob_bits = VECTOR_PROB_BITS;
        tables.n_symbols = 1u << width;
        tables.n_contexts = 1;
        tables.freqs = freqs;
        uint32_t entries[256];
        alignas(64) uint32_t slots[1 << VECTOR_PROB_BITS];
        FastTables fast;
        build_tables(tables, entries, slots, &fast);
        const size_t n_rows = (n + ROW - 1) / ROW;
        std::vector<uint16_t> rows(n_rows * ROW, tables.favourites[0]);
        for (size_t i = 0; i < n; i++) rows[i] = places[size_t(values[i] - least)];
        std::vector<uint8_t> stream(SLACK + 2 * n_rows * ROW), states(STATE_BYTES);
        uint8_t* end = stream.data() + stream.size();
        const size_t n_words = kernels().encode_stream(tables, rows.data(), n_rows, end, states.data());
        std::vector<uint8_t> table;
        put_freqs(table, freqs, tables.n_symbols);
        if (VECTOR_HEAD + 4 + table.size() + STATE_BYTES + 2 * n_words < n_packed) {
            put_head(1);
            put(out, n_words, 4);
            out.insert(out.end(), table.begin(), table.end());
            out.insert(out.end(), states.begin(), states.end());
            out.insert(out.end(), end - 2 * n_words, end);
            return;
        }
    }
    put_head(0);
    BitWriter writer(out, n * width);
    for (size_t i = 0; i < n && width; i++) writer.put(places[size_t(values[i] - least)], width);
}

}  // namespace

void write_side(const Model& model, std::vector<uint8_t>& section) {
    section.clear();
    if (model.entropy == RANS) put_freqs(section, model.symbols.freqs, n_symbol_freqs(model));
    for (uint32_t plane = 0; plane < model.n_planes; plane++)
        if (is_coded(model, plane))
            put_freqs(section, model.planes[plane].freqs, size_t(1) << model.plane_widths[plane]);
    if (model.entropy == INDEX) {
        put(section, model.n_dictionary - 1, 1);
        section.insert(section.end(), model.dictionary, model.dictionary + model.n_dictionary);
    }
    if (model.predict == PALETTE) {
        const uint8_t* palette = static_cast<const uint8_t*>(model.palette);
        section.insert(section.end(), palette, palette + model.n_symbols * model.kind.word_bits / 8);
    }
    if (model.n_columns) {
        const size_t n_rows = size_t(n_rows_of(model)), n_columns = size_t(model.n_columns);
        if (model.predict == SCALED_DELTA) {
            put_vector(section, model.factor_rows, n_rows);
            if (model.has_column_scale) put_vector(section, model.factor_columns, n_columns);
        } else {
            put_vector(section, model.level_rows, n_rows);
            if (model.has_column_scale) put_vector(section, model.level_columns, n_columns);
        }
    }
    section.resize((section.size() + ALIGN - 1) / ALIGN * ALIGN);
}

}  // namespace tricomp
