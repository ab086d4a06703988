#include "accumulator.hpp"

#include <cstring>

#include "check.hpp"

namespace paci_rt {
namespace {

// An overwrite of a buffer much larger than the last-level cache saves the read that an ordinary store begins with.
constexpr std::int64_t kStreamFromBytes = std::int64_t{64} << 20;

}  // namespace

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

Accumulator::Accumulator(std::vector<Segment> segments, std::int64_t numel, const std::vector<std::uintptr_t>& buffers,
                         int device)
    : segments_(std::move(segments)), numel_(numel), device_(device) {
  Stream{device, 0}.require_supported();
  check_value(buffers.size() == 1 || buffers.size() == 2, "an accumulator has 1 or 2 buffers, got ", buffers.size());
  std::int64_t end = 0;
  for (const Segment& segment : segments_) {
    check_value(segment.numel >= 0 && segment.offset >= end, "segment at offset ", segment.offset, " of ",
                segment.numel, " elements overlaps the one before it, which ends at ", end);
    end = segment.offset + segment.numel;
  }
  check_value(end <= numel_, "segments end at ", end, ", beyond the buffer of ", numel_, " elements");
  for (const std::uintptr_t address : buffers) {
    check_value(address % 64 == 0, "buffer address ", address, " is not aligned to 64 bytes");
    Buffer buffer;
    buffer.data = reinterpret_cast<float*>(address);
    buffer.touched.assign(segments_.size(), 0);
    buffer.sums.assign(segments_.size(), {});
    buffer.lent.assign(segments_.size(), 0);
    buffers_.push_back(std::move(buffer));
  }
}

Stream Accumulator::check(Stream stream) const {
  stream.device = device_;
  stream.require_supported();
  return stream;
}

void Accumulator::refuse(const char* verb, State from, State to) const {
  std::string all;
  for (const Buffer& buffer : buffers_) all += concat(all.empty() ? "" : ", ", name_of(buffer.state));
  throw StateError(concat("cannot ", verb, " the accumulator: ", name_of(from), " -> ", name_of(to),
                          " is no legal transition (a buffer goes empty -> filling -> sealed -> consuming -> empty; ",
                          "this accumulator's are: ", all, ")"));
}

Accumulator::Buffer& Accumulator::fill(const char* verb, std::int64_t index) {
  check_value(index >= 0 && index < segments(), "segment ", index, " does not exist: the group has ", segments());
  Buffer& front = buffers_[front_];
  if (front.state == State::empty) {
    front.state = State::filling;
  } else if (front.state != State::filling) {
    refuse(verb, front.state, State::filling);
  }
  return front;
}

bool Accumulator::lend(std::int64_t index, Stream stream, int threads) {
  check(stream);
  Buffer& front = fill("add to", index);
  const bool overwrite = !front.touched[index];
  front.touched[index] = front.lent[index] = 1;
  threads_ = threads;
  return overwrite;
}

void Accumulator::add(std::int64_t index, std::uintptr_t grad, DType dtype, std::int64_t numel, Stream stream,
                      int threads) {
  check(stream);
  check_value(index >= 0 && index < segments(), "segment ", index, " does not exist: the group has ", segments());
  const Segment& segment = segments_[index];
  check_value(numel == segment.numel, "a gradient of ", numel, " elements was given for segment ", index, " of ",
              segment.numel);
  Buffer& front = fill("add to", index);
  const bool overwrite = !front.touched[index];
  front.touched[index] = 1;
  front.lent[index] = 0;
  front.sums[index] = accumulate_segment(front.data + segment.offset, reinterpret_cast<const void*>(grad), dtype, numel,
                                         overwrite, overwrite && numel_ * 4 >= kStreamFromBytes, threads);
}

void Accumulator::seal(Stream stream) {
  check(stream);
  Buffer& front = buffers_[front_];
  if (front.state != State::filling) refuse("seal", front.state, State::sealed);
  const std::int64_t next = buffers_.size() == 2 ? 1 - front_ : front_;
  // The next window needs a place to go: with two buffers the other one must have been released by now.
  if (next != front_ && buffers_[next].state != State::empty) refuse("seal", buffers_[next].state, State::filling);
  for (std::size_t i = 0; i < segments_.size(); ++i) {
    if (front.lent[i]) front.sums[i] = measure_segment(front.data + segments_[i].offset, segments_[i].numel, threads_);
    if (!front.touched[i])
      std::memset(front.data + segments_[i].offset, 0, static_cast<std::size_t>(segments_[i].numel) * sizeof(float));
  }
  front.state = State::sealed;
  front_ = next;
}

Accumulator::Buffer& Accumulator::move(const char* verb, State from, State to) {
  for (Buffer& buffer : buffers_) {
    if (buffer.state == from) {
      buffer.state = to;
      return buffer;
    }
  }
  // The buffer that is furthest along is the one that the caller must have meant.
  State furthest = State::empty;
  for (const Buffer& buffer : buffers_)
    if (static_cast<int>(buffer.state) > static_cast<int>(furthest)) furthest = buffer.state;
  refuse(verb, furthest, to);
}

std::int64_t Accumulator::consume(Stream stream) {
  check(stream);
  return &move("consume", State::sealed, State::consuming) - buffers_.data();
}

void Accumulator::release(Stream stream) {
  check(stream);
  Buffer& buffer = move("release", State::consuming, State::empty);
  buffer.touched.assign(segments_.size(), 0);
  buffer.sums.assign(segments_.size(), {});
  buffer.lent.assign(segments_.size(), 0);
}

const Accumulator::Buffer& Accumulator::finished(const char* what) const {
  for (const Buffer& buffer : buffers_)
    if (buffer.state == State::sealed || buffer.state == State::consuming) return buffer;
  throw StateError(concat(what, " is known for a buffer that is sealed or consuming; this accumulator's front is ",
                          name_of(buffers_[front_].state)));
}

std::vector<std::string> Accumulator::states() const {
  std::vector<std::string> names;
  for (const Buffer& buffer : buffers_) names.emplace_back(name_of(buffer.state));
  return names;
}

double Accumulator::sum_of_squares() const {
  double total = 0.0;
  for (const SumAndCount& sums : finished("the sum of squares").sums) total += sums.sum_of_squares;
  return total;
}

std::int64_t Accumulator::nonfinite_count() const {
  std::int64_t total = 0;
  for (const SumAndCount& sums : finished("the non-finite count").sums) total += sums.nonfinite;
  return total;
}

std::vector<bool> Accumulator::front_touched() const {
  const Buffer& front = buffers_[front_];
  if (front.state != State::empty && front.state != State::filling)
    throw StateError(concat("the front buffer is ", name_of(front.state), ": it has no window in the making"));
  return {front.touched.begin(), front.touched.end()};
}

std::vector<bool> Accumulator::touched() const {
  const Buffer& buffer = finished("which segments got a gradient");
  return {buffer.touched.begin(), buffer.touched.end()};
}

}  // namespace paci_rt
