// Optimizer steps that read a sealed accumulator and update one flat parameter group in one pass.
#pragma once

#include <cstdint>
#include <vector>

#include "core/stream.hpp"
#include "cpu/kernels.hpp"

namespace paci_rt {

// One parameter to be updated: its place in the flat buffers and the number of this step, from 1.
struct Piece {
  std::int64_t offset;
  std::int64_t numel;
  std::int64_t step;
};

// Addresses of flat buffers with equal offsets. `master` is the fp32 weight; `weight` the bf16/fp16 parameter, or 0
// where the parameter is fp32 and `master` is the parameter itself.
struct FlatWeights {
  std::uintptr_t master;
  std::uintptr_t weight;
  DType dtype;
  std::uintptr_t grad_sum;
};

// By what the first moment and the gradient itself are multiplied in one step of NAdam.
struct StepSizes {
  double mean, fresh;
};

struct AdamWConfig {
  double lr, beta1, beta2, eps, weight_decay;
  // NAdam's, for each piece and, within it, each repeat of a look-ahead; empty: AdamW, whose sizes follow from lr.
  std::vector<StepSizes> step_sizes;
};

struct SGDConfig {
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
};

struct LionConfig {
  double lr, beta1, beta2, weight_decay;
};

// What sums of gradients are multiplied by, and then divided by; a negative divisor maximises.
struct GradScale {
  double clip, divisor;
};

void adamw_step(const FlatWeights& flat, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq,
                const std::vector<Piece>& pieces, const AdamWConfig& config, GradScale grads, Stream stream,
                int threads);

// A piece of step 1 sets its momentum buffer; later ones update it.
void sgd_step(const FlatWeights& flat, std::uintptr_t momentum_buffer, const std::vector<Piece>& pieces,
              const SGDConfig& config, GradScale grads, Stream stream, int threads);

// The momentum begins at zero, so the number of a step does not matter.
void lion_step(const FlatWeights& flat, std::uintptr_t exp_avg, const std::vector<Piece>& pieces,
               const LionConfig& config, GradScale grads, Stream stream, int threads);

// Where the next `repeats` steps would bring the weights, were all of them to see the same gradients: those of a window
// that is still being summed up, of which `divisor` micro-batches are in. Nothing changes but the weights themselves:
// `kept` receives fp32 ones as they were; bf16/fp16 ones have their masters.
//
// A piece that is not `known` has no gradient in the sum yet and goes on as its momentum does: AdamW sees the mean of
// past gradients, exp_avg / (1 - beta1^n) after n steps, SGD (1 - momentum) / (1 - dampening) of its buffer, Lion its
// momentum, the mean of past gradients up to a factor that has no effect on a sign. `step` is the number of the first
// of the steps.
struct Ahead {
  std::vector<Piece> pieces;
  std::vector<std::uint8_t> known;  // one for each piece
  std::int64_t repeats;
  std::uintptr_t kept;
};

void adamw_ahead(const FlatWeights& flat, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq, const Ahead& ahead,
                 const AdamWConfig& config, double divisor, Stream stream, int threads);

void sgd_ahead(const FlatWeights& flat, std::uintptr_t momentum_buffer, const Ahead& ahead, const SGDConfig& config,
               double divisor, Stream stream, int threads);

void lion_ahead(const FlatWeights& flat, std::uintptr_t exp_avg, const Ahead& ahead, const LionConfig& config,
                double divisor, Stream stream, int threads);

}  // namespace paci_rt
