// vlmkernels._C: facts about the build and this machine; the ops register themselves with torch when it is loaded.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <map>
#include <vector>

#include "dense.h"
#include "vlmkernels/info_nce.h"
#include "vlmkernels/isa.h"

namespace py = pybind11;

namespace {

// vlmkernels/_native.py reads these in the file: what was built for another torch, or for results of other sizes, is not even
// loaded.
[[gnu::used]] const char kBuiltFor[] = "vlmkernels " VLMK_VERSION " for torch " VLMK_TORCH;
[[gnu::used]] const struct {
  char name[16] = "vlmkernels tile";
  int64_t rows = vlmk::kTileRows, cols = vlmk::kTileCols, header = vlmk::kTileHeader;
} kTile;

std::map<std::string, std::string> build() {
  return {{"isa", vlmk::isa_name(vlmk::isa())}, {"tile_gemm", vlmk::tile_product_name()},
          {"compiler", VLMK_COMPILER},          {"cuda", VLMK_CUDA},
          {"why_no_cuda", VLMK_WHY_NO_CUDA},    {"version", VLMK_VERSION}};
}

// GFLOP/s of tile products on all threads, operands streaming through the caches as in the kernels: each thread multiplies its
// rows [rows, depth] with one packed block [depth, cols] after the other.
template <class P>
double measure(int64_t rows, int64_t cols, int64_t depth, int64_t repeats) {
  const auto product = vlmk::tile_product<P>();
  if (!product) return 0;
  const int64_t tasks = 4 * at::get_num_threads(), blocks = 16;
  std::vector<P> a(tasks * rows * depth), b(blocks * (depth + 1) * cols);
  const auto run = [&](int64_t rounds) {
    vlmk::for_tasks(tasks, rows * cols * 4, [&](int64_t task, vlmk::Scratch& scratch) {
      auto* c = scratch.take<vlmk::acc_t<P>>(rows * cols);
      for (int64_t round = 0; round < rounds; ++round) {
        for (int64_t block = 0; block < blocks; ++block) {
          product(rows, cols, depth, depth, cols, cols, false, a.data() + task * rows * depth, b.data() + block * depth * cols,
                  c);
        }
      }
    });
  };
  run(1);
  const auto start = std::chrono::steady_clock::now();
  run(repeats);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return 2e-9 * rows * cols * depth * blocks * tasks * repeats / seconds;
}

double tile_product_rate(const std::string& dtype, int64_t rows, int64_t cols, int64_t depth, int64_t repeats) {
  for (const int64_t size : {rows, cols, depth, repeats}) {
    if (size < 1 || size > 1 << 14)
      throw py::value_error("sizes and repeats must be in [1, 16384], got " + std::to_string(size));
  }
  if (dtype == "bfloat16") return measure<vlmk::bf16>(rows, cols, depth, repeats);
  if (dtype == "float32") return measure<float>(rows, cols, depth, repeats);
  throw py::value_error("dtype must be 'float32' or 'bfloat16', got '" + dtype + "'");
}

void choose_torch_products(const std::string& dtype, bool forward, bool input, bool weight, bool few) {
  if (dtype != "float32" && dtype != "bfloat16")
    throw py::value_error("dtype must be 'float32' or 'bfloat16', got '" + dtype + "'");
  vlmk::torch_products(dtype == "float32" ? at::kFloat : at::kBFloat16) = {forward, input, weight, few};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  vlmk::isa();  // an unusable VLMKERNELS_CPU_ISA fails here, where the loader can say so
  m.def("build", &build, "Instruction set, tile-product provider, compiler, GPUs or why there are none, version.");
  m.def("choose_torch_products", &choose_torch_products, py::arg("dtype"), py::arg("forward"), py::arg("input"),
        py::arg("weight"), py::arg("few"), "Which products of dense layers torch computes itself; not while ops run.");
  m.def("tile_product_rate", &tile_product_rate, py::arg("dtype"), py::arg("rows") = 128, py::arg("cols") = 256,
        py::arg("depth") = 512, py::arg("repeats") = 8, py::call_guard<py::gil_scoped_release>(),
        "GFLOP/s of the tile products of this machine on all of torch's threads; 0 where there is none for the dtype.");
}
