// How Python describes a message.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "p2p/channel.hpp"

namespace paci_rt {

// `packed` is the description of wire.py, or None where it is that of the last message.
inline std::shared_ptr<const Layout> layout_for(const pybind11::object& packed, std::shared_ptr<const Layout> last,
                                                const Edge& edge) {
  auto layout = packed.is_none() ? std::move(last) : Layout::parse(packed.cast<std::string>());
  check_value(layout != nullptr, "channel ", edge.name(), ": the first message needs its description");
  return layout;
}

}  // namespace paci_rt
