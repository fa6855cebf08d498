// The product of matrices that the ops are made of: a block of the result stays in registers while
// the sum runs. Included after lanes.h.

// A stride that is known to the compiler goes into the instructions instead of into a register.
template <int64_t N>
struct Constant {
  constexpr operator int64_t() const { return N; }
};

// so many sums, the factors that they share and one more fill the registers
#if defined(__AVX512F__)
constexpr int kSums = 24, kColumns = 4;
#else
constexpr int kSums = 12, kColumns = 2;
#endif
constexpr int kRows = kSums / kColumns;

// c[r, :] (+)= sum_k a[r * a_row + k * a_k] * b[k * ldb + :] for ROWS rows and COLUMNS registers
template <int ROWS, int COLUMNS, typename RowStride, typename KStride, typename T>
void tile(const float* a, RowStride a_row, KStride a_k, const T* b, int64_t ldb, int64_t K,
          float* c, int64_t ldc, bool add) {
  Lanes sums[ROWS][COLUMNS];
#pragma GCC unroll 24
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
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; ++r) {
      const float weight = a[r * a_row];
#pragma GCC unroll 4
      for (int n = 0; n < COLUMNS; ++n) sums[r][n] += weight * factors[n];
    }
    a += a_k;
    b += ldb;
  }
#pragma GCC unroll 24
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < COLUMNS; ++n) store(sums[r][n], c + r * ldc + n * kLanes);
  }
}

template <int COLUMNS, typename RowStride, typename KStride, typename T>
void rows_of_tiles(const float* a, RowStride a_row, KStride a_k, const T* b, int64_t ldb, int64_t M,
                   int64_t K, float* c, int64_t ldc, bool add) {
  // fewer columns leave registers for more rows, and the sums stay as many as hide the latency
  constexpr int most = kSums / COLUMNS;
  for (; M >= most; M -= most, a += most * a_row, c += most * ldc) {
    tile<most, COLUMNS>(a, a_row, a_k, b, ldb, K, c, ldc, add);
  }
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

template <int COLUMNS, typename RowStride, typename KStride, typename T>
void strip(const float* a, RowStride a_row, KStride a_k, const T* b, int64_t ldb, int64_t M,
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
template <typename RowStride, typename KStride, typename T>
void product(const float* a, RowStride a_row, KStride a_k, const T* b, int64_t ldb, int64_t M,
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
