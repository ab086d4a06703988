// The double-buffered gradient accumulator of one flat parameter group.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "buffers/lifecycle.hpp"
#include "core/stream.hpp"
#include "cpu/kernels.hpp"

namespace paci_rt {

// One parameter within a flat buffer, in elements.
struct Segment {
  std::int64_t offset;
  std::int64_t numel;
};

// Sum of squares and number of non-finite elements of a window's sums, as a device holds them.
struct DeviceTotals {
  double sum_of_squares;
  double nonfinite;
};

// Flat fp32 buffers that the caller owns and keeps alive. The front buffer collects the current window; a sealed one is
// consumed by the update while, with two buffers, the other one fills. A segment's first gradient in a window
// overwrites what the buffer held, so nothing is ever cleared except segments that got no gradient at all.
//
// Each buffer walks empty -> filling -> sealed -> consuming -> empty; anything else throws StateError. `Lifecycle` has
// the walk and the order of streams, on every device; the arithmetic is done here on the CPU only. On a device the
// kernels are launched by the caller, on the stream that it names here, between `lend` and `seal`.
//
// Not thread-safe: one thread drives one accumulator.
class Accumulator {
 public:
  // `buffers` holds one or two addresses, each of `numel` floats, aligned to 64 bytes. `ops` is null for the CPU.
  Accumulator(std::vector<Segment> segments, std::int64_t numel, const std::vector<std::uintptr_t>& buffers, int device,
              std::shared_ptr<StreamOps> ops);

  // CPU only. Adds `numel` elements at `grad` to segment `index` of the front buffer.
  void add(std::int64_t index, std::uintptr_t grad, DType dtype, std::int64_t numel, Stream stream, int threads);

  // For a caller that writes segment `index` of the front buffer itself, before anything else happens to the buffer, on
  // a device by work that it issues to `stream`. Returns whether it must overwrite what the segment holds; otherwise it
  // adds. On the CPU its squares are taken at the seal.
  bool lend(std::int64_t index, Stream stream, int threads);

  // The same for many segments that one launch writes.
  std::vector<bool> lend_many(const std::vector<std::int64_t>& indices, Stream stream);

  // front: filling -> sealed; segments without a gradient become zero. On a device `totals` is the address of a
  // DeviceTotals that work on `stream` writes, or 0 where they are not needed; `keep` keeps them alive.
  void seal(Stream stream, std::uintptr_t totals, std::shared_ptr<void> keep = nullptr);
  std::int64_t consume(Stream stream);      // sealed -> consuming; returns the buffer's number
  std::int64_t continue_on(Stream stream);  // consuming goes on on another stream
  void release(Stream stream);              // consuming -> empty

  std::vector<std::string> states() const;
  std::int64_t front() const { return static_cast<std::int64_t>(life_.front()); }

  // Of the front buffer, as far as its window has come.
  std::vector<bool> front_touched() const;

  // Of the buffer that is sealed or being consumed; throw StateError when there is none. On a device they wait for the
  // window's gradients, but for nothing that was issued after the seal, and fetch the totals when first asked.
  double sum_of_squares() const;
  std::int64_t nonfinite_count() const;
  std::vector<bool> touched() const;

  // What the buffers live in: it goes with this object.
  void keep(std::vector<std::shared_ptr<void>> kept) { kept_ = std::move(kept); }
  std::atomic<int>& users() const { return *users_; }  // for `Sole`

  bool on_cpu() const { return life_.on_cpu(); }
  std::int64_t segments() const { return static_cast<std::int64_t>(segments_.size()); }

 private:
  struct Buffer {
    float* data = nullptr;
    std::vector<std::uint8_t> touched;
    std::vector<SumAndCount> sums;  // CPU: of the present content of each segment that is not in `lent`
    std::vector<std::uint8_t> lent;
    std::uintptr_t totals = 0;                    // device: where they are
    std::shared_ptr<void> totals_kept;            //
    mutable std::optional<DeviceTotals> fetched;  // and what they are, once asked for
  };

  void check_segment(std::int64_t index) const;
  const Buffer& finished(const char* what) const;
  const DeviceTotals& fetch(const char* what) const;

  std::vector<Segment> segments_;
  std::int64_t numel_;
  std::vector<std::shared_ptr<void>> kept_;
  std::unique_ptr<std::atomic<int>> users_ = std::make_unique<std::atomic<int>>(0);
  Lifecycle life_;
  std::vector<Buffer> buffers_;
  int device_;
  int threads_ = 1;                             // of the last call that said how many
  mutable std::optional<StreamHandle> reader_;  // of totals, made when first needed
};

}  // namespace paci_rt
