// The ops that others are made of have no derivatives: asked for one, in reverse or forward mode, they say so.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

TORCH_LIBRARY_IMPL(vlmkernels, Autograd, m) {
  for (const char* op : {"small_distillation", "small_loss", "small_loss_bwd", "contrastive_distillation_grads",
                         "contrastive_distillation_stats", "info_nce_grads", "info_nce_stats", "sigmoid_sweep",
                         "linear_cross_entropy_sweep", "linear_distillation_sweep"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}
