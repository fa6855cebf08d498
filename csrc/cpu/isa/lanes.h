// Vectors of float32 as wide as the instruction set's registers, and the one product that the ops
// are made of. Included inside an anonymous namespace of every instruction-set file, so that no
// copy is shared between them.
#include "numbers.inc"

#if defined(__AVX512F__)
constexpr int kLanes = 16, kColumns = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kColumns = 2;
#else
constexpr int kLanes = 4, kColumns = 2;
#endif
constexpr int kRows = 6;  // kRows * kColumns sums, kColumns factors and one more fill the registers

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
template <typename T>
inline void store(Lanes lanes, T* out) {
  for (int i = 0; i < kLanes; ++i) from_float(lanes[i], out + i);
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
  // truncation, so this rounds to nearest; adding and subtracting 1.5 * 2^23 would be optimised
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

// c[r, :] (+)= sum_k a[r * a_row + k * a_k] * b[k * ldb + :] for ROWS rows and COLUMNS registers
template <int ROWS, int COLUMNS, typename T>
void tile(const float* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t K, float* c,
          int64_t ldc, bool add) {
  Lanes sums[ROWS][COLUMNS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < COLUMNS; ++n) {
      sums[r][n] = add ? load(c + r * ldc + n * kLanes) : Lanes{};
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    Lanes factors[COLUMNS];
#pragma GCC unroll 4
    for (int n = 0; n < COLUMNS; ++n) factors[n] = load(b + n * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const float weight = a[r * a_row];
#pragma GCC unroll 4
      for (int n = 0; n < COLUMNS; ++n) sums[r][n] += weight * factors[n];
    }
    a += a_k;
    b += ldb;
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < COLUMNS; ++n) store(sums[r][n], c + r * ldc + n * kLanes);
  }
}

template <int COLUMNS, typename T>
void rows_of_tiles(const float* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t M,
                   int64_t K, float* c, int64_t ldc, bool add) {
  for (; M >= kRows; M -= kRows, a += kRows * a_row, c += kRows * ldc) {
    tile<kRows, COLUMNS>(a, a_row, a_k, b, ldb, K, c, ldc, add);
  }
  switch (M) {
    case 5:
      return tile<5, COLUMNS>(a, a_row, a_k, b, ldb, K, c, ldc, add);
    case 4:
      return tile<4, COLUMNS>(a, a_row, a_k, b, ldb, K, c, ldc, add);
    case 3:
      return tile<3, COLUMNS>(a, a_row, a_k, b, ldb, K, c, ldc, add);
    case 2:
      return tile<2, COLUMNS>(a, a_row, a_k, b, ldb, K, c, ldc, add);
    case 1:
      return tile<1, COLUMNS>(a, a_row, a_k, b, ldb, K, c, ldc, add);
  }
}

// All rows read one panel of b, so it is kept no deeper than fits the second-level cache well.
constexpr int64_t kDepth = 512;

template <int COLUMNS, typename T>
void strip(const float* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t M,
           int64_t K, float* c, int64_t ldc, bool add) {
  int64_t k = 0;
  do {  // once for K = 0 too, which sets c to zero
    const int64_t depth = K - k < kDepth ? K - k : kDepth;
    rows_of_tiles<COLUMNS>(a + k * a_k, a_row, a_k, b + k * ldb, ldb, M, depth, c, ldc,
                           add || k > 0);
    k += depth;
  } while (k < K);
}

// c[m, n] (+)= sum_k a[m * a_row + k * a_k] * b[k * ldb + n], m < M, n < N, a multiple of kLanes
template <typename T>
void product(const float* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t M,
             int64_t N, int64_t K, float* c, int64_t ldc, bool add) {
  int64_t n = 0;
  for (; n + kColumns * kLanes <= N; n += kColumns * kLanes) {
    strip<kColumns>(a, a_row, a_k, b + n, ldb, M, K, c + n, ldc, add);
  }
  switch ((N - n) / kLanes) {
    case 3:
      return strip<3>(a, a_row, a_k, b + n, ldb, M, K, c + n, ldc, add);
    case 2:
      return strip<2>(a, a_row, a_k, b + n, ldb, M, K, c + n, ldc, add);
    case 1:
      return strip<1>(a, a_row, a_k, b + n, ldb, M, K, c + n, ldc, add);
  }
}
