// The event protocol under random delays, for ThreadSanitizer: the buffers are plain memory that the host twin's
// workers read and write, so a wait that is missing is a data race, and a wrong sum besides.
//
// usage: protocol_stress ROUNDS SEED [LOSE_EVERY]; exit code 1 if a sum is wrong. LOSE_EVERY drops every so-manieth
// wait, to prove that this program would notice.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "buffers/lifecycle.hpp"
#include "buffers/weight_gate.hpp"
#include "testing/host_twin.hpp"

using namespace paci_rt;

namespace {

constexpr int kDevice = 0, kBuckets = 3, kElements = 64, kMaxDelayUs = 40;

using Floats = std::vector<float>;

// A stage of an asynchronous pipeline: forwards that need all weights, backwards that fill the front buffer, an update
// on its own stream that adds the sums to the weights bucket by bucket. All values are small whole numbers, so every
// order that is legal gives the same floats.
class Stage {
 public:
  Stage(std::shared_ptr<HostTwin> twin, std::size_t buffers, std::uint64_t seed)
      : twin_(std::move(twin)),
        random_(seed),
        life_(buffers, kDevice, twin_),
        gate_(kBuckets, kDevice, twin_),
        sums_(buffers, Floats(kBuckets * kElements)),
        weights_(kBuckets * kElements) {
    for (int i = 0; i < 4; ++i) streams_.push_back(StreamHandle::make(twin_, kDevice));
  }

  void run(int windows) {
    for (int window = 0; window < windows; ++window) {
      const int micro_batches = 1 + draw(3);
      for (int m = 0; m < micro_batches; ++m) {
        forward(compute(), window);
        // Weight gradients may be on a stream of their own.
        add(draw(3) == 0 ? side() : compute(), m == 0, micro_batches);
      }
      seal();
      update();
    }
    gate_.wait_all(compute());
    forward(compute(), windows);
    for (const StreamHandle& stream : streams_) stream.synchronize();
    gate_.synchronize();
  }

  int wrong() const { return wrong_; }

 private:
  int draw(int below) { return static_cast<int>(random_() % static_cast<std::uint64_t>(below)); }
  Stream compute() const { return streams_[0].get(); }
  Stream side() const { return streams_[1].get(); }
  Stream updating() const { return streams_[2].get(); }
  Stream reducing() const { return streams_[3].get(); }

  // Reads all weights, each bucket no earlier than its update; after window k they are k.
  void forward(Stream stream, int window) {
    for (int bucket = 0; bucket < kBuckets; ++bucket) {
      gate_.wait(bucket, stream);
      twin_->launch(stream, [this, bucket, window] {
        for (int i = 0; i < kElements; ++i)
          if (weights_[bucket * kElements + i] != static_cast<float>(window)) ++wrong_;
      });
    }
  }

  // Adds micro-batches' share of 12, so that a window's sum is 12 whatever their number (1, 2 or 3).
  void add(Stream stream, bool overwrite, int micro_batches) {
    Floats& sums = sums_[life_.fill("add to", stream)];
    const float share = 12.0F / static_cast<float>(micro_batches);
    twin_->launch(stream, [&sums, share, overwrite] {
      for (float& sum : sums) sum = overwrite ? share : sum + share;
    });
  }

  void seal() {
    const Stream stream = draw(4) == 0 ? side() : compute();
    life_.begin_seal(stream);
    life_.seal(stream);
  }

  void update() {
    if (draw(2) == 0) {  // data-parallel replicas add theirs up on the way
      Floats& sums = sums_[life_.consume(reducing())];
      twin_->launch(reducing(), [&sums] {
        for (float& sum : sums) sum *= 2.0F;
      });
      twin_->launch(reducing(), [&sums] {
        for (float& sum : sums) sum /= 2.0F;
      });
      life_.continue_on(updating());
    } else {
      life_.consume(updating());
    }
    gate_.claim(updating());
    const std::size_t back = life_.size() == 2 ? 1 - life_.front() : 0;
    for (int bucket = kBuckets - 1; bucket >= 0; --bucket) {  // the last layers first, the forwards need them last
      twin_->launch(updating(), [this, back, bucket] {
        for (int i = bucket * kElements; i < (bucket + 1) * kElements; ++i) weights_[i] += sums_[back][i] / 12.0F;
      });
      gate_.publish(bucket, updating());
    }
    life_.release(updating());
  }

  std::shared_ptr<HostTwin> twin_;
  std::mt19937_64 random_;
  Lifecycle life_;
  WeightGate gate_;
  std::vector<Floats> sums_;
  Floats weights_;
  std::vector<StreamHandle> streams_;
  int wrong_ = 0;  // written by forwards only, which are in order
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "usage: protocol_stress ROUNDS SEED [LOSE_EVERY]\n"), 2;
  const int rounds = std::atoi(argv[1]);
  const auto seed = std::strtoull(argv[2], nullptr, 10);
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    const auto twin = std::make_shared<HostTwin>(kMaxDelayUs, seed + static_cast<std::uint64_t>(round));
    if (argc > 3) twin->lose_waits(std::atoi(argv[3]));
    Stage stage(twin, 1 + static_cast<std::size_t>(round % 2), seed * 31 + static_cast<std::uint64_t>(round));
    stage.run(20);
    wrong += stage.wrong();
  }
  std::printf("%d rounds, %d wrong values\n", rounds, wrong);
  return wrong == 0 ? 0 : 1;
}
