// Memory that processes of one host share, and what they know of each other.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "core/check.hpp"

namespace paci_rt {

// Sleeps until somebody wakes `word`, it no longer holds `value`, or `milliseconds` are over. Works across processes.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t value, int milliseconds);
void futex_wake(std::atomic<std::uint32_t>& word);

// Another process, by its number and its start: a number that is used again is not taken for it.
class PeerProcess {
 public:
  PeerProcess(pid_t pid, std::uint64_t start);
  PeerProcess(const PeerProcess&) = delete;
  PeerProcess& operator=(const PeerProcess&) = delete;
  ~PeerProcess();

  bool alive() const;
  pid_t pid() const { return pid_; }

  static std::uint64_t start_of(pid_t pid);  // in clock ticks since boot; 0: there is no such process, or only a zombie

 private:
  pid_t pid_;
  std::uint64_t start_;
  int pidfd_;  // -1 where the system has none
};

struct MemoryLimit {
  std::int64_t bytes;
  std::string name;  // of what sets it
};
// What can still be allocated at the end of a file of `file_bytes`, and which of the machine's, the container's and the
// process's limits says so.
MemoryLimit memory_limit(std::int64_t file_bytes = 0);

// One process's share of the memory of a transport: everything that it sends. An anonymous file (memfd), which other
// processes open through /proc and which the kernel frees with the last process that has it mapped, however that ends;
// it has no name to be left behind, and the size of /dev/shm is no limit to it.
//
// Addresses are reserved once, for far more than will be used, so that the file can grow without moving and views of it
// stay valid. What is allocated is allocated in earnest, never by a first touch, which could only end in SIGBUS.
class ShmSegment {
 public:
  static constexpr std::int64_t kReserveBytes = std::int64_t{1} << 40;
  static constexpr int kChannels = 256;

  // Throw ResourceError. `reserve_bytes` is an upper limit to the segment's size, and is halved, down to 1 GiB at the
  // least, where the process may not have so many addresses.
  static std::shared_ptr<ShmSegment> create(std::int64_t reserve_bytes = kReserveBytes);
  static std::shared_ptr<ShmSegment> attach(pid_t pid, int fd, std::uint64_t token);

  ShmSegment(const ShmSegment&) = delete;
  ShmSegment& operator=(const ShmSegment&) = delete;
  ~ShmSegment();  // the maker's marks it closed

  pid_t pid() const { return peer_.pid(); }
  int fd() const { return fd_; }
  std::uint64_t token() const;
  char* at(std::int64_t offset) const { return base_ + offset; }

  // For the maker. Whole pages, aligned to 2 MiB from that size on. `what` names the user in the error.
  std::int64_t allocate(std::int64_t bytes, const std::string& what);
  void release(std::int64_t offset, std::int64_t bytes);
  std::int64_t allocated_bytes() const { return allocated_; }

  // Channels are found by name; the word changes when one is added.
  void publish(const std::string& name, std::int64_t offset);
  std::int64_t find(const std::string& name) const;  // its offset, -1 where there is none
  std::atomic<std::uint32_t>& channels_word() const;

  // Why the maker stopped: those who wait for it stop and raise. The first call counts.
  void fail(const std::string& reason);
  void close();
  bool failed() const;
  // Why waiting for the maker is pointless; empty while it is not. `who` begins the sentence, for example
  // "stage 3", unless it is one of the maker's own. `look` asks the system, too.
  std::string lost(const std::string& who, bool look) const;

 private:
  struct Header;
  ShmSegment(int fd, char* base, std::int64_t reserved, bool mine, pid_t pid, std::uint64_t start);

  Header& header() const;
  void end(std::uint32_t state, const std::string& reason);
  std::int64_t find_room(std::int64_t bytes, std::int64_t align, const std::string& what);

  int fd_;
  char* base_;
  std::int64_t reserved_;
  bool mine_;
  PeerProcess peer_;

  std::mutex mutex_;  // of what follows, and of the table of channels
  std::int64_t end_ = 0;
  std::map<std::int64_t, std::int64_t> holes_;  // offset to bytes
  std::atomic<std::int64_t> allocated_{0};
};

}  // namespace paci_rt
