#pragma once
// out = x + t y;  dy = t dout,  dgate = (1 - t^2) sum(dout y),  t = tanh(gate): each operand is read once.
#include "device.cuh"
#include "vlmkernels/gated_residual_cuda.h"

namespace vlmk::cuda {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kResident = 4;  // blocks of the backward on a multiprocessor: asked for none, ptxas spills to make room for more

// A block holds `lanes` groups of V channels in each of `rows` rows at a time, `col_blocks` blocks hold whole rows. A warp
// lies in one row where that has groups enough.
struct Tiling {
  int lanes, rows, col_blocks;
};

template <class T>
struct Rows {
  const T* data;  // [rows, d]
  int64_t stride;
};

// The channels of this thread, and its first row and the step to its next within the rows of this block.
template <int V>
struct Place {
  __device__ explicit Place(Tiling tiling)
      : lane(threadIdx.x % tiling.lanes),
        row(threadIdx.x / tiling.lanes),
        block(blockIdx.x / tiling.col_blocks),
        group(int64_t(blockIdx.x % tiling.col_blocks) * tiling.lanes + lane),
        channel(group * V),
        first(int64_t(block) * tiling.rows + row),
        step(int64_t(gridDim.x / tiling.col_blocks) * tiling.rows) {}
  __device__ bool inside(Tiling tiling, int64_t d) const { return row < tiling.rows && channel < d; }
  int lane, row, block;
  int64_t group, channel, first, step;
};

// tanh of V gates.
template <int V, class A>
__device__ void load_tanh(Gate gate, int64_t channel, A (&t)[V]) {
  with_type(gate.type, [&](auto type) {
    const auto* gates = static_cast<const decltype(type)*>(gate.data) + (gate.per_channel ? channel : 0);
#pragma unroll
    for (int v = 0; v < V; ++v) t[v] = A(wide(gates[gate.per_channel ? v : 0]));
  });
#pragma unroll
  for (int v = 0; v < V; ++v) t[v] = std::tanh(t[v]);
}

template <int V, class X, class Y>
__global__ void __launch_bounds__(kThreads) forward(Rows<X> x,             // [rows, d]
                                                    Rows<Y> y,             // [rows, d]
                                                    Gate gate,             // [d] or [1]
                                                    const bool* row_mask,  // [rows] or null
                                                    X* out,                // [rows, d]
                                                    int64_t rows, int64_t d, Tiling tiling) {
  const Place<V> my(tiling);
  if (!my.inside(tiling, d)) return;
  acc_t<X> t[V];
  load_tanh(gate, my.channel, t);
  for (int64_t r = my.first; r < rows; r += my.step) {
    acc_t<X> sum[V], branch[V];
    load(x.data + r * x.stride, my.group, sum);
    if (!row_mask || row_mask[r]) {
      load(y.data + r * y.stride, my.group, branch);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += t[v] * branch[v];
    }
    store(sum, out + r * d, my.group);
  }
}

// Adds over the rows of a block's threads [rows, lanes] into its first row; all threads of the block take part.
template <int V>
__device__ void add_rows(double (&sum)[V], double* shared, int lane, int row, int lanes, int rows) {  // [V, kThreads]
  const int at = row * lanes + lane;
#pragma unroll
  for (int v = 0; v < V; ++v) shared[v * kThreads + at] = sum[v];
  for (int half; rows > 1; rows = half) {
    half = (rows + 1) / 2;
    __syncthreads();
    if (row + half < rows) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] += shared[v * kThreads + at + half * lanes];
        shared[v * kThreads + at] = sum[v];
      }
    }
  }
}

// The sum over the threads of a block, in its first thread.
__device__ inline double add_threads(double sum, double* shared) {  // shared [kThreads / kWarp]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffff, sum, offset);
  if (lane == 0) shared[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = lane < kThreads / kWarp ? shared[lane] : 0;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffff, sum, offset);
  }
  return sum;
}

template <int V, class G, class Y>
__global__ void __launch_bounds__(kThreads, kResident) backward(Rows<G> dout,          // [rows, d]
                                                                Rows<Y> y,             // [rows, d]
                                                                Gate gate,             // [d] or [1]
                                                                const bool* row_mask,  // [rows] or null
                                                                Y* dy,                 // [rows, d] or null
                                                                double* partial,  // [parts, d] or [parts, col_blocks], or null
                                                                int64_t rows, int64_t d, Tiling tiling) {
  VLMK_SHARED(double, shared, V* kThreads);
  const Place<V> my(tiling);
  const bool inside = my.inside(tiling, d);
  acc_t<G> t[V], total[V] = {};
  if (inside && dy) load_tanh(gate, my.channel, t);
  for (int64_t r = inside ? my.first : rows; r < rows; r += my.step) {
    const bool kept = !row_mask || row_mask[r];
    acc_t<G> g[V] = {}, branch[V], down[V];
    if (kept) load(dout.data + r * dout.stride, my.group, g);
    if (partial && kept) {
      load(y.data + r * y.stride, my.group, branch);
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] += g[v] * branch[v];
    }
    if (dy) {
#pragma unroll
      for (int v = 0; v < V; ++v) down[v] = kept ? t[v] * g[v] : 0;
      store(down, dy + r * d, my.group);
    }
  }
  if (!partial) return;
  double sum[V], all = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] = total[v];
  if (gate.per_channel) {
    add_rows(sum, shared, my.lane, my.row, tiling.lanes, tiling.rows);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (my.row == 0 && inside) partial[my.block * d + my.channel + v] = sum[v];
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) all += sum[v];
    all = add_threads(all, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = all;
  }
}

// dgate = (1 - t^2) sum of partial over its rows, in an order that the sizes alone fix.
template <class T>
__global__ void __launch_bounds__(kThreads) finish(const double* partial,  // [parts, channels]
                                                   Gate gate,              // [channels]
                                                   T* dgate,               // [channels]
                                                   int64_t parts, int64_t channels, int lanes) {
  VLMK_SHARED(double, shared, kThreads);
  const int lane = threadIdx.x % lanes, row = threadIdx.x / lanes, rows = kThreads / lanes;
  const int64_t channel = int64_t(blockIdx.x) * lanes + lane;
  double sum[1] = {}, t[1];
  for (int64_t part = row; channel < channels && part < parts; part += rows) sum[0] += partial[part * channels + channel];
  add_rows(sum, shared, lane, row, lanes, rows);
  if (row == 0 && channel < channels) {
    load_tanh(gate, channel, t);
    narrow((1 - t[0] * t[0]) * sum[0], dgate[channel]);
  }
}

}  // namespace vlmk::cuda
