// The double-buffered gradient accumulator of one flat parameter group.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu_kernels.hpp"
#include "stream.hpp"

namespace paci_rt {

// One parameter within a flat buffer, in elements.
struct Segment {
  std::int64_t offset;
  std::int64_t numel;
};

enum class State : int { empty, filling, sealed, consuming };
const char* name_of(State state);

// Flat fp32 buffers that the caller owns and keeps alive. The front buffer collects the current window; a sealed one is
// consumed by the update while, with two buffers, the other one fills. A segment's first gradient in a window
// overwrites what the buffer held, so nothing is ever cleared except segments that got no gradient at all.
//
// Each buffer walks empty -> filling -> sealed -> consuming -> empty; anything else throws StateError. Not thread-safe:
// one thread drives one accumulator.
class Accumulator {
 public:
  // `buffers` holds one or two addresses, each of `numel` floats, aligned to 64 bytes.
  Accumulator(std::vector<Segment> segments, std::int64_t numel, const std::vector<std::uintptr_t>& buffers,
              int device);

  // Adds `numel` elements at `grad` to segment `index` of the front buffer.
  void add(std::int64_t index, std::uintptr_t grad, DType dtype, std::int64_t numel, Stream stream, int threads);

  // For a caller that writes segment `index` of the front buffer itself, before anything else happens to the buffer.
  // Returns whether it must overwrite what the segment holds; otherwise it adds. Its squares are taken at the seal.
  bool lend(std::int64_t index, Stream stream, int threads);

  void seal(Stream stream);             // front: filling -> sealed; segments without a gradient become zero
  std::int64_t consume(Stream stream);  // sealed -> consuming; returns the buffer's number
  void release(Stream stream);          // consuming -> empty

  std::vector<std::string> states() const;
  std::int64_t front() const { return front_; }

  // Of the front buffer, as far as its window has come.
  std::vector<bool> front_touched() const;

  // Of the buffer that is sealed or being consumed; throw StateError when there is none.
  double sum_of_squares() const;
  std::int64_t nonfinite_count() const;
  std::vector<bool> touched() const;

  std::int64_t segments() const { return static_cast<std::int64_t>(segments_.size()); }

 private:
  struct Buffer {
    float* data = nullptr;
    State state = State::empty;
    std::vector<std::uint8_t> touched;
    std::vector<SumAndCount> sums;  // of the present content of each segment that is not in `lent`
    std::vector<std::uint8_t> lent;
  };

  Stream check(Stream stream) const;
  Buffer& fill(const char* verb, std::int64_t index);
  Buffer& move(const char* verb, State from, State to);
  const Buffer& finished(const char* what) const;
  [[noreturn]] void refuse(const char* verb, State from, State to) const;

  std::vector<Segment> segments_;
  std::int64_t numel_;
  std::vector<Buffer> buffers_;
  std::int64_t front_ = 0;
  int device_;
  int threads_ = 1;  // of the last call that said how many
};

}  // namespace paci_rt
