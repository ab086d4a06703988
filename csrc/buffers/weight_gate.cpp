#include "buffers/weight_gate.hpp"

#include <algorithm>

#include "core/check.hpp"

namespace paci_rt {

namespace {

constexpr std::int64_t kMostBuckets = std::int64_t{1} << 20;

}  // namespace

WeightGate::WeightGate(std::int64_t buckets, int device, std::shared_ptr<StreamOps> ops)
    : device_(device), ops_(std::move(ops)) {
  check_value(buckets >= 1 && buckets <= kMostBuckets, "a gate of ", buckets,
              " buckets is not possible: at least 1 and at most ", kMostBuckets);
  if (ops_) ops_->check_device(device);
  for (std::int64_t i = 0; i < buckets; ++i) {
    Bucket bucket;
    if (ops_) bucket.event.emplace(ops_, device);
    buckets_.push_back(std::move(bucket));
  }
}

const WeightGate::Bucket& WeightGate::at(std::int64_t bucket) const {
  check_value(bucket >= 0 && bucket < buckets(), "bucket ", bucket, " does not exist: the gate has ", buckets());
  return buckets_[static_cast<std::size_t>(bucket)];
}

Stream WeightGate::on(Stream stream) const {
  stream.device = device_;
  if (!ops_) stream.require_supported();
  return stream;
}

void WeightGate::note_reader(Stream stream) {
  if (!ops_) return;
  const auto noted = [&](const Reader& reader) { return reader.reading && same_queue(reader.stream, stream); };
  if (std::any_of(readers_.begin(), readers_.end(), noted)) return;
  for (Reader& reader : readers_) {
    if (reader.reading) continue;
    reader.stream = stream;
    reader.reading = true;
    return;
  }
  readers_.push_back({stream, Event(ops_, device_), true});
}

void WeightGate::claim(Stream stream) {
  stream = on(stream);
  for (Bucket& bucket : buckets_) wait(bucket, stream);
  for (Reader& reader : readers_) {
    if (reader.reading && !same_queue(reader.stream, stream)) {
      reader.event.record(reader.stream);
      reader.event.block(stream);
    }
    reader.reading = false;
  }
}

void WeightGate::publish(std::int64_t bucket, Stream stream) {
  stream = on(stream);
  Bucket& published = at(bucket);
  if (published.event) published.event->record(stream);
  published.waiting.assign(1, stream);
  ++published.published;
}

void WeightGate::wait(Bucket& bucket, Stream stream) {
  if (bucket.published == 0 || !ops_) return;
  const auto told = [&](Stream other) { return same_queue(other, stream); };
  if (std::any_of(bucket.waiting.begin(), bucket.waiting.end(), told)) return;
  bucket.event->block(stream);
  bucket.waiting.push_back(stream);
}

void WeightGate::wait(std::int64_t bucket, Stream stream) {
  stream = on(stream);
  wait(at(bucket), stream);
  note_reader(stream);
}

void WeightGate::wait_all(Stream stream) {
  stream = on(stream);
  for (Bucket& bucket : buckets_) wait(bucket, stream);
  note_reader(stream);
}

void WeightGate::synchronize() const {
  for (const Bucket& bucket : buckets_)
    if (bucket.event) bucket.event->synchronize();
}

std::int64_t WeightGate::published(std::int64_t bucket) const { return at(bucket).published; }

}  // namespace paci_rt
