// The inner loops of csrc/cpu/isa against double, in a program without torch or Python: what can be
// run under emulation where the processor itself is not at hand. Prints an op, a dtype and the
// largest error as a fraction of the largest expected value; see tests/test_aarch64.py.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using pgn_fast::DType;
namespace loops = pgn_fast::scalar;

namespace {

uint64_t state = 1;

// between -1 and 1
double draw() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<double>(state >> 33) / (1u << 30) - 1.0;
}

// numbers of one type, and what they are in double
struct Numbers {
  DType dtype;
  std::vector<float> f32;
  std::vector<uint16_t> f16;
  std::vector<double> value;

  Numbers(DType dtype, size_t count) : dtype(dtype), f32(count), f16(count), value(count) {}

  void fill(double scale) {
    for (size_t i = 0; i < value.size(); ++i) {
      const float x = static_cast<float>(scale * draw());
      f32[i] = x;
      if (dtype == DType::float16) {
        const pgn_fast::float16 half = static_cast<pgn_fast::float16>(x);
        std::memcpy(&f16[i], &half, 2);
      } else {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        f16[i] = static_cast<uint16_t>(bits >> 16);
      }
    }
    read();
  }
  void read() {
    for (size_t i = 0; i < value.size(); ++i) {
      if (dtype == DType::float32) {
        value[i] = f32[i];
      } else if (dtype == DType::float16) {
        pgn_fast::float16 half;
        std::memcpy(&half, &f16[i], 2);
        value[i] = static_cast<float>(half);
      } else {
        const uint32_t bits = static_cast<uint32_t>(f16[i]) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        value[i] = x;
      }
    }
  }
  void* data() { return dtype == DType::float32 ? static_cast<void*>(f32.data()) : f16.data(); }
};

void report(const char* op, DType dtype, const std::vector<double>& got,
            const std::vector<double>& expected) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    worst = std::fmax(worst, std::fabs(got[i] - expected[i]));
    largest = std::fmax(largest, std::fabs(expected[i]));
  }
  const char* names[] = {"float32", "float16", "bfloat16"};
  std::printf("%s %s %.3g\n", op, names[static_cast<int>(dtype)], worst / largest);
}

std::vector<double> softmax(const double* z, int64_t count) {
  double top = z[0], sum = 0;
  for (int64_t i = 1; i < count; ++i) top = std::fmax(top, z[i]);
  std::vector<double> weights(count);
  for (int64_t i = 0; i < count; ++i) sum += weights[i] = std::exp(z[i] - top);
  for (double& weight : weights) weight /= sum;
  return weights;
}

void mix_prompts(DType dtype) {
  const int64_t R = 5, K = 33, D = 70;
  Numbers logits(dtype, R * K), library(dtype, K * D), prompts(dtype, R * D);
  logits.fill(4);
  library.fill(1);
  std::vector<float> weights(R * K), sums(R * D);
  loops::mixture_rows(logits.data(), dtype, true, K, R, weights.data());
  loops::mix_columns(weights.data(), library.data(), dtype, K, D, R, 0, D, sums.data(),
                     prompts.data());
  prompts.read();
  std::vector<double> expected(R * D);
  for (int64_t r = 0; r < R; ++r) {
    const std::vector<double> w = softmax(&logits.value[r * K], K);
    for (int64_t k = 0; k < K; ++k)
      for (int64_t d = 0; d < D; ++d) expected[r * D + d] += w[k] * library.value[k * D + d];
  }
  report("mix_prompts", dtype, prompts.value, expected);
}

void add_layer_norm(DType dtype) {
  const int64_t R = 3, D = 70;
  Numbers x(dtype, R * D), y(dtype, R * D), total(dtype, R * D), normed(dtype, R * D);
  x.fill(2);
  y.fill(1);
  std::vector<float> rstd(R);
  loops::add_layer_norm_rows(
      {x.data(), y.data(), total.data(), normed.data(), rstd.data(), D, 1e-6f}, dtype, 0, R);
  total.read();
  normed.read();
  std::vector<double> expected(R * D);
  for (int64_t r = 0; r < R; ++r) {
    double mean = 0, variance = 0;
    for (int64_t d = 0; d < D; ++d) mean += total.value[r * D + d] / D;
    for (int64_t d = 0; d < D; ++d) variance += std::pow(total.value[r * D + d] - mean, 2) / D;
    for (int64_t d = 0; d < D; ++d)
      expected[r * D + d] = (total.value[r * D + d] - mean) / std::sqrt(variance + 1e-6);
  }
  report("add_layer_norm", dtype, normed.value, expected);
}

void prompt_attention(DType dtype) {
  const int64_t Q = 70, T = 70, P = 5, d = 24, padded = 32;
  Numbers q(dtype, Q * d), k(dtype, T * d), v(dtype, T * d);
  Numbers prompt_k(dtype, P * d), prompt_v(dtype, P * d), out(dtype, Q * d);
  for (Numbers* numbers : {&q, &k, &v, &prompt_k, &prompt_v}) numbers->fill(1.5);
  std::vector<float> lse(Q), scratch(1 << 20);
  pgn_fast::Attention task{};
  task.q = {q.data(), Q * d, Q * d, d};
  task.k = {k.data(), T * d, T * d, d};
  task.v = {v.data(), T * d, T * d, d};
  task.prompt_k = {prompt_k.data(), 0, P * d, d};
  task.prompt_v = {prompt_v.data(), 0, P * d, d};
  task.h = 1;
  task.Q = Q;
  task.T = T;
  task.P = P;
  task.d = d;
  task.padded_d = padded;
  task.scale = 0.2f;
  task.shared = true;
  task.out = out.data();
  task.lse = lse.data();
  loops::attention_forward(task, dtype, 0, 0, 1, scratch.data());
  out.read();
  std::vector<double> expected(Q * d);
  for (int64_t i = 0; i < Q; ++i) {
    std::vector<double> scores(P + T);
    for (int64_t j = 0; j < P + T; ++j) {
      const double* key = j < P ? &prompt_k.value[j * d] : &k.value[(j - P) * d];
      for (int64_t c = 0; c < d; ++c) scores[j] += 0.2f * q.value[i * d + c] * key[c];
    }
    const std::vector<double> w = softmax(scores.data(), P + T);
    for (int64_t j = 0; j < P + T; ++j) {
      const double* value = j < P ? &prompt_v.value[j * d] : &v.value[(j - P) * d];
      for (int64_t c = 0; c < d; ++c) expected[i * d + c] += w[j] * value[c];
    }
  }
  report("prompt_attention", dtype, out.value, expected);
}

// pixels to the numbers of patches, uint8 and normalized
void cut_patches(DType dtype) {
  const int64_t C = 3, H = 8, W = 12, p = 4, N = (H / p) * (W / p);
  std::vector<uint8_t> images(C * H * W);
  for (uint8_t& level : images) level = static_cast<uint8_t>(127.5 * (draw() + 1));
  const float scale[] = {0.01f, 0.02f, 0.03f}, shift[] = {-1, 0, 1};
  Numbers out(dtype, N * C * p * p);
  loops::cut_patches({images.data(), true, C, H, W, p, p, C * H * W, H * W, W, 1, scale, shift},
                     dtype, 0, H / p, out.data());
  out.read();
  std::vector<double> expected;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < C; ++c)
      for (int64_t i = 0; i < p * p; ++i) {
        const int64_t y = n / (W / p) * p + i / p, x = n % (W / p) * p + i % p;
        expected.push_back(images[(c * H + y) * W + x] * double(scale[c]) + shift[c]);
      }
  report("cut_patches", dtype, out.value, expected);
}

// every byte counts: the sum of all words is that of two parts, and changes with any byte
bool fingerprint() {
  std::vector<uint8_t> data(8 * 101);
  for (uint8_t& byte : data) byte = static_cast<uint8_t>(127.5 * (draw() + 1));
  const uint64_t whole = loops::fingerprint_words(data.data(), 808, 0);
  const uint64_t parts = loops::fingerprint_words(data.data(), 320, 0) +
                         loops::fingerprint_words(data.data() + 320, 488, 40);
  data[555] ^= 1;
  return whole == parts && whole != loops::fingerprint_words(data.data(), 808, 0);
}

}  // namespace

int main() {
  for (DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    mix_prompts(dtype);
    add_layer_norm(dtype);
    prompt_attention(dtype);
    cut_patches(dtype);
  }
  return fingerprint() ? 0 : 1;
}
