#pragma once
// The CUDA that kernels here are written in. For nvcc it is a few lines over CUDA itself; a C++ compiler takes the host
// runtime of tests/cpp/cuda in its place and runs the same kernels on the CPU.
#include "vlmkernels/cuda.h"
#include "vlmkernels/types.h"

#ifdef __CUDACC__

// Memory that the threads of a block share.
#define VLMK_SHARED(T, name, count) __shared__ T name[count]

namespace vlmk::cuda {

template <class... P, class... A>
void launch(Stream stream, int64_t blocks, int threads, void (*kernel)(P...), A... arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream.handle)>>>(arguments...);
}

// This library has its own CUDA runtime: it must be told of the device that the caller's runtime has chosen.
inline void use(Stream stream) { cudaSetDevice(stream.device); }

inline const char* failure() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }

__device__ inline float wide(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ inline void narrow(float x, f16& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }

}  // namespace vlmk::cuda

#else
#include "cuda_host.h"
#endif

namespace vlmk::cuda {

__device__ inline double wide(double x) { return x; }
__device__ inline float wide(float x) { return x; }
__device__ inline float wide(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, float& to) { to = float(x); }
__device__ inline void narrow(float x, bf16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = bits_of(x);
  to.bits = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
}
__device__ inline void narrow(double x, bf16& to) { narrow(float(x), to); }
__device__ inline void narrow(double x, f16& to) { narrow(float(x), to); }

// V neighbours in one access, which the row is aligned to.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

template <int V, class T, class A>
__device__ inline void load(const T* row, int64_t group, A (&to)[V]) {
  const auto pack = reinterpret_cast<const Pack<T, V>*>(row)[group];
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = wide(pack.at[v]);
}

template <int V, class T, class A>
__device__ inline void store(const A (&from)[V], T* row, int64_t group) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) narrow(from[v], pack.at[v]);
  reinterpret_cast<Pack<T, V>*>(row)[group] = pack;
}

// f of a value of the C++ type that `type` names.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
__host__ __device__ inline auto with_type(DType type, F f) {
  switch (type) {
    case DType::f64:
      return f(double());
    case DType::f32:
      return f(float());
    case DType::bf16:
      return f(bf16());
    default:
      return f(f16());
  }
}

}  // namespace vlmk::cuda
