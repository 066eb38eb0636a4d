// Decoding of frames: heads checked and parsed, then chunks shared among threads. Baseline, STL allowed.
//
// The hard thing: a chunk whose payload ends where its memory ends has no slack for the streams' reads; it is copied.

#include <cstring>
#include <memory>
#include <stdexcept>

#include "frame.h"
#include "kernels.h"
#include "derive.h"
#include "side.h"
#include "threads.h"

namespace tricomp {

namespace {

constexpr uint64_t LARGE_BYTES = 1 << 20;  // decoded words that are written past the cache

// Some chunks of one frame, next to each other, that are decoded together.
struct Group {
    size_t request;
    uint64_t first_chunk;
    size_t n_chunks;
    uint64_t offset;  // of the first one's payload in the payloads
};

struct Frame {
    Model model;
    SideData side;
    const uint8_t* rows;  // of the directory
    uint64_t first_chunk;  // of those that are asked for
    std::vector<uint64_t> offsets;  // of their payloads in the payloads
    Fault fault;
};

uint32_t field(const uint8_t* row, size_t number) {
    uint32_t value;
    std::memcpy(&value, row + 4 * number, 4);
    return value;
}

// Check the head, read the side section, find where the chunks stand. What is wrong is in the frame's fault.
void open(const DecodeRequest& request, size_t number, Frame& frame) {
    Model& model = frame.model;
    Fault& fault = frame.fault;
    if (!model_of(request.plan, model)) throw std::invalid_argument("a plan that contradicts itself");
    const uint64_t n_chunks = n_chunks_of(model);
    const size_t n_row_bytes = row_bytes(model);
    const uint64_t head_bytes = request.plan.side_bytes() + aligned(n_chunks * n_row_bytes);
    fault.request = number;
    fault.stage = 1;
    if (request.head.n_bytes < head_bytes ||
        kernels().xxh3_64(request.head.data, size_t(head_bytes)) != request.plan.side_check()) {
        fault.code = HEAD_DAMAGED;
        return;
    }
    const uint32_t side_fault = read_side(model, request.head.data, size_t(request.plan.side_bytes()), frame.side);
    if (side_fault) {
        fault.stage = 2;
        fault.code = side_fault;
        return;
    }
    derive(model);
    const uint8_t* rows = request.head.data + request.plan.side_bytes();
    const uint64_t first = request.start >> model.chunk_log2;
    const uint64_t stop = (request.stop + (uint64_t(1) << model.chunk_log2) - 1) >> model.chunk_log2;
    frame.first_chunk = first;
    frame.offsets.reserve(size_t(stop > first ? stop - first : 0));
    uint64_t at = head_bytes, end = head_bytes;
    bool is_inside = true;
    for (uint64_t chunk = 0; chunk < n_chunks; chunk++) {
        const uint64_t n_bytes = field(rows + chunk * n_row_bytes, 2);
        if (chunk >= first && chunk < stop) {
            frame.offsets.push_back(at - request.payloads_at);
            is_inside &= at >= request.payloads_at && at - request.payloads_at <= request.payloads.n_bytes &&
                         n_bytes <= request.payloads.n_bytes - (at - request.payloads_at);
        }
        end = at + n_bytes;
        at += aligned(n_bytes);
    }
    if (end != request.frame_bytes || !is_inside) {
        fault.stage = 1;
        fault.code = END_ELSEWHERE;
        fault.details[0] = end;
        fault.details[1] = request.frame_bytes;
        return;
    }
    frame.rows = rows;
    fault.stage = 0;
}

// All chunks, in groups. The last ones are smaller, so that no thread is left with much to do when the others are done.
std::vector<Group> groups_of(const std::vector<std::unique_ptr<Frame>>& frames, size_t n_threads) {
    size_t n_left = 0;
    for (const auto& frame : frames) n_left += frame->offsets.size();
    std::vector<Group> groups;
    for (size_t number = 0; number < frames.size(); number++) {
        const std::vector<uint64_t>& offsets = frames[number]->offsets;
        for (size_t i = 0; i < offsets.size();) {
            size_t n = MAX_GROUP;
            while (n > 1 && n_threads > 1 && n_left <= n * n_threads) n /= 2;
            n = std::min(n, offsets.size() - i);
            groups.push_back({number, frames[number]->first_chunk + i, n, offsets[i]});
            i += n;
            n_left -= n;
        }
    }
    return groups;
}

}  // namespace

Fault decode(std::vector<DecodeRequest>& requests, size_t n_threads) {
    std::vector<std::unique_ptr<Frame>> frames;
    for (size_t number = 0; number < requests.size(); number++) frames.push_back(std::make_unique<Frame>());
    share(requests.size(), n_threads, [&] {
        return [&](size_t number) { open(requests[number], number, *frames[number]); };
    });
    for (const auto& frame : frames)
        if (frame->fault.stage) return frame->fault;
    const std::vector<Group> groups = groups_of(frames, n_threads);
    std::vector<Fault> faults(groups.size());
    std::vector<uint64_t> sums(groups.size()), reference_sums(groups.size());
    share(groups.size(), n_threads, [&] {
        Lent<DecodeScratch> scratch;
        return [&, scratch](size_t item) {
            const Group& group = groups[item];
            DecodeRequest& request = requests[group.request];
            const Frame& frame = *frames[group.request];
            const Model& model = frame.model;
            const size_t word_bytes = model.kind.word_bits / 8, n_row_bytes = row_bytes(model);
            const size_t source_bytes = model.predict == CAST ? model.source.word_bits / 8 : word_bytes;
            const uint64_t size = uint64_t(1) << model.chunk_log2;
            DecodeChunk chunks[MAX_GROUP];
            std::vector<uint8_t> copies[MAX_GROUP];
            uint64_t at = group.offset;
            Fault& fault = faults[item];
            for (size_t c = 0; c < group.n_chunks; c++) {
                const uint64_t number = group.first_chunk + c, first = number * size;
                const uint8_t* row = frame.rows + number * n_row_bytes;
                DecodeChunk& chunk = chunks[c];
                chunk.n_bytes = field(row, 2);
                chunk.payload = request.payloads.data + at;
                chunk.row = row;
                chunk.first = first;
                chunk.n_words = size_t(std::min(size, model.n_words - first));
                const size_t offset = size_t(first - request.start);
                chunk.words = static_cast<uint8_t*>(request.words) + offset * word_bytes;
                chunk.reference = request.reference == nullptr
                                      ? nullptr
                                      : static_cast<const uint8_t*>(request.reference) + offset * source_bytes;
                chunk.wants_reference_sum = request.wants_reference_sum;
                chunk.is_checked = request.is_checked;
                chunk.is_large = (request.stop - request.start) * word_bytes >= LARGE_BYTES;
                // Padding after this chunk, where another follows, is zero: no checksum covers it.
                const uint64_t room = request.payloads.n_bytes - at;
                chunk.details[0] = chunk.details[1] = 0;
                const uint64_t padded = std::min<uint64_t>(aligned(chunk.n_bytes), room);
                bool is_clean = true;
                for (uint64_t i = chunk.n_bytes; i < padded; i++) is_clean &= chunk.payload[i] == 0;
                if (!is_clean && !fault.stage)
                    fault = {3, PADDING_NOT_ZERO, group.request, number, {0, 0}};
                if (room - chunk.n_bytes < SLACK) {
                    copies[c].assign(chunk.n_bytes + SLACK, 0);
                    std::memcpy(copies[c].data(), chunk.payload, chunk.n_bytes);
                    chunk.payload = copies[c].data();
                }
                at += aligned(chunk.n_bytes);
            }
            kernels().decode_chunks(model, chunks, group.n_chunks, *scratch);
            for (size_t c = group.n_chunks; c-- > 0;) {
                sums[item] += chunks[c].digest_sum;
                reference_sums[item] += chunks[c].reference_sum;
                if (chunks[c].fault != NO_FAULT && (!fault.stage || fault.chunk >= group.first_chunk + c))
                    fault = {3, chunks[c].fault, group.request, group.first_chunk + c,
                             {chunks[c].details[0], chunks[c].details[1]}};
            }
        };
    });
    for (const Fault& fault : faults)
        if (fault.stage) return fault;
    for (size_t item = 0; item < groups.size(); item++) {
        requests[groups[item].request].digest_sum += sums[item];
        requests[groups[item].request].reference_sum += reference_sums[item];
    }
    return Fault();
}

}  // namespace tricomp
