// Calls of the launchers of csrc/cuda from outside: as a program, those that a file holds; as a library, one at a time.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "vlmkernels/gated_residual_cuda.h"

using namespace vlmk::cuda;

extern "C" {

struct Call {
  int64_t backward, rows, d, x_type, x_stride, y_type, y_stride, gate_type, per_channel;
  void *x, *y, *gate, *row_mask, *out, *dgate;  // in the backward x is dout, out is dy
  double* scratch;
};

int64_t vlmk_scratch(const Call* c) {
  return gated_residual_bwd_scratch({c->x, DType(c->x_type), c->x_stride}, {c->y, DType(c->y_type), c->y_stride},
                                    {c->gate, DType(c->gate_type), c->per_channel != 0}, c->out, c->rows, c->d);
}

const char* vlmk_call(const Call* c) {
  const Matrix x{c->x, DType(c->x_type), c->x_stride}, y{c->y, DType(c->y_type), c->y_stride};
  const Gate gate{c->gate, DType(c->gate_type), c->per_channel != 0};
  const auto* mask = static_cast<const bool*>(c->row_mask);
  if (!c->backward) return gated_residual(x, y, gate, mask, c->out, c->rows, c->d, {});
  return gated_residual_bwd(x, y, gate, mask, c->out, c->dgate, c->scratch, c->rows, c->d, {});
}
}

namespace {

constexpr int kBuffers = 6;  // x, y, gate, row_mask, out and dgate

void read(void* to, size_t bytes, FILE* file) {
  if (std::fread(to, 1, bytes, file) != bytes) std::abort();
}

}  // namespace

// In the file a pointer of a call is the size of its buffer, 0 for null. Then come for every buffer how far it lies from an
// aligned address, and its content. `results` takes out and dgate of every call.
int main(int, char** arguments) {
  FILE *calls = std::fopen(arguments[1], "rb"), *results = std::fopen(arguments[2], "wb");
  if (!calls || !results) return 1;
  for (Call call; std::fread(&call, sizeof call, 1, calls) == 1;) {
    void** const pointers = &call.x;
    void* memory[kBuffers] = {};
    size_t sizes[kBuffers];
    for (int i = 0; i < kBuffers; ++i) {
      int64_t shift;
      sizes[i] = reinterpret_cast<size_t>(pointers[i]);
      read(&shift, sizeof shift, calls);
      if (!sizes[i]) continue;
      memory[i] = std::malloc(sizes[i] + shift);  // its end is the end of the buffer, for the address sanitizer
      pointers[i] = static_cast<char*>(memory[i]) + shift;
      read(pointers[i], sizes[i], calls);
    }
    std::vector<double> scratch(call.dgate ? vlmk_scratch(&call) : 0, NAN);
    call.scratch = scratch.data();
    if (const char* failure = vlmk_call(&call)) return std::puts(failure), 1;
    for (int i : {4, 5}) {
      if (sizes[i]) std::fwrite(pointers[i], 1, sizes[i], results);
    }
    for (void* each : memory) std::free(each);
  }
  return std::fclose(results);
}
