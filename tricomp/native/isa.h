// Which instruction set a source is compiled for. Stage headers are compiled once for each, in a namespace of its own,
// so that the linker can never give one set's code to another.
//
// A source that includes this is compiled with TRICOMP_ISA defined as portable, avx2 or avx512. Imports no STL.
#pragma once

#define TRICOMP_IS_portable 0
#define TRICOMP_IS_avx2 2
#define TRICOMP_IS_avx512 5
#define TRICOMP_JOIN_(a, b) a##b
#define TRICOMP_JOIN(a, b) TRICOMP_JOIN_(a, b)
#define TRICOMP_LEVEL TRICOMP_JOIN(TRICOMP_IS_, TRICOMP_ISA)
#define TRICOMP_HAS_AVX2 (TRICOMP_LEVEL >= 2)
#define TRICOMP_HAS_AVX512 (TRICOMP_LEVEL >= 5)  // with VBMI2: Ice Lake, Zen 4 and later

#if TRICOMP_HAS_AVX2
#include <immintrin.h>
#endif

#define TRICOMP_BEGIN namespace tricomp { namespace TRICOMP_ISA {
#define TRICOMP_END } }
#define INLINE inline __attribute__((always_inline))
