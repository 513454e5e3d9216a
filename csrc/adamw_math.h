// The maths of one step: its scalars in double precision, then one vector of elements
// (SPEC.md, eq. 6 to 12). Every operation rounds once, in the order written; the build forbids
// contraction into fused multiply-adds.

// Eq. 6: beta^t by binary powering.
inline double power(double base, uint64_t exponent) {
  double result = 1.0;
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// The scalars of one tensor in one step, rounded once to the type that computes.
template <class Real>
struct AdamWScalars {
  Real beta1, c1, beta2, c2;     // c = 1 - beta
  Real rescale;                  // r = 1/p, negative where maximize asks for -g
  Real decay;                    // a
  Real step_size, inverse_root;  // s, b
  Real eps;
  bool decays_before, decays_after;

  bool decays() const { return decays_before || decays_after; }
};

// Eq. 7; `factor` is q * kappa of eq. 20.
template <class Real>
inline AdamWScalars<Real> adamw_scalars(const PlanGroup& group, uint64_t step, double factor) {
  const bool correct = group.correct_bias != 0;
  const double correction1 = correct ? 1.0 - power(group.beta1, step) : 1.0;
  const double correction2 = correct ? 1.0 - power(group.beta2, step) : 1.0;
  AdamWScalars<Real> scalars;
  const bool original = group.original_convention != 0;
  if (original) {
    scalars.step_size = Real(group.lr * __builtin_sqrt(correction2) / correction1);
    scalars.inverse_root = Real(1);
  } else {
    scalars.step_size = Real(group.lr / correction1);
    scalars.inverse_root = Real(1.0 / __builtin_sqrt(correction2));
  }
  scalars.beta1 = Real(group.beta1);
  scalars.c1 = Real(1.0 - group.beta1);
  scalars.beta2 = Real(group.beta2);
  scalars.c2 = Real(1.0 - group.beta2);
  scalars.rescale = Real(factor * (1.0 / group.reserve_p));
  if (group.maximize != 0) scalars.rescale = -scalars.rescale;
  scalars.decay = Real(group.lr * group.weight_decay);
  scalars.eps = Real(group.eps);
  scalars.decays_before = scalars.decay != Real(0) && !original;
  scalars.decays_after = scalars.decay != Real(0) && original;
  return scalars;
}

template <class Real>
struct VecOf;
template <>
struct VecOf<float> {
  typedef VecF32 type;
};
template <>
struct VecOf<double> {
  typedef VecF64 type;
};

// Eq. 9: decoupled decay of one vector of weights.
template <class Real, class Vec>
CHILDTUNE_INLINE Vec decayed(Vec weight, const AdamWScalars<Real>& scalars) {
  return weight - scalars.decay * weight;
}

// What eq. 11 makes of the new moments before it divides.
template <class Vec>
struct Fraction {
  Vec numerator;
  Vec root;
};

// Eq. 8 and 10 for one vector; bit k of `keep` says whether lane k's gradient counts. A factor of one changes
// no value, so r and b need no test.
template <class Real, class Vec>
CHILDTUNE_INLINE Fraction<Vec> moments_and_fraction(Vec grad, Vec& exp_avg, Vec& exp_avg_sq, uint64_t keep,
                                                    const AdamWScalars<Real>& scalars) {
  grad = select(keep, grad * scalars.rescale, Vec{});
  exp_avg = scalars.beta1 * exp_avg + scalars.c1 * grad;
  exp_avg_sq = scalars.beta2 * exp_avg_sq + scalars.c2 * (grad * grad);
  return {scalars.step_size * exp_avg, square_root(exp_avg_sq)};
}

// What eq. 11 subtracts from the weight.
template <class Real, class Vec>
CHILDTUNE_INLINE Vec quotient(const Fraction<Vec>& fraction, const AdamWScalars<Real>& scalars) {
  return fraction.numerator / (fraction.root * scalars.inverse_root + scalars.eps);
}

// Eq. 9 and 11: one vector of weights.
template <class Real, class Vec>
CHILDTUNE_INLINE Vec updated(Vec weight, Vec update, const AdamWScalars<Real>& scalars) {
  if (scalars.decays_before) weight = decayed(weight, scalars);
  weight = weight - update;
  if (scalars.decays_after) weight = decayed(weight, scalars);
  return weight;
}
