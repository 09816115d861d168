// Vector versions of the activations of activation.h and of their derivatives. float32: relative
// error of a few units in the last place, also in the tails (no 1 + erf cancellation); float64 as
// exact as the C library. Per-target code: included once for each instruction set.
#if defined(NORMCORE_KERNELS_CPU_ACTIVATION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMCORE_KERNELS_CPU_ACTIVATION_INL_H_
#undef NORMCORE_KERNELS_CPU_ACTIVATION_INL_H_
#else
#define NORMCORE_KERNELS_CPU_ACTIVATION_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <cmath>

#include "cpu/convert-inl.h"
#include "normcore/kernels/activation.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {

template <class A>
HWY_INLINE Vector<A> constant(double value) {
  return hn::Set(Tag<A>(), static_cast<A>(value));
}

// exp(-x) = 2^n + excess 2^n in float32, as excess and 2^(n + kExponent), which has to be normal.
// Relative error of 1 + excess before it is rounded: 3.1e-9 by the polynomial, and 2.8e-9 |x| by ln 2.
struct ExpParts {
  Vector<float> excess, power;
};

template <int kExponent>
HWY_INLINE ExpParts exp_of_negative(Vector<float> x) {
  // -x = n ln 2 - t. The sum's lowest bits are n + kExponent + 127, the exponent of the power.
  const auto shift = constant<float>(12582912.0 + kExponent + 127.0);
  const auto biased = hn::MulAdd(x, constant<float>(-1.4426950408889634), shift);
  const auto n = hn::Sub(biased, shift);
#if HWY_NATIVE_FMA  // the product is not rounded: one float for ln 2 is worth a change of x by 3e-9 x
  const auto t = hn::MulAdd(n, constant<float>(0.6931471805599453), x);
#else
  const auto t = hn::MulAdd(n, constant<float>(1.428606765330187e-6),
                            hn::MulAdd(n, constant<float>(0.693145751953125), x));
#endif
  // exp(-t) = 1 - t + t^2 p(t): minimax for |t| <= ln(2) / 2
  const auto t2 = hn::Mul(t, t);
  const auto low =
      hn::NegMulAdd(t, constant<float>(0.1666652113199234), constant<float>(0.4999999403953552));
  const auto high =
      hn::NegMulAdd(t, constant<float>(0.008368718437850475), constant<float>(0.04166838899254799));
  const auto p = hn::MulAdd(t2, hn::MulAdd(t2, constant<float>(0.0013814604608342052), high), low);
  const hn::RebindToUnsigned<Tag<float>> du;
  return {hn::MulSub(p, t2, t),
          hn::BitCast(Tag<float>(), hn::ShiftLeft<23>(hn::BitCast(du, biased)))};
}

// exp(-x) for x >= 0. float32: gradual underflow, 0 above 104, NaN stays NaN.
template <class A>
HWY_INLINE Vector<A> exp_decay(Vector<A> x) {
  if constexpr (sizeof(A) == 4) {
    const auto parts = exp_of_negative<64>(x);
    const auto result =
        hn::Mul(hn::MulAdd(parts.excess, parts.power, parts.power), constant<A>(0x1p-64));
    return hn::IfThenZeroElse(hn::Gt(x, constant<A>(104.0)), result);
  } else {
    return hn::Exp(Tag<A>(), hn::Neg(x));
  }
}

// sigmoid(x) = 1 / (1 + exp(-x)) and 1 - sigmoid(x), neither by a subtraction that cancels. float32:
// the complement is 0 from 70 on, which is seen only beside 1, and both may lose a NaN.
template <class A>
struct Sigmoid {
  Vector<A> value, complement;
};

template <class A>
HWY_INLINE Sigmoid<A> sigmoid(Vector<A> x) {
  if constexpr (sizeof(A) == 4) {
    // All terms over 2^24: exp(-x) / 2^24 is normal from -104, where the value is 0, to 70.
    const auto lowest = constant<A>(-104.0), highest = constant<A>(70.0);
    const auto unit = constant<A>(0x1p-24);
    const auto parts = exp_of_negative<-24>(hn::Max(hn::Min(x, highest), lowest));
    const auto value =
        hn::Div(unit, hn::MulAdd(parts.excess, parts.power, hn::Add(unit, parts.power)));
    const auto complement = hn::Mul(hn::MulAdd(parts.excess, parts.power, parts.power),
                                    hn::Mul(value, constant<A>(0x1p24)));
    return {value, hn::IfThenZeroElse(hn::Ge(x, highest), complement)};
  } else {
    const auto one = constant<A>(1.0);
    const auto decay = exp_decay<A>(hn::Abs(x));
    const auto large = hn::Div(one, hn::Add(one, decay)), small = hn::Mul(decay, large);
    const auto is_negative = hn::Lt(x, hn::Zero(Tag<A>()));
    return {hn::IfThenElse(is_negative, small, large), hn::IfThenElse(is_negative, large, small)};
  }
}

template <class A>
struct NormalDistribution {
  Vector<A> cumulative;  // Phi(x)
  Vector<A> density;     // exp(-x^2 / 2) / sqrt(2 pi)
};

template <class A>
HWY_INLINE NormalDistribution<A> normal_distribution(Vector<A> x) {
  const Tag<A> d;
  if constexpr (sizeof(A) == 4) {
    const auto a = hn::Min(hn::Abs(x), constant<A>(20.0));  // exp(-200) is 0
    // exp(-a^2/2) with the square in two parts: its rounding error would be multiplied by a^2/2
    // otherwise
    const auto square = hn::Mul(a, a);
    const auto square_error = hn::MulSub(a, a, square);
    const auto half = constant<A>(0.5);
    const auto gauss = hn::Mul(exp_decay<A>(hn::Mul(square, constant<A>(0.5))),
                               hn::NegMulAdd(half, square_error, constant<A>(1.0)));
    // Phi(-a) exp(a^2/2) for a >= 0 as t times a polynomial in t = 1 / (1 + 0.35 a); fitted for
    // [0, 14.5], relative error 3.2e-8
    const auto t = hn::Div(constant<A>(1.0), hn::MulAdd(constant<A>(0.35), a, constant<A>(1.0)));
    constexpr float kTail[] = {
        -0.029157016426324844f, 0.14402702450752258f,   -0.25583159923553467f,
        0.1593119502067566f,    -0.023207461461424828f, 0.1055506020784378f,
        0.11982173472642899f,   0.13986346125602722f,   0.139621302485466f};
    auto p = hn::Set(d, kTail[0]);
    for (int i = 1; i < 9; ++i) p = hn::MulAdd(p, t, hn::Set(d, kTail[i]));
    const auto tail = hn::Mul(hn::Mul(p, t), gauss);
    const auto is_negative = hn::Lt(x, hn::Zero(d));
    return {hn::IfThenElse(is_negative, tail, hn::Sub(constant<A>(1.0), tail)),
            hn::Mul(gauss, constant<A>(kInvSqrtTwoPi))};
  } else {
    HWY_ALIGN double in[HWY_MAX_BYTES / sizeof(double)], cumulative[HWY_MAX_BYTES / sizeof(double)],
        density[HWY_MAX_BYTES / sizeof(double)];
    hn::Store(x, d, in);
    for (std::int64_t i = 0; i < lanes<double>(); ++i) {
      cumulative[i] = 0.5 * std::erfc(in[i] * -kSqrtHalf);  // of a NaN the same bits as in[i]
      density[i] = kInvSqrtTwoPi * std::exp(-0.5 * in[i] * in[i]);
    }
    return {hn::Load(d, cumulative), hn::Load(d, density)};
  }
}

// 2 u, u = sqrt(2/pi) (z + 0.044715 z^3), so that 0.5 (1 + tanh u) = sigmoid(2 u)
template <class A>
HWY_INLINE Vector<A> twice_gelu_tanh_argument(Vector<A> z) {
  const auto inner = hn::MulAdd(hn::Mul(z, z), constant<A>(kGeluTanhCubic), constant<A>(1.0));
  return hn::Mul(hn::Mul(z, constant<A>(2.0 * kSqrtTwoOverPi)), inner);
}

template <Activation kActivation, class A>
HWY_INLINE Vector<A> activate(Vector<A> z) {
  if constexpr (kActivation == Activation::kNone) {
    return z;
  } else if constexpr (kActivation == Activation::kReLU) {  // NaN stays NaN
    return hn::IfThenZeroElse(hn::Le(z, hn::Zero(Tag<A>())), z);
  } else if constexpr (kActivation == Activation::kSiLU) {
    return hn::Mul(z, sigmoid<A>(z).value);
  } else if constexpr (kActivation == Activation::kGelu) {
    return hn::Mul(z, normal_distribution<A>(z).cumulative);
  } else {
    return hn::Mul(z, sigmoid<A>(twice_gelu_tanh_argument<A>(z)).value);
  }
}

template <Activation kActivation, class A>
HWY_INLINE Vector<A> activation_derivative(Vector<A> z) {
  const Tag<A> d;
  const auto one = constant<A>(1.0);
  if constexpr (kActivation == Activation::kNone) {
    return one;
  } else if constexpr (kActivation == Activation::kReLU) {
    return hn::IfThenZeroElse(hn::Le(z, hn::Zero(d)), one);
  } else if constexpr (kActivation == Activation::kSiLU) {
    const auto s = sigmoid<A>(z);
    return hn::Mul(s.value, hn::MulAdd(z, s.complement, one));
  } else if constexpr (kActivation == Activation::kGelu) {
    const auto normal = normal_distribution<A>(z);
    return hn::MulAdd(z, normal.density, normal.cumulative);
  } else {
    const auto s = sigmoid<A>(twice_gelu_tanh_argument<A>(z));
    const auto slope = hn::Mul(hn::MulAdd(hn::Mul(z, z), constant<A>(3.0 * kGeluTanhCubic), one),
                               constant<A>(2.0 * kSqrtTwoOverPi));
    return hn::MulAdd(hn::Mul(z, hn::Mul(s.value, s.complement)), slope, s.value);
  }
}

// The first two derivatives. The second one of an activation with a kink is 0 there.
template <class A>
struct Derivatives {
  Vector<A> first, second;
};

// The second derivatives are 0 far from 0 before the squares in them overflow; NaN stays NaN.
template <class A>
HWY_INLINE Vector<A> clamp_argument(Vector<A> z) {
  const auto limit = constant<A>(40.0);
  return hn::IfThenElse(hn::Gt(hn::Abs(z), limit), hn::CopySign(limit, z), z);
}

template <Activation kActivation, class A>
HWY_INLINE Derivatives<A> activation_derivatives(Vector<A> z) {
  const auto one = constant<A>(1.0), two = constant<A>(2.0);
  if constexpr (kActivation == Activation::kNone || kActivation == Activation::kReLU) {
    return {activation_derivative<kActivation, A>(z), hn::Zero(Tag<A>())};
  } else if constexpr (kActivation == Activation::kSiLU) {
    const auto s = sigmoid<A>(z);
    const auto slope = hn::Mul(s.value, s.complement);
    return {hn::MulAdd(z, slope, s.value),
            hn::Mul(slope, hn::MulAdd(z, hn::Sub(s.complement, s.value), two))};
  } else if constexpr (kActivation == Activation::kGelu) {
    const auto normal = normal_distribution<A>(z);
    const auto bent = hn::Mul(z, normal.density);
    return {hn::Add(bent, normal.cumulative),
            hn::NegMulAdd(clamp_argument<A>(z), bent, hn::Mul(two, normal.density))};
  } else {
    const auto c = clamp_argument<A>(z), square = hn::Mul(c, c);
    const auto s = sigmoid<A>(twice_gelu_tanh_argument<A>(c));
    const auto rate = hn::Mul(hn::MulAdd(square, constant<A>(3.0 * kGeluTanhCubic), one),
                              constant<A>(2.0 * kSqrtTwoOverPi));
    const auto product = hn::Mul(s.value, s.complement), slope = hn::Mul(product, rate);
    // of sigmoid: s' = product rate, s'' = product (rate^2 (1 - 2 s) + rate')
    const auto turn = hn::MulAdd(hn::Mul(rate, rate), hn::Sub(s.complement, s.value),
                                 hn::Mul(c, constant<A>(12.0 * kGeluTanhCubic * kSqrtTwoOverPi)));
    return {hn::MulAdd(c, slope, s.value),
            hn::MulAdd(hn::Mul(c, product), turn, hn::Mul(two, slope))};
  }
}

// Calls f with the activation as a constant.
template <class F>
HWY_INLINE void visit_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kNone:
      return f(std::integral_constant<Activation, Activation::kNone>());
    case Activation::kReLU:
      return f(std::integral_constant<Activation, Activation::kReLU>());
    case Activation::kSiLU:
      return f(std::integral_constant<Activation, Activation::kSiLU>());
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>());
  }
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
