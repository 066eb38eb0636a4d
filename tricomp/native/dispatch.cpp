// Chooses the instruction set, once a process. Baseline code: it must run on any processor.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace tricomp {

namespace {

#ifdef TRICOMP_X86
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512ifma") &&
           __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

const Kernels* choose() {
    const char* asked = std::getenv("TRICOMP_ISA");
    const bool any = asked == nullptr || *asked == '\0';
#ifdef TRICOMP_X86
    __builtin_cpu_init();
    if ((any || !std::strcmp(asked, "avx512")) && has_avx512()) return &avx512_kernels;
    if ((any || !std::strcmp(asked, "avx2")) && has_avx2()) return &avx2_kernels;
#endif
    if (any || !std::strcmp(asked, "portable")) return &portable_kernels;
    return nullptr;
}

}  // namespace

const Kernels* chosen_kernels() {
    static const Kernels* chosen = choose();
    return chosen;
}

const Kernels& kernels() { return *chosen_kernels(); }

}  // namespace tricomp
