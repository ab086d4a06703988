// Who may write a gradient buffer, who may read it, and which stream waits for which.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "core/event.hpp"
#include "core/stream.hpp"

namespace paci_rt {

enum class State : int { empty, filling, sealed, consuming };
const char* name_of(State state);

// The walk of one or two buffers, empty -> filling -> sealed -> consuming -> empty; anything else throws StateError.
//
// A buffer is in the hands of one stream at a time: that of the last call about it. When a call names another stream,
// that one is made to wait for the work of the former. The events for this are recorded by `seal` and `release`, right
// behind the work that they stand for, so that nothing waits for what the stream was given afterwards. Only when two
// streams fill the same window by turns, the event is recorded at the change of hands, since the core
// does not see where work that others launch ends.
//
// A call that throws changes no state. On the CPU there are no events, and streams must be 0.
class Lifecycle {
 public:
  // `ops` is null for the CPU.
  Lifecycle(std::size_t buffers, int device, std::shared_ptr<StreamOps> ops);

  // The front buffer may be written by work that is issued to `stream` from now on. Returns its number.
  std::size_t fill(const char* verb, Stream stream) {
    // On the CPU this is asked for every gradient of every micro-batch.
    return !ops_ && buffers_[front_].state == State::filling ? front_ : begin_fill(verb, stream);
  }

  // In two steps: between them the caller issues its last work on the front buffer to `stream`.
  std::size_t begin_seal(Stream stream);
  void seal(Stream stream);

  std::size_t consume(Stream stream);      // the sealed buffer may be read on `stream`
  std::size_t continue_on(Stream stream);  // reading goes on there, behind what was issued so far
  std::size_t release(Stream stream);      // what was issued to `stream` so far was the last to read it

  // Lets later work on `stream`, which is no part of the walk, read what the sealed buffer's window has left.
  void follow_seal(std::size_t buffer, Stream stream) const;

  // The same stream on this device; throws if it cannot be one.
  Stream on(Stream stream) const {
    stream.device = device_;
    if (!ops_) stream.require_supported();
    return stream;
  }
  State state(std::size_t buffer) const { return buffers_[buffer].state; }
  std::size_t front() const { return front_; }
  std::size_t size() const { return buffers_.size(); }
  std::optional<std::size_t> finished() const;  // the buffer that is sealed or consuming
  bool on_cpu() const { return ops_ == nullptr; }
  const std::shared_ptr<StreamOps>& ops() const { return ops_; }

 private:
  struct Buffer {
    State state = State::empty;
    std::optional<Event> mark;     // none on the CPU
    std::optional<Stream> holder;  // none before first use
    bool marked = false;           // `mark` stands for all work on the buffer
  };

  std::size_t begin_fill(const char* verb, Stream stream);
  void hand_over(Buffer& buffer, Stream stream);
  void set_mark(Buffer& buffer);
  std::size_t find(const char* verb, State from, State to) const;
  [[noreturn]] void refuse(const char* verb, State from, State to) const;

  int device_;
  std::shared_ptr<StreamOps> ops_;
  std::vector<Buffer> buffers_;
  std::size_t front_ = 0;
};

}  // namespace paci_rt
