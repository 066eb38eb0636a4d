// All stages put together for one instruction set: compiled once for each. No STL, no exceptions.

#include "chunk_encode.h"
#include "compare.h"
#include "kernels.h"
#include "stream.h"

namespace tricomp {

#define TRICOMP_TEXT_(x) #x
#define TRICOMP_TEXT(x) TRICOMP_TEXT_(x)

extern const Kernels TRICOMP_JOIN(TRICOMP_ISA, _kernels);
const Kernels TRICOMP_JOIN(TRICOMP_ISA, _kernels) = {
    TRICOMP_TEXT(TRICOMP_ISA), TRICOMP_ISA::encode_chunk, TRICOMP_ISA::decode_chunks,
    TRICOMP_ISA::xxh3_64,      TRICOMP_ISA::digest_sum,   TRICOMP_ISA::is_equal,
    TRICOMP_ISA::encode_stream, TRICOMP_ISA::decode_stream,
};

}  // namespace tricomp
