// All stages put together for one instruction set: compiled once for each. No STL, no exceptions.

#include "isa.h"
#include "kernels.h"

namespace tricomp {

#define TRICOMP_TEXT_(x) #x
#define TRICOMP_TEXT(x) TRICOMP_TEXT_(x)

extern const Kernels TRICOMP_JOIN(TRICOMP_ISA, _kernels);
const Kernels TRICOMP_JOIN(TRICOMP_ISA, _kernels) = {
    TRICOMP_TEXT(TRICOMP_ISA),
};

}  // namespace tricomp
