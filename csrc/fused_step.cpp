#include "fused_step.hpp"

#include <cmath>

#include "check.hpp"
#include "thread_pool.hpp"

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
    check_value(pieces[p].step >= 1, "step ", pieces[p].step, " of a parameter is no step number: they start at 1");
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

template <typename Body>
void for_each_task(const std::vector<Task>& tasks, int threads, const Body& body) {
  if (threads <= 1) {
    for (const Task& task : tasks) body(task);
    return;
  }
  parallel_for(static_cast<std::int64_t>(tasks.size()), threads,
               [&](std::int64_t i) { body(tasks[static_cast<std::size_t>(i)]); });
}

}  // namespace

void adamw_step(const FlatWeights& flat, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq,
                const std::vector<Piece>& pieces, const AdamWConfig& config, double divisor, Stream stream,
                int threads) {
  stream.require_supported();
  check_value(divisor != 0.0, "gradients cannot be divided by 0");
  const KernelTable& table = kernels();
  const std::vector<Task> tasks = cut(pieces);
  std::vector<AdamWScalars> scalars;
  scalars.reserve(pieces.size());
  for (const Piece& piece : pieces) {
    const double step = static_cast<double>(piece.step);
    AdamWScalars s;
    s.divisor = static_cast<float>(divisor);
    s.decay = static_cast<float>(1.0 - config.lr * config.weight_decay);
    s.beta1 = static_cast<float>(config.beta1);
    s.one_minus_b1 = static_cast<float>(1.0 - config.beta1);
    s.beta2 = static_cast<float>(config.beta2);
    s.one_minus_b2 = static_cast<float>(1.0 - config.beta2);
    s.inv_bias2sqrt = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(config.beta2, step)));
    s.eps = static_cast<float>(config.eps);
    s.step_size = static_cast<float>(config.lr / (1.0 - std::pow(config.beta1, step)));
    scalars.push_back(s);
  }
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
              const SGDConfig& config, double divisor, Stream stream, int threads) {
  stream.require_supported();
  check_value(divisor != 0.0, "gradients cannot be divided by 0");
  check_value(config.momentum == 0.0 || momentum_buffer != 0, "momentum ", config.momentum,
              " needs a momentum buffer, and none was given");
  const KernelTable& table = kernels();
  const std::vector<Task> tasks = cut(pieces);
  SGDScalars scalars{static_cast<float>(divisor),
                     static_cast<float>(config.lr),
                     static_cast<float>(config.weight_decay),
                     static_cast<float>(config.momentum),
                     static_cast<float>(1.0 - config.dampening),
                     config.nesterov,
                     false};
  for_each_task(tasks, threads, [&](const Task& task) {
    SGDScalars mine = scalars;
    mine.first = pieces[task.piece].step == 1;
    const SGDRange range{at<float>(flat.master, task.offset), at<std::uint16_t>(flat.weight, task.offset), flat.dtype,
                         at<const float>(flat.grad_sum, task.offset), at<float>(momentum_buffer, task.offset)};
    table.sgd(range, task.numel, mine);
  });
}

}  // namespace paci_rt
