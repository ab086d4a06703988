#include "cpu/optimizer_step.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "bindings/memory.hpp"
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

// The elements that pieces reach to in the flat buffers.
std::int64_t end_of(const std::vector<PieceTuple>& tuples) {
  constexpr std::int64_t most = std::int64_t{1} << 52;
  std::int64_t end = 0;
  for (const auto& [offset, numel, step] : tuples) {
    check_value(offset >= 0 && numel >= 0 && offset <= most && numel <= most, "a piece at offset ", offset, " of ",
                numel, " elements is not possible: both are 0 to ", most);
    check_value(step >= 1 && step <= most, "step ", step,
                " of a parameter is not a step number: they start at 1 and end at ", most);
    end = std::max(end, offset + numel);
  }
  return end;
}

// Buffers of fp32 elements that a step over `pieces` reads and writes, each as long as the pieces reach.
struct Buffers {
  const std::int64_t end;

  explicit Buffers(const std::vector<PieceTuple>& pieces) : end(end_of(pieces)) {}
  std::uintptr_t need(const Memory& memory, const char* what) const { return memory.host(end, 4, what); }
  std::uintptr_t need_if_there(const Memory& memory, const char* what) const {
    return memory.owner ? need(memory, what) : 0;
  }
  FlatWeights flat(const Memory& master, const Memory& weight, int dtype, const Memory& grad_sum) const {
    const DType type = dtype_of(dtype);
    check_value(!weight.owner || type != DType::f32,
                "weight was passed for fp32 parameters, which master is: pass None");
    return {need(master, "master"), weight.owner ? weight.host(end, 2, "weight") : 0, type, need(grad_sum, "grad_sum")};
  }
};

std::int64_t elements_of(const std::vector<PieceTuple>& tuples) {
  std::int64_t total = 0;
  for (const auto& tuple : tuples) total += std::get<1>(tuple);
  return total;
}

void bind_steps(py::module_& m) {
  m.def(
      "adamw_step",
      [](const Memory& master, const Memory& weight, int dtype, const Memory& grad_sum, const Memory& exp_avg,
         const Memory& exp_avg_sq, const std::vector<PieceTuple>& pieces, double lr, double beta1, double beta2,
         double eps, double weight_decay, const SizePairs& step_sizes, double clip, double divisor, int device,
         StreamArg stream, int threads) {
        const Buffers buffers(pieces);
        const FlatWeights flat = buffers.flat(master, weight, dtype, grad_sum);
        const std::uintptr_t mean = buffers.need(exp_avg, "exp_avg"), square = buffers.need(exp_avg_sq, "exp_avg_sq");
        const MaybeReleaseGil release(elements_of(pieces));
        adamw_step(flat, mean, square, pieces_of(pieces), {lr, beta1, beta2, eps, weight_decay, sizes_of(step_sizes)},
                   {clip, divisor}, stream.on(device), threads);
      },
      py::kw_only(), py::arg("master"), py::arg("weight"), py::arg("dtype"), py::arg("grad_sum"), py::arg("exp_avg"),
      py::arg("exp_avg_sq"), py::arg("pieces"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
      py::arg("weight_decay"), py::arg("step_sizes"), py::arg("clip") = 1.0, py::arg("divisor"), py::arg("device"),
      py::arg("stream"), py::arg("threads"));
  m.def(
      "sgd_step",
      [](const Memory& master, const Memory& weight, int dtype, const Memory& grad_sum, const Memory& momentum_buffer,
         const std::vector<PieceTuple>& pieces, double lr, double momentum, double dampening, double weight_decay,
         bool nesterov, double clip, double divisor, int device, StreamArg stream, int threads) {
        const Buffers buffers(pieces);
        const FlatWeights flat = buffers.flat(master, weight, dtype, grad_sum);
        const std::uintptr_t velocity = buffers.need_if_there(momentum_buffer, "momentum_buffer");
        const MaybeReleaseGil release(elements_of(pieces));
        sgd_step(flat, velocity, pieces_of(pieces), {lr, momentum, dampening, weight_decay, nesterov}, {clip, divisor},
                 stream.on(device), threads);
      },
      py::kw_only(), py::arg("master"), py::arg("weight"), py::arg("dtype"), py::arg("grad_sum"),
      py::arg("momentum_buffer"), py::arg("pieces"), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
      py::arg("weight_decay"), py::arg("nesterov"), py::arg("clip") = 1.0, py::arg("divisor"), py::arg("device"),
      py::arg("stream"), py::arg("threads"));
  m.def(
      "lion_step",
      [](const Memory& master, const Memory& weight, int dtype, const Memory& grad_sum, const Memory& exp_avg,
         const std::vector<PieceTuple>& pieces, double lr, double beta1, double beta2, double weight_decay, double clip,
         double divisor, int device, StreamArg stream, int threads) {
        const Buffers buffers(pieces);
        const FlatWeights flat = buffers.flat(master, weight, dtype, grad_sum);
        const std::uintptr_t mean = buffers.need(exp_avg, "exp_avg");
        const MaybeReleaseGil release(elements_of(pieces));
        lion_step(flat, mean, pieces_of(pieces), {lr, beta1, beta2, weight_decay}, {clip, divisor}, stream.on(device),
                  threads);
      },
      py::kw_only(), py::arg("master"), py::arg("weight"), py::arg("dtype"), py::arg("grad_sum"), py::arg("exp_avg"),
      py::arg("pieces"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("weight_decay"),
      py::arg("clip") = 1.0, py::arg("divisor"), py::arg("device"), py::arg("stream"), py::arg("threads"));
}

Ahead ahead_of(const std::vector<PieceTuple>& pieces, const std::vector<bool>& known, std::int64_t repeats,
               std::uintptr_t kept) {
  return {pieces_of(pieces), {known.begin(), known.end()}, repeats, kept};
}

void bind_ahead(py::module_& m) {
  m.def(
      "adamw_ahead",
      [](const Memory& master, const Memory& weight, int dtype, const Memory& grad_sum, const Memory& exp_avg,
         const Memory& exp_avg_sq, const std::vector<PieceTuple>& pieces, const std::vector<bool>& known,
         std::int64_t repeats, const Memory& kept, double lr, double beta1, double beta2, double eps,
         double weight_decay, const SizePairs& step_sizes, double divisor, int device, StreamArg stream, int threads) {
        const Buffers buffers(pieces);
        const FlatWeights flat = buffers.flat(master, weight, dtype, grad_sum);
        const std::uintptr_t mean = buffers.need(exp_avg, "exp_avg"), square = buffers.need(exp_avg_sq, "exp_avg_sq");
        const Ahead ahead = ahead_of(pieces, known, repeats, buffers.need_if_there(kept, "kept"));
        const py::gil_scoped_release release;
        adamw_ahead(flat, mean, square, ahead, {lr, beta1, beta2, eps, weight_decay, sizes_of(step_sizes)}, divisor,
                    stream.on(device), threads);
      },
      py::kw_only(), py::arg("master"), py::arg("weight"), py::arg("dtype"), py::arg("grad_sum"), py::arg("exp_avg"),
      py::arg("exp_avg_sq"), py::arg("pieces"), py::arg("known"), py::arg("repeats"), py::arg("kept"), py::arg("lr"),
      py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("step_sizes"),
      py::arg("divisor"), py::arg("device"), py::arg("stream"), py::arg("threads"));
  m.def(
      "sgd_ahead",
      [](const Memory& master, const Memory& weight, int dtype, const Memory& grad_sum, const Memory& momentum_buffer,
         const std::vector<PieceTuple>& pieces, const std::vector<bool>& known, std::int64_t repeats,
         const Memory& kept, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
         double divisor, int device, StreamArg stream, int threads) {
        const Buffers buffers(pieces);
        const FlatWeights flat = buffers.flat(master, weight, dtype, grad_sum);
        const std::uintptr_t velocity = buffers.need_if_there(momentum_buffer, "momentum_buffer");
        const Ahead ahead = ahead_of(pieces, known, repeats, buffers.need_if_there(kept, "kept"));
        const py::gil_scoped_release release;
        sgd_ahead(flat, velocity, ahead, {lr, momentum, dampening, weight_decay, nesterov}, divisor, stream.on(device),
                  threads);
      },
      py::kw_only(), py::arg("master"), py::arg("weight"), py::arg("dtype"), py::arg("grad_sum"),
      py::arg("momentum_buffer"), py::arg("pieces"), py::arg("known"), py::arg("repeats"), py::arg("kept"),
      py::arg("lr"), py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"),
      py::arg("divisor"), py::arg("device"), py::arg("stream"), py::arg("threads"));
  m.def(
      "lion_ahead",
      [](const Memory& master, const Memory& weight, int dtype, const Memory& grad_sum, const Memory& exp_avg,
         const std::vector<PieceTuple>& pieces, const std::vector<bool>& known, std::int64_t repeats,
         const Memory& kept, double lr, double beta1, double beta2, double weight_decay, double divisor, int device,
         StreamArg stream, int threads) {
        const Buffers buffers(pieces);
        const FlatWeights flat = buffers.flat(master, weight, dtype, grad_sum);
        const std::uintptr_t mean = buffers.need(exp_avg, "exp_avg");
        const Ahead ahead = ahead_of(pieces, known, repeats, buffers.need_if_there(kept, "kept"));
        const py::gil_scoped_release release;
        lion_ahead(flat, mean, ahead, {lr, beta1, beta2, weight_decay}, divisor, stream.on(device), threads);
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
