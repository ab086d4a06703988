// Vectorised CPU arithmetic over flat buffers, one set of functions per instruction set.
//
// Results are the same to the bit for every instruction set and every thread count: element-wise work uses only
// correctly rounded operations, none of them contracted, and every sum runs over 16 fixed lanes in chunks of fixed
// size.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace paci_rt {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline constexpr std::int64_t kChunk = 16384;  // elements; the unit of work of one thread and of one partial sum

inline constexpr std::int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// One step of AdamW or NAdam over one range with one step count. All scalars are derived in double precision by the
// caller.
struct AdamWScalars {
  float clip;           // the sum of gradients is multiplied by this
  float divisor;        // and divided by this; negative to maximise
  float decay;          // 1 - lr * weight_decay
  float beta1;          // first moment keeps this share
  float one_minus_b1;   // and takes this share of the gradient
  float beta2;          // second moment keeps this share
  float one_minus_b2;   //
  float inv_bias2sqrt;  // 1 / sqrt(1 - beta2^step)
  float eps;            //
  float step_size;      // lr / (1 - beta1^step), or NAdam's factor of the first moment
  float fresh_size;     // NAdam's factor of the gradient itself; 0: it moves the weight through the first moment alone
};

struct SGDScalars {
  float clip;
  float divisor;
  float lr;
  float weight_decay;
  float momentum;  // 0: no momentum buffer is read or written
  float one_minus_dampening;
  bool nesterov;
  bool first;  // the momentum buffer holds nothing yet and is set to the gradient
};

struct LionScalars {
  float clip;
  float divisor;
  float decay;         // 1 - lr * weight_decay
  float lr;            //
  float beta1;         // the direction takes this share of the momentum
  float one_minus_b1;  // and this share of the gradient
  float beta2;         // the momentum keeps this share
  float one_minus_b2;  //
};

// Pointers are to the first element of the range. `low` is the bf16/fp16 parameter, null where the parameter is fp32.
struct AdamWRange {
  float* weight;
  void* low;
  DType low_dtype;
  const float* grad_sum;
  float* exp_avg;
  float* exp_avg_sq;
};

struct MomentumRange {
  float* weight;
  void* low;
  DType low_dtype;
  const float* grad_sum;
  float* momentum;
};

struct KernelTable {
  const char* name;
  // dst[i] = (overwrite ? 0 : dst[i]) + src[i]; returns the sum of squares of the new dst. `stream` bypasses the cache.
  double (*accumulate)(float* dst, const void* src, DType dtype, std::int64_t n, bool overwrite, bool stream);
  double (*sum_of_squares)(const float* x, std::int64_t n);  // the same sum as accumulate's, to the bit
  std::int64_t (*count_nonfinite)(const float* x, std::int64_t n);
  void (*adamw)(const AdamWRange& range, std::int64_t n, const AdamWScalars& scalars);
  void (*sgd)(const MomentumRange& range, std::int64_t n, const SGDScalars& scalars);
  void (*lion)(const MomentumRange& range, std::int64_t n, const LionScalars& scalars);
};

// The table in use: the best one this CPU runs, unless select_isa chose another.
const KernelTable& kernels();
std::vector<std::string> available_isas();  // best last
void select_isa(const std::string& name);   // "auto" or one of the above; throws std::invalid_argument

struct SumAndCount {
  double sum_of_squares = 0.0;
  std::int64_t nonfinite = 0;
};

// The accumulate kernel over a whole segment, in chunks, over up to `threads` threads.
SumAndCount accumulate_segment(float* dst, const void* src, DType dtype, std::int64_t n, bool overwrite, bool stream,
                               int threads);

// Squares and non-finite elements of a segment as it stands; what accumulate_segment returns for the same content.
SumAndCount measure_segment(const float* x, std::int64_t n, int threads);

}  // namespace paci_rt
