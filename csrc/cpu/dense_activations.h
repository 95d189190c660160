#pragma once
// Activations and their derivatives, as plain inline functions that the compiler vectorises.
#include "simd.h"
#include "vlmkernels/dense.h"

namespace vlmk::VLMK_ISA {
namespace {

// exp(x) for x <= 0.
VLMK_INLINE float decay(float x) { return x < -87.33f ? 0.0f : exp_(x); }
VLMK_INLINE double decay(double x) { return exp_(x); }

template <class A>
VLMK_INLINE A magnitude(A x) {
  return x < 0 ? -x : x;
}

template <class A>
VLMK_INLINE A sigmoid(A x) {
  const A e = decay(-magnitude(x)), up = 1 / (1 + e);
  return x < 0 ? e * up : up;
}

// The distribution function of the normal law and its density.
template <class A>
struct Normal {
  A below, density;
};
// The lower tail is exp(-x^2 / 2) times a polynomial in 1 / (1 + 0.34 |x|), within 3e-7 of it.
VLMK_INLINE Normal<float> normal(float x) {
  const float a = magnitude(x), e = decay(-0.5f * a * a), t = 1.0f / (1.0f + 0.34f * a);
  float p = -2.6630179e-2f;
  p = p * t + 1.4189585e-1f;
  p = p * t - 2.7790211e-1f;
  p = p * t + 2.0741507e-1f;
  p = p * t - 4.8168333e-2f;
  p = p * t + 1.1675452e-1f;
  p = p * t + 1.1486057e-1f;
  p = p * t + 1.3615655e-1f;
  p = p * t + 1.3561807e-1f;
  const float tail = e * (p * t);
  return {x < 0 ? tail : 1.0f - tail, 3.98942280e-1f * e};
}
VLMK_INLINE Normal<double> normal(double x) {
  return {0.5 * std::erfc(-x * 7.0710678118654752440e-1), 3.9894228040143267794e-1 * std::exp(-0.5 * x * x)};
}

// act(y) and act'(y), each activation a type so that loops over it have no branch.
struct Identity {
  template <class A>
  static VLMK_INLINE A value(A y) {
    return y;
  }
  template <class A>
  static VLMK_INLINE A slope(A) {
    return 1;
  }
};
struct Gelu {
  template <class A>
  static VLMK_INLINE A value(A y) {
    return y * normal(y).below;
  }
  template <class A>
  static VLMK_INLINE A slope(A y) {
    const Normal<A> n = normal(y);
    return n.below + y * n.density;
  }
};
// 0.5 y (1 + tanh(u)) = y sigmoid(2 u), u = sqrt(2 / pi) (y + 0.044715 y^3)
struct GeluTanh {
  template <class A>
  static VLMK_INLINE A twice(A y) {
    return A(1.5957691216057308) * y * (1 + A(0.044715) * y * y);
  }
  template <class A>
  static VLMK_INLINE A value(A y) {
    return y * sigmoid(twice(y));
  }
  template <class A>
  static VLMK_INLINE A slope(A y) {
    const A s = sigmoid(twice(y)), rest = sigmoid(-twice(y));
    return s + y * s * rest * A(1.5957691216057308) * (1 + A(0.134145) * y * y);
  }
};
template <int Thousandths>  // y sigmoid(scale y)
struct Swish {
  template <class A>
  static VLMK_INLINE A value(A y) {
    return y * sigmoid(A(Thousandths) / A(1000) * y);
  }
  template <class A>
  static VLMK_INLINE A slope(A y) {
    const A z = A(Thousandths) / A(1000) * y, s = sigmoid(z);
    return s + z * s * (1 - s);
  }
};
struct Relu {
  template <class A>
  static VLMK_INLINE A value(A y) {
    return y < 0 ? A(0) : y;
  }
  template <class A>
  static VLMK_INLINE A slope(A y) {
    return y > 0 ? A(1) : A(0);
  }
};
struct SquaredRelu {
  template <class A>
  static VLMK_INLINE A value(A y) {
    return Relu::value(y) * Relu::value(y);
  }
  template <class A>
  static VLMK_INLINE A slope(A y) {
    return 2 * Relu::value(y);
  }
};

template <class F>
void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::none:
      return f(Identity());
    case Activation::gelu:
      return f(Gelu());
    case Activation::gelu_tanh:
      return f(GeluTanh());
    case Activation::quick_gelu:
      return f(Swish<1702>());
    case Activation::silu:
      return f(Swish<1000>());
    case Activation::relu:
      return f(Relu());
    case Activation::squared_relu:
      return f(SquaredRelu());
  }
}

template <class F>
void with_type(const Stored& m, F f) {
  switch (m.type) {
    case Storage::f32:
      return f(static_cast<float*>(m.data));
    case Storage::f64:
      return f(static_cast<double*>(m.data));
    case Storage::bf16:
      return f(static_cast<bf16*>(m.data));
    case Storage::f16:
      return f(static_cast<f16*>(m.data));
  }
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
