// Errors of the native core. Every message names the bad value and the remedy.
#pragma once

#include <atomic>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

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

// A message that came where another one was due; reaches Python as paci_rt.errors.ScheduleError.
class OrderError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A wait for another stage that did not end well; `action` is what waited, for example "1RECV_F7".
class TransferError : public std::runtime_error {
 public:
  TransferError(std::string action, const std::string& text) : std::runtime_error(text), action(std::move(action)) {}
  const std::string action;
};

// A wait that outlasted its deadline; reaches Python as paci_rt.errors.TransferTimeoutError.
class TransferTimeout : public TransferError {
 public:
  using TransferError::TransferError;
};

// The stage at the other end died, failed or closed; reaches Python as paci_rt.errors.PeerLostError. `origin` is what
// is known of the first stage to go, for passing on.
class PeerLost : public TransferError {
 public:
  PeerLost(std::string action, const std::string& text, std::string origin)
      : TransferError(std::move(action), text), origin(std::move(origin)) {}
  const std::string origin;
};

// Memory or another resource that the system refused; reaches Python as paci_rt.errors.TransportError.
class ResourceError : public std::runtime_error {
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

// Marks an object as in use for a scope, and refuses a second thread that would use it at the same time.
class Sole {
 public:
  Sole(std::atomic<int>& users, const char* who) : users_(users) {
    if (users_.fetch_add(1, std::memory_order_acquire) == 0) return;
    users_.fetch_sub(1, std::memory_order_relaxed);
    throw std::invalid_argument(concat("another thread is using ", who, " at this moment: let one thread drive it"));
  }
  ~Sole() { users_.fetch_sub(1, std::memory_order_release); }
  Sole(const Sole&) = delete;
  Sole& operator=(const Sole&) = delete;

 private:
  std::atomic<int>& users_;
};

}  // namespace paci_rt
