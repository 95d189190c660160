#include "vlmkernels/embedding_distillation.h"

#include "simd.h"

namespace vlmk::VLMK_ISA {
namespace {

// What is summed of u and v, and its derivative by u.
struct L1 {
  template <class A>
  static VLMK_INLINE A value(A u, A v) {
    return u > v ? u - v : v - u;
  }
  template <class A>
  static VLMK_INLINE A slope(A u, A v) {
    return u > v ? A(1) : u < v ? A(-1) : A(0);
  }
};
struct L2 {
  template <class A>
  static VLMK_INLINE A value(A u, A v) {
    return (u - v) * (u - v);
  }
  template <class A>
  static VLMK_INLINE A slope(A u, A v) {
    return 2 * (u - v);
  }
};
struct SmoothL1 {
  template <class A>
  static VLMK_INLINE A value(A u, A v) {
    const A x = L1::value(u, v);
    return x < 1 ? A(0.5) * x * x : x - A(0.5);
  }
  template <class A>
  static VLMK_INLINE A slope(A u, A v) {
    const A x = u - v;
    return x < -1 ? A(-1) : x > 1 ? A(1) : x;
  }
};
struct Cosine {  // 1 is added to the sum
  template <class A>
  static VLMK_INLINE A value(A u, A v) {
    return -u * v;
  }
  template <class A>
  static VLMK_INLINE A slope(A, A v) {
    return -v;
  }
};

// The sum of f(x_c, y_c).
template <class T, class F>
VLMK_INLINE double sum_of(const T* x, const T* y, int64_t d, F f) {
  double sum = 0;
  for (int64_t c0 = 0; c0 < d; c0 += kSumPart) {
    acc_t<T> part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t c = c0; c < min_(c0 + kSumPart, d); ++c) part += f(to_acc(x[c]), to_acc(y[c]));
    sum += part;
  }
  return sum;
}

constexpr double kEps = 1e-12;

// What rows are multiplied by; whether the student's norm is one.
template <class A>
struct Scales {
  A student = 1, teacher = 1;
  bool divided = false;
};
template <class T>
VLMK_INLINE Scales<acc_t<T>> scales_of(const EmbeddingDistillation<T>& g, const T* student, const T* teacher) {
  using A = acc_t<T>;
  if (!g.normalize) return {};
  const double norm = std::sqrt(static_cast<double>(dot(student, student, g.d)));
  const double other = std::sqrt(static_cast<double>(dot(teacher, teacher, g.d)));
  return {static_cast<A>(1 / (norm < kEps ? kEps : norm)), static_cast<A>(1 / (other < kEps ? kEps : other)), !(norm < kEps)};
}

template <class T>
double weight_of(const EmbeddingDistillation<T>& g, int64_t row) {
  return g.weight ? g.weight[row] : 1;
}

template <class F, class T>
void losses(const EmbeddingDistillation<T>& g, int64_t first, int64_t last, acc_t<T>* loss) {
  using A = acc_t<T>;
  for (int64_t row = first; row < last; ++row) {
    const T *student = g.student + row * g.d, *teacher = g.teacher + row * g.d;
    const double w = weight_of(g, row);
    loss[row] = 0;
    if (w == 0) continue;
    const Scales<A> by = scales_of(g, student, teacher);
    const A of_s = by.student, of_t = by.teacher;
    const double sum = sum_of(student, teacher, g.d, [=](A x, A y) { return F::value(x * of_s, y * of_t); });
    loss[row] = static_cast<A>(w * (g.distance == Distance::cosine ? 1 + sum : sum));
  }
}

template <class F, class T>
void gradients(const EmbeddingDistillation<T>& g, int64_t first, int64_t last, const acc_t<T>* dloss, bool one, double factor,
               T* dstudent) {
  using A = acc_t<T>;
  for (int64_t row = first; row < last; ++row) {
    const T *student = g.student + row * g.d, *teacher = g.teacher + row * g.d;
    T* to = dstudent + row * g.d;
    const double w = weight_of(g, row);
    if (w == 0) {
      for (int64_t c = 0; c < g.d; ++c) to[c] = T{};
      continue;
    }
    const Scales<A> by = scales_of(g, student, teacher);
    const A of_s = by.student, of_t = by.teacher;
    A along = 0;
    if (by.divided) {
      along = static_cast<A>(sum_of(student, teacher, g.d, [=](A x, A y) { return x * of_s * F::slope(x * of_s, y * of_t); }));
    }
    const A u = static_cast<A>(factor * dloss[one ? 0 : row] * w * of_s);
#pragma omp simd
    for (int64_t c = 0; c < g.d; ++c) {
      const A x = to_acc(student[c]) * of_s, y = to_acc(teacher[c]) * of_t;
      from_acc(u * (F::slope(x, y) - x * along), to[c]);
    }
  }
}

template <class F>
void with_distance(Distance distance, F f) {
  switch (distance) {
    case Distance::l1:
      return f(L1());
    case Distance::l2:
      return f(L2());
    case Distance::cosine:
      return f(Cosine());
    case Distance::smooth_l1:
      return f(SmoothL1());
  }
}

}  // namespace

template <class T>
void embedding_distillation(const EmbeddingDistillation<T>& g, int64_t first, int64_t last, acc_t<T>* loss) {
  with_distance(g.distance, [&](auto f) { losses<decltype(f)>(g, first, last, loss); });
}

template <class T>
void embedding_distillation_bwd(const EmbeddingDistillation<T>& g, int64_t first, int64_t last, const acc_t<T>* dloss, bool one,
                                double factor, T* dstudent) {
  with_distance(g.distance, [&](auto f) { gradients<decltype(f)>(g, first, last, dloss, one, factor, dstudent); });
}

#define VLMK_INSTANTIATE(T)                                                                                                  \
  template void embedding_distillation(const EmbeddingDistillation<T>&, int64_t, int64_t, acc_t<T>*);                        \
  template void embedding_distillation_bwd(const EmbeddingDistillation<T>&, int64_t, int64_t, const acc_t<T>*, bool, double, \
                                           T*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)

}  // namespace vlmk::VLMK_ISA
