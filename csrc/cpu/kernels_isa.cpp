// The kernels of one instruction set. CMake compiles this file once per set, with PACI_RT_ISA naming it.
#include <cmath>

#include "cpu/kernels.hpp"
#include "cpu/simd.hpp"

#define PACI_RT_STRING2(x) #x
#define PACI_RT_STRING(x) PACI_RT_STRING2(x)
#define PACI_RT_CONCAT2(a, b) a##b
#define PACI_RT_CONCAT(a, b) PACI_RT_CONCAT2(a, b)

namespace paci_rt {
namespace {

constexpr std::int64_t kBlock = 1024;  // elements of fp32 work that stay in the first-level cache until rounded

template <DType dtype>
inline SimdFloats load_as(const void* base, std::int64_t i) {
  if constexpr (dtype == DType::f32) return load(static_cast<const float*>(base) + i);
  if constexpr (dtype == DType::bf16) return load_bf16(static_cast<const std::uint16_t*>(base) + i);
  if constexpr (dtype == DType::f16) return load_f16(static_cast<const std::uint16_t*>(base) + i);
}

// Pairwise over the lanes, in the same order everywhere.
double reduce(const SimdSums& sums) {
  double lanes[kSimdWidth];
  spill(sums, lanes);
  for (std::int64_t width = kSimdWidth / 2; width > 0; width /= 2)
    for (std::int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <DType dtype, bool overwrite, bool stream>
double accumulate_as(float* dst, const void* src, std::int64_t n) {
  SimdSums sums;
  std::int64_t i = 0;
  for (; i + kSimdWidth <= n; i += kSimdWidth) {
    SimdFloats x = load_as<dtype>(src, i);
    if constexpr (!overwrite) x = add(load(dst + i), x);
    if constexpr (stream) {
      store_past_cache(dst + i, x);
    } else {
      store(dst + i, x);
    }
    add_squares(sums, x);
  }
  if (i < n) {  // the tail, as a full set of lanes padded with zeros
    alignas(64) float old[kSimdWidth] = {};
    alignas(64) unsigned char fresh[kSimdWidth * 4] = {};
    const auto count = static_cast<std::size_t>(n - i);
    std::memcpy(fresh, static_cast<const unsigned char*>(src) + i * size_of(dtype), count * size_of(dtype));
    if constexpr (!overwrite) std::memcpy(old, dst + i, count * 4);
    SimdFloats x = load_as<dtype>(fresh, 0);
    if constexpr (!overwrite) x = add(load(old), x);
    add_squares(sums, x);
    store(old, x);
    std::memcpy(dst + i, old, count * 4);
  }
  if constexpr (stream) fence();
  return reduce(sums);
}

template <DType dtype>
double accumulate_dtype(float* dst, const void* src, std::int64_t n, bool overwrite, bool stream) {
  if (!overwrite) return accumulate_as<dtype, false, false>(dst, src, n);
  if (stream) return accumulate_as<dtype, true, true>(dst, src, n);
  return accumulate_as<dtype, true, false>(dst, src, n);
}

double accumulate(float* dst, const void* src, DType dtype, std::int64_t n, bool overwrite, bool stream) {
  switch (dtype) {
    case DType::bf16:
      return accumulate_dtype<DType::bf16>(dst, src, n, overwrite, stream);
    case DType::f16:
      return accumulate_dtype<DType::f16>(dst, src, n, overwrite, stream);
    default:
      return accumulate_dtype<DType::f32>(dst, src, n, overwrite, stream);
  }
}

double sum_of_squares(const float* x, std::int64_t n) {
  SimdSums sums;
  std::int64_t i = 0;
  for (; i + kSimdWidth <= n; i += kSimdWidth) add_squares(sums, load(x + i));
  if (i < n) {
    alignas(64) float tail[kSimdWidth] = {};
    std::memcpy(tail, x + i, static_cast<std::size_t>(n - i) * 4);
    add_squares(sums, load(tail));
  }
  return reduce(sums);
}

std::int64_t count_nonfinite(const float* x, std::int64_t n) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < n; ++i) count += (bits_of_float(x[i]) & 0x7f800000u) == 0x7f800000u;
  return count;
}

inline std::uint16_t narrow_bf16(float x) {
  const std::uint32_t bits = bits_of_float(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

void round_to(void* low, DType dtype, std::int64_t at, const float* x, std::int64_t n) {
  std::uint16_t* out = static_cast<std::uint16_t*>(low) + at;
  if (dtype == DType::bf16) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = narrow_bf16(x[i]);
    return;
  }
  std::int64_t i = 0;
  for (; i + kSimdWidth <= n; i += kSimdWidth) store_f16(out + i, load(x + i));
  if (i < n) {
    float tail[kSimdWidth] = {};
    std::uint16_t rounded[kSimdWidth];
    std::memcpy(tail, x + i, static_cast<std::size_t>(n - i) * 4);
    store_f16(rounded, load(tail));
    std::memcpy(out + i, rounded, static_cast<std::size_t>(n - i) * 2);
  }
}

// Division by a power of two equals multiplication by its reciprocal to the bit; anything else must divide.
bool exact_reciprocal(float divisor) {
  int exponent;
  return std::fabs(std::frexp(divisor, &exponent)) == 0.5f;
}

// torch.optim.AdamW's order of operations. `low_weight`: torch's lerp, for a share of the gradient below one half.
// `fresh`: NAdam, whose gradient also moves the weight directly.
template <bool multiply, bool low_weight, bool fresh>
void adamw_block(float* __restrict w, const float* __restrict sum, float* __restrict m, float* __restrict v,
                 std::int64_t n, const AdamWScalars& s) {
  const float clip = s.clip, scale = multiply ? 1.0f / s.divisor : s.divisor;
  const float decay = s.decay, b1 = s.beta1, c1 = s.one_minus_b1, b2 = s.beta2, c2 = s.one_minus_b2;
  const float inv_bias = s.inv_bias2sqrt, eps = s.eps, step = -s.step_size, fresh_step = -s.fresh_size;
  for (std::int64_t i = 0; i < n; ++i) {
    const float g = multiply ? sum[i] * clip * scale : sum[i] * clip / scale;
    const float mi = low_weight ? m[i] + c1 * (g - m[i]) : g - (g - m[i]) * b1;
    const float vi = v[i] * b2 + (c2 * g) * g;
    const float denominator = std::sqrt(vi) * inv_bias + eps;
    float move = step * mi;
    if constexpr (fresh) move = move + fresh_step * g;
    w[i] = w[i] * decay + move / denominator;
    m[i] = mi;
    v[i] = vi;
  }
}

template <bool multiply>
auto adamw_block_for(const AdamWScalars& s) {
  const bool low_weight = s.one_minus_b1 < 0.5f;
  if (s.fresh_size != 0.0f) return low_weight ? adamw_block<multiply, true, true> : adamw_block<multiply, false, true>;
  return low_weight ? adamw_block<multiply, true, false> : adamw_block<multiply, false, false>;
}

void adamw(const AdamWRange& r, std::int64_t n, const AdamWScalars& s) {
  auto* block = exact_reciprocal(s.divisor) ? adamw_block_for<true>(s) : adamw_block_for<false>(s);
  if (r.low == nullptr) return block(r.weight, r.grad_sum, r.exp_avg, r.exp_avg_sq, n, s);
  for (std::int64_t i = 0; i < n; i += kBlock) {
    const std::int64_t count = n - i < kBlock ? n - i : kBlock;
    block(r.weight + i, r.grad_sum + i, r.exp_avg + i, r.exp_avg_sq + i, count, s);
    round_to(r.low, r.low_dtype, i, r.weight + i, count);
  }
}

enum class Momentum { none, first, plain, nesterov_first, nesterov };

template <bool multiply, Momentum kind>
void sgd_block(float* __restrict w, const float* __restrict sum, float* __restrict buffer, std::int64_t n,
               const SGDScalars& s) {
  constexpr bool first = kind == Momentum::first || kind == Momentum::nesterov_first;
  constexpr bool nesterov = kind == Momentum::nesterov || kind == Momentum::nesterov_first;
  const float clip = s.clip, scale = multiply ? 1.0f / s.divisor : s.divisor;
  const float lr = -s.lr, decay = s.weight_decay, momentum = s.momentum, take = s.one_minus_dampening;
  for (std::int64_t i = 0; i < n; ++i) {
    float g = (multiply ? sum[i] * clip * scale : sum[i] * clip / scale) + decay * w[i];
    if constexpr (kind != Momentum::none) {
      const float b = first ? g : buffer[i] * momentum + take * g;
      buffer[i] = b;
      g = nesterov ? g + momentum * b : b;
    }
    w[i] = w[i] + lr * g;
  }
}

template <bool multiply>
auto sgd_block_for(const SGDScalars& s) {
  if (s.momentum == 0.0f) return sgd_block<multiply, Momentum::none>;
  if (s.nesterov)
    return s.first ? sgd_block<multiply, Momentum::nesterov_first> : sgd_block<multiply, Momentum::nesterov>;
  return s.first ? sgd_block<multiply, Momentum::first> : sgd_block<multiply, Momentum::plain>;
}

void sgd(const MomentumRange& r, std::int64_t n, const SGDScalars& s) {
  auto* block = exact_reciprocal(s.divisor) ? sgd_block_for<true>(s) : sgd_block_for<false>(s);
  const bool has_buffer = s.momentum != 0.0f;
  for (std::int64_t i = 0; i < n; i += kBlock) {
    const std::int64_t count = n - i < kBlock ? n - i : kBlock;
    block(r.weight + i, r.grad_sum + i, has_buffer ? r.momentum + i : nullptr, count, s);
    if (r.low != nullptr) round_to(r.low, r.low_dtype, i, r.weight + i, count);
  }
}

template <bool multiply>
void lion_block(float* __restrict w, const float* __restrict sum, float* __restrict m, std::int64_t n,
                const LionScalars& s) {
  const float clip = s.clip, scale = multiply ? 1.0f / s.divisor : s.divisor;
  const float decay = s.decay, lr = -s.lr, b1 = s.beta1, c1 = s.one_minus_b1, b2 = s.beta2, c2 = s.one_minus_b2;
  for (std::int64_t i = 0; i < n; ++i) {
    const float g = multiply ? sum[i] * clip * scale : sum[i] * clip / scale;
    const float direction = m[i] * b1 + c1 * g;
    // Zero has no sign, and neither has NaN, which must not be hidden.
    const float sign = direction > 0.0f ? 1.0f : (direction < 0.0f ? -1.0f : direction);
    w[i] = w[i] * decay + lr * sign;
    m[i] = m[i] * b2 + c2 * g;
  }
}

void lion(const MomentumRange& r, std::int64_t n, const LionScalars& s) {
  auto* block = exact_reciprocal(s.divisor) ? lion_block<true> : lion_block<false>;
  for (std::int64_t i = 0; i < n; i += kBlock) {
    const std::int64_t count = n - i < kBlock ? n - i : kBlock;
    block(r.weight + i, r.grad_sum + i, r.momentum + i, count, s);
    if (r.low != nullptr) round_to(r.low, r.low_dtype, i, r.weight + i, count);
  }
}

}  // namespace

extern const KernelTable PACI_RT_CONCAT(kernels_, PACI_RT_ISA);
const KernelTable PACI_RT_CONCAT(kernels_, PACI_RT_ISA) = {
    PACI_RT_STRING(PACI_RT_ISA), accumulate, sum_of_squares, count_nonfinite, adamw, sgd, lion};

}  // namespace paci_rt
