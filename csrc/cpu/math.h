// e^x, tanh x and m + ln l on vectors.
#pragma once

#include <cmath>
#include <limits>

#include "simd.h"

namespace attn_ops::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());
template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();

// x log2(e) = n + r with n integer, |r| <= 1/2:   e^x = 2^n 2^r,   2^r by a minimax polynomial (own Remez run).
// Adding 1.5 * 2^mantissa_bits + bias rounds to n and leaves n + bias in the low bits; shifted into the exponent
// field that is 2^n, and n = -bias gives 0. So everything below 2^-126.5 (2^-1022.5) is flushed to exactly 0:
// masked scores (-inf) need no special case. The polynomial is 1 at r = 0, so e^0 is exactly 1.
//
// Scores keep their natural unit, and log2(e) enters only here, in the two fused steps that base 2 would spend on
// rounding anyway. (Folded into the queries it made scores from 2.36e38 on overflow.)
template <class E>
struct Exp;

template <>
struct Exp<float> {
  static constexpr float lowest = -88.0f, rounder = 12582912.0f + 127.0f;  // lowest: n is -127
  static constexpr int mantissa_bits = 23;
  // relative error 1.9e-9 before rounding
  static constexpr float coefficients[] = {1.5345812158740182e-4f, 1.3399931209474140e-3f, 9.6184889565227916e-3f,
                                           5.5503287769976638e-2f, 2.4022646890639572e-1f, 6.9314720573725268e-1f,
                                           1.0f};
};

// Of what is rounded to bfloat16.
template <>
struct Exp<Pair> : Exp<float> {
  // relative error 9.2e-8 before rounding
  static constexpr float coefficients[] = {1.3264727048601377e-3f, 9.67151265023744e-3f,  5.55073374374635e-2f,
                                           2.402224208514429e-1f,  6.931469775988187e-1f, 1.0f};
};

template <>
struct Exp<double> {
  static constexpr double lowest = -709.0, rounder = 6755399441055744.0 + 1023.0;
  static constexpr int mantissa_bits = 52;
  // relative error 3.1e-18 before rounding
  static constexpr double coefficients[] = {
      4.4352809446103361611e-10, 7.0741056262456593708e-9, 1.0178198033328527662e-7, 1.3215433089594629037e-6,
      1.52527334899608046e-5,    1.5403530462514613026e-4, 1.3333558146789950323e-3, 9.6181291075883350833e-3,
      5.5504108664819921483e-2,  2.4022650695910156205e-1, 6.9314718055994533046e-1, 1.0};
};

// r, 2^n, and (2^r - 1) / r, for x <= 0 (and a little above). NaN stays NaN: max() keeps its second operand, and the
// factor 2^n multiplies (an integer add would not).
template <class E, class T = Accumulator<E>>
struct ExpParts {
  Vec<T> r, two_n, slope;

  explicit ATTN_INLINE ExpParts(Vec<T> x) {
    using S = Simd<T>;
    using F = Exp<E>;
    constexpr size_t kCount = sizeof(F::coefficients) / sizeof(T);
    static_assert(F::coefficients[kCount - 1] == 1, "2^0 is 1");
    const Vec<T> log2e = S::set1(static_cast<T>(kLog2E));
    x = S::max(S::set1(F::lowest), x);
    const Vec<T> shifted = S::fma(x, log2e, S::set1(F::rounder));
    r = S::fma(x, log2e, S::set1(F::rounder) - shifted);
    two_n = (Vec<T>)((typename S::I)shifted << F::mantissa_bits);
    slope = S::set1(F::coefficients[0]);
    for (size_t i = 1; i + 1 < kCount; ++i) slope = S::fma(slope, r, S::set1(F::coefficients[i]));
  }
};

// e^x of pairs where a matrix unit makes the products and this is what takes time: 2^floor 2^r of x log2(e), 0 <= r < 1, for which
// there are instructions. The product's rounding is of no account beside that to bfloat16.
template <class E>
ATTN_INLINE Vec<float> exp_from_floor(Vec<float> x) {
  using S = Simd<Accumulator<E>>;
  // 2^r; relative error 9.4e-8
  constexpr float coefficients[] = {1.8671301659196615e-3f, 9.017029777169228e-3f, 5.579991266131401e-2f,
                                    2.4016444385051727e-1f, 6.931512951850891e-1f, 1.0f};
  x *= S::set1(static_cast<float>(kLog2E));
  const Vec<float> r = S::above_floor(x);
  Vec<float> power = S::set1(coefficients[0]);
  for (size_t i = 1; i < sizeof(coefficients) / sizeof(float); ++i) power = S::fma(power, r, S::set1(coefficients[i]));
  return S::times_power(power, x);
}

template <class E>
ATTN_INLINE Vec<Accumulator<E>> exp(Vec<Accumulator<E>> x) {
  if constexpr (kOfTiles<E>) {
    return exp_from_floor<E>(x);
  } else {
    using S = Simd<Accumulator<E>>;
    const ExpParts<E> e(x);
    return S::fma(e.slope, e.r, S::set1(1)) * e.two_n;
  }
}

template <class T>
ATTN_INLINE T exp_of(T x) {
  return exp<T>(Simd<T>::set1(x))[0];
}

// float: x P(x^2) / Q(x^2), own fit for |x| <= 9, from where on tanh is 1; relative error 2.1e-8 before rounding. It takes
// half the time of the other way. NaN stays NaN.
ATTN_INLINE Vec<float> tanh(Vec<float> x) {
  using S = Simd<float>;
  constexpr float p[] = {1.3354787147982305e-8f, 2.060918208078534e-5f, 3.4955945228442695e-3f, 0.13381031116581013f,
                         0.9999999794652905f};
  constexpr float q[] = {7.776612514062246e-7f, 3.285645055599032e-4f, 2.587700682547732e-2f, 0.4671434671294364f, 1.0f};
  x = S::max(S::set1(-9), S::min(S::set1(9), x));
  const Vec<float> u = x * x;
  Vec<float> numerator = S::set1(p[0]), denominator = S::set1(q[0]);
  for (int i = 1; i < 5; ++i) {
    numerator = S::fma(numerator, u, S::set1(p[i]));
    denominator = S::fma(denominator, u, S::set1(q[i]));
  }
  return x * numerator / denominator;
}

// double: tanh |x| = -e / (2 + e) with e = e^(-2|x|) - 1 = 2^n (2^r - 1) + (2^n - 1): exact where x is small, since n is 0
// there.
ATTN_INLINE Vec<double> tanh(Vec<double> x) {
  using S = Simd<double>;
  const ExpParts<double> e(S::set1(-2) * S::max(x, -x));
  const Vec<double> minus = S::fma(e.two_n, -(e.slope * e.r), S::set1(1) - e.two_n);
  const Vec<double> t = minus / (S::set1(2) - minus);
  return S::select(x < S::zero(), -t, t);
}

// m + ln l, for l that are normal numbers or not finite: then inf or NaN.
//
// l = 2^n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2):   ln l = n ln 2 + f + f^2 P(f),   P by an own fit, f^2 P good to 2.3e-9. m and
// ln l may all but cancel, so what adding n ln 2 and f to m rounds away is added at the end (Knuth's sum of two).
ATTN_INLINE Vec<float> plus_log(Vec<float> m, Vec<float> l) {
  using S = Simd<float>;
  using I = S::I;
  constexpr float coefficients[] = {-7.608100771903992e-2f, 0.1305861622095108f, -0.13332733511924744f, 0.14160169661045074f,
                                    -0.16593463718891144f, 0.2000279277563095f, -0.25002428889274597f, 0.33333319425582886f,
                                    -0.4999997615814209f};
  constexpr int32_t sqrt_half = 0x3f3504f3;
  const I n = ((I)l - sqrt_half) >> 23;
  const Vec<float> f = (Vec<float>)((I)l - (n << 23)) - S::set1(1), exponent = __builtin_convertvector(n, Vec<float>);
  Vec<float> p = S::set1(coefficients[0]);
  for (size_t i = 1; i < sizeof(coefficients) / sizeof(float); ++i) p = S::fma(p, f, S::set1(coefficients[i]));
  Vec<float> sum = m, lost = S::fma(exponent, S::set1(-2.1219444e-4f), f * f * p);
  const auto add = [&](Vec<float> x) {
    const Vec<float> next = sum + x, added = next - sum;
    lost += (sum - (next - added)) + (x - added);
    sum = next;
  };
  add(exponent * S::set1(0.693359375f));  // of 10 bits: exact, and with the number above ln 2
  add(f);
  const Vec<float> inputs = m + l;
  return S::select(inputs - inputs == S::zero(), sum + lost, inputs);
}

ATTN_INLINE Vec<double> plus_log(Vec<double> m, Vec<double> l) {
  for (int i = 0; i < Simd<double>::width; ++i) m[i] += std::log(l[i]);
  return m;
}

}  // namespace
}  // namespace attn_ops::cpu
