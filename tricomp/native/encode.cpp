// Encoding of frames: chunks shared among threads, laid down in order. Baseline, STL allowed.
//
// The hard thing: where a chunk's payload goes is known when all before it are done. So a thread encodes into memory of
// its own, waits for the sizes of the chunks before, and copies. The bytes never depend on the number of threads.

#include <atomic>
#include <condition_variable>
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

struct Frame {
    Model model;
    SideData side;
};

struct Item {
    size_t request;
    uint64_t chunk;
    uint64_t digest_sum = 0, reference_sum = 0;
};

// Where payloads go: handed out in the order of the items.
class Places {
  public:
    // Wait for the turn of an item; returns where it goes. made: called with the place; returns the place after it.
    template <class Made>
    void take(size_t item, Made made) {
        // The others are nearly done, too: to sleep and be woken takes as long as a good part of a chunk.
        for (size_t i = 0; i < SPINS && item_.load(std::memory_order_acquire) != item; i++) relax();
        std::unique_lock<std::mutex> held(lock_);
        turned_.wait(held, [&] { return item_ == item || is_over_; });
        if (is_over_) return;
        at_ = made(at_);
        item_.store(item + 1, std::memory_order_release);
        turned_.notify_all();
    }

    void give_up() {
        std::lock_guard<std::mutex> held(lock_);
        is_over_ = true;
        turned_.notify_all();
    }

  private:
    static constexpr size_t SPINS = 1000;

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    std::mutex lock_;
    std::condition_variable turned_;
    std::atomic<size_t> item_{0};
    size_t at_ = 0;
    bool is_over_ = false;
};

struct Memory {
    EncodeScratch scratch;
    Payload payload;
};

}  // namespace

size_t output_bytes(const std::vector<EncodeRequest>& requests) {
    uint64_t n = SLACK;
    for (const EncodeRequest& request : requests) {
        const uint64_t word_bytes = uint64_t(request.plan.fields[P_WORD_BITS]) / 8;
        n += request.n_chunks * aligned(word_bytes << request.plan.fields[P_CHUNK_LOG2]);
    }
    return size_t(n);
}

void encode(std::vector<EncodeRequest>& requests, size_t n_threads, uint8_t* out) {
    std::vector<std::unique_ptr<Frame>> frames;
    std::vector<Item> items;
    for (size_t number = 0; number < requests.size(); number++) {
        frames.push_back(std::make_unique<Frame>());
        for (uint64_t chunk = 0; chunk < requests[number].n_chunks; chunk++)
            items.push_back({number, requests[number].first_chunk + chunk, 0, 0});
    }
    share(requests.size(), n_threads, [&] {
        return [&](size_t number) {
            EncodeRequest& request = requests[number];
            Frame& frame = *frames[number];
            if (!model_of(request.plan, frame.model)) throw std::invalid_argument("a plan that contradicts itself");
            set_side(frame.model, request, frame.side);
            derive(frame.model);
            if (request.wants_side) write_side(frame.model, request.side);
            request.rows.resize(size_t(request.n_chunks) * row_bytes(frame.model));
        };
    });
    Places places;
    share(items.size(), n_threads, [&] {
        // A thread without memory must not leave the others waiting for its turn.
        std::unique_ptr<Lent<Memory>> lent;
        try {
            lent = std::make_unique<Lent<Memory>>();
        } catch (...) {
            places.give_up();
            throw;
        }
        return [&, memory = *lent](size_t number) {
            Item& item = items[number];
            EncodeRequest& request = requests[item.request];
            const Model& model = frames[item.request]->model;
            const size_t word_bytes = model.kind.word_bits / 8;
            const size_t source_bytes = model.predict == CAST ? model.source.word_bits / 8 : word_bytes;
            EncodeChunk chunk;
            chunk.first = item.chunk << model.chunk_log2;
            chunk.n_words = size_t(std::min(uint64_t(1) << model.chunk_log2, model.n_words - chunk.first));
            chunk.words = static_cast<const uint8_t*>(request.words) + chunk.first * word_bytes;
            chunk.reference = request.reference == nullptr
                                  ? nullptr
                                  : static_cast<const uint8_t*>(request.reference) + chunk.first * source_bytes;
            chunk.wants_reference_sum = request.wants_reference_sum;
            Payload& payload = memory->payload;
            kernels().encode_chunk(model, chunk, memory->scratch, payload);
            item.digest_sum = payload.digest_sum;
            item.reference_sum = payload.reference_sum;
            const bool is_last = item.chunk + 1 == n_chunks_of(model);
            const size_t n_bytes = payload.n_bytes, n_padded = is_last ? n_bytes : size_t(aligned(n_bytes));
            uint8_t* place = nullptr;
            places.take(number, [&](size_t at) {
                if (item.chunk == request.first_chunk) request.begin = at = size_t(aligned(at));
                place = out + at;
                request.end = at + n_padded;
                return request.end;
            });
            if (place == nullptr) return;
            kernels().lay_down(payload, place);
            std::memset(place + n_bytes, 0, n_padded - n_bytes);
            std::memcpy(request.rows.data() + (item.chunk - request.first_chunk) * row_bytes(model), payload.row.fields,
                        row_bytes(model));
        };
    });
    for (const Item& item : items) {
        requests[item.request].digest_sum += item.digest_sum;
        requests[item.request].reference_sum += item.reference_sum;
    }
}

}  // namespace tricomp
