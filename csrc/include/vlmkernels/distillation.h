#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/scratch.h"
#include "vlmkernels/types.h"

namespace vlmk {

enum class Divergence { none, forward_kl, reverse_kl, jsd };

// Of one row, relative to its maxima so far: the sums of the exponentials at T, of exp(x / T) (x - y), x being the first
// argument of KL and x and y logit - maximum, and of the student's exponentials at T = 1 where they are others.
template <class A>
struct RowSums {
  A student_top = -__builtin_inf(), teacher_top = -__builtin_inf();
  double student = 0, teacher = 0, cross = 0, hard = 0;
};

// With s = softmax(student / T), p = softmax(teacher / T), m = beta p + (1 - beta) s and h = hard_weight:
// l = (1 - h) T^2 d + h CE(student, target), d = KL(p || s), KL(s || p) or beta KL(p || m) + (1 - beta) KL(s || m).
template <class T>
struct Distillation {
  const T* student;       // [rows][classes], student_stride apart
  const T* teacher;       // likewise; not read without a divergence
  const int64_t* target;  // [rows] in [0, classes) or ignore_index; or null
  acc_t<T>* stats;        // [rows][kStats]
  int64_t classes, student_stride, teacher_stride, ignore_index;
  Divergence divergence;  // none if h = 1; then T = 1
  double temperature, beta, hard_weight;

  // Of each row: the student's maximum and sum of exp((x - maximum) / T), the teacher's, what is subtracted in the brackets of
  // D (the loss's derivative by s / T), and the student's sum at T = 1.
  static constexpr int64_t kStats = 6;
};

// Classes that are taken from memory at once and then lie in the first cache.
constexpr int64_t kPiece = 2048;

// The exponentials of a row, kept from its sums to its gradient: those of a piece are relative to the maxima known by then.
template <class A>
struct KeptRow {
  A *student, *teacher;              // [classes], whole vectors
  A *student_shift, *teacher_shift;  // [pieces]

  KeptRow(Scratch& scratch, int64_t classes)
      : student(scratch.take<A>(classes)),
        teacher(scratch.take<A>(classes)),
        student_shift(scratch.take<A>(classes / kPiece + 1)),
        teacher_shift(scratch.take<A>(classes / kPiece + 1)) {}
};

VLMK_PER_ISA(
    // Losses and stats of rows [first, last).
    template <class T> void distillation(const Distillation<T>&, int64_t first, int64_t last, acc_t<T>* loss);  // [rows]
    // And dstudent, with u = factor.
    template <class T> void distillation_formed(const Distillation<T>&, int64_t first, int64_t last, acc_t<T>* loss,
                                                double factor, T* dstudent, const KeptRow<acc_t<T>>&);
    // dstudent of rows [first, last), with u = factor dloss.
    template <class T> void distillation_bwd(const Distillation<T>&, int64_t first, int64_t last,
                                             const acc_t<T>* dloss,                   // [rows], or one for all
                                             bool one, double factor, T* dstudent);)  // [rows][classes]

}  // namespace vlmk
