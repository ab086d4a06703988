#include "buffers/accumulator.hpp"

#include <cstring>

#include "core/check.hpp"

namespace paci_rt {
namespace {

// An overwrite of a buffer much larger than the last-level cache saves the read that an ordinary store begins with.
constexpr std::int64_t kStreamFromBytes = std::int64_t{64} << 20;
constexpr std::int64_t kMostElements = std::int64_t{1} << 52;  // of which no sum overflows

}  // namespace

Accumulator::Accumulator(std::vector<Segment> segments, std::int64_t numel, const std::vector<std::uintptr_t>& buffers,
                         int device, std::shared_ptr<StreamOps> ops)
    : segments_(std::move(segments)), numel_(numel), life_(buffers.size(), device, std::move(ops)), device_(device) {
  std::int64_t end = 0;
  for (const Segment& segment : segments_) {
    check_value(segment.numel >= 0 && segment.offset >= end, "segment at offset ", segment.offset, " of ",
                segment.numel, " elements overlaps the one before it, which ends at ", end);
    check_value(segment.numel <= kMostElements && segment.offset <= kMostElements, "segment at offset ", segment.offset,
                " of ", segment.numel, " elements is beyond the most that a buffer can have, ", kMostElements);
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

void Accumulator::check_segment(std::int64_t index) const {
  check_value(index >= 0 && index < segments(), "segment ", index, " does not exist: the group has ", segments());
}

bool Accumulator::lend(std::int64_t index, Stream stream, int threads) {
  stream = life_.on(stream);
  check_segment(index);
  Buffer& front = buffers_[life_.fill("add to", stream)];
  const bool overwrite = !front.touched[index];
  front.touched[index] = front.lent[index] = 1;
  threads_ = threads;
  return overwrite;
}

std::vector<bool> Accumulator::lend_many(const std::vector<std::int64_t>& indices, Stream stream) {
  for (const std::int64_t index : indices) check_segment(index);
  std::vector<bool> overwrite;
  overwrite.reserve(indices.size());
  for (const std::int64_t index : indices) overwrite.push_back(lend(index, stream, threads_));
  return overwrite;
}

void Accumulator::add(std::int64_t index, std::uintptr_t grad, DType dtype, std::int64_t numel, Stream stream,
                      int threads) {
  check_value(life_.on_cpu(), "gradients on device ", device_,
              " are added by paci_rt.kernels.accumulate: lend their segments to it");
  stream = life_.on(stream);
  check_segment(index);
  const Segment& segment = segments_[index];
  check_value(numel == segment.numel, "a gradient of ", numel, " elements was given for segment ", index, " of ",
              segment.numel);
  Buffer& front = buffers_[life_.fill("add to", stream)];
  const bool overwrite = !front.touched[index];
  front.touched[index] = 1;
  front.lent[index] = 0;
  // Stores past the cache need whole lines.
  const bool past_cache = overwrite && numel_ * 4 >= kStreamFromBytes && segment.offset % 16 == 0;
  front.sums[index] = accumulate_segment(front.data + segment.offset, reinterpret_cast<const void*>(grad), dtype, numel,
                                         overwrite, past_cache, threads);
}

void Accumulator::seal(Stream stream, std::uintptr_t totals, std::shared_ptr<void> keep) {
  stream = life_.on(stream);
  Buffer& front = buffers_[life_.begin_seal(stream)];
  for (std::size_t i = 0; i < segments_.size(); ++i) {
    float* const data = front.data + segments_[i].offset;
    if (life_.on_cpu() && front.lent[i]) front.sums[i] = measure_segment(data, segments_[i].numel, threads_);
    if (front.touched[i] || segments_[i].numel == 0) continue;
    const auto bytes = static_cast<std::size_t>(segments_[i].numel) * sizeof(float);
    if (life_.on_cpu())
      std::memset(data, 0, bytes);
    else
      life_.ops()->clear(stream, data, bytes);
  }
  front.totals = totals;
  front.totals_kept = std::move(keep);
  front.fetched.reset();
  life_.seal(stream);
}

std::int64_t Accumulator::consume(Stream stream) { return static_cast<std::int64_t>(life_.consume(life_.on(stream))); }

std::int64_t Accumulator::continue_on(Stream stream) {
  return static_cast<std::int64_t>(life_.continue_on(life_.on(stream)));
}

void Accumulator::release(Stream stream) {
  Buffer& buffer = buffers_[life_.release(life_.on(stream))];
  buffer.touched.assign(segments_.size(), 0);
  buffer.sums.assign(segments_.size(), {});
  buffer.lent.assign(segments_.size(), 0);
}

const Accumulator::Buffer& Accumulator::finished(const char* what) const {
  if (const auto found = life_.finished()) return buffers_[*found];
  throw StateError(concat(what, " is known for a buffer that is sealed or consuming; this accumulator's front is ",
                          name_of(life_.state(life_.front()))));
}

const DeviceTotals& Accumulator::fetch(const char* what) const {
  const Buffer& buffer = finished(what);
  if (buffer.fetched) return *buffer.fetched;
  if (buffer.totals == 0)
    throw StateError(concat(what, " is not known: the window was sealed without totals=, where the device writes it"));
  if (!reader_) reader_.emplace(StreamHandle::make(life_.ops(), device_));
  life_.follow_seal(static_cast<std::size_t>(&buffer - buffers_.data()), reader_->get());
  DeviceTotals totals{};
  life_.ops()->read(reader_->get(), &totals, reinterpret_cast<const void*>(buffer.totals), sizeof totals);
  buffer.fetched = totals;
  return *buffer.fetched;
}

std::vector<std::string> Accumulator::states() const {
  std::vector<std::string> names;
  for (std::size_t i = 0; i < life_.size(); ++i) names.emplace_back(name_of(life_.state(i)));
  return names;
}

double Accumulator::sum_of_squares() const {
  constexpr const char* what = "the sum of squares";
  if (!life_.on_cpu()) return fetch(what).sum_of_squares;
  double total = 0.0;
  for (const SumAndCount& sums : finished(what).sums) total += sums.sum_of_squares;
  return total;
}

std::int64_t Accumulator::nonfinite_count() const {
  constexpr const char* what = "the non-finite count";
  if (!life_.on_cpu()) return static_cast<std::int64_t>(fetch(what).nonfinite);
  std::int64_t total = 0;
  for (const SumAndCount& sums : finished(what).sums) total += sums.nonfinite;
  return total;
}

std::vector<bool> Accumulator::front_touched() const {
  const State state = life_.state(life_.front());
  if (state != State::empty && state != State::filling)
    throw StateError(concat("the front buffer is ", name_of(state), ": it has no window in the making"));
  const Buffer& front = buffers_[life_.front()];
  return {front.touched.begin(), front.touched.end()};
}

std::vector<bool> Accumulator::touched() const {
  const Buffer& buffer = finished("which segments got a gradient");
  return {buffer.touched.begin(), buffer.touched.end()};
}

}  // namespace paci_rt
