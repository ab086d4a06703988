// Errors of the native core. Every message names the bad value and the remedy.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace paci_rt {

// An illegal transition of an accumulator; reaches Python as paci_rt.errors.AccumulatorStateError.
class StateError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A failed call of CUDA, with its file, line and CUDA's own text; reaches Python as paci_rt.errors.CudaError.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// A mistake of the caller; reaches Python as ValueError.
template <typename... Parts>
void check_value(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument(concat(parts...));
}

}  // namespace paci_rt
