// Streams and events without a GPU, for tests of the order that events make.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "core/device_ops.hpp"

namespace paci_rt {

// A stream is a worker thread with a queue, an event the place of a queue's entry; so work on two streams is ordered by
// events and by nothing else, as on a GPU. Before each entry the worker may sleep a random time, which brings orders
// about that a GPU shows once in a million windows, and makes a missing wait a data race that ThreadSanitizer sees.
//
// Any device number is accepted. Handles begin at 16, so that CUDA's reserved ones (0, 1, 2) are errors. An exception
// in launched work ends up in the next call that waits for its stream. Calls may come from several threads.
//
// Device memory is the process's own, and handles for "other processes" are good within this one twin, which stands for
// a whole machine then. CUDA's rules for them are kept: what is open elsewhere must not go, and memory is shared in
// whole blocks.
class HostTwin final : public DeviceOps {
 public:
  // Sleeps of up to `max_delay_us`, drawn from `seed`, the stream's handle and the entry's number.
  explicit HostTwin(std::int64_t max_delay_us = 0, std::uint64_t seed = 0);
  ~HostTwin() override;  // waits for all work

  void launch(Stream stream, std::function<void()> work);

  // Makes every n-th call of wait_event do nothing, to show that a test would notice; 0: none.
  void lose_waits(std::int64_t every) { lose_every_ = every; }
  std::int64_t waits() const { return waits_; }
  std::int64_t records() const { return records_; }

  void check_device(int device) override;
  std::uintptr_t make_stream(int device, int priority) override;
  void drop_stream(Stream stream) noexcept override;
  void synchronize(Stream stream) override;
  std::uintptr_t make_event(int device) override;
  void drop_event(int device, std::uintptr_t event) noexcept override;
  void record(std::uintptr_t event, Stream stream) override;
  void wait_event(Stream stream, std::uintptr_t event) override;
  bool event_done(int device, std::uintptr_t event) override;
  void synchronize_event(int device, std::uintptr_t event) override;
  void clear(Stream stream, void* address, std::size_t bytes) override;
  void read(Stream stream, void* host, const void* address, std::size_t bytes) override;

  void copy(Stream stream, void* to, const void* from, std::size_t bytes) override;
  void* allocate(int device, std::size_t bytes) override;
  void release(int device, void* address) noexcept override;
  std::shared_ptr<void> enter(int device) override;
  bool capturing(Stream stream) override;
  int multiprocessors(int) override { return 132; }
  std::string export_memory(int device, void* address) override;
  void* open_memory(int device, const std::string& handle) override;
  void close_memory(int device, void* address) noexcept override;
  std::uintptr_t make_shared_event(int device) override;
  std::string export_event(int device, std::uintptr_t event) override;
  std::uintptr_t open_event(int device, const std::string& handle) override;

  // As if a CUDA graph were being recorded on the stream; work runs all the same.
  void capture(Stream stream, bool on);
  std::string misuse();                                  // rules of handles that were broken; empty: none
  static int current();                                  // the device that the calling thread has entered; -1: none
  std::int64_t allocated() const { return allocated_; }  // pieces of memory that were not released yet

 private:
  class Place;   // one record of an event
  class Worker;  // one stream
  struct EventEntry {
    int device;
    std::shared_ptr<Place> latest;  // null before the first record
    std::uintptr_t owner;           // the handle that it was made with
  };

  Worker& worker(Stream stream);  // with mutex_ held
  EventEntry& event(int device, std::uintptr_t handle);

  const std::int64_t max_delay_us_;
  const std::uint64_t seed_;
  std::mutex mutex_;
  std::map<std::uintptr_t, std::unique_ptr<Worker>> workers_;
  std::vector<std::unique_ptr<Worker>> dropped_;                  // they finish their work and are joined at the end
  std::map<std::uintptr_t, std::shared_ptr<EventEntry>> events_;  // opened ones are second names
  std::set<std::uintptr_t> capturing_;
  std::map<void*, std::size_t> sizes_;  // of memory
  std::multiset<void*> opened_;
  std::string misuse_;
  std::uintptr_t next_handle_ = 16;
  std::int64_t lose_every_ = 0;
  std::atomic<std::int64_t> waits_{0};
  std::atomic<std::int64_t> records_{0};
  std::atomic<std::int64_t> allocated_{0};
};

}  // namespace paci_rt
