// Channels over shared memory under random sizes, orders and delays, for the sanitizers: senders and receivers are
// threads over one mapping, so what the protocol forgets to order is a data race; and processes, for what only they
// have.
//
// usage: p2p_stress threads|processes ROUNDS SEED; exit code 1 if a message was wrong. Built with one of the
// PACI_RT_P2P_... macros of p2p_shm.cpp broken, it must fail.
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "p2p/shm_channel.hpp"

using namespace paci_rt;

namespace {

constexpr int kMessages = 120, kSlots = 3, kHeld = 2, kMaxDelayUs = 60;
constexpr double kTimeoutS = 60;
constexpr std::int64_t kReserveBytes = std::int64_t{256} << 20;

std::atomic<int> wrong{0};

void complain(const std::string& what) {
  ++wrong;
  std::fprintf(stderr, "%s\n", what.c_str());
}

// Both sides draw the same messages from the same seed.
class Script {
 public:
  explicit Script(std::uint64_t seed) : random_(seed) {}

  std::vector<std::int64_t> next() {
    if (below(3) == 0) sizes_.clear();  // else the shapes stay
    if (!sizes_.empty()) return sizes_;
    for (int tensors = below(4); tensors >= 0; --tensors) {
      const int kind = below(6);
      sizes_.push_back(kind == 0 ? -1 : kind == 1 ? 0 : kind < 5 ? 1 + below(3000) : 1 + below(100000));
    }
    return sizes_;
  }

 private:
  int below(int bound) { return static_cast<int>(random_() % static_cast<std::uint64_t>(bound)); }

  std::mt19937_64 random_;
  std::vector<std::int64_t> sizes_;  // of uint8 tensors; -1: absent
};

std::string packed(const std::vector<std::int64_t>& sizes) {
  std::vector<std::int64_t> words;
  for (const std::int64_t size : sizes) {
    words.insert(words.end(), {8, size < 0 ? 0 : 1, size < 0 ? 0 : 1});
    if (size >= 0) words.push_back(size);
  }
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(std::int64_t)};
}

unsigned char expected(std::int64_t index, std::size_t tensor) {
  return static_cast<unsigned char>(index * 7 + static_cast<std::int64_t>(tensor) + 1);
}

void check(const Arrival& arrival, const char* when) {
  for (std::size_t at = 0; at < arrival.layout->tensors.size(); ++at) {
    const std::int64_t size = arrival.layout->tensors[at].bytes();
    const auto* bytes = reinterpret_cast<unsigned char*>(arrival.address + arrival.layout->offsets[at]);
    for (std::int64_t i = 0; i < size; ++i)
      if (bytes[i] != expected(arrival.index, at))
        return complain(concat("message ", arrival.index, " ", when, ": byte ", i, " of tensor ", at, " is wrong"));
  }
}

void rest(std::mt19937_64& random) {
  const auto us = random() % (2 * kMaxDelayUs);
  if (us < kMaxDelayUs) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

// Tensors of a message, which must stay as they are until it has been copied.
using Tensors = std::vector<std::vector<unsigned char>>;

void send_all(ShmOutgoing& end, std::uint64_t seed) {
  Script script(seed);
  std::mt19937_64 random(seed * 3 + 1);
  std::deque<std::pair<std::int64_t, Tensors>> leaving;
  for (int m = 0; m < kMessages; ++m) {
    const std::vector<std::int64_t> sizes = script.next();
    Tensors tensors;
    std::vector<std::uintptr_t> addresses;
    for (std::size_t at = 0; at < sizes.size(); ++at) {
      tensors.emplace_back(static_cast<std::size_t>(std::max<std::int64_t>(sizes[at], 0)), expected(m, at));
      addresses.push_back(reinterpret_cast<std::uintptr_t>(tensors.back().data()));
    }
    const std::int64_t sequence = end.send(m, Layout::parse(packed(sizes)), addresses, Stream{});
    leaving.emplace_back(sequence, std::move(tensors));
    rest(random);
    for (; !leaving.empty() && leaving.front().first <= end.completed(); leaving.pop_front())
      for (std::vector<unsigned char>& tensor : leaving.front().second)
        std::fill(tensor.begin(), tensor.end(), static_cast<unsigned char>(0));  // nobody reads them any more
  }
  end.flush();
}

// By turns: every message is copied by whoever sends, or the larger ones by a thread.
std::shared_ptr<Copier> copier_of(std::uint64_t seed) {
  return seed % 2 == 0 ? nullptr : std::make_shared<Copier>(2000);
}

// What was received and is still kept, for another thread to look at and drop in any order.
class Keeper {
 public:
  void keep(Arrival arrival) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(std::move(arrival));
    changed_.notify_one();
  }
  void finish() {
    const std::lock_guard<std::mutex> lock(mutex_);
    finished_ = true;
    changed_.notify_one();
  }
  void drop_all(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    for (;;) {
      Arrival arrival;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return finished_ || kept_.size() > 2; });
        if (kept_.empty()) return;
        const auto chosen = kept_.begin() + static_cast<std::ptrdiff_t>(random() % kept_.size());
        arrival = std::move(*chosen);
        kept_.erase(chosen);
      }
      check(arrival, "while it was kept");
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Arrival> kept_;
  bool finished_ = false;
};

void receive_all(ShmIncoming& end, std::uint64_t seed, Keeper* keeper) {
  Script script(seed);
  std::mt19937_64 random(seed * 5 + 2);
  for (int m = 0; m < kMessages; ++m) {
    const std::vector<std::int64_t> sizes = script.next();
    Arrival arrival = end.take(m, Stream{});
    if (arrival.layout->packed != packed(sizes)) complain(concat("message ", m, " has another shape than was sent"));
    check(arrival, "on arrival");
    rest(random);
    if (keeper != nullptr) keeper->keep(std::move(arrival));
  }
  if (keeper != nullptr) keeper->finish();
}

template <typename Work>
std::thread started(const Work& work) {
  return std::thread([work] {
    try {
      work();
    } catch (const std::exception& error) {
      complain(error.what());
      std::fflush(nullptr);
      std::_Exit(1);  // the other side would wait for the deadline
    }
  });
}

// Two channels of one segment, each with a sender, a receiver and a thread that drops what was received.
void run_threads(std::uint64_t seed) {
  const auto segment = ShmSegment::create(kReserveBytes);
  std::vector<std::thread> threads;
  std::deque<Keeper> keepers(2);
  for (int edge = 0; edge < 2; ++edge) {
    const std::uint64_t own_seed = seed * 2 + static_cast<std::uint64_t>(edge);
    const Edge name{"F", edge, edge + 1};
    threads.push_back(started([segment, name, own_seed] {
      ShmOutgoing end(name, {kSlots, kTimeoutS, nullptr}, segment, segment, kHeld, copier_of(own_seed));
      send_all(end, own_seed);
    }));
    Keeper& keeper = keepers[static_cast<std::size_t>(edge)];
    threads.push_back(started([segment, name, own_seed, &keeper] {
      ShmIncoming end(name, {kSlots, kTimeoutS, nullptr}, segment);
      receive_all(end, own_seed, &keeper);
    }));
    threads.push_back(started([own_seed, &keeper] { keeper.drop_all(own_seed); }));
  }
  for (std::thread& thread : threads) thread.join();
}

// A parent that sends and a child that receives, through the child's own mapping.
void run_processes(std::uint64_t seed) {
  const auto segment = ShmSegment::create(kReserveBytes);
  const int fd = segment->fd();
  const std::uint64_t token = segment->token();
  const pid_t parent = getpid(), child = fork();
  if (child == 0) {
    int code = 1;
    try {
      const auto mapped = ShmSegment::attach(parent, fd, token);
      ShmIncoming end({"F", 0, 1}, {kSlots, kTimeoutS, nullptr}, mapped);
      receive_all(end, seed, nullptr);
      code = wrong == 0 ? 0 : 1;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
    }
    std::fflush(nullptr);
    std::_Exit(code);
  }
  ShmOutgoing end({"F", 0, 1}, {kSlots, kTimeoutS, nullptr}, segment, segment, kHeld, copier_of(seed));
  send_all(end, seed);
  int status = 0;
  waitpid(child, &status, 0);
  if (status != 0) complain(concat("the receiving process ended with status ", status));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc == 4 ? argv[1] : "";
  if (mode != "threads" && mode != "processes")
    return std::fprintf(stderr, "usage: p2p_stress threads|processes ROUNDS SEED\n"), 2;
  const int rounds = std::atoi(argv[2]);
  const auto seed = std::strtoull(argv[3], nullptr, 10);
  for (int round = 0; round < rounds; ++round)
    (mode == "threads" ? run_threads : run_processes)(seed + static_cast<std::uint64_t>(round));
  std::printf("%d rounds, %d wrong messages\n", rounds, wrong.load());
  return wrong == 0 ? 0 : 1;
}
