// The engine for transfers on devices, on the host twin and for ThreadSanitizer: stages are threads with an engine
// each, tensors are plain memory that streams write and read, so that a wait that is missing is a data race, and wrong
// bytes besides.
//
// usage: device_stress nccl|nccl-background|nccl-registered|ipc ROUNDS SEED [LOSE_EVERY]; exit code 1 if bytes are
// wrong or a rule of NCCL was broken. LOSE_EVERY drops every so-manieth wait, to prove that this program would notice.
#include <sys/socket.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "p2p/device_engine.hpp"
#include "p2p/nccl_lane.hpp"
#include "testing/fake_nccl.hpp"
#include "testing/host_twin.hpp"

using namespace paci_rt;

namespace {

constexpr int kStages = 3, kMessages = 40, kMaxDelayUs = 20;
constexpr std::int64_t kSlots = 2;

std::string pack(const std::vector<std::int64_t>& sizes) {
  std::string text;
  const auto add = [&](std::int64_t value) { text.append(reinterpret_cast<const char*>(&value), sizeof value); };
  for (const std::int64_t size : sizes) add(8), add(1), add(1), add(size);  // uint8, present, one dimension
  return text;
}

// What message `index` of an edge looks like: both sides know.
struct Expected {
  Expected(const std::string& edge, std::int64_t index, std::uint64_t seed) {
    std::mt19937_64 random(std::hash<std::string>()(edge) ^ (seed + static_cast<std::uint64_t>(index) / 5));
    const std::size_t tensors = 1 + random() % 2;
    for (std::size_t i = 0; i < tensors; ++i)
      sizes.push_back(static_cast<std::int64_t>(random() % 4 == 0 ? 0 : random() % 3000));
    first = static_cast<unsigned char>(index * 7 + edge.size());
  }
  std::vector<std::int64_t> sizes;
  unsigned char first;
  std::shared_ptr<const Layout> layout() const { return Layout::parse(pack(sizes)); }
};

using Bytes = std::vector<unsigned char>;

class Stage {
 public:
  // `trouble` is called before every micro-batch, and may throw.
  Stage(std::shared_ptr<HostTwin> twin, int number, std::uint64_t seed, double timeout_s,
        std::function<void(int)> trouble)
      : twin_(twin),
        trouble_(std::move(trouble)),
        number_(number),
        seed_(seed),
        random_(seed * 31 + static_cast<std::uint64_t>(number)),
        compute_(StreamHandle::make(twin, number)),
        engine_(std::make_shared<DeviceEngine>(twin, number, number, Options{kSlots, timeout_s, {}})) {}

  DeviceEngine& engine() { return *engine_; }
  void add_outgoing(const Edge& edge, int fd, std::unique_ptr<SendLane> lane) {
    outgoing_[edge.kind] = &engine_->add(edge, std::make_unique<ControlLink>(fd), std::move(lane));
  }
  void add_incoming(const Edge& edge, int fd, std::unique_ptr<RecvLane> lane) {
    incoming_[edge.kind] = &engine_->add(edge, std::make_unique<ControlLink>(fd), std::move(lane));
  }

  // The order of an asynchronous pipeline: some forwards ahead, then one of each for ever.
  void run() {
    engine_->connect();
    const int ahead = kStages - 1 - number_;
    for (int m = 0; m < kMessages + ahead; ++m) {
      if (trouble_) trouble_(m);
      if (m < kMessages) forward(m);
      if (m >= ahead) backward(m - ahead);
      if (random_() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_() % 200));
    }
    for (auto& [kind, end] : outgoing_) end->flush();
    compute_.synchronize();
    engine_->close();
  }
  // As `run` where something goes wrong: whether this stage learned of it.
  bool run_and_fail() {
    bool told = false;
    try {
      run();
    } catch (const TransferError&) {
      told = true;
    } catch (const std::exception& error) {
      told = true;
      engine_->give_up(error.what());
    }
    engine_->close();
    compute_.synchronize();
    return told;
  }
  int wrong() const { return wrong_; }

 private:
  void forward(int m) {
    if (incoming_.count("F") != 0) receive(*incoming_["F"], m);
    if (outgoing_.count("F") != 0) send(*outgoing_["F"], m);
  }
  void backward(int m) {
    if (incoming_.count("B") != 0) receive(*incoming_["B"], m);
    if (outgoing_.count("B") != 0) send(*outgoing_["B"], m);
  }

  void send(DeviceOutgoing& end, int m) {
    const Expected expected(end.edge().name(), m, seed_);
    Sent sent{std::numeric_limits<std::int64_t>::max(), {}};
    std::vector<std::uintptr_t> addresses;
    for (const std::int64_t size : expected.sizes) {
      auto tensor = std::make_unique<Bytes>(static_cast<std::size_t>(size));
      addresses.push_back(reinterpret_cast<std::uintptr_t>(tensor->data()));
      twin_->launch(compute_.get(), [bytes = tensor.get(), first = expected.first] {
        for (std::size_t i = 0; i < bytes->size(); ++i) (*bytes)[i] = static_cast<unsigned char>(first + i);
      });
      sent.tensors.push_back(std::move(tensor));
    }
    auto& held = held_[&end];
    held.push_back(std::move(sent));
    held.back().sequence = end.send(m, expected.layout(), addresses, compute_.get());
    // As the caching allocator would: memory that is free is used for something else at once.
    for (const std::int64_t done = end.completed(); !held.empty() && held.front().sequence <= done; held.pop_front())
      for (auto& tensor : held.front().tensors) std::fill(tensor->begin(), tensor->end(), 0xee);
  }

  void receive(DeviceIncoming& end, int m) {
    const Expected expected(end.edge().name(), m, seed_);
    Arrival arrival = end.take(m, compute_.get());
    if (arrival.layout->packed != expected.layout()->packed) {
      ++wrong_;
      return;
    }
    for (std::size_t i = 0; i < expected.sizes.size(); ++i) {
      auto copy = std::make_shared<Bytes>(static_cast<std::size_t>(expected.sizes[i]));
      twin_->copy(compute_.get(), copy->data(),
                  reinterpret_cast<const char*>(arrival.address) + arrival.layout->offsets[i], copy->size());
      twin_->launch(compute_.get(), [this, copy, first = expected.first] {
        for (std::size_t at = 0; at < copy->size(); ++at)
          if ((*copy)[at] != static_cast<unsigned char>(first + at)) return void(++wrong_);
      });
    }
  }

  struct Sent {
    std::int64_t sequence;
    std::vector<std::unique_ptr<Bytes>> tensors;
  };
  std::shared_ptr<HostTwin> twin_;
  const std::function<void(int)> trouble_;
  const int number_;
  const std::uint64_t seed_;
  std::mt19937_64 random_;
  StreamHandle compute_;
  std::map<DeviceOutgoing*, std::deque<Sent>> held_;
  std::shared_ptr<DeviceEngine> engine_;
  std::map<std::string, DeviceOutgoing*> outgoing_;
  std::map<std::string, DeviceIncoming*> incoming_;
  std::atomic<int> wrong_{0};
};

void link(const Edge& edge, std::vector<std::unique_ptr<Stage>>& stages, const std::shared_ptr<FakeNccl>& nccl,
          const std::string& mode) {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) std::perror("socketpair"), std::exit(2);
  Stage& sender = *stages[static_cast<std::size_t>(edge.sender)];
  Stage& receiver = *stages[static_cast<std::size_t>(edge.receiver)];
  const LaneOptions from = sender.engine().lane_options(0), to = receiver.engine().lane_options(0);
  if (mode.substr(0, 3) == "ipc") {
    sender.add_outgoing(edge, fds[0], make_push_sender(from, Reach::host, make_copy_mover(from.ops)));
    receiver.add_incoming(edge, fds[1], make_push_receiver(to, Reach::host, "copy"));
    return;
  }
  NcclLaneOptions options;
  nccl->unique_id(&options.id);
  options.register_buffers = mode == "nccl-registered";
  sender.add_outgoing(edge, fds[0], make_nccl_sender(nccl, from, options));
  receiver.add_incoming(edge, fds[1], make_nccl_receiver(nccl, to, options));
}

using Stages = std::vector<std::unique_ptr<Stage>>;

Stages make_stages(const std::string& mode, std::uint64_t seed, const std::shared_ptr<HostTwin>& twin,
                   const std::shared_ptr<FakeNccl>& nccl) {
  Stages stages;
  std::mt19937_64 random(seed);
  const bool fails = mode.find("-fails") != std::string::npos, link_down = mode[0] == 'n' && random() % 2 == 0;
  const int culprit = static_cast<int>(random() % kStages), when = static_cast<int>(random() % kMessages);
  for (int i = 0; i < kStages; ++i) {
    std::function<void(int)> trouble;
    if (fails && i == culprit)
      trouble = [=](int m) {
        if (m != when) return;
        if (!link_down) throw std::runtime_error("as planned");
        nccl->hold(true);
      };
    stages.push_back(std::make_unique<Stage>(twin, i, seed, fails ? 0.5 : 60.0, std::move(trouble)));
  }
  for (int i = 0; i + 1 < kStages; ++i) {
    link({"F", i, i + 1}, stages, nccl, mode);
    link({"B", i + 1, i}, stages, nccl, mode);
  }
  return stages;
}

int run_round(const std::string& mode, std::uint64_t seed, int lose_every) {
  const auto twin = std::make_shared<HostTwin>(kMaxDelayUs, seed);
  const auto nccl = std::make_shared<FakeNccl>(twin, 23203);
  if (mode == "nccl-background") nccl->set_background(3);
  const bool fails = mode.find("-fails") != std::string::npos;
  Stages stages = make_stages(mode, seed, twin, nccl);
  if (lose_every > 0) twin->lose_waits(lose_every);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (const auto& stage : stages)
    threads.emplace_back([&] {
      if (!fails) return stage->run();
      if (!stage->run_and_fail()) ++wrong;
    });
  for (std::thread& thread : threads) thread.join();
  for (const auto& stage : stages) wrong += fails ? 0 : stage->wrong();  // what was cut off arrives as it likes
  stages.clear();
  const auto expect = [&](bool fine, const std::string& text) {
    if (fine) return;
    std::printf("%s\n", text.c_str());
    ++wrong;
  };
  expect(nccl->misuse().empty(), "NCCL's rules: " + nccl->misuse());
  expect(twin->misuse().empty(), "CUDA's rules for handles: " + twin->misuse());
  expect(nccl->alive() == 0, concat(nccl->alive(), " communicators were left"));
  expect(fails || nccl->aborts() == 0, concat(nccl->aborts(), " communicators were aborted"));
  expect(nccl->issuing_threads() <= 1, "several threads issued");
  expect(twin->allocated() == 0, concat(twin->allocated(), " buffers were left"));
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return std::fprintf(stderr, "usage: device_stress MODE ROUNDS SEED [LOSE_EVERY]\n"), 2;
  const int rounds = std::atoi(argv[2]);
  const auto seed = std::strtoull(argv[3], nullptr, 10);
  int wrong = 0;
  for (int round = 0; round < rounds; ++round)
    wrong += run_round(argv[1], seed + static_cast<std::uint64_t>(round), argc > 4 ? std::atoi(argv[4]) : 0);
  std::printf("%s: %d rounds, %d wrong\n", argv[1], rounds, wrong);
  return wrong == 0 ? 0 : 1;
}
