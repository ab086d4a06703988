// Memory as Python passes it: a tensor, whose address and length the core reads itself, or None.
//
// A bare integer would let one wrong number end the process. So no call takes one for memory, and each says how much of
// it it will touch: what is shorter, elsewhere, strided or freed is refused with an exception.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "core/check.hpp"
#include "p2p/channel.hpp"

namespace paci_rt {

struct Memory {
  std::uintptr_t address = 0;
  std::int64_t bytes = 0;
  bool on_host = true;
  pybind11::object owner;  // none: there is no memory

  // Its address, for `count` elements of `size` bytes; `what` names it in the error.
  std::uintptr_t holding(std::int64_t count, std::int64_t size, const char* what) const;
  // The same for code of the CPU.
  std::uintptr_t host(std::int64_t count, std::int64_t size, const char* what) const;
};

// What is at `source`: false where it is no tensor. Throws where it is one without plain memory in a row.
bool read_memory(pybind11::handle source, Memory& memory);

// Keeps memory of the host alive and where it is, as long as the result: its storage cannot be resized any more. Needs
// no interpreter lock to go.
std::shared_ptr<void> pinned(const Memory& memory);
std::shared_ptr<void> kept_alive(pybind11::object object);

// Addresses of a message's tensors, each as long as its description says; 0 for absent ones.
std::vector<std::uintptr_t> addresses_for(const Layout& layout, const std::vector<Memory>& tensors);

}  // namespace paci_rt

template <>
struct pybind11::detail::type_caster<paci_rt::Memory> {
  PYBIND11_TYPE_CASTER(paci_rt::Memory, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (paci_rt::read_memory(source, value)) return true;
    throw type_error("an object of type " + std::string(Py_TYPE(source.ptr())->tp_name) +
                     " was passed for memory: pass a tensor, or None where there is none");
  }
};
