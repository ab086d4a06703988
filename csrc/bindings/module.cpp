// The only Python module of the native core. Tensors arrive as addresses, element counts and dtype codes; streams as
// integers. paci_rt/native.py is the only file that imports it.
#include "bindings/module.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include "core/check.hpp"
#include "cpu/kernels.hpp"
#include "p2p/nccl_api.hpp"

namespace py = pybind11;

namespace paci_rt {
namespace {

// Large pages spare the flat buffers most of their address translations. Advice only: what the system makes of it
// never changes a result, so a refusal is no error.
bool advise_huge_pages(std::uintptr_t address, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 4096, large_page = std::uintptr_t{2} << 20;
  if (bytes < large_page || bytes > ~std::uintptr_t{0} - page - address) return false;
  const std::uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)address, (void)bytes;
  return false;
#endif
}

// A slot of its own is what makes Python refuse `Class.__new__(Class)`, as it does for classes of C that inherit one.
PyObject* new_object(PyTypeObject* type, PyObject* args, PyObject* options) {
  return reinterpret_cast<PyTypeObject*>(py::detail::get_internals().instance_base)->tp_new(type, args, options);
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

void close_classes(const py::module_& m) {
  for (const auto& [name, value] : py::dict(m.attr("__dict__")))
    if (PyType_Check(value.ptr()) != 0) no_bare_new(value);
}

}  // namespace

void no_bare_new(py::handle type) { reinterpret_cast<PyTypeObject*>(type.ptr())->tp_new = &new_object; }

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
  bind_accumulator(m);
  bind_shm_channel(m);
  bind_device_engine(m);
  bind_sm_partition(m);
  bind_optimizer_step(m);
#if defined(PACI_RT_TESTING)
  bind_testing(m);
#endif
  m.def("available_isas", &available_isas);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("select_isa", &select_isa, py::arg("name"));
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
  close_classes(m);
#if defined(PACI_RT_TESTING)
  close_classes(m.attr("_testing").cast<py::module_>());
#endif
}
