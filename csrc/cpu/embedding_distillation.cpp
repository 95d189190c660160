#include "vlmkernels/embedding_distillation.h"

#include <utility>

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

// The sums of both parts of f(x_c, y_c).
template <class T, class F>
VLMK_INLINE std::pair<double, double> sums_of(const T* x, const T* y, int64_t d, F f) {
  double first = 0, second = 0;
  for (int64_t c0 = 0; c0 < d; c0 += kSumPart) {
    acc_t<T> some = 0, others = 0;
#pragma omp simd reduction(+ : some, others)
    for (int64_t c = c0; c < min_(c0 + kSumPart, d); ++c) {
      const auto [a, b] = f(to_acc(x[c]), to_acc(y[c]));
      some += a, others += b;
    }
    first += some, second += others;
  }
  return {first, second};
}
template <class A>
struct Both {
  A first, second;
};

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
  const auto [own, others] = sums_of(student, teacher, g.d, [](A x, A y) { return Both<A>{x * x, y * y}; });
  const double norm = std::sqrt(own), other = std::sqrt(others);
  return {static_cast<A>(1 / (norm < kEps ? kEps : norm)), static_cast<A>(1 / (other < kEps ? kEps : other)), !(norm < kEps)};
}

template <class T>
double weight_of(const EmbeddingDistillation<T>& g, int64_t row) {
  return g.weight ? g.weight[row] : 1;
}

// The sum over a row's features, and the part of its derivative that lies along the normalised row.
template <class F, class T>
VLMK_INLINE std::pair<double, double> distance_of(const T* student, const T* teacher, int64_t d, Scales<acc_t<T>> by) {
  using A = acc_t<T>;
  return sums_of(student, teacher, d, [=](A x, A y) {
    const A u = x * by.student, v = y * by.teacher;
    return Both<A>{F::value(u, v), u * F::slope(u, v)};
  });
}

// u times the derivative of a row's sum.
template <class F, class T>
VLMK_INLINE void put_gradient(const T* student, const T* teacher, int64_t d, Scales<acc_t<T>> by, double along, double u,
                              T* to) {
  using A = acc_t<T>;
  const A radial = static_cast<A>(by.divided ? along : 0), factor = static_cast<A>(u * by.student);
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) {
    const A x = to_acc(student[c]) * by.student, y = to_acc(teacher[c]) * by.teacher;
    from_acc(factor * (F::slope(x, y) - x * radial), to[c]);
  }
}

template <class T>
void put_zeros(int64_t d, T* to) {
  for (int64_t c = 0; c < d; ++c) to[c] = T{};
}

template <class F, class T>
void losses(const EmbeddingDistillation<T>& g, int64_t first, int64_t last, acc_t<T>* loss, double factor, T* dstudent) {
  for (int64_t row = first; row < last; ++row) {
    const T *student = g.student + row * g.d, *teacher = g.teacher + row * g.d;
    const double w = weight_of(g, row);
    loss[row] = 0;
    if (w == 0) {
      if (dstudent) put_zeros(g.d, dstudent + row * g.d);
      continue;
    }
    const auto by = scales_of(g, student, teacher);
    const auto [sum, along] = distance_of<F>(student, teacher, g.d, by);
    loss[row] = static_cast<acc_t<T>>(w * (g.distance == Distance::cosine ? 1 + sum : sum));
    if (dstudent) put_gradient<F>(student, teacher, g.d, by, along, factor * w, dstudent + row * g.d);
  }
}

template <class F, class T>
void gradients(const EmbeddingDistillation<T>& g, int64_t first, int64_t last, const acc_t<T>* dloss, bool one, double factor,
               T* dstudent) {
  for (int64_t row = first; row < last; ++row) {
    const T *student = g.student + row * g.d, *teacher = g.teacher + row * g.d;
    const double w = weight_of(g, row);
    if (w == 0) {
      put_zeros(g.d, dstudent + row * g.d);
      continue;
    }
    const auto by = scales_of(g, student, teacher);
    const double along = by.divided ? distance_of<F>(student, teacher, g.d, by).second : 0;
    put_gradient<F>(student, teacher, g.d, by, along, factor * dloss[one ? 0 : row] * w, dstudent + row * g.d);
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
void embedding_distillation(const EmbeddingDistillation<T>& g, int64_t first, int64_t last, acc_t<T>* loss, double factor,
                            T* dstudent) {
  with_distance(g.distance, [&](auto f) { losses<decltype(f)>(g, first, last, loss, factor, dstudent); });
}

template <class T>
void embedding_distillation_bwd(const EmbeddingDistillation<T>& g, int64_t first, int64_t last, const acc_t<T>* dloss, bool one,
                                double factor, T* dstudent) {
  with_distance(g.distance, [&](auto f) { gradients<decltype(f)>(g, first, last, dloss, one, factor, dstudent); });
}

#define VLMK_INSTANTIATE(T)                                                                                                  \
  template void embedding_distillation(const EmbeddingDistillation<T>&, int64_t, int64_t, acc_t<T>*, double, T*);            \
  template void embedding_distillation_bwd(const EmbeddingDistillation<T>&, int64_t, int64_t, const acc_t<T>*, bool, double, \
                                           T*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)

}  // namespace vlmk::VLMK_ISA
