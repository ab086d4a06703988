#include "cpu/optimizer_step.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "bindings/module.hpp"

namespace py = pybind11;

namespace paci_rt {
namespace {

using PieceTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

std::vector<Piece> pieces_of(const std::vector<PieceTuple>& tuples) {
  std::vector<Piece> pieces;
  pieces.reserve(tuples.size());
  for (const auto& [offset, numel, step] : tuples) pieces.push_back({offset, numel, step});
  return pieces;
}

using SizePairs = std::vector<std::pair<double, double>>;

std::vector<StepSizes> sizes_of(const SizePairs& pairs) {
  std::vector<StepSizes> sizes;
  sizes.reserve(pairs.size());
  for (const auto& [mean, fresh] : pairs) sizes.push_back({mean, fresh});
  return sizes;
}

std::int64_t elements_of(const std::vector<PieceTuple>& tuples) {
  std::int64_t total = 0;
  for (const auto& tuple : tuples) total += std::get<1>(tuple);
  return total;
}

void bind_steps(py::module_& m) {
  m.def(
      "adamw_step",
      [](std::uintptr_t master, std::uintptr_t weight, int dtype, std::uintptr_t grad_sum, std::uintptr_t exp_avg,
         std::uintptr_t exp_avg_sq, const std::vector<PieceTuple>& pieces, double lr, double beta1, double beta2,
         double eps, double weight_decay, const SizePairs& step_sizes, double divisor, int device,
         std::uintptr_t stream, int threads) {
        const FlatWeights flat{master, weight, dtype_of(dtype), grad_sum};
        const MaybeReleaseGil release(elements_of(pieces));
        adamw_step(flat, exp_avg, exp_avg_sq, pieces_of(pieces),
                   {lr, beta1, beta2, eps, weight_decay, sizes_of(step_sizes)}, divisor, Stream{device, stream},
                   threads);
      },
      py::kw_only(), py::arg("master"), py::arg("weight"), py::arg("dtype"), py::arg("grad_sum"), py::arg("exp_avg"),
      py::arg("exp_avg_sq"), py::arg("pieces"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
      py::arg("weight_decay"), py::arg("step_sizes"), py::arg("divisor"), py::arg("device"), py::arg("stream"),
      py::arg("threads"));
  m.def(
      "sgd_step",
      [](std::uintptr_t master, std::uintptr_t weight, int dtype, std::uintptr_t grad_sum,
         std::uintptr_t momentum_buffer, const std::vector<PieceTuple>& pieces, double lr, double momentum,
         double dampening, double weight_decay, bool nesterov, double divisor, int device, std::uintptr_t stream,
         int threads) {
        const FlatWeights flat{master, weight, dtype_of(dtype), grad_sum};
        const MaybeReleaseGil release(elements_of(pieces));
        sgd_step(flat, momentum_buffer, pieces_of(pieces), {lr, momentum, dampening, weight_decay, nesterov}, divisor,
                 Stream{device, stream}, threads);
      },
      py::kw_only(), py::arg("master"), py::arg("weight"), py::arg("dtype"), py::arg("grad_sum"),
      py::arg("momentum_buffer"), py::arg("pieces"), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
      py::arg("weight_decay"), py::arg("nesterov"), py::arg("divisor"), py::arg("device"), py::arg("stream"),
      py::arg("threads"));
  m.def(
      "lion_step",
      [](std::uintptr_t master, std::uintptr_t weight, int dtype, std::uintptr_t grad_sum, std::uintptr_t exp_avg,
         const std::vector<PieceTuple>& pieces, double lr, double beta1, double beta2, double weight_decay,
         double divisor, int device, std::uintptr_t stream, int threads) {
        const FlatWeights flat{master, weight, dtype_of(dtype), grad_sum};
        const MaybeReleaseGil release(elements_of(pieces));
        lion_step(flat, exp_avg, pieces_of(pieces), {lr, beta1, beta2, weight_decay}, divisor, Stream{device, stream},
                  threads);
      },
      py::kw_only(), py::arg("master"), py::arg("weight"), py::arg("dtype"), py::arg("grad_sum"), py::arg("exp_avg"),
      py::arg("pieces"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("weight_decay"), py::arg("divisor"),
      py::arg("device"), py::arg("stream"), py::arg("threads"));
}

Ahead ahead_of(const std::vector<PieceTuple>& pieces, const std::vector<bool>& known, std::int64_t repeats,
               std::uintptr_t kept) {
  return {pieces_of(pieces), {known.begin(), known.end()}, repeats, kept};
}

void bind_ahead(py::module_& m) {
  m.def(
      "adamw_ahead",
      [](std::uintptr_t master, std::uintptr_t weight, int dtype, std::uintptr_t grad_sum, std::uintptr_t exp_avg,
         std::uintptr_t exp_avg_sq, const std::vector<PieceTuple>& pieces, const std::vector<bool>& known,
         std::int64_t repeats, std::uintptr_t kept, double lr, double beta1, double beta2, double eps,
         double weight_decay, const SizePairs& step_sizes, double divisor, int device, std::uintptr_t stream,
         int threads) {
        const FlatWeights flat{master, weight, dtype_of(dtype), grad_sum};
        const Ahead ahead = ahead_of(pieces, known, repeats, kept);
        const py::gil_scoped_release release;
        adamw_ahead(flat, exp_avg, exp_avg_sq, ahead, {lr, beta1, beta2, eps, weight_decay, sizes_of(step_sizes)},
                    divisor, Stream{device, stream}, threads);
      },
      py::kw_only(), py::arg("master"), py::arg("weight"), py::arg("dtype"), py::arg("grad_sum"), py::arg("exp_avg"),
      py::arg("exp_avg_sq"), py::arg("pieces"), py::arg("known"), py::arg("repeats"), py::arg("kept"), py::arg("lr"),
      py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("step_sizes"),
      py::arg("divisor"), py::arg("device"), py::arg("stream"), py::arg("threads"));
  m.def(
      "sgd_ahead",
      [](std::uintptr_t master, std::uintptr_t weight, int dtype, std::uintptr_t grad_sum,
         std::uintptr_t momentum_buffer, const std::vector<PieceTuple>& pieces, const std::vector<bool>& known,
         std::int64_t repeats, std::uintptr_t kept, double lr, double momentum, double dampening, double weight_decay,
         bool nesterov, double divisor, int device, std::uintptr_t stream, int threads) {
        const FlatWeights flat{master, weight, dtype_of(dtype), grad_sum};
        const Ahead ahead = ahead_of(pieces, known, repeats, kept);
        const py::gil_scoped_release release;
        sgd_ahead(flat, momentum_buffer, ahead, {lr, momentum, dampening, weight_decay, nesterov}, divisor,
                  Stream{device, stream}, threads);
      },
      py::kw_only(), py::arg("master"), py::arg("weight"), py::arg("dtype"), py::arg("grad_sum"),
      py::arg("momentum_buffer"), py::arg("pieces"), py::arg("known"), py::arg("repeats"), py::arg("kept"),
      py::arg("lr"), py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"),
      py::arg("divisor"), py::arg("device"), py::arg("stream"), py::arg("threads"));
  m.def(
      "lion_ahead",
      [](std::uintptr_t master, std::uintptr_t weight, int dtype, std::uintptr_t grad_sum, std::uintptr_t exp_avg,
         const std::vector<PieceTuple>& pieces, const std::vector<bool>& known, std::int64_t repeats,
         std::uintptr_t kept, double lr, double beta1, double beta2, double weight_decay, double divisor, int device,
         std::uintptr_t stream, int threads) {
        const FlatWeights flat{master, weight, dtype_of(dtype), grad_sum};
        const Ahead ahead = ahead_of(pieces, known, repeats, kept);
        const py::gil_scoped_release release;
        lion_ahead(flat, exp_avg, ahead, {lr, beta1, beta2, weight_decay}, divisor, Stream{device, stream}, threads);
      },
      py::kw_only(), py::arg("master"), py::arg("weight"), py::arg("dtype"), py::arg("grad_sum"), py::arg("exp_avg"),
      py::arg("pieces"), py::arg("known"), py::arg("repeats"), py::arg("kept"), py::arg("lr"), py::arg("beta1"),
      py::arg("beta2"), py::arg("weight_decay"), py::arg("divisor"), py::arg("device"), py::arg("stream"),
      py::arg("threads"));
}

}  // namespace

void bind_optimizer_step(py::module_& m) {
  bind_steps(m);
  bind_ahead(m);
}

}  // namespace paci_rt
