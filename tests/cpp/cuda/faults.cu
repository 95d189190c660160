// Kernels that do what CUDA leaves undefined, by name, for the tests of the host runtime. Each prints the sum of `out`, 64 * 63
// / 2 in each of two blocks where nothing goes wrong.
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "device.cuh"

using namespace vlmk::cuda;

namespace {

constexpr int kThreads = 64;

// The numbers of the threads in reverse, through shared memory.
template <bool kBarrier, bool kFilled, bool kTwice>
__global__ void reversed(float* out) {
  VLMK_SHARED(float, shared, kThreads);
  const int i = threadIdx.x;
  if (kFilled || i != 3) shared[i] = float(i);
  if (kBarrier) __syncthreads();
  out[blockIdx.x * kThreads + i] = shared[kThreads - 1 - i];
  if (kTwice) shared[i] = 0;  // another thread may still have to read it
}

__global__ void divergent(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = 0;
}

__global__ void ended(float* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = 0;
}

__global__ void absent(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0xffffffff, 1.0f, 8);
}

__global__ void unnamed(float* out) { out[threadIdx.x] = __shfl_down_sync(0x0000ffff, 1.0f, 0); }

__global__ void unnamed_source(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffff, 1.0f, 8);
}

__global__ void elsewhere(float* out) {
  if (threadIdx.x % 2) {
    out[threadIdx.x] = __shfl_down_sync(0xffffffff, 1.0f, 2);
  } else {
    out[threadIdx.x] = __shfl_down_sync(0xffffffff, 1.0f, 2);
  }
}

__global__ void blocks_overlap(float* out) { out[threadIdx.x] = float(threadIdx.x); }

__global__ void outside(float* out) { out[blockIdx.x * kThreads + threadIdx.x + 1] = 0; }

__global__ void misaligned(float* out) {
  const float four[4] = {};
  store(four, out + 1, threadIdx.x / 4);
}

const std::map<std::string, void (*)(float*)> kernels = {{"none", reversed<true, true, false>},
                                                         {"no barrier", reversed<false, true, false>},
                                                         {"no barrier before the next write", reversed<true, true, true>},
                                                         {"uninitialised shared memory", reversed<true, false, false>},
                                                         {"divergent barrier", divergent},
                                                         {"barrier without ended threads", ended},
                                                         {"shuffle without some lanes", absent},
                                                         {"shuffle of lanes outside its mask", unnamed},
                                                         {"shuffle from lanes outside its mask", unnamed_source},
                                                         {"shuffle at two places", elsewhere},
                                                         {"blocks write to the same place", blocks_overlap},
                                                         {"store beyond the end", outside},
                                                         {"misaligned access", misaligned}};

}  // namespace

int main(int, char** arguments) {
  std::vector<float> out(2 * kThreads);
  launch({}, 2, kThreads, kernels.at(arguments[1]), out.data());
  float sum = 0;
  for (float x : out) sum += x;
  std::printf("%g\n", sum);
}
