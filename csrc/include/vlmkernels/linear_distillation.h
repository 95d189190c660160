#pragma once
#include "vlmkernels/distillation.h"
#include "vlmkernels/isa.h"
#include "vlmkernels/linear_cross_entropy.h"

namespace vlmk {

// Distillation (distillation.h) of the logits z of a linear layer, in the tiles of linear_cross_entropy.h, whose products with
// the gradients of the logits these are as well. The teacher is another linear layer, whose logits q lie in tiles of the same
// layout, or k log-probabilities of each row, or nothing.
//
// Of an offline teacher the tiles know nothing: the logits of its classes are taken out of them, so that sums over a row are
// those of all other classes, and what the row has to be given for these classes is put back.
template <class P>
struct LinearDistillation {
  using A = acc_t<P>;
  const LinearCrossEntropy<P>& student;  // whose sums are not used; its target may be null
  A* teacher_tiles;                      // null without a teacher's layer, or if a row's sums are enough
  const A* teacher_bias;                 // [V] or null
  Divergence divergence;                 // none without a teacher's layer
  double temperature, beta, hard_weight;
  bool jsd;                // of an offline teacher, forward_kl otherwise
  int64_t k;               // classes of an offline teacher, -1 without one
  const int64_t* indices;  // [N][k], ascending
  const A* log_probs;      // [N][k]
  A* taken;                // [N][k]: their logits, then what dz is there
  // Of the rows of blocks [first, last):
  RowSums<A>* sums;  // [class chunks][rows]
  double* mixed;     // [class chunks][2][rows]: (1 - beta) KL(s || m), beta KL(p || m)
  A* slopes;         // [kSlopes][rows]
  static constexpr int64_t kSlopes = 9;

  int64_t rows() const { return (student.last - student.first) * kTileCols; }
  A* teacher_logits(int64_t ib, int64_t jb) const { return teacher_tiles + (student.logits(ib, jb) - student.tiles); }
};

VLMK_PER_ISA(
    // z, q and the sums over one chunk of classes, of block jb of rows. scratch: two tiles, unless there are tiles.
    template <class P, class Q> void linear_distillation_logits(const LinearDistillation<P>&, const Pairs<Q>& teacher,
                                                                int64_t class_chunk, int64_t jb, acc_t<P>* scratch);
    // Losses and slopes of block jb of rows from the sums of all chunks; for a teacher's jsd without its terms.
    template <class P> void linear_distillation_rows(const LinearDistillation<P>&, int64_t jb);
    // For a teacher's jsd: its terms over one chunk of classes, and losses and slopes with those of all chunks.
    template <class P> void linear_distillation_mix(const LinearDistillation<P>&, int64_t class_chunk, int64_t jb);
    template <class P> void linear_distillation_mixed_rows(const LinearDistillation<P>&, int64_t jb);
    // Turns the tiles of a group of classes into gradients.
    template <class P> void linear_distillation_gradients(const LinearDistillation<P>&, int64_t classes);)

}  // namespace vlmk
