// The shm backend: channels between processes of one host, in memory that they share.
//
// A send copies its tensors into a buffer of the sender's segment, and that is the only copy: the receiver computes on
// the buffer itself, which comes back when its last tensor dies, in any order. Copying is the sender's: of small
// messages by the thread that sends, of large ones by a thread of their own, beside what is computed next. (Measured
// for 4 MiB against the alternative with one copy too, where the receiver fetches the tensor by process_vm_readv: 0.09
// to 0.28 ms against 0.33 to 0.51 ms, since that walks and pins page by page; and it would make the sender keep its
// tensors until they are fetched.)
//
// Buffers are more than credits by the number that the receiver may hold. Beyond that number the receiver copies
// messages out, so that a computation that keeps what it received can never starve the channel: with a credit there is
// always a buffer.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "p2p/channel.hpp"
#include "p2p/copier.hpp"
#include "p2p/shm_segment.hpp"

namespace paci_rt {

struct ShmChannel;  // what both ends share of a channel

class ShmOutgoing final : public Outgoing {
 public:
  // `own` is the sender's segment, `peer` the receiver's. `held` is how many buffers the receiver may keep. `copier`
  // copies large messages; null: the thread that sends does.
  ShmOutgoing(Edge edge, Options options, std::shared_ptr<ShmSegment> own, std::shared_ptr<ShmSegment> peer,
              std::int64_t held, std::shared_ptr<Copier> copier);
  ~ShmOutgoing() override;

  // `stream` must be 0.
  std::int64_t send(std::int64_t index, std::shared_ptr<const Layout> layout,
                    const std::vector<std::uintptr_t>& addresses, Stream stream) override;
  bool has_room() override;
  std::int64_t completed() override { return copied_.load(std::memory_order_acquire) - 1; }
  void flush() override;
  Progress progress() const override;
  void close() override;

  void wake();  // the receiver, where it waits, to look around

 private:
  struct Copy;
  struct Buffer {
    std::int64_t offset = 0;
    std::int64_t bytes = 0;  // 0: none, or none any more
  };

  void carry_out(const Copy& copy);
  void wait_for_credit(std::int64_t index, std::int64_t bytes);
  std::int32_t pick_buffer(std::int64_t bytes);
  void trim();

  std::shared_ptr<ShmSegment> own_, peer_;
  std::shared_ptr<Copier> copier_;
  ShmChannel* channel_;
  std::int64_t sent_ = 0;                // handed over, by the thread that sends
  std::atomic<std::int64_t> copied_{0};  // and published, by the thread that copies
  std::uint32_t collected_ = 0;          // of the buffers that came back
  std::vector<Buffer> buffers_;
  std::vector<std::int32_t> free_;  // the last one came back last and may still be in a cache
  std::size_t least_free_ = 0;      // since the last trim
  bool closed_ = false;
};

class ShmIncoming final : public Incoming {
 public:
  // `peer` is the sender's segment; the channel need not be there yet.
  ShmIncoming(Edge edge, Options options, std::shared_ptr<ShmSegment> peer);

  void post() override {}  // buffers are the sender's to write at any time
  bool ready() override;
  Arrival take(std::int64_t index, Stream stream) override;
  std::int64_t held() const override;
  Progress progress() const override;
  void close() override;

  void wake();  // the sender, where it waits, to look around

 private:
  struct State;  // outlives this object in leases

  bool find_channel();
  void wait_for_message(std::int64_t index);
  bool arrived();

  std::shared_ptr<State> state_;
  std::int64_t taken_ = 0;
  std::shared_ptr<const Layout> layout_;
  bool closed_ = false;
};

}  // namespace paci_rt
