#include "testing/fake_nccl.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace paci_rt {

struct FakeNccl::Call {
  bool sends = false;
  const void* from = nullptr;
  void* to = nullptr;
  std::size_t bytes = 0;
  int peer = 0;
  Comm* comm = nullptr;
  Stream stream;
  bool registered = false;
  bool done = false;
  std::string kept;  // of an eager send, whose buffer is the caller's again
};

// All ranks of one unique id.
struct FakeNccl::Clique {
  int ranks = 0, joined = 0, started = 0, finished = 0;
  struct Queues {
    std::deque<std::shared_ptr<Call>> sends, receives;
  };
  std::map<std::pair<int, int>, Queues> queues;  // by sender and receiver
};

struct FakeNccl::Comm {
  Clique* clique = nullptr;
  int rank = 0, device = -1;
  bool gone = false, aborted = false, finalizing = false, started = false;
  int polls_left = 0;
  std::vector<std::shared_ptr<Call>> waiting;  // to be issued in the background
  std::set<std::thread::id> issuers;
  std::map<const void*, std::size_t> registered;
};

struct FakeNccl::State {
  mutable std::mutex mutex;
  std::condition_variable changed;
  std::map<std::string, std::unique_ptr<Clique>> cliques;
  std::vector<std::unique_ptr<Comm>> comms;
  std::map<const void*, std::size_t> memory;
  NcclResult broken = NcclResult::success, init_result = NcclResult::success;
  bool held = false;
  std::size_t eager_bytes = 0;
  int background_polls = 0;
  std::int64_t ids = 0, matched = 0, aborts = 0;
  std::string misuse;
};

namespace {

struct Group {
  int depth = 0;
  std::vector<std::shared_ptr<void>> calls;
};
thread_local Group group;

}  // namespace

// NCCL makes calls of CUDA in these, and leaves the calling thread on the device that it found it on.
void FakeNccl::check_current(int device, const char* call) {
  const int current = HostTwin::current();
  if (current < 0) state_->misuse += concat(call, " came from a thread that has no device; ");
  if (current >= 0 && device >= 0 && current != device)
    state_->misuse += concat(call, " for device ", device, " came while ", current, " was current; ");
}

FakeNccl::FakeNccl(std::shared_ptr<HostTwin> twin, int version)
    : twin_(std::move(twin)), version_(version), state_(std::make_shared<State>()) {}

FakeNccl::~FakeNccl() {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  for (const auto& comm : state_->comms) comm->aborted = true;
  state_->changed.notify_all();
}

void FakeNccl::hold(bool on) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->held = on;
  if (on) return;
  for (const auto& [id, clique] : state_->cliques) {
    for (int from = 0; from < clique->ranks; ++from)
      for (int to = 0; to < clique->ranks; ++to) match(*state_, *clique, from, to);
  }
}

template <typename Work>
auto FakeNccl::locked(const Work& work) const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return work(*state_);
}

void FakeNccl::break_all(int result) {
  locked([&](State& state) { state.broken = NcclResult{result}; });
}

void FakeNccl::set_init_result(int result) {
  locked([&](State& state) { state.init_result = NcclResult{result}; });
}

void FakeNccl::set_eager_bytes(std::int64_t bytes) {
  locked([&](State& state) { state.eager_bytes = static_cast<std::size_t>(bytes); });
}

void FakeNccl::set_background(int polls) {
  locked([&](State& state) { state.background_polls = polls; });
}

std::int64_t FakeNccl::matched() const {
  return locked([](const State& state) { return state.matched; });
}

std::int64_t FakeNccl::registered() const {
  return locked([](const State& state) {
    std::size_t count = 0;
    for (const auto& comm : state.comms) count += comm->registered.size();
    return static_cast<std::int64_t>(count);
  });
}

std::int64_t FakeNccl::alive() const {
  return locked([](const State& state) {
    return std::count_if(state.comms.begin(), state.comms.end(), [](const auto& comm) { return !comm->gone; });
  });
}

std::int64_t FakeNccl::aborts() const {
  return locked([](const State& state) { return state.aborts; });
}

std::string FakeNccl::misuse() const {
  return locked([](const State& state) { return state.misuse; });
}

std::int64_t FakeNccl::issuing_threads() const {
  return locked([](const State& state) {
    std::size_t most = 0;
    for (const auto& comm : state.comms) most = std::max(most, comm->issuers.size());
    return static_cast<std::int64_t>(most);
  });
}

// --- communicators ---

NcclResult FakeNccl::unique_id(NcclUniqueId* id) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  const std::string text = concat("fake ", ++state_->ids);
  *id = {};
  std::memcpy(id->internal, text.data(), text.size());
  return NcclResult::success;
}

NcclResult FakeNccl::comm_init(NcclComm* comm, int ranks, const NcclUniqueId& id, int rank, int) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->init_result != NcclResult::success) return state_->init_result;
  if (rank < 0 || rank >= ranks) return NcclResult::invalid_argument;
  check_current(-1, "ncclCommInitRankConfig");
  auto& clique = state_->cliques[std::string(id.internal, sizeof id.internal)];
  if (clique == nullptr) clique = std::make_unique<Clique>();
  clique->ranks = ranks;
  ++clique->joined;
  auto made = std::make_unique<Comm>();
  made->clique = clique.get();
  made->rank = rank;
  made->device = HostTwin::current();
  made->polls_left = state_->background_polls;
  *comm = made.get();
  state_->comms.push_back(std::move(made));
  return NcclResult::in_progress;
}

NcclResult FakeNccl::comm_state(NcclComm handle, NcclResult* state) {
  auto* comm = static_cast<Comm*>(handle);
  std::unique_lock<std::mutex> lock(state_->mutex);
  if (comm->gone) {
    state_->misuse += "a communicator was asked for its state after its end; ";
    return NcclResult::invalid_argument;
  }
  *state = state_->broken;
  if (*state != NcclResult::success) return NcclResult::success;
  const bool joining = comm->clique->joined < comm->clique->ranks;
  const bool ending = comm->finalizing && comm->clique->finished < comm->clique->ranks;
  const bool connecting = comm->started && comm->clique->started < comm->clique->ranks;
  if (joining || ending || connecting || comm->polls_left-- > 0) {
    *state = NcclResult::in_progress;
    return NcclResult::success;
  }
  comm->polls_left = 0;
  std::vector<std::shared_ptr<Call>> calls = std::exchange(comm->waiting, {});
  lock.unlock();
  if (!calls.empty()) launch(comm, calls.front()->stream, calls);
  return NcclResult::success;
}

NcclResult FakeNccl::comm_finalize(NcclComm handle) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  auto* comm = static_cast<Comm*>(handle);
  check_current(comm->device, "ncclCommFinalize");
  if (!comm->registered.empty()) state_->misuse += "a communicator ended with buffers registered; ";
  if (!std::exchange(comm->finalizing, true)) ++comm->clique->finished;
  return NcclResult::in_progress;
}

NcclResult FakeNccl::comm_destroy(NcclComm handle) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  auto* comm = static_cast<Comm*>(handle);
  check_current(comm->device, "ncclCommDestroy");
  comm->gone = true;
  return NcclResult::success;
}

NcclResult FakeNccl::comm_abort(NcclComm handle) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  auto* comm = static_cast<Comm*>(handle);
  check_current(comm->device, "ncclCommAbort");
  if (comm->gone) state_->misuse += "a communicator was aborted twice; ";
  if (!std::exchange(comm->finalizing, true)) ++comm->clique->finished;
  comm->gone = comm->aborted = true;
  comm->registered.clear();
  ++state_->aborts;
  // What was not matched must not touch this side's memory any more.
  for (auto& [edge, queues] : comm->clique->queues) {
    for (auto* side : {&queues.sends, &queues.receives}) {
      for (auto it = side->begin(); it != side->end();) it = (*it)->comm == comm ? side->erase(it) : it + 1;
    }
  }
  state_->changed.notify_all();
  return NcclResult::success;
}

// --- calls ---

NcclResult FakeNccl::group_start() {
  ++group.depth;
  return NcclResult::success;
}

NcclResult FakeNccl::send(const void* buffer, std::size_t bytes, int peer, NcclComm comm, Stream stream) {
  Call call;
  call.sends = true, call.from = buffer, call.bytes = bytes, call.peer = peer, call.stream = stream;
  call.comm = static_cast<Comm*>(comm);
  return queue(std::move(call));
}

NcclResult FakeNccl::recv(void* buffer, std::size_t bytes, int peer, NcclComm comm, Stream stream) {
  Call call;
  call.to = buffer, call.bytes = bytes, call.peer = peer, call.stream = stream;
  call.comm = static_cast<Comm*>(comm);
  return queue(std::move(call));
}

NcclResult FakeNccl::queue(Call call) {
  if (group.depth == 0) return NcclResult::invalid_usage;  // NCCL allows it; the engine always groups
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    if (call.comm->gone) {
      state_->misuse += "a communicator was used after its end; ";
      return NcclResult::invalid_argument;
    }
    if (call.peer < 0 || call.peer >= call.comm->clique->ranks) return NcclResult::invalid_argument;
    if (call.comm->clique->joined < call.comm->clique->ranks) return NcclResult::invalid_usage;
    call.registered = is_registered(call.comm, call.sends ? call.from : call.to);
    call.comm->issuers.insert(std::this_thread::get_id());
  }
  group.calls.push_back(std::make_shared<Call>(std::move(call)));
  return NcclResult::success;
}

bool FakeNccl::is_registered(const Comm* comm, const void* buffer) const {
  for (const auto& [address, bytes] : comm->registered) {
    const auto* begin = static_cast<const char*>(address);
    if (buffer >= begin && buffer < begin + bytes) return true;
  }
  return false;
}

NcclResult FakeNccl::group_end() {
  if (group.depth == 0) return NcclResult::invalid_usage;
  if (--group.depth > 0) return NcclResult::success;
  std::map<Comm*, std::vector<std::shared_ptr<Call>>> by_comm;
  for (const auto& call : std::exchange(group.calls, {})) {
    auto typed = std::static_pointer_cast<Call>(call);
    by_comm[typed->comm].push_back(std::move(typed));
  }
  bool background = false;
  for (const auto& [comm, calls] : by_comm) {
    int halves = 0;
    for (const auto& call : calls) halves += call->peer == comm->rank ? (call->sends ? 1 : -1) : 0;
    if (halves != 0) return NcclResult::invalid_usage;  // one half of a transfer to oneself
    {
      const std::lock_guard<std::mutex> lock(state_->mutex);
      check_current(comm->device, "ncclGroupEnd");
      comm->polls_left = state_->background_polls;
      // Connections are made with the first calls, in the background, and take both sides.
      const bool first = !std::exchange(comm->started, true);
      comm->clique->started += first ? 1 : 0;
      if (comm->polls_left > 0 || (first && comm->clique->ranks > 1)) {
        comm->waiting = calls;
        background = true;
        continue;
      }
    }
    launch(comm, calls.front()->stream, calls);
  }
  return background ? NcclResult::in_progress : NcclResult::success;
}

void FakeNccl::launch(Comm* comm, Stream stream, const std::vector<std::shared_ptr<Call>>& calls) {
  twin_->launch(stream, [state = state_, comm, calls] { run(state, comm, calls); });
}

// On a worker of the twin: holds its stream until every call of the group is done, or the communicator is aborted.
void FakeNccl::run(const std::shared_ptr<State>& state, Comm* comm, std::vector<std::shared_ptr<Call>> calls) {
  std::unique_lock<std::mutex> lock(state->mutex);
  if (comm->aborted) return;
  Clique& clique = *comm->clique;
  for (const auto& call : calls) {
    const int from = call->sends ? comm->rank : call->peer, to = call->sends ? call->peer : comm->rank;
    auto& queues = clique.queues[{from, to}];
    (call->sends ? queues.sends : queues.receives).push_back(call);
    match(*state, clique, from, to);
    if (!call->done && call->sends && call->bytes <= state->eager_bytes) {
      call->kept.assign(static_cast<const char*>(call->from), call->bytes);
      call->from = nullptr;
      call->done = true;
    }
  }
  state->changed.wait(lock, [&] {
    if (comm->aborted) return true;
    for (const auto& call : calls)
      if (!call->done) return false;
    return true;
  });
}

void FakeNccl::match(State& state, Clique& clique, int from, int to) {
  auto& queues = clique.queues[{from, to}];
  while (!state.held && !queues.sends.empty() && !queues.receives.empty()) {
    const std::shared_ptr<Call> send = queues.sends.front(), receive = queues.receives.front();
    if (send->bytes != receive->bytes) {
      state.misuse += concat("a send of ", send->bytes, " bytes met a receive of ", receive->bytes, "; ");
      return;
    }
    if (send->registered != receive->registered) state.misuse += "one side of a transfer was registered only; ";
    if (send->bytes > 0) std::memcpy(receive->to, send->from ? send->from : send->kept.data(), send->bytes);
    queues.sends.pop_front();
    queues.receives.pop_front();
    send->done = receive->done = true;
    ++state.matched;
    state.changed.notify_all();
  }
}

// --- memory ---

NcclResult FakeNccl::mem_alloc(void** buffer, std::size_t bytes) {
  if (!features().mem_alloc) return NcclResult::invalid_usage;
  *buffer = std::malloc(bytes);
  const std::lock_guard<std::mutex> lock(state_->mutex);
  check_current(-1, "ncclMemAlloc");
  state_->memory[*buffer] = bytes;
  return NcclResult::success;
}

NcclResult FakeNccl::mem_free(void* buffer) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  check_current(-1, "ncclMemFree");
  if (state_->memory.erase(buffer) == 0) {
    state_->misuse += "memory was freed that was not allocated; ";
    return NcclResult::invalid_argument;
  }
  std::free(buffer);
  return NcclResult::success;
}

NcclResult FakeNccl::comm_register(NcclComm comm, void* buffer, std::size_t bytes, void** handle) {
  if (!features().mem_alloc) return NcclResult::invalid_usage;
  const std::lock_guard<std::mutex> lock(state_->mutex);
  const auto found = state_->memory.find(buffer);
  if (found == state_->memory.end() || found->second < bytes) return NcclResult::invalid_argument;
  static_cast<Comm*>(comm)->registered[buffer] = bytes;
  *handle = buffer;
  return NcclResult::success;
}

NcclResult FakeNccl::comm_deregister(NcclComm comm, void* handle) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return static_cast<Comm*>(comm)->registered.erase(handle) == 1 ? NcclResult::success : NcclResult::invalid_argument;
}

std::string FakeNccl::error_text(NcclResult result) const { return concat("fake error ", static_cast<int>(result)); }

}  // namespace paci_rt
