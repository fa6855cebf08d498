// Vectors of float32 as wide as the instruction set's registers. Included inside an anonymous
// namespace of every instruction-set file, so that no copy is shared between them.
#include "numbers.inc"

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

inline Lanes all(float x) { return Lanes{} + x; }
inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

inline Lanes load(const float* x) { return *reinterpret_cast<const Lanes*>(x); }
inline Lanes load(const uint8_t* x) {
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(x), Ints),
                                 Lanes);
}
inline Lanes load(const bfloat16* x) {
  const Words bits = __builtin_convertvector(*reinterpret_cast<const Shorts*>(x), Words) << 16;
  return reinterpret_cast<Lanes>(bits);
}
inline Lanes load(const float16* x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#else
  Lanes lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = to_float(x[i]);
  return lanes;
#endif
}

inline void store(Lanes lanes, float* out) { *reinterpret_cast<Lanes*>(out) = lanes; }
// as from_float of each number: to nearest even, and a NaN is 0x7fc0
inline void store(Lanes lanes, bfloat16* out) {
  const Words bits = reinterpret_cast<Words>(lanes);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words kept = lanes == lanes ? rounded : Words{} + 0x7fc0;
  *reinterpret_cast<Shorts*>(out) = __builtin_convertvector(kept, Shorts);
}
inline void store(Lanes lanes, float16* out) {  // 0: to nearest even
#if defined(__AVX512F__)
  const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(lanes), 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(lanes), 0));
#else
  for (int i = 0; i < kLanes; ++i) from_float(lanes[i], out + i);
#endif
}

inline float sum_of(Lanes lanes) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}
inline float largest_of(Lanes lanes) {
  float largest = lanes[0];
  for (int i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

// exp(x) for x <= 0, relative error below 2e-7: Cody-Waite reduction and a degree-6 polynomial.
// Everything below -87.3, -inf too, gives 0.
inline Lanes exp_of(Lanes x) {
  const Lanes lowest = all(-87.3f);
  const Lanes clamped = x < lowest ? lowest : x;
  // truncation, so this rounds to nearest; adding and subtracting 1.5 * 2^23 would be optimized
  // away
  const Ints rounded = __builtin_convertvector(clamped * 1.44269504f - 0.5f, Ints);
  const Lanes n = __builtin_convertvector(rounded, Lanes);
  const Lanes r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints exponent = (rounded + 127) << 23;
  return x < lowest ? Lanes{} : p * reinterpret_cast<Lanes>(exponent);
}

// 2^x for x <= 0, relative error below 2e-7: a polynomial of degree 6. Everything below -126 gives
// 2^-126.
inline Lanes exp2_of(Lanes x) {
  const Lanes clamped = larger(all(-126.0f), x);  // a NaN stays one
  // truncation, so this rounds to nearest
  const Ints rounded = __builtin_convertvector(clamped - 0.5f, Ints);
  const Lanes r = clamped - __builtin_convertvector(rounded, Lanes);
  Lanes p = r * 1.535336200e-04f + 1.339887445e-03f;
  p = p * r + 9.618437358e-03f;
  p = p * r + 5.550332471e-02f;
  p = p * r + 2.402264791e-01f;
  p = p * r + 6.931472029e-01f;
  p = p * r + 1.0f;
  return reinterpret_cast<Lanes>(reinterpret_cast<Ints>(p) + (rounded << 23));
}

// visit(k, lanes, count): a row of K numbers in registers, count < kLanes of them real in the last
template <typename T, typename F>
inline void for_row(const T* z, int64_t K, float filler, F visit) {
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) visit(k, load(z + k), kLanes);
  if (k < K) {
    Lanes rest = all(filler);
    for (int64_t i = 0; i < K - k; ++i) rest[i] = to_float(z[k + i]);
    visit(k, rest, static_cast<int>(K - k));
  }
}

template <typename T>
inline void store_part(Lanes lanes, int count, T* out) {
  if (count == kLanes) return store(lanes, out);
  for (int i = 0; i < count; ++i) from_float(lanes[i], out + i);
}
