// All stages put together for one instruction set: compiled once for each. No STL, no exceptions.

#include "chunk_encode.h"
#include "compare.h"
#include "convolve.h"
#include "kernels.h"
#include "multiply.h"
#include "quantize.h"
#include "stats.h"
#include "stream.h"

namespace tricomp {

#define TRICOMP_TEXT_(x) #x
#define TRICOMP_TEXT(x) TRICOMP_TEXT_(x)

extern const Kernels TRICOMP_JOIN(TRICOMP_ISA, _kernels);
const Kernels TRICOMP_JOIN(TRICOMP_ISA, _kernels) = {
    TRICOMP_TEXT(TRICOMP_ISA), TRICOMP_ISA::encode_chunk, TRICOMP_ISA::lay_down, TRICOMP_ISA::decode_chunks,
    TRICOMP_ISA::xxh3_64,      TRICOMP_ISA::xxh3_take,    TRICOMP_ISA::xxh3_end,
    TRICOMP_ISA::digest_sum,   TRICOMP_ISA::is_equal,
    TRICOMP_ISA::encode_stream, TRICOMP_ISA::decode_stream, TRICOMP_ISA::stats::price_tables,
    TRICOMP_ISA::stats::majority,
    {TRICOMP_ISA::quantizing::quantize_row, TRICOMP_ISA::quantizing::dequantize_row},
    {TRICOMP_ISA::multiplying::blocks, TRICOMP_ISA::multiplying::prepare, TRICOMP_ISA::multiplying::multiply},
    {TRICOMP_ISA::convolving::LANES, TRICOMP_ISA::convolving::packed_bytes, TRICOMP_ISA::convolving::code_bytes,
     TRICOMP_ISA::convolving::pack_steps, TRICOMP_ISA::convolving::pack, TRICOMP_ISA::convolving::largest,
     TRICOMP_ISA::convolving::quantize, TRICOMP_ISA::convolving::convolve},
    {TRICOMP_ISA::stats::stats_of<uint8_t>(), TRICOMP_ISA::stats::stats_of<uint16_t>(),
     TRICOMP_ISA::stats::stats_of<uint32_t>(), TRICOMP_ISA::stats::stats_of<uint64_t>()},
};

}  // namespace tricomp
