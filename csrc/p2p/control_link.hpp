// What both ends of a channel tell each other beside the data: a stream of small frames over a connected socket, for
// which the two processes may be on one host or on two.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace paci_rt {

enum class FrameType : std::uint32_t {
  hello = 1,  // both: protocol, slots, backend, whether buffers can be registered; payload: the edge's name
  issue,      // sender: transfer a is on its way, index b, sender completed c; payload: the layout, where it changed
  done,       // sender: has completed c, and nothing is under way
  vacant,     // receiver: slot a is free again after message b; receiver has taken c
  events,     // sender: handles of the events that it records (push lanes)
  need,       // sender: slot a must hold b bytes
  slot,       // receiver: slot a holds b bytes; payload: handles of its memory and of the event that frees it
  abort,      // both: this side gave up; payload: why
  bye,        // both: this side is done, and nothing of its own is under way
};

struct Frame {
  FrameType type = FrameType::hello;
  std::int64_t a = 0, b = 0, c = 0, d = 0;
  std::string payload;
};

// One end. Nothing here blocks. One thread reads and writes.
class ControlLink {
 public:
  explicit ControlLink(int fd);  // takes the socket over
  ~ControlLink();
  ControlLink(const ControlLink&) = delete;
  ControlLink& operator=(const ControlLink&) = delete;

  int fd() const { return fd_; }
  void queue(const Frame& frame);  // leaves with `write`
  void write();                    // as much as the socket takes
  bool unsent() const { return !out_.empty(); }
  // The next frame that has arrived; std::nullopt: none yet, or none any more, which `broken` tells apart.
  std::optional<Frame> read();
  const std::string& broken() const { return broken_; }  // why the connection is gone; empty while it stands

 private:
  void fill();

  const int fd_;
  std::string in_, out_, broken_;
  bool mute_ = false;  // the other side takes nothing any more
};

}  // namespace paci_rt
