// Point-to-point channels between stages: one interface, two backends. `shm` is for processes of one host on the CPU,
// `nccl` for GPUs.
//
// A channel is one directed edge of the pipeline and one kind of message: activations down ("F"), gradients up ("B"),
// tied weights and their gradients ("TW0", "TG0"). Channels never wait for one another. A channel has `slots` credits:
// as many messages may be sent and not yet taken, and the next send waits. Messages carry a sequence number, which is
// checked, and the index that the schedule gave them (a micro-batch, or a window), which is checked as well.
//
// One thread drives an end of a channel; leases may be dropped by any thread. Whatever blocks looks at the deadline, at
// the peer and at `Options::poll` at least every kSliceMs, and ends with TransferTimeout or PeerLost (check.hpp).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/check.hpp"
#include "core/stream.hpp"

namespace paci_rt {

inline constexpr std::int64_t kNone = -1;     // of a sequence number: no message yet
inline constexpr std::int64_t kUnknown = -2;  // the other side's number, where this side cannot see it
inline constexpr int kSliceMs = 50;           // how long a wait sleeps before it looks around

// CLOCK_MONOTONIC, which all processes of a host share.
using Clock = std::chrono::steady_clock;
std::int64_t now_ns();
inline std::int64_t ns_of(double seconds) { return static_cast<std::int64_t>(seconds * 1e9); }
inline double seconds_since(std::int64_t start_ns) { return static_cast<double>(now_ns() - start_ns) * 1e-9; }

struct Edge {
  std::string kind;
  int sender = 0;  // stages
  int receiver = 0;

  std::string name() const;                           // "F 0->1"
  std::string send_action(std::int64_t index) const;  // "0SEND_F7"
  std::string recv_action(std::int64_t index) const;  // "1RECV_F7"
  const char* counted() const;                        // what an index counts: "micro-batch" or "window"
};

// Last completed sequence numbers of a channel.
struct Progress {
  std::int64_t sent = kNone;   // by the sender: left its memory
  std::int64_t taken = kNone;  // by the receiver: handed to the computation
};

// --- what a message consists of ---

// Shape and dtype of one tensor, as paci_rt/transport/wire.py packs them: little-endian int64 code, flags, rank, sizes.
struct TensorMeta {
  int dtype = 0;  // wire.py's code
  bool present = false;
  bool requires_grad = false;
  std::vector<std::int64_t> shape;

  std::int64_t numel() const;
  std::int64_t bytes() const;          // 0 where it is absent
  bool fits(std::int64_t most) const;  // whether it is of so many bytes at most
};

// DLPack's description of wire.py's dtype codes.
struct DTypeInfo {
  const char* name;
  std::uint8_t code;
  std::uint8_t bits;
};
inline constexpr int kDTypeCount = 21;
const DTypeInfo& dtype_info(int wire_code);  // throws std::invalid_argument

// All tensors of a message, and where they lie in a slot. Both ends keep the last one, so it travels when it changes.
struct Layout {
  static constexpr std::int64_t kAlign = 64;
  static constexpr std::int64_t kMostBytes = std::int64_t{1} << 46;       // times all slots, it is still a number
  static std::shared_ptr<const Layout> parse(const std::string& packed);  // throws std::invalid_argument

  std::string packed;
  std::vector<TensorMeta> tensors;
  std::vector<std::int64_t> offsets;  // of each tensor, in multiples of kAlign
  std::int64_t bytes = 0;             // of the slot that holds them
};

// A message that was taken. The tensors lie at `address + layout->offsets[i]`, until the last copy of `lease` is gone.
struct Arrival {
  std::int64_t sequence = kNone;
  std::int64_t index = kNone;
  std::int64_t slot = kNone;
  std::shared_ptr<const Layout> layout;
  std::uintptr_t address = 0;
  std::shared_ptr<void> lease;
};

// --- what happened lately ---

enum class Moment : std::uint8_t { open, post, send, arrive, take, copy, release, wait, timeout, fail, close };
const char* name_of(Moment moment);

struct EventRecord {
  std::int64_t time_ns;
  Moment moment;
  std::int64_t sequence;  // kNone where there is none, as in the rest
  std::int64_t index;
  std::int64_t slot;
  std::int64_t bytes;
};

// The last `size` events of one end of a channel. Any thread may add to it.
class EventRing {
 public:
  explicit EventRing(std::size_t size = 128) : records_(size) {}

  void note(Moment moment, std::int64_t sequence, std::int64_t index, std::int64_t slot, std::int64_t bytes);
  std::vector<EventRecord> last() const;  // oldest first
  std::string json() const;               // a list of objects

 private:
  mutable std::mutex mutex_;
  std::vector<EventRecord> records_;
  std::size_t count_ = 0;
};

// --- the ends of a channel ---

struct Options {
  std::int64_t slots = 4;      // credits
  double timeout_s = 300.0;    // of every single wait
  std::function<void()> poll;  // called now and then while something blocks; what it throws ends the wait

  static constexpr std::int64_t kMostSlots = 65536;
  static constexpr double kLongestS = 1e9;  // 30 years
  void check() const;                       // throws std::invalid_argument
};

class Endpoint {
 public:
  Endpoint(Edge edge, Options options);  // throws std::invalid_argument
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;
  virtual ~Endpoint() = default;

  const Edge& edge() const { return edge_; }
  std::int64_t slots() const { return options_.slots; }
  double timeout_s() const { return options_.timeout_s; }
  EventRing& events() { return *events_; }
  std::atomic<int>& users() { return users_; }  // for `Sole`
  virtual Progress progress() const = 0;

  // `{"edge", "side", "slots", "timeout_s", "sent", "taken", "events"}`
  std::string json() const;

  // No more calls but for leases that are still out, which stay valid. Idempotent.
  virtual void close() = 0;

 protected:
  virtual bool sends() const = 0;

  // The end of a wait. `doing` says what for, for example "slot 3 is still full".
  struct Waiting {
    std::string action;
    std::string doing;
    std::int64_t index = kNone;
    std::int64_t slot = kNone;
    std::int64_t bytes = kNone;
  };
  [[noreturn]] void time_out(const Waiting& waiting, double waited_s);
  // `origin` says why, in a sentence that can be passed on to stages further away.
  [[noreturn]] void lose(const Waiting& waiting, const std::string& origin);
  int peer() const { return sends() ? edge_.receiver : edge_.sender; }  // the stage at the other end
  Waiting waiting_for(std::int64_t index, std::int64_t slot, std::int64_t bytes, std::string doing) const;

  const Edge edge_;
  const Options options_;
  const std::shared_ptr<EventRing> events_;  // leases note their end, maybe after this object's
  std::atomic<int> users_{0};
};

class Outgoing : public Endpoint {
 public:
  using Endpoint::Endpoint;

  // Starts sending one tensor for each of the layout's, at `addresses` (0 for absent and empty ones), contiguous, with
  // all work on `stream` that writes them; waits only for a credit. Returns the sequence number. The tensors must stay
  // as they are until `completed()` has reached it.
  virtual std::int64_t send(std::int64_t index, std::shared_ptr<const Layout> layout,
                            const std::vector<std::uintptr_t>& addresses, Stream stream) = 0;
  virtual bool has_room() = 0;           // whether `send` would find a credit
  virtual std::int64_t completed() = 0;  // the last message whose tensors are free again, and all before it
  virtual void flush() = 0;              // waits until all are

  // The layout of the last message sent, which is the one to pass on where nothing has changed.
  const std::shared_ptr<const Layout>& layout() const { return layout_; }

 protected:
  bool sends() const override { return true; }
  std::shared_ptr<const Layout> layout_;
};

class Incoming : public Endpoint {
 public:
  using Endpoint::Endpoint;

  // Posts receives as far ahead as there are slots; `take` keeps it that way.
  virtual void post() = 0;
  virtual bool ready() = 0;  // whether `take` would find a message
  // The next message, which must be number `index`; on a device, work on `stream` that follows finds it there. Waits
  // on the host for no more than the message's being on its way. Throws ScheduleError's C++ side, OrderError, where
  // another one comes.
  virtual Arrival take(std::int64_t index, Stream stream) = 0;
  virtual std::int64_t held() const = 0;  // slots that are out on a lease

 protected:
  bool sends() const override { return false; }
};

}  // namespace paci_rt
