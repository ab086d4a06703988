#include "buffers/lifecycle.hpp"

#include <utility>

#include "core/check.hpp"

namespace paci_rt {

const char* name_of(State state) {
  switch (state) {
    case State::empty:
      return "empty";
    case State::filling:
      return "filling";
    case State::sealed:
      return "sealed";
    default:
      return "consuming";
  }
}

Lifecycle::Lifecycle(std::size_t buffers, int device, std::shared_ptr<StreamOps> ops)
    : device_(device), ops_(std::move(ops)) {
  check_value(buffers == 1 || buffers == 2, "an accumulator has 1 or 2 buffers, got ", buffers);
  if (ops_) ops_->check_device(device);
  for (std::size_t i = 0; i < buffers; ++i) {
    Buffer buffer;
    if (ops_) buffer.mark.emplace(ops_, device);
    buffers_.push_back(std::move(buffer));
  }
}

void Lifecycle::refuse(const char* verb, State from, State to) const {
  std::string all;
  for (const Buffer& buffer : buffers_) all += concat(all.empty() ? "" : ", ", name_of(buffer.state));
  throw StateError(
      concat("cannot ", verb, " the accumulator: ", name_of(from), " -> ", name_of(to),
             " is not a legal transition (a buffer goes empty -> filling -> sealed -> consuming -> empty; ",
             "this accumulator's are: ", all, ")"));
}

void Lifecycle::set_mark(Buffer& buffer) {
  if (!ops_ || buffer.marked) return;
  buffer.mark->record(*buffer.holder);
  buffer.marked = true;
}

void Lifecycle::hand_over(Buffer& buffer, Stream stream) {
  if (!ops_) return;
  if (buffer.holder && !same_queue(*buffer.holder, stream)) {
    set_mark(buffer);
    buffer.mark->block(stream);
  }
  buffer.holder = stream;
  buffer.marked = false;  // the caller is about to issue more
}

std::size_t Lifecycle::begin_fill(const char* verb, Stream stream) {
  Buffer& front = buffers_[front_];
  if (front.state != State::empty && front.state != State::filling) refuse(verb, front.state, State::filling);
  hand_over(front, stream);
  front.state = State::filling;
  return front_;
}

std::size_t Lifecycle::begin_seal(Stream stream) {
  Buffer& front = buffers_[front_];
  if (front.state != State::filling) refuse("seal", front.state, State::sealed);
  // The next window needs a place to go: with two buffers the other one must have been released by now.
  if (buffers_.size() == 2 && buffers_[1 - front_].state != State::empty)
    refuse("seal", buffers_[1 - front_].state, State::filling);
  hand_over(front, stream);
  return front_;
}

void Lifecycle::seal(Stream stream) {
  Buffer& front = buffers_[front_];
  hand_over(front, stream);
  set_mark(front);
  front.state = State::sealed;
  if (buffers_.size() == 2) front_ = 1 - front_;
}

std::size_t Lifecycle::find(const char* verb, State from, State to) const {
  for (std::size_t i = 0; i < buffers_.size(); ++i)
    if (buffers_[i].state == from) return i;
  // The buffer that is furthest along is the one that the caller must have meant.
  State furthest = State::empty;
  for (const Buffer& buffer : buffers_)
    if (static_cast<int>(buffer.state) > static_cast<int>(furthest)) furthest = buffer.state;
  refuse(verb, furthest, to);
}

std::size_t Lifecycle::consume(Stream stream) {
  const std::size_t found = find("consume", State::sealed, State::consuming);
  hand_over(buffers_[found], stream);
  buffers_[found].state = State::consuming;
  return found;
}

std::size_t Lifecycle::continue_on(Stream stream) {
  const std::size_t found = find("go on with", State::consuming, State::consuming);
  hand_over(buffers_[found], stream);
  return found;
}

std::size_t Lifecycle::release(Stream stream) {
  const std::size_t found = find("release", State::consuming, State::empty);
  hand_over(buffers_[found], stream);
  set_mark(buffers_[found]);
  buffers_[found].state = State::empty;
  return found;
}

void Lifecycle::follow_seal(std::size_t buffer, Stream stream) const {
  // The latest record is that of the seal, or of a later change of hands, which is behind it.
  if (ops_) buffers_[buffer].mark->block(stream);
}

std::optional<std::size_t> Lifecycle::finished() const {
  for (std::size_t i = 0; i < buffers_.size(); ++i)
    if (buffers_[i].state == State::sealed || buffers_[i].state == State::consuming) return i;
  return std::nullopt;
}

}  // namespace paci_rt
