#include "cpu/optimizer_step.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/check.hpp"
#include "cpu/thread_pool.hpp"

namespace paci_rt {
namespace {

struct Task {
  std::int64_t offset;
  std::int64_t numel;
  std::size_t piece;
};

// Cuts pieces into chunks of bounded size. Padding between pieces is never touched, so it stays zero.
std::vector<Task> cut(const std::vector<Piece>& pieces) {
  std::vector<Task> tasks;
  for (std::size_t p = 0; p < pieces.size(); ++p) {
    check_value(pieces[p].step >= 1, "step ", pieces[p].step, " of a parameter is not a step number: they start at 1");
    for (std::int64_t at = 0; at < pieces[p].numel; at += kChunk) {
      const std::int64_t left = pieces[p].numel - at;
      tasks.push_back({pieces[p].offset + at, left < kChunk ? left : kChunk, p});
    }
  }
  return tasks;
}

template <typename T>
T* at(std::uintptr_t base, std::int64_t offset) {
  return base == 0 ? nullptr : reinterpret_cast<T*>(base) + offset;
}

MomentumRange momentum_range(const FlatWeights& flat, std::uintptr_t momentum, std::int64_t offset) {
  return {at<float>(flat.master, offset), at<std::uint16_t>(flat.weight, offset), flat.dtype,
          at<const float>(flat.grad_sum, offset), at<float>(momentum, offset)};
}

template <typename Body>
void for_each_task(const std::vector<Task>& tasks, int threads, const Body& body) {
  if (threads <= 1) {
    for (const Task& task : tasks) body(task);
    return;
  }
  parallel_for(static_cast<std::int64_t>(tasks.size()), threads,
               [&](std::int64_t i) { body(tasks[static_cast<std::size_t>(i)]); });
}

// `at` is the step's place in `config.step_sizes`.
AdamWScalars adamw_scalars(const AdamWConfig& config, GradScale grads, std::int64_t number, std::size_t at) {
  const double step = static_cast<double>(number);
  AdamWScalars s;
  s.clip = static_cast<float>(grads.clip);
  s.divisor = static_cast<float>(grads.divisor);
  s.decay = static_cast<float>(1.0 - config.lr * config.weight_decay);
  s.beta1 = static_cast<float>(config.beta1);
  s.one_minus_b1 = static_cast<float>(1.0 - config.beta1);
  s.beta2 = static_cast<float>(config.beta2);
  s.one_minus_b2 = static_cast<float>(1.0 - config.beta2);
  s.inv_bias2sqrt = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(config.beta2, step)));
  s.eps = static_cast<float>(config.eps);
  const bool nesterov = !config.step_sizes.empty();
  s.step_size =
      static_cast<float>(nesterov ? config.step_sizes[at].mean : config.lr / (1.0 - std::pow(config.beta1, step)));
  s.fresh_size = static_cast<float>(nesterov ? config.step_sizes[at].fresh : 0.0);
  return s;
}

void check_step_sizes(const AdamWConfig& config, std::size_t steps) {
  check_value(config.step_sizes.empty() || config.step_sizes.size() == steps, config.step_sizes.size(),
              " step sizes were given for ", steps, " steps");
}

LionScalars lion_scalars(const LionConfig& config, GradScale grads) {
  return {static_cast<float>(grads.clip),
          static_cast<float>(grads.divisor),
          static_cast<float>(1.0 - config.lr * config.weight_decay),
          static_cast<float>(config.lr),
          static_cast<float>(config.beta1),
          static_cast<float>(1.0 - config.beta1),
          static_cast<float>(config.beta2),
          static_cast<float>(1.0 - config.beta2)};
}

constexpr std::int64_t kMostRepeats = 4096;

void check_ahead(const FlatWeights& flat, const Ahead& ahead, double divisor) {
  check_value(divisor != 0.0, "gradients cannot be divided by 0");
  check_value(ahead.repeats >= 1 && ahead.repeats <= kMostRepeats, "looking ahead by ", ahead.repeats,
              " steps is not possible: at least 1 and at most ", kMostRepeats);
  check_value(flat.weight != 0 || ahead.kept != 0, "fp32 weights need a buffer that keeps them");
  check_value(ahead.known.size() == ahead.pieces.size(), "one flag for each piece is needed");
}

constexpr std::int64_t kAheadBlock = 1024;  // elements whose copies of weight and state stay in the first-level cache

// Runs `steps(piece, offset, count, weight copy, low weight, gradient block)` over blocks and keeps what they make of
// the weights. `guess(piece, offset, count, block)` fills in gradients that are not known.
template <typename Guess, typename Steps>
void for_each_ahead(const FlatWeights& flat, const Ahead& ahead, int threads, const Guess& guess, const Steps& steps) {
  for_each_task(cut(ahead.pieces), threads, [&](const Task& task) {
    alignas(64) float weight[kAheadBlock], guessed[kAheadBlock];
    for (std::int64_t done = 0; done < task.numel; done += kAheadBlock) {
      const std::int64_t count = std::min(kAheadBlock, task.numel - done), offset = task.offset + done;
      const auto bytes = static_cast<std::size_t>(count) * sizeof(float);
      float* master = at<float>(flat.master, offset);
      std::memcpy(weight, master, bytes);
      const float* grad = guessed;
      if (ahead.known[task.piece]) {
        grad = at<const float>(flat.grad_sum, offset);
      } else {
        guess(ahead.pieces[task.piece], offset, count, guessed);
      }
      steps(ahead.pieces[task.piece], ahead.known[task.piece] != 0, offset, count, weight,
            at<std::uint16_t>(flat.weight, offset), grad);
      if (flat.weight == 0) {
        std::memcpy(at<float>(ahead.kept, offset), master, bytes);
        std::memcpy(master, weight, bytes);
      }
    }
  });
}

}  // namespace

void adamw_ahead(const FlatWeights& flat, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq, const Ahead& ahead,
                 const AdamWConfig& config, double divisor, Stream stream, int threads) {
  stream.require_supported();
  check_ahead(flat, ahead, divisor);
  check_step_sizes(config, ahead.pieces.size() * static_cast<std::size_t>(ahead.repeats));
  const KernelTable& table = kernels();
  std::vector<AdamWScalars> scalars;  // of each piece and each step
  for (std::size_t p = 0; p < ahead.pieces.size(); ++p)
    for (std::int64_t repeat = 0; repeat < ahead.repeats; ++repeat)
      scalars.push_back(
          adamw_scalars(config, {1.0, ahead.known[p] ? divisor : 1.0}, ahead.pieces[p].step + repeat, scalars.size()));
  const auto guess = [&](const Piece& piece, std::int64_t offset, std::int64_t count, float* grad) {
    // The moments hold gradients that were divided, and negated to maximise, already.
    const float unbias = static_cast<float>(1.0 / (1.0 - std::pow(config.beta1, static_cast<double>(piece.step - 1))));
    const float* mean = at<const float>(exp_avg, offset);
    for (std::int64_t i = 0; i < count; ++i) grad[i] = mean[i] * unbias;
  };
  const auto steps = [&](const Piece& piece, bool, std::int64_t offset, std::int64_t count, float* weight,
                         std::uint16_t* low, const float* grad) {
    alignas(64) float mean[kAheadBlock], square[kAheadBlock];
    const AdamWScalars* mine = scalars.data() + (&piece - ahead.pieces.data()) * ahead.repeats;
    const auto bytes = static_cast<std::size_t>(count) * sizeof(float);
    std::memcpy(mean, at<const float>(exp_avg, offset), bytes);
    std::memcpy(square, at<const float>(exp_avg_sq, offset), bytes);
    for (std::int64_t repeat = 0; repeat < ahead.repeats; ++repeat) {
      const bool last = repeat + 1 == ahead.repeats;
      const AdamWRange range{weight, last ? low : nullptr, flat.dtype, grad, mean, square};
      table.adamw(range, count, mine[repeat]);
    }
  };
  for_each_ahead(flat, ahead, threads, guess, steps);
}

void sgd_ahead(const FlatWeights& flat, std::uintptr_t momentum_buffer, const Ahead& ahead, const SGDConfig& config,
               double divisor, Stream stream, int threads) {
  stream.require_supported();
  check_ahead(flat, ahead, divisor);
  check_value(config.momentum != 0.0 && momentum_buffer != 0, "looking ahead with SGD needs momentum and its buffer");
  const KernelTable& table = kernels();
  const float share = static_cast<float>((1.0 - config.momentum) / (1.0 - config.dampening));
  const auto guess = [&](const Piece&, std::int64_t offset, std::int64_t count, float* grad) {
    const float* buffer = at<const float>(momentum_buffer, offset);
    for (std::int64_t i = 0; i < count; ++i) grad[i] = buffer[i] * share;
  };
  const auto steps = [&](const Piece& piece, bool known, std::int64_t offset, std::int64_t count, float* weight,
                         std::uint16_t* low, const float* grad) {
    alignas(64) float buffer[kAheadBlock];
    std::memcpy(buffer, at<const float>(momentum_buffer, offset), static_cast<std::size_t>(count) * sizeof(float));
    for (std::int64_t repeat = 0; repeat < ahead.repeats; ++repeat) {
      // The buffer of past gradients includes their weight decay.
      const SGDScalars scalars{1.0f,
                               static_cast<float>(known ? divisor : 1.0),
                               static_cast<float>(config.lr),
                               static_cast<float>(known ? config.weight_decay : 0.0),
                               static_cast<float>(config.momentum),
                               static_cast<float>(1.0 - config.dampening),
                               config.nesterov,
                               piece.step + repeat == 1};
      const MomentumRange range{weight, repeat + 1 == ahead.repeats ? low : nullptr, flat.dtype, grad, buffer};
      table.sgd(range, count, scalars);
    }
  };
  for_each_ahead(flat, ahead, threads, guess, steps);
}

void lion_ahead(const FlatWeights& flat, std::uintptr_t exp_avg, const Ahead& ahead, const LionConfig& config,
                double divisor, Stream stream, int threads) {
  stream.require_supported();
  check_ahead(flat, ahead, divisor);
  const KernelTable& table = kernels();
  const LionScalars known_scalars = lion_scalars(config, {1.0, divisor}),
                    guess_scalars = lion_scalars(config, {1.0, 1.0});
  const auto guess = [&](const Piece&, std::int64_t offset, std::int64_t count, float* grad) {
    std::memcpy(grad, at<const float>(exp_avg, offset), static_cast<std::size_t>(count) * sizeof(float));
  };
  const auto steps = [&](const Piece&, bool known, std::int64_t offset, std::int64_t count, float* weight,
                         std::uint16_t* low, const float* grad) {
    alignas(64) float momentum[kAheadBlock];
    std::memcpy(momentum, at<const float>(exp_avg, offset), static_cast<std::size_t>(count) * sizeof(float));
    for (std::int64_t repeat = 0; repeat < ahead.repeats; ++repeat) {
      const MomentumRange range{weight, repeat + 1 == ahead.repeats ? low : nullptr, flat.dtype, grad, momentum};
      table.lion(range, count, known ? known_scalars : guess_scalars);
    }
  };
  for_each_ahead(flat, ahead, threads, guess, steps);
}

void adamw_step(const FlatWeights& flat, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq,
                const std::vector<Piece>& pieces, const AdamWConfig& config, GradScale grads, Stream stream,
                int threads) {
  stream.require_supported();
  check_value(grads.divisor != 0.0, "gradients cannot be divided by 0");
  check_step_sizes(config, pieces.size());
  const KernelTable& table = kernels();
  const std::vector<Task> tasks = cut(pieces);
  std::vector<AdamWScalars> scalars;
  scalars.reserve(pieces.size());
  for (const Piece& piece : pieces) scalars.push_back(adamw_scalars(config, grads, piece.step, scalars.size()));
  for_each_task(tasks, threads, [&](const Task& task) {
    const AdamWRange range{at<float>(flat.master, task.offset),
                           at<std::uint16_t>(flat.weight, task.offset),
                           flat.dtype,
                           at<const float>(flat.grad_sum, task.offset),
                           at<float>(exp_avg, task.offset),
                           at<float>(exp_avg_sq, task.offset)};
    table.adamw(range, task.numel, scalars[task.piece]);
  });
}

void sgd_step(const FlatWeights& flat, std::uintptr_t momentum_buffer, const std::vector<Piece>& pieces,
              const SGDConfig& config, GradScale grads, Stream stream, int threads) {
  stream.require_supported();
  check_value(grads.divisor != 0.0, "gradients cannot be divided by 0");
  check_value(config.momentum == 0.0 || momentum_buffer != 0, "momentum ", config.momentum,
              " needs a momentum buffer, and none was given");
  const KernelTable& table = kernels();
  const std::vector<Task> tasks = cut(pieces);
  SGDScalars scalars{static_cast<float>(grads.clip),
                     static_cast<float>(grads.divisor),
                     static_cast<float>(config.lr),
                     static_cast<float>(config.weight_decay),
                     static_cast<float>(config.momentum),
                     static_cast<float>(1.0 - config.dampening),
                     config.nesterov,
                     false};
  for_each_task(tasks, threads, [&](const Task& task) {
    SGDScalars mine = scalars;
    mine.first = pieces[task.piece].step == 1;
    table.sgd(momentum_range(flat, momentum_buffer, task.offset), task.numel, mine);
  });
}

void lion_step(const FlatWeights& flat, std::uintptr_t exp_avg, const std::vector<Piece>& pieces,
               const LionConfig& config, GradScale grads, Stream stream, int threads) {
  stream.require_supported();
  check_value(grads.divisor != 0.0, "gradients cannot be divided by 0");
  const KernelTable& table = kernels();
  const LionScalars scalars = lion_scalars(config, grads);
  for_each_task(cut(pieces), threads,
                [&](const Task& task) { table.lion(momentum_range(flat, exp_avg, task.offset), task.numel, scalars); });
}

}  // namespace paci_rt
