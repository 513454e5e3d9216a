// How each storage type becomes one of the two types that compute (float, double), and back: rounded to
// nearest even (SPEC.md, "Types and rounding"), split in two (eq. 17), or rounded by random words (eq. 18).

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct SplitBFloat16 : BFloat16 {};       // the upper half of an fp32 master; an int16 beside it is the lower one
struct StochasticBFloat16 : BFloat16 {};  // rounded by random words

CHILDTUNE_INLINE VecF32 load_as(const float* source, VecF32) { return load<VecF32>(source); }
CHILDTUNE_INLINE VecF64 load_as(const double* source, VecF64) { return load<VecF64>(source); }
CHILDTUNE_INLINE VecF32 load_as(const BFloat16* source, VecF32) {
  return (VecF32)(widened16(load<HalfU16>(source)) << 16);
}
CHILDTUNE_INLINE VecF32 load_as(const Float16* source, VecF32) { return half_to_float(load<HalfU16>(source)); }
// Doubles narrowed to nearest; the others are widened exactly.
CHILDTUNE_INLINE VecF32 load_as(const double* source, VecF32) {
  typedef float HalfF32 __attribute__((vector_size(kVectorBytes / 2)));
  float lanes[kLanes32];
  store(lanes, __builtin_convertvector(load<VecF64>(source), HalfF32));
  store(lanes + kLanes64, __builtin_convertvector(load<VecF64>(source + kLanes64), HalfF32));
  return load<VecF32>(lanes);
}

CHILDTUNE_INLINE HalfU16 rounded(VecF32 value, BFloat16) {
  const VecU32 bits = (VecU32)value;
  const VecU32 nearest_even = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  // Rounding could carry a NaN's payload into the sign; SPEC.md makes every bf16 NaN 0x7FC0.
  const VecU32 is_nan = (VecU32)(value != value);
  return narrowed16(select_by_sign(is_nan, VecU32{} + 0x7FC0u, nearest_even));
}
// A NaN's bits are those of 0x7FC0.
CHILDTUNE_INLINE VecU32 canonical_bits(VecF32 value) {
  const VecU32 is_nan = (VecU32)(value != value);
  return select_by_sign(is_nan, VecU32{} + 0x7FC00000u, (VecU32)value);
}
// Eq. 17: the weight, and the remainder, which is the master's lower half as it is.
CHILDTUNE_INLINE HalfU16 upper_of_master(VecU32 bits) { return narrowed16((bits + 0x8000u) >> 16); }
CHILDTUNE_INLINE HalfU16 lower_of_master(VecU32 bits) { return narrowed16(bits & 0xFFFFu); }
CHILDTUNE_INLINE VecF32 joined_master(HalfU16 weight, HalfU16 remainder) {
  const VecU32 upper = widened16(weight) << 16;
  const VecU32 bits = upper + (VecU32)widened16_signed(remainder);
  // Another sign than the weight's: a zero that somebody has written since.
  return (VecF32)select_by_sign(bits ^ upper, upper, bits);
}
// Eq. 18.
CHILDTUNE_INLINE HalfU16 rounded_by_words(VecF32 value, const uint32_t* words) {
  const VecU32 is_nan = (VecU32)(value != value);
  const VecU32 drawn = ((VecU32)value + (load<VecU32>(words) & 0xFFFFu)) >> 16;
  return narrowed16(select_by_sign(is_nan, VecU32{} + 0x7FC0u, drawn));
}

CHILDTUNE_INLINE HalfU16 rounded(VecF32 value, Float16) { return float_to_half(value); }

CHILDTUNE_INLINE void store_as(float* target, VecF32 value) { store(target, value); }
CHILDTUNE_INLINE void store_as(double* target, VecF64 value) { store(target, value); }
template <class Half>
CHILDTUNE_INLINE void store_as(Half* target, VecF32 value) {
  store(target, rounded(value, Half()));
}

// Writes the lanes of `value` whose bit is set in `bits`; the others keep what is stored, bit for
// bit (a NaN's payload included).
#if defined(__x86_64__) && CHILDTUNE_VECTOR_BYTES == 64
// Lines without such a lane are then not written at all.
CHILDTUNE_INLINE void store_selected(float* target, VecF32 value, uint64_t bits) {
  _mm512_mask_storeu_ps(target, (__mmask16)bits, (__m512)value);
}
CHILDTUNE_INLINE void store_selected(double* target, VecF64 value, uint64_t bits) {
  _mm512_mask_storeu_pd(target, (__mmask8)bits, (__m512d)value);
}
#else
CHILDTUNE_INLINE void store_selected(float* target, VecF32 value, uint64_t bits) {
  store(target, select(bits, value, load<VecF32>(target)));
}
CHILDTUNE_INLINE void store_selected(double* target, VecF64 value, uint64_t bits) {
  store(target, select(bits, value, load<VecF64>(target)));
}
#endif
CHILDTUNE_INLINE void store_selected_halves(void* target, HalfU16 value, uint64_t bits) {
  store(target, narrowed16(select(bits, widened16(value), widened16(load<HalfU16>(target)))));
}
template <bool kWhole>
CHILDTUNE_INLINE void store_halves(void* target, HalfU16 value, uint64_t bits) {
  if constexpr (kWhole) {
    store(target, value);
  } else {
    store_selected_halves(target, value, bits);
  }
}
