// Encodes, decodes and plans frames without Python, for machines whose Python is not at hand: `program FILE`.
//
// tests/test_native_program.py writes FILE from what the reference made, and reads what is printed: the instruction set,
// the digest's sum of each sound frame, the fault of each damaged one, a line for each difference, and "done". The hard
// thing: every part of a record gets memory of exactly its size, so that a step outside is one for a sanitizer to see.

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <vector>

#include "frame.h"
#include "kernels.h"
#include "planner.h"

namespace {

using namespace tricomp;

// In the order in which the test writes them.
enum Kind : uint64_t { SOUND, DAMAGED, PLANNED };
enum Part {
    PLAN,       // as plan_numbers.py packs it, as the job has it
    COMPLETED,  // the same with the size and checksum of the head
    FREQS, PLANE_FREQS, DICTIONARY, PALETTE, SCALE_ROWS, SCALE_COLUMNS,
    WORDS,
    OLD_WORDS,  // of the reference; empty: none
    DATA,       // the frame
    REQUEST,    // u64: whether the tier is fast, then the shape
    N_PARTS
};

struct Buffer {
    std::unique_ptr<uint8_t[]> room;
    size_t n_bytes = 0;

    Bytes bytes() const { return {room.get(), n_bytes}; }
    bool operator==(const Buffer& other) const {
        return n_bytes == other.n_bytes && !std::memcmp(room.get(), other.room.get(), n_bytes);
    }
};

Buffer buffer_of(const uint8_t* data, size_t n_bytes) {
    Buffer buffer{std::unique_ptr<uint8_t[]>(new uint8_t[n_bytes]), n_bytes};
    if (data != nullptr && n_bytes) std::memcpy(buffer.room.get(), data, n_bytes);
    return buffer;
}

template <class Value>
Buffer buffer_of(const std::vector<Value>& values) {
    return buffer_of(reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(Value));
}

struct Record {
    uint64_t number = 0, kind = 0;
    Buffer parts[N_PARTS];
};

// Takes records from a file: kind, then for each part its bytes, all numbers u64.
class Reader {
  public:
    explicit Reader(const char* path) {
        std::ifstream file(path, std::ios::binary);
        if (!file) throw std::runtime_error("no such file");
        data_.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }

    bool next(Record& record) {
        if (at_ == data_.size()) return false;
        record.number = n_records_++;
        record.kind = number();
        for (Buffer& part : record.parts) {
            const uint64_t n_bytes = number();
            if (n_bytes > data_.size() - at_) throw std::runtime_error("a record that is cut short");
            part = buffer_of(reinterpret_cast<const uint8_t*>(data_.data()) + at_, size_t(n_bytes));
            at_ += size_t(n_bytes);
        }
        return true;
    }

  private:
    uint64_t number() {
        uint64_t value;
        if (sizeof value > data_.size() - at_) throw std::runtime_error("a record that is cut short");
        std::memcpy(&value, data_.data() + at_, sizeof value);
        at_ += sizeof value;
        return value;
    }

    std::vector<char> data_;
    size_t at_ = 0;
    uint64_t n_records_ = 0;
};

PlanNumbers plan_of(const Buffer& packed, Model& model) {
    PlanNumbers plan;
    if (packed.n_bytes != sizeof plan.fields) throw std::runtime_error("a plan of another length");
    std::memcpy(plan.fields, packed.room.get(), sizeof plan.fields);
    if (!model_of(plan, model)) throw std::runtime_error("a plan that contradicts itself");
    return plan;
}

// What a frame is encoded to, all of it.
Buffer encoded(EncodeRequest request, size_t n_threads) {
    Model model;
    if (!model_of(request.plan, model)) throw std::runtime_error("a plan that contradicts itself");
    request.n_chunks = n_chunks_of(model);
    request.wants_side = true;
    std::vector<EncodeRequest> requests{request};
    Buffer payloads = buffer_of(nullptr, output_bytes(requests));
    encode(requests, n_threads, payloads.room.get());
    const EncodeRequest& done = requests[0];
    std::vector<uint8_t> frame = done.side;
    frame.insert(frame.end(), done.rows.begin(), done.rows.end());
    frame.resize(size_t(aligned(frame.size())));
    frame.insert(frame.end(), payloads.room.get() + done.begin, payloads.room.get() + done.end);
    return buffer_of(frame);
}

Fault decoded(const Record& record, size_t n_threads, Buffer& words, uint64_t& digest_sum) {
    Model model;
    DecodeRequest request;
    request.plan = plan_of(record.parts[COMPLETED], model);
    request.head = request.payloads = record.parts[DATA].bytes();
    request.frame_bytes = record.parts[DATA].n_bytes;
    request.stop = model.n_words;
    request.reference = model.has_reference ? record.parts[OLD_WORDS].room.get() : nullptr;
    words = buffer_of(nullptr, size_t(model.n_words) * model.kind.word_bits / 8);
    std::memset(words.room.get(), 0xA5, words.n_bytes);
    request.words = words.room.get();
    std::vector<DecodeRequest> requests{request};
    const Fault fault = decode(requests, n_threads);
    digest_sum = requests[0].digest_sum;
    return fault;
}

void check_sound(const Record& record) {
    Model model;
    EncodeRequest request;
    request.plan = plan_of(record.parts[PLAN], model);
    request.freqs = record.parts[FREQS].bytes();
    request.plane_freqs = record.parts[PLANE_FREQS].bytes();
    request.dictionary = record.parts[DICTIONARY].bytes();
    request.palette = record.parts[PALETTE].bytes();
    request.scale_rows = record.parts[SCALE_ROWS].bytes();
    request.scale_columns = record.parts[SCALE_COLUMNS].bytes();
    request.words = record.parts[WORDS].room.get();
    request.reference = model.has_reference ? record.parts[OLD_WORDS].room.get() : nullptr;
    for (size_t n_threads : {1, 3}) {
        if (!(encoded(request, n_threads) == record.parts[DATA]))
            std::printf("differs %" PRIu64 " encoded, threads %zu\n", record.number, n_threads);
        Buffer words;
        uint64_t digest_sum;
        const Fault fault = decoded(record, n_threads, words, digest_sum);
        if (fault.stage || !(words == record.parts[WORDS]))
            std::printf("differs %" PRIu64 " decoded, threads %zu, fault %u %u\n", record.number, n_threads, fault.stage,
                        fault.code);
        std::printf("sum %" PRIu64 " %" PRIu64 "\n", record.number, digest_sum);
    }
}

void check_damaged(const Record& record) {
    Buffer words;
    uint64_t digest_sum;
    const Fault fault = decoded(record, 2, words, digest_sum);
    if (fault.stage)
        std::printf("fault %" PRIu64 " %u %u %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", record.number, fault.stage,
                    fault.code, fault.request, fault.chunk, fault.details[0], fault.details[1]);
    else if (!(words == record.parts[WORDS]))
        std::printf("differs %" PRIu64 " decoded\n", record.number);
}

// A plan as the planner chose it, in the form that the drivers take.
PlanNumbers numbers_of(const PlanResult& plan, const PlanNumbers& known) {
    PlanNumbers numbers = known;  // dtype and number of words
    int64_t* f = numbers.fields;
    f[P_PREDICT] = plan.predict;
    f[P_ENTROPY] = plan.entropy;
    f[P_REMAINDER] = plan.remainder;
    f[P_N_SYMBOLS] = plan.n_symbols;
    f[P_BASE] = plan.base;
    f[P_N_CONTEXTS] = plan.n_contexts;
    f[P_CONTEXT_BASE] = plan.context_base;
    f[P_CONTEXT_SHIFT] = plan.context_shift;
    f[P_K] = plan.k;
    f[P_HAS_SIGN] = plan.has_sign;
    f[P_N_COLUMNS] = int64_t(plan.n_columns);
    f[P_HAS_COLUMN_SCALE] = plan.has_column_scale;
    f[P_FACTOR] = int64_t(plan.factor);
    f[P_INDEX_BITS] = plan.index_bits;
    f[P_SHIFT] = plan.shift;
    f[P_HAS_BLOCK_SHIFTS] = plan.has_block_shifts;
    f[P_CODED_PLANES] = plan.coded_planes;
    f[P_WORD] = int64_t(plan.word);
    f[P_HAS_REFERENCE] = plan.has_reference;
    return numbers;
}

void check_planned(const Record& record) {
    Model model;
    const PlanNumbers expected = plan_of(record.parts[PLAN], model);
    std::vector<uint64_t> numbers(record.parts[REQUEST].n_bytes / 8);
    std::memcpy(numbers.data(), record.parts[REQUEST].room.get(), 8 * numbers.size());
    PlanRequest asked;
    asked.kind = model.kind;
    asked.words = record.parts[WORDS].room.get();
    asked.reference = record.parts[OLD_WORDS].n_bytes ? record.parts[OLD_WORDS].room.get() : nullptr;
    asked.n_words = model.n_words;
    asked.chunk_log2 = model.chunk_log2;
    asked.is_fast = numbers.at(0) != 0;
    asked.shape.assign(numbers.begin() + 1, numbers.end());
    PlanResult plan;
    plan_frame(asked, plan);
    EncodeRequest request;
    request.plan = numbers_of(plan, expected);
    for (int field = 0; field < N_PLAN_FIELDS; field++)
        if (request.plan.fields[field] != expected.fields[field])
            std::printf("differs %" PRIu64 " planned, field %d: %" PRId64 ", not %" PRId64 "\n", record.number, field,
                        request.plan.fields[field], expected.fields[field]);
    if (!record.parts[DATA].n_bytes) return;
    const bool is_level = plan.factor_rows.empty();
    std::vector<uint16_t> plane_freqs;
    for (const std::vector<uint16_t>& freqs : plan.plane_freqs)
        plane_freqs.insert(plane_freqs.end(), freqs.begin(), freqs.end());
    std::vector<uint8_t> palette;
    for (const uint64_t word : plan.palette)
        for (uint32_t bit = 0; bit < model.kind.word_bits; bit += 8) palette.push_back(uint8_t(word >> bit));
    const Buffer freqs = buffer_of(plan.freqs), planes = buffer_of(plane_freqs), dictionary = buffer_of(plan.dictionary);
    const Buffer rows = is_level ? buffer_of(plan.level_rows) : buffer_of(plan.factor_rows);
    const Buffer columns = is_level ? buffer_of(plan.level_columns) : buffer_of(plan.factor_columns);
    const Buffer ascending = buffer_of(palette);
    request.freqs = freqs.bytes();
    request.plane_freqs = planes.bytes();
    request.dictionary = dictionary.bytes();
    request.palette = ascending.bytes();
    request.scale_rows = rows.bytes();
    request.scale_columns = columns.bytes();
    request.words = asked.words;
    request.reference = plan.has_reference ? asked.reference : nullptr;
    if (!(encoded(request, 1) == record.parts[DATA])) std::printf("differs %" PRIu64 " planned\n", record.number);
}

}  // namespace

int main(int n_arguments, char** arguments) {
    if (n_arguments != 2 || chosen_kernels() == nullptr) {
        std::fprintf(stderr, n_arguments != 2 ? "one file, please\n" : "this processor does not have it\n");
        return 2;
    }
    try {
        std::printf("isa %s\n", kernels().name);
        Reader reader(arguments[1]);
        Record record;
        while (reader.next(record)) {
            if (record.kind == SOUND) check_sound(record);
            else if (record.kind == DAMAGED) check_damaged(record);
            else check_planned(record);
        }
        std::printf("done\n");
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
