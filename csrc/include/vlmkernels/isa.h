#pragma once
// Every csrc/cpu/*.cpp is compiled once per instruction set, with VLMK_ISA naming the namespace its functions live in.
// The caller picks one namespace per process: VLMK_CALL(f, ...) calls the f of the active instruction set.

namespace vlmk {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set of this CPU, or the one VLMKERNELS_CPU_ISA names. Throws std::runtime_error when the CPU cannot run
// it.
Isa isa();
const char* isa_name(Isa);

}  // namespace vlmk

#ifdef VLMK_X86
#define VLMK_PER_ISA(...) \
  namespace baseline {    \
  __VA_ARGS__             \
  }                       \
  namespace avx2 {        \
  __VA_ARGS__             \
  }                       \
  namespace avx512 {      \
  __VA_ARGS__             \
  }
#define VLMK_CALL(f, ...)                                                \
  (::vlmk::isa() == ::vlmk::Isa::avx512 ? ::vlmk::avx512::f(__VA_ARGS__) \
   : ::vlmk::isa() == ::vlmk::Isa::avx2 ? ::vlmk::avx2::f(__VA_ARGS__)   \
                                        : ::vlmk::baseline::f(__VA_ARGS__))
#else
#define VLMK_PER_ISA(...) \
  namespace baseline {    \
  __VA_ARGS__             \
  }
#define VLMK_CALL(f, ...) ::vlmk::baseline::f(__VA_ARGS__)
#endif
