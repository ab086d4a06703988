#include "p2p/shm_segment.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <random>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

namespace paci_rt {

namespace {

constexpr std::int64_t kPage = 4096, kLargePage = std::int64_t{2} << 20;
constexpr std::uint64_t kMagic = 0x31706873'69636170;  // "pacishp1"
constexpr std::int64_t kMostReserve = std::int64_t{1} << 46;
constexpr std::int64_t kLeastReserve = std::int64_t{1} << 30;

enum : std::uint32_t { kAlive, kFailed, kClosed };

[[noreturn]] void refuse(const std::string& doing, int error, const std::string& remedy) {
  throw ResourceError(concat("the shm transport cannot ", doing, " (", std::strerror(error), "): ", remedy));
}

std::int64_t round_up(std::int64_t bytes, std::int64_t unit) { return (bytes + unit - 1) / unit * unit; }

int make_file() {
#if defined(__linux__) && defined(MFD_CLOEXEC)
  return memfd_create("paci-rt", MFD_CLOEXEC);
#else
  errno = ENOSYS;
  return -1;
#endif
}

void punch(int fd, std::int64_t offset, std::int64_t bytes) {
#if defined(__linux__) && defined(FALLOC_FL_PUNCH_HOLE)
  // Advice: pages that stay cost memory and nothing else.
  (void)!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes);
#else
  (void)fd, (void)offset, (void)bytes;
#endif
}

int fill(int fd, std::int64_t offset, std::int64_t bytes) {
#if defined(__linux__)
  int error;
  do error = posix_fallocate(fd, offset, bytes);
  while (error == EINTR);
  return error;
#else
  (void)fd, (void)offset, (void)bytes;
  return ENOSYS;
#endif
}

char* map(int fd, std::int64_t bytes) {
  int flags = MAP_SHARED;
#if defined(MAP_NORESERVE)
  flags |= MAP_NORESERVE;
#endif
  void* base = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE, flags, fd, 0);
  if (base == MAP_FAILED) return nullptr;
#if defined(MADV_DONTDUMP)
  // A core dump would walk through all the addresses that are merely reserved.
  madvise(base, static_cast<std::size_t>(bytes), MADV_DONTDUMP);
#endif
  return static_cast<char*>(base);
}

std::int64_t number_in(const std::string& path) {  // -1: no such file, or no number in it ("max")
  std::ifstream file(path);
  std::int64_t value;
  return file >> value ? value : -1;
}

// The value behind `key` in a file of lines `key value`; 0 where there is none.
std::int64_t value_of(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line))
    if (line.compare(0, key.size(), key) == 0) return std::strtoll(line.c_str() + key.size(), nullptr, 10);
  return 0;
}

void lower(MemoryLimit& limit, std::int64_t bytes, const char* name) {
  if (bytes < limit.bytes) limit = {std::max<std::int64_t>(0, bytes), name};
}

// Version 2, from the process's own group up to the root, as far as the container shows them; and version 1.
void lower_by_container(MemoryLimit& limit) {
  std::ifstream groups("/proc/self/cgroup");
  std::string line, path;
  while (std::getline(groups, line))
    if (line.compare(0, 3, "0::") == 0) path = line.substr(3);
  for (;;) {
    const std::string folder = "/sys/fs/cgroup" + (path == "/" ? "" : path);
    const std::int64_t most = number_in(folder + "/memory.max");
    if (most >= 0) {
      // The page cache is counted as used, and given up on demand.
      const std::int64_t cached =
          value_of(folder + "/memory.stat", "inactive_file ") + value_of(folder + "/memory.stat", "active_file ");
      lower(limit, most - number_in(folder + "/memory.current") + cached, "the container's memory limit (cgroup)");
    }
    if (path.empty() || path == "/") break;
    path = path.substr(0, path.rfind('/'));
  }
  const std::string old = "/sys/fs/cgroup/memory";
  const std::int64_t most = number_in(old + "/memory.limit_in_bytes");
  if (most >= 0)
    lower(limit, most - number_in(old + "/memory.usage_in_bytes") + value_of(old + "/memory.stat", "total_cache "),
          "the container's memory limit (cgroup)");
}

}  // namespace

void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t value, int milliseconds) {
#if defined(__linux__)
  const timespec time{milliseconds / 1000, milliseconds % 1000 * 1000000L};
  // Whatever ends it, a signal too, the caller looks again.
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT, value, &time, nullptr, 0);
#else
  if (word.load() == value) usleep(static_cast<useconds_t>(std::min(milliseconds, 1)) * 1000);
#endif
}

void futex_wake(std::atomic<std::uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

PeerProcess::PeerProcess(pid_t pid, std::uint64_t start) : pid_(pid), start_(start), pidfd_(-1) {
#if defined(__linux__) && defined(SYS_pidfd_open)
  pidfd_ = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  // It is of the process that was meant only if that is still there now.
  if (pidfd_ >= 0 && start_of(pid) != start) {
    ::close(pidfd_);
    pidfd_ = -1;
  }
#endif
}

PeerProcess::~PeerProcess() {
  if (pidfd_ >= 0) ::close(pidfd_);
}

bool PeerProcess::alive() const {
  if (pidfd_ < 0) return start_of(pid_) == start_;
  pollfd entry{pidfd_, POLLIN, 0};
  return poll(&entry, 1, 0) != 1;
}

std::uint64_t PeerProcess::start_of(pid_t pid) {
  std::ifstream file(concat("/proc/", pid, "/stat"));
  std::string text;
  std::getline(file, text);
  const std::size_t name_end = text.rfind(')');  // the name may hold blanks and brackets
  if (name_end == std::string::npos) return 0;
  std::istringstream fields(text.substr(name_end + 1));
  std::string field;
  for (int at = 3; at <= 22 && fields >> field; ++at) {
    if (at == 3 && (field == "Z" || field == "X")) return 0;
    if (at == 22) return std::strtoull(field.c_str(), nullptr, 10);
  }
  return 0;
}

MemoryLimit memory_limit(std::int64_t file_bytes) {
  MemoryLimit limit{std::numeric_limits<std::int64_t>::max(), "nothing"};
  const std::int64_t kib = value_of("/proc/meminfo", "MemAvailable:");
  if (kib > 0) lower(limit, kib * 1024, "the machine's available memory (MemAvailable)");
  lower_by_container(limit);
  rlimit files{};
  if (getrlimit(RLIMIT_FSIZE, &files) == 0 && files.rlim_cur != RLIM_INFINITY)
    lower(limit, static_cast<std::int64_t>(files.rlim_cur) - file_bytes, "the process's file size limit (ulimit -f)");
  return limit;
}

struct ShmSegment::Header {
  std::uint64_t magic;
  std::uint64_t token;
  std::int64_t reserved;
  std::int64_t pid;
  std::uint64_t start;
  std::atomic<std::uint32_t> state;   // kAlive, kFailed, kClosed
  std::atomic<std::uint32_t> ending;  // who is first to say why
  char reason[2048];
  std::atomic<std::uint32_t> channels;  // how many of the entries below are there
  struct {
    char name[24];
    std::int64_t offset;
  } table[kChannels];
};

ShmSegment::ShmSegment(int fd, char* base, std::int64_t reserved, bool mine, pid_t pid, std::uint64_t start)
    : fd_(fd), base_(base), reserved_(reserved), mine_(mine), peer_(pid, start) {}

std::shared_ptr<ShmSegment> ShmSegment::create(std::int64_t reserve_bytes) {
  check_value(reserve_bytes >= 0 && reserve_bytes <= kMostReserve, "reserve_bytes is ", reserve_bytes, ": 0 to ",
              kMostReserve);
  const int fd = make_file();
  if (fd < 0)
    refuse("make shared memory by memfd_create", errno,
           "it needs Linux 3.17 or later; use transport 'gloo' (--transport gloo)");
  const std::int64_t first = round_up(sizeof(Header), kPage);
  const auto fail_with = [fd](const char* doing, int error, const char* remedy) {
    ::close(fd);
    refuse(doing, error, remedy);
  };
  const int error = fill(fd, 0, first);
  if (error != 0) fail_with("allocate its first pages", error, "free some memory, or raise the limit (ulimit -f)");
  char* base = nullptr;
  std::int64_t reserved = round_up(std::max(reserve_bytes, first), kPage);
  while ((base = map(fd, reserved)) == nullptr && reserved > kLeastReserve) reserved /= 2;
  if (base == nullptr) fail_with("reserve addresses", errno, "raise the limit of address space (ulimit -v)");
  const std::uint64_t start = PeerProcess::start_of(getpid());
  if (start == 0) {
    munmap(base, static_cast<std::size_t>(reserved));
    fail_with("read /proc/self/stat", ENOENT, "mount /proc, or use transport 'gloo' (--transport gloo)");
  }
  std::shared_ptr<ShmSegment> segment(new ShmSegment(fd, base, reserved, true, getpid(), start));
  segment->end_ = first;
  segment->allocated_ = first;
  Header& header = *new (base) Header();
  std::random_device random;
  header.token = (static_cast<std::uint64_t>(random()) << 32) | random();
  header.reserved = reserved;
  header.pid = getpid();
  header.start = start;
  header.magic = kMagic;
  return segment;
}

std::shared_ptr<ShmSegment> ShmSegment::attach(pid_t pid, int fd, std::uint64_t token) {
  const std::string path = concat("/proc/", pid, "/fd/", fd);
  const std::string doing = concat("open the memory of process ", pid);
  const char* remedy =
      "the stages must be processes of one user and one container on one host; use transport 'gloo' (--transport gloo) "
      "otherwise";
  const int file = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) refuse(doing, errno, remedy);
  Header head{};
  char* base = nullptr;
  int error = ENOENT;  // another file by now
  constexpr std::size_t needed = offsetof(Header, state);
  if (pread(file, &head, needed, 0) == static_cast<ssize_t>(needed) && head.magic == kMagic && head.token == token &&
      (base = map(file, head.reserved)) == nullptr)
    error = errno;
  ::close(file);  // the mapping holds the memory
  if (base == nullptr) refuse(doing, error, error == ENOMEM ? "raise the limit of address space (ulimit -v)" : remedy);
  return std::shared_ptr<ShmSegment>(
      new ShmSegment(-1, base, head.reserved, false, static_cast<pid_t>(head.pid), head.start));
}

ShmSegment::~ShmSegment() {
  if (mine_ && getpid() == pid()) close();  // and not in a child of fork()
  munmap(base_, static_cast<std::size_t>(reserved_));
  if (fd_ >= 0) ::close(fd_);
}

ShmSegment::Header& ShmSegment::header() const { return *reinterpret_cast<Header*>(base_); }
std::uint64_t ShmSegment::token() const { return header().token; }
std::atomic<std::uint32_t>& ShmSegment::channels_word() const { return header().channels; }

std::int64_t ShmSegment::find_room(std::int64_t bytes, std::int64_t align, const std::string& what) {
  for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
    const auto [offset, size] = *hole;
    const std::int64_t begin = round_up(offset, align), end = offset + size;
    if (begin + bytes > end) continue;
    holes_.erase(hole);
    if (begin > offset) holes_[offset] = begin - offset;
    if (end > begin + bytes) holes_[begin + bytes] = end - begin - bytes;
    return begin;
  }
  const std::int64_t begin = round_up(end_, align);
  if (begin + bytes > reserved_)
    throw ResourceError(concat("the shm transport needs ", bytes, " bytes more for ", what,
                               ", and its addresses end at ", reserved_,
                               " bytes: raise the limit of address space (ulimit -v)"));
  if (begin > end_) holes_[end_] = begin - end_;
  end_ = begin + bytes;
  return begin;
}

std::int64_t ShmSegment::allocate(std::int64_t bytes, const std::string& what) {
  const std::lock_guard<std::mutex> lock(mutex_);
  bytes = round_up(std::max<std::int64_t>(bytes, 1), kPage);
  const auto refuse_bytes = [&](const MemoryLimit& limit, const char* said) {
    throw ResourceError(concat("the shm transport needs ", bytes, " bytes more for ", what, ", beyond the ",
                               allocated_.load(), " that this process's messages take, and ", limit.name, " leaves ",
                               limit.bytes, said,
                               ": make micro-batches smaller, raise that limit, or run fewer stages on this host"));
  };
  const MemoryLimit limit = memory_limit(end_);
  // Before the attempt, which might end another process for lack of memory, or this one by SIGXFSZ.
  if (bytes > limit.bytes) refuse_bytes(limit, "");
  const std::int64_t offset = find_room(bytes, bytes >= kLargePage ? kLargePage : kPage, what);
  const int error = fill(fd_, offset, bytes);
  if (error != 0) {
    punch(fd_, offset, bytes);
    holes_[offset] = bytes;
    refuse_bytes(limit, concat(" (", std::strerror(error), ")").c_str());
  }
#if defined(MADV_HUGEPAGE)
  if (bytes >= kLargePage) madvise(base_ + offset, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);  // advice
#endif
#if defined(MADV_POPULATE_WRITE)
  madvise(base_ + offset, static_cast<std::size_t>(bytes), MADV_POPULATE_WRITE);  // spares a fault a page
#endif
  allocated_ += bytes;
  return offset;
}

void ShmSegment::release(std::int64_t offset, std::int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  bytes = round_up(std::max<std::int64_t>(bytes, 1), kPage);
  punch(fd_, offset, bytes);
  allocated_ -= bytes;
  auto next = holes_.lower_bound(offset);
  if (next != holes_.end() && offset + bytes == next->first) {
    bytes += next->second;
    next = holes_.erase(next);
  }
  if (next != holes_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += bytes;
      return;
    }
  }
  holes_[offset] = bytes;
}

void ShmSegment::publish(const std::string& name, std::int64_t offset) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::uint32_t at = header().channels.load(std::memory_order_relaxed);
  auto& entries = header().table;
  if (at >= kChannels || name.size() >= sizeof entries[0].name)
    throw ResourceError(concat("the shm transport has room for ", kChannels, " channels a process, and '", name,
                               "' is one more: use fewer chunks"));
  std::memcpy(entries[at].name, name.c_str(), name.size() + 1);
  entries[at].offset = offset;
  header().channels.store(at + 1, std::memory_order_release);
  futex_wake(header().channels);
}

std::int64_t ShmSegment::find(const std::string& name) const {
  const std::uint32_t count = header().channels.load(std::memory_order_acquire);
  for (std::uint32_t at = 0; at < count; ++at)
    if (name == header().table[at].name) return header().table[at].offset;
  return -1;
}

void ShmSegment::end(std::uint32_t state, const std::string& reason) {
  if (header().ending.exchange(1) != 0) return;
  const std::size_t size = std::min(reason.size(), sizeof header().reason - 1);
  std::memcpy(header().reason, reason.data(), size);
  header().reason[size] = '\0';
  header().state.store(state, std::memory_order_release);
  futex_wake(header().channels);
}

void ShmSegment::fail(const std::string& reason) { end(kFailed, reason); }
void ShmSegment::close() { end(kClosed, ""); }
bool ShmSegment::failed() const { return header().state.load(std::memory_order_acquire) == kFailed; }

std::string ShmSegment::lost(const std::string& who, bool look) const {
  const std::uint32_t state = header().state.load(std::memory_order_acquire);
  if (state == kFailed) return header().reason;
  if (state == kClosed) return concat(who, " closed its pipeline (process ", pid(), ")");
  if (look && !peer_.alive()) return concat(who, " is gone: its process ", pid(), " was killed or ended");
  return "";
}

}  // namespace paci_rt
