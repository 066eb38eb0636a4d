// Digest sums of many parts of leaves, shared among threads in pieces that fit a cache. Baseline, STL allowed.

#include "frame.h"
#include "kernels.h"
#include "threads.h"

namespace tricomp {

namespace {

constexpr size_t PIECE_BYTES = size_t(2) << 20;  // ours; a multiple of 512

struct Piece {
    size_t part, offset;
};

}  // namespace

std::vector<uint64_t> sum_parts(const std::vector<Part>& parts, size_t n_threads) {
    std::vector<Piece> pieces;
    for (size_t i = 0; i < parts.size(); i++)
        for (size_t offset = 0; offset < parts[i].bytes.n_bytes; offset += PIECE_BYTES) pieces.push_back({i, offset});
    std::vector<uint64_t> found(pieces.size()), sums(parts.size());
    share(pieces.size(), n_threads, [&] {
        return [&](size_t item) {
            const Part& part = parts[pieces[item].part];
            const size_t offset = pieces[item].offset;
            found[item] = kernels().digest_sum(part.bytes.data + offset,
                                               std::min(PIECE_BYTES, part.bytes.n_bytes - offset),
                                               part.first_byte + offset);
        };
    });
    for (size_t item = 0; item < pieces.size(); item++) sums[pieces[item].part] += found[item];
    return sums;
}

}  // namespace tricomp
