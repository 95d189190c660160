#include "vlmkernels/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vlmk {

static bool runs(Isa isa) {
#ifdef VLMK_X86
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::baseline;
}

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

static Isa choose() {
  const char* wanted = std::getenv("VLMKERNELS_CPU_ISA");
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline}) {
    if (!wanted || !*wanted) {
      if (runs(isa)) return isa;
    } else if (std::string(wanted) == isa_name(isa)) {
      if (runs(isa)) return isa;
      throw std::runtime_error(std::string("VLMKERNELS_CPU_ISA=") + wanted + ": this CPU or build does not run it");
    }
  }
  throw std::runtime_error(std::string("VLMKERNELS_CPU_ISA must be baseline, avx2 or avx512, got ") + wanted);
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace vlmk
