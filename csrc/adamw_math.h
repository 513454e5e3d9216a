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
  Real rescale;                  // r = 1/p
  Real decay;                    // a
  Real step_size, inverse_root;  // s, b
  Real eps;
  bool decays, rescales, original, maximize;
};

// Eq. 7.
template <class Real>
inline AdamWScalars<Real> adamw_scalars(const PlanGroup& group, uint64_t step) {
  const bool correct = group.correct_bias != 0;
  const double correction1 = correct ? 1.0 - power(group.beta1, step) : 1.0;
  const double correction2 = correct ? 1.0 - power(group.beta2, step) : 1.0;
  AdamWScalars<Real> scalars;
  scalars.original = group.original_convention != 0;
  if (scalars.original) {
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
  scalars.rescale = Real(1.0 / group.reserve_p);
  scalars.decay = Real(group.lr * group.weight_decay);
  scalars.eps = Real(group.eps);
  scalars.decays = scalars.decay != Real(0);
  scalars.rescales = group.reserve_p != 1.0;
  scalars.maximize = group.maximize != 0;
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

// Eq. 8 to 11 for one vector; bit k of `keep` says whether lane k's gradient counts.
template <class Real, class Vec>
CHILDTUNE_INLINE void adamw_vector(Vec& weight, Vec grad, Vec& exp_avg, Vec& exp_avg_sq, uint64_t keep,
                                   const AdamWScalars<Real>& scalars) {
  if (scalars.maximize) grad = -grad;
  if (scalars.rescales) grad = grad * scalars.rescale;
  grad = select(keep, grad, Vec{});
  exp_avg = scalars.beta1 * exp_avg + scalars.c1 * grad;
  exp_avg_sq = scalars.beta2 * exp_avg_sq + scalars.c2 * (grad * grad);
  const Vec root = square_root(exp_avg_sq);
  if (scalars.original) {
    weight = weight - scalars.step_size * exp_avg / (root + scalars.eps);
    if (scalars.decays) weight = decayed(weight, scalars);
  } else {
    if (scalars.decays) weight = decayed(weight, scalars);
    weight = weight - scalars.step_size * exp_avg / (root * scalars.inverse_root + scalars.eps);
  }
}
