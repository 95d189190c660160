#pragma once
// CUDA for a C++ compiler: kernels of csrc/cuda run on the CPU, the threads of a block as fibers that give way where they wait
// for each other. A wait that a GPU might never end, or that CUDA leaves undefined, ends the process with the places of the
// threads. Shared memory starts as NaN in every block.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <tuple>

#include "vlmkernels/cuda.h"
#include "vlmkernels/types.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define VLMK_SHARED(T, name, count) T* const name = static_cast<T*>(::vlmk::host::shared(sizeof(T) * (count)))

struct Index {
  unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace vlmk::host {

using Place = std::source_location;

void run(int64_t blocks, int threads, const std::function<void()>& thread);
void* shared(size_t bytes, Place = Place::current());
void wait_for_block(Place);
// The value of lane `source`, once all lanes of the mask have come; `orders_memory` for a barrier.
uint64_t wait_for_warp(uint32_t mask, uint64_t value, int source, bool orders_memory, Place);

// Where set, takes the launches in place of run(): kernel, blocks, threads, and its arguments and their sizes.
using Recorder = void (*)(void* kernel, int64_t blocks, int threads, int count, const void* const* arguments,
                          const int64_t* sizes);
extern Recorder recorder;

template <class T>
T shuffle(uint32_t mask, T value, int source, Place place) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = wait_for_warp(mask, bits, source, false, place);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace vlmk::host

inline void __syncthreads(vlmk::host::Place place = vlmk::host::Place::current()) { vlmk::host::wait_for_block(place); }

inline void __syncwarp(uint32_t mask = ~0u, vlmk::host::Place place = vlmk::host::Place::current()) {
  vlmk::host::wait_for_warp(mask, 0, threadIdx.x % 32, true, place);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, vlmk::host::Place place = vlmk::host::Place::current()) {
  const int lane = threadIdx.x % 32;
  return vlmk::host::shuffle(mask, value, lane + delta < 32 ? lane + delta : lane, place);
}

namespace vlmk::cuda {

template <class... P, class... A>
void launch(Stream, int64_t blocks, int threads, void (*kernel)(P...), A... arguments) {
  const std::tuple<P...> values(arguments...);
  std::apply(
      [&](const P&... value) {
        if (!host::recorder) return host::run(blocks, threads, [&] { kernel(value...); });
        const void* const addresses[] = {&value...};
        const int64_t sizes[] = {sizeof(value)...};
        host::recorder(reinterpret_cast<void*>(kernel), blocks, threads, sizeof...(P), addresses, sizes);
      },
      values);
}

inline void use(Stream) {}
inline const char* failure() { return nullptr; }

inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float wide(f16 x) { return float(std::bit_cast<_Float16>(x.bits)); }
inline void narrow(float x, f16& to) { to.bits = std::bit_cast<uint16_t>(_Float16(x)); }

}  // namespace vlmk::cuda
