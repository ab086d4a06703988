// The only Python module of the native core. Tensors arrive as addresses, element counts and dtype codes; streams as
// integers. paci_rt/native.py is the only file that imports it.
#include "bindings.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <tuple>

#include "check.hpp"
#include "cpu_kernels.hpp"
#include "fused_step.hpp"
#include "nccl_api.hpp"

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

// Large pages spare the flat buffers most of their address translations. Advice only: what the system makes of it
// never changes a result, so a refusal is no error.
bool advise_huge_pages(std::uintptr_t address, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 4096, large_page = std::uintptr_t{2} << 20;
  if (bytes < large_page) return false;
  const std::uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)address, (void)bytes;
  return false;
#endif
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

void set_error(const char* name, const std::exception& error) {
  py::set_error(py::module_::import("paci_rt.errors").attr(name), error.what());
}

// Errors that know their action take it as their first argument.
template <typename... More>
void set_action_error(const char* name, const TransferError& error, const More&... more) {
  const py::object type = py::module_::import("paci_rt.errors").attr(name);
  PyErr_SetObject(type.ptr(), type(error.action, error.what(), more...).ptr());
}

}  // namespace
}  // namespace paci_rt

PYBIND11_MODULE(_C, m) {
  using namespace paci_rt;
  m.doc() = "Native core of paci_rt. Use paci_rt.native; nothing else imports this module.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const StateError& error) {
      set_error("AccumulatorStateError", error);
    } catch (const CudaError& error) {
      set_error("CudaError", error);
    } catch (const NcclError& error) {
      set_error("NcclError", error);
    } catch (const OrderError& error) {
      set_error("ScheduleError", error);
    } catch (const ResourceError& error) {
      set_error("TransportError", error);
    } catch (const TransferTimeout& error) {
      set_action_error("TransferTimeoutError", error);
    } catch (const PeerLost& error) {
      set_action_error("PeerLostError", error, error.origin);
    }
  });
  bind_streams(m);
  bind_host_twin(m);
  bind_accumulator(m);
  bind_p2p(m);
  bind_device(m);
  bind_green(m);
  bind_steps(m);
  bind_ahead(m);
  m.def("available_isas", &available_isas);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("select_isa", &select_isa, py::arg("name"));
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
}
