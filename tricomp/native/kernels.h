// The functions that exist once for every instruction set, and which set is in use. Baseline code calls these alone.
#pragma once

#include "model.h"

namespace tricomp {

struct Kernels {
    const char* name;  // "avx512", "avx2", "portable"
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels;

// The best set that this processor has, or the one that the environment variable TRICOMP_ISA names.
const Kernels& kernels();

}  // namespace tricomp
