// 16 float lanes for the instruction set that the including file is compiled for. Everything here is in an unnamed
// namespace: the same inline function compiled for two instruction sets must never be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr std::int64_t kSimdWidth = 16;

inline float float_of_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline std::uint32_t bits_of_float(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

#if defined(__AVX512F__)

struct SimdFloats {
  __m512 v;
};
struct SimdSums {
  __m512d lo = _mm512_setzero_pd(), hi = _mm512_setzero_pd();
};

inline SimdFloats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline SimdFloats load_bf16(const std::uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline SimdFloats load_f16(const std::uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline SimdFloats add(SimdFloats a, SimdFloats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline void store(float* p, SimdFloats a) { _mm512_storeu_ps(p, a.v); }
inline void store_past_cache(float* p, SimdFloats a) { _mm512_stream_ps(p, a.v); }
inline void fence() { _mm_sfence(); }
// The square of a float is exact in double, so a fused multiply-add rounds as the two separate operations do.
inline void add_squares(SimdSums& s, SimdFloats a) {
  const __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  const __m512d hi = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
  s.lo = _mm512_fmadd_pd(lo, lo, s.lo);
  s.hi = _mm512_fmadd_pd(hi, hi, s.hi);
}
inline void spill(const SimdSums& s, double* out) {
  _mm512_storeu_pd(out, s.lo);
  _mm512_storeu_pd(out + 8, s.hi);
}
inline void store_f16(std::uint16_t* p, SimdFloats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(__AVX2__)

struct SimdFloats {
  __m256 lo, hi;
};
struct SimdSums {
  __m256d v[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
};

inline SimdFloats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widen_bf16(const std::uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline SimdFloats load_bf16(const std::uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline SimdFloats load_f16(const std::uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline SimdFloats add(SimdFloats a, SimdFloats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline void store(float* p, SimdFloats a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_past_cache(float* p, SimdFloats a) {
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
}
inline void fence() { _mm_sfence(); }
inline void add_square(__m256d& sum, __m128 x) {
  const __m256d wide = _mm256_cvtps_pd(x);
  sum = _mm256_add_pd(sum, _mm256_mul_pd(wide, wide));
}
inline void add_squares(SimdSums& s, SimdFloats a) {
  add_square(s.v[0], _mm256_castps256_ps128(a.lo));
  add_square(s.v[1], _mm256_extractf128_ps(a.lo, 1));
  add_square(s.v[2], _mm256_castps256_ps128(a.hi));
  add_square(s.v[3], _mm256_extractf128_ps(a.hi, 1));
}
inline void spill(const SimdSums& s, double* out) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(out + 4 * i, s.v[i]);
}
inline void store_f16(std::uint16_t* p, SimdFloats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

#else  // any other CPU: plain loops over 16 elements, which compilers turn into whatever vectors there are

struct SimdFloats {
  float v[16];
};
struct SimdSums {
  double v[16] = {};
};

inline float widen_f16(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t shifted = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
  if (shifted >= (0x7c00u << 13)) {  // infinity or NaN, which becomes quiet as hardware makes it
    const std::uint32_t quiet = (half & 0x3ffu) ? 0x00400000u : 0u;
    return float_of_bits(sign | (shifted + ((255u - 31u) << 23)) | quiet);
  }
  // Half's exponent bias is 112 less; the product is exact and makes subnormals normal.
  return float_of_bits(sign | bits_of_float(float_of_bits(shifted) * 0x1p112f));
}

inline std::uint16_t narrow_f16(float x) {
  const std::uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal half: the addition aligns and rounds to nearest even
    const float aligned = float_of_bits(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_of_float(aligned) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

inline SimdFloats load(const float* p) {
  SimdFloats a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}
inline SimdFloats load_bf16(const std::uint16_t* p) {
  SimdFloats a;
  for (int i = 0; i < 16; ++i) a.v[i] = float_of_bits(static_cast<std::uint32_t>(p[i]) << 16);
  return a;
}
inline SimdFloats load_f16(const std::uint16_t* p) {
  SimdFloats a;
  for (int i = 0; i < 16; ++i) a.v[i] = widen_f16(p[i]);
  return a;
}
inline SimdFloats add(SimdFloats a, SimdFloats b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline void store(float* p, SimdFloats a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store_past_cache(float* p, SimdFloats a) { store(p, a); }
inline void fence() {}
inline void add_squares(SimdSums& s, SimdFloats a) {
  for (int i = 0; i < 16; ++i) s.v[i] += static_cast<double>(a.v[i]) * static_cast<double>(a.v[i]);
}
inline void spill(const SimdSums& s, double* out) { std::memcpy(out, s.v, sizeof s.v); }
inline void store_f16(std::uint16_t* p, SimdFloats a) {
  for (int i = 0; i < 16; ++i) p[i] = narrow_f16(a.v[i]);
}

#endif

}  // namespace
