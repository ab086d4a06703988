// Lets forwards wait for an update piece by piece: where the next layers' weights are needed, and no earlier.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "core/event.hpp"
#include "core/stream.hpp"

namespace paci_rt {

// The parameters of a stage in buckets, in the order in which a forward needs them. The update publishes each bucket as
// soon as its work is issued; whoever is about to read the bucket's weights, a forward or a backward, first lets its
// stream wait for that work. The host waits for neither. A bucket that no update has written yet blocks nothing.
//
// In the other direction an update claims the weights before it writes them: its stream then waits for all that was
// issued so far to the streams that read them, and for the update before it. Where the seal is on the same stream as
// all of the reading, as in a pipeline with one compute stream, that is no later than the seal, which the update waits
// for anyway.
//
// On the CPU all of this is true by itself, and only the counts are kept. Not thread-safe.
class WeightGate {
 public:
  // `ops` is null for the CPU.
  WeightGate(std::int64_t buckets, int device, std::shared_ptr<StreamOps> ops);

  void claim(Stream stream);                         // what is issued to `stream` from now on may write the weights
  void publish(std::int64_t bucket, Stream stream);  // the bucket's update is all that was issued to `stream` so far
  void wait(std::int64_t bucket, Stream stream);     // what is issued to `stream` from now on may read the bucket
  void wait_all(Stream stream);
  void synchronize() const;  // the host waits for all that was published

  std::int64_t published(std::int64_t bucket) const;  // how often
  std::int64_t buckets() const { return static_cast<std::int64_t>(buckets_.size()); }

 private:
  struct Bucket {
    std::optional<Event> event;   // none on the CPU
    std::vector<Stream> waiting;  // streams that need not be told again before the next publication
    std::int64_t published = 0;
  };

  struct Reader {
    Stream stream;
    Event event;
    bool reading;  // since the last claim; else this place is free
  };

  const Bucket& at(std::int64_t bucket) const;
  Bucket& at(std::int64_t bucket) { return const_cast<Bucket&>(std::as_const(*this).at(bucket)); }
  Stream on(Stream stream) const;
  void wait(Bucket& bucket, Stream stream);
  void note_reader(Stream stream);

  int device_;
  std::shared_ptr<StreamOps> ops_;
  std::vector<Bucket> buckets_;
  std::vector<Reader> readers_;
};

}  // namespace paci_rt
