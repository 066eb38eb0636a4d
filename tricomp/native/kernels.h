// The functions that exist once for every instruction set, and which set is in use. Baseline code calls these alone.
#pragma once

#include "model.h"

namespace tricomp {

struct Kernels {
    const char* name;  // "avx512", "avx2", "portable"
};

extern const Kernels portable_kernels;
#ifdef TRICOMP_X86
extern const Kernels avx2_kernels, avx512_kernels;
#endif

// The best set that this processor has, or the one that the environment variable TRICOMP_ISA names; null if it does not
// have that one.
const Kernels* chosen_kernels();

// The same, once it is known to be there: the module refuses to load otherwise.
const Kernels& kernels();

}  // namespace tricomp
