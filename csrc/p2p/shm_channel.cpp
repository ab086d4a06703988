#include "p2p/shm_channel.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

// tests/cpp/p2p_stress.cpp breaks these one by one, to show that it would notice.
#ifndef PACI_RT_P2P_PUBLISH
#define PACI_RT_P2P_PUBLISH std::memory_order_seq_cst
#endif
#ifndef PACI_RT_P2P_RETURN
#define PACI_RT_P2P_RETURN std::memory_order_release
#endif
#ifndef PACI_RT_P2P_CREDITS
#define PACI_RT_P2P_CREDITS(slots) (slots)
#endif

namespace paci_rt {

namespace {

constexpr std::int64_t kInlineBytes = 4096 + 512;  // 4 KiB and the description of a few tensors
constexpr std::int64_t kTrimEvery = 256;           // messages
constexpr std::int64_t kMostHeld = std::int64_t{1} << 20;

constexpr std::int64_t align_up(std::int64_t bytes) {
  return (bytes + Layout::kAlign - 1) / Layout::kAlign * Layout::kAlign;
}

// One message between send and take. Its body is the description, where that is a new one, and the tensors.
struct alignas(64) Descriptor {
  std::int64_t sequence;
  std::int64_t index;
  std::int64_t description_bytes;  // 0: as before
  std::int64_t bytes;              // of the body
  std::int64_t offset;             // of the buffer that holds the body
  std::int32_t buffer;             // its number; -1: the body is below
  alignas(64) char body[kInlineBytes];
};

using Word = std::atomic<std::uint32_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 4, "words are futexes, shared between processes");

}  // namespace

// Each side writes its own words only. They count messages modulo 2^32 and are futexes at the same time.
//
// Waking without a lost wake-up: the one side sets `..._waits` and then reads the word; the other writes the word and
// then reads `..._waits`. All four are sequentially consistent, so one of the two sees the other.
struct ShmChannel {
  std::int64_t slots;
  std::int64_t buffers;

  alignas(64) Word sent{0};  // the sender's
  Word sender_waits{0};

  alignas(64) Word taken{0};  // the receiver's
  Word receiver_waits{0};
  alignas(64) Word returned{0};  // buffers that it gave back, in `returns()`

  Descriptor* descriptors() { return reinterpret_cast<Descriptor*>(this + 1); }
  Descriptor& descriptor(std::int64_t sequence) { return descriptors()[sequence % slots]; }
  std::int32_t* returns() { return reinterpret_cast<std::int32_t*>(descriptors() + slots); }

  static std::int64_t bytes(std::int64_t slots, std::int64_t buffers) {
    return static_cast<std::int64_t>(sizeof(ShmChannel)) + slots * static_cast<std::int64_t>(sizeof(Descriptor)) +
           buffers * static_cast<std::int64_t>(sizeof(std::int32_t));
  }
};

namespace {

// The other side's 64-bit count from its word, which is at most 2^31 away from ours.
std::int64_t extend(std::int64_t ours, std::uint32_t word) {
  return ours + static_cast<std::int32_t>(word - static_cast<std::uint32_t>(ours));
}

// Sleeps on `word` until `ready`. `look` throws where nothing is to be hoped for; its argument is false before the
// first sleep, when asking the system how the other process is would only cost time.
template <typename Ready, typename Look>
void sleep_until(Word& word, Word* waits, double timeout_s, const Ready& ready, const Look& look) {
  const std::int64_t start = now_ns();
  const double slice_s = kSliceMs / 1000.0;
  bool slept = false;
  for (;;) {
    if (waits != nullptr) waits->store(1);
    const std::uint32_t value = word.load();
    if (ready()) break;
    const double waited_s = seconds_since(start);
    look(slept, waited_s);
    const double left_s = std::min(slice_s, timeout_s - waited_s);
    futex_wait(word, value, std::max(1, static_cast<int>(left_s * 1000)));
    slept = true;
  }
  if (waits != nullptr) waits->store(0);
}

}  // namespace

// --- the sender ---

ShmOutgoing::ShmOutgoing(Edge edge, Options options, std::shared_ptr<ShmSegment> own, std::shared_ptr<ShmSegment> peer,
                         std::int64_t held, std::shared_ptr<Copier> copier)
    : Outgoing(std::move(edge), std::move(options)),
      own_(std::move(own)),
      peer_(std::move(peer)),
      copier_(std::move(copier)) {
  check_value(held >= 0 && held <= kMostHeld, "held is ", held, ": the receiver keeps 0 to ", kMostHeld, " buffers");
  const std::int64_t buffers = slots() + held;
  const std::string what = concat("channel ", edge_.name());
  const std::int64_t offset = own_->allocate(ShmChannel::bytes(slots(), buffers), what);
  channel_ = new (own_->at(offset)) ShmChannel{slots(), buffers};
  own_->publish(edge_.name(), offset);
  events_->note(Moment::open, kNone, kNone, kNone, kNone);
}

// A message that is about to be copied to `to` and then published.
struct ShmOutgoing::Copy {
  std::int64_t sequence;
  std::int64_t index;
  std::int64_t bytes;
  char* to;
  std::shared_ptr<const Layout> layout;
  std::vector<std::uintptr_t> addresses;
};

ShmOutgoing::~ShmOutgoing() { flush(); }

bool ShmOutgoing::has_room() { return extend(sent_, channel_->taken.load()) > sent_ - PACI_RT_P2P_CREDITS(slots()); }

Progress ShmOutgoing::progress() const { return {copied_.load() - 1, extend(sent_, channel_->taken.load()) - 1}; }

void ShmOutgoing::wait_for_credit(std::int64_t index, std::int64_t bytes) {
  if (has_room()) return;
  const Waiting waiting = waiting_for(index, sent_ % slots(), bytes, "");
  events_->note(Moment::wait, sent_, index, waiting.slot, bytes);
  sleep_until(
      channel_->taken, &channel_->sender_waits, timeout_s(), [this] { return has_room(); },
      [&](bool look, double waited_s) {
        const std::string why = peer_->lost(concat("stage ", peer()), look);
        if (!why.empty() && !has_room()) lose(waiting, why);
        if (waited_s >= timeout_s()) {
          Waiting full = waiting;
          full.doing = concat("slot ", waiting.slot, " still holds message ", sent_ - slots());
          time_out(full, waited_s);
        }
        if (look && options_.poll) options_.poll();
      });
}

std::int64_t ShmOutgoing::send(std::int64_t index, std::shared_ptr<const Layout> layout,
                               const std::vector<std::uintptr_t>& addresses, Stream stream) {
  stream.require_supported();
  check_value(!closed_, "channel ", edge_.name(), " is closed");
  check_value(addresses.size() == layout->tensors.size(), addresses.size(), " addresses for ", layout->tensors.size(),
              " tensors");
  if (peer_->failed()) lose(waiting_for(index, kNone, layout->bytes, ""), peer_->lost("", false));
  const bool fresh = layout_ == nullptr || (layout != layout_ && layout->packed != layout_->packed);
  const std::int64_t description_bytes = fresh ? static_cast<std::int64_t>(layout->packed.size()) : 0;
  const std::int64_t bytes = align_up(description_bytes) + layout->bytes;
  wait_for_credit(index, bytes);

  // The message that was in this slot before has been taken, hence copied: what the copier wrote there is over.
  const bool behind_copies = copied_.load(std::memory_order_acquire) != sent_;
  Descriptor& message = channel_->descriptor(sent_);
  message.buffer = bytes <= kInlineBytes ? -1 : pick_buffer(bytes);
  message.sequence = sent_;
  message.index = index;
  message.description_bytes = description_bytes;
  message.bytes = bytes;
  char* body = message.body;
  if (message.buffer >= 0) {
    message.offset = buffers_[static_cast<std::size_t>(message.buffer)].offset;
    body = own_->at(message.offset);
  }
  if (fresh) std::memcpy(body, layout->packed.data(), layout->packed.size());
  layout_ = std::move(layout);
  const std::int64_t sequence = sent_++;
  Copy copy{sequence, index, bytes, body + align_up(description_bytes), layout_, addresses};
  // Messages of a channel keep their order: behind one that is being copied, small ones wait as well.
  const bool beside = copier_ != nullptr && (bytes >= copier_->from_bytes() || behind_copies);
  if (beside) {
    copier_->hand_over([this, copy = std::move(copy)] { carry_out(copy); });
  } else {
    carry_out(copy);
  }
  if (sent_ % kTrimEvery == 0) trim();
  return sequence;
}

void ShmOutgoing::carry_out(const Copy& copy) {
  for (std::size_t at = 0; at < copy.addresses.size(); ++at) {
    const std::int64_t size = copy.layout->tensors[at].bytes();
    if (size == 0) continue;
    std::memcpy(copy.to + copy.layout->offsets[at], reinterpret_cast<const void*>(copy.addresses[at]),
                static_cast<std::size_t>(size));
  }
  events_->note(Moment::send, copy.sequence, copy.index, copy.sequence % slots(), copy.bytes);
  channel_->sent.store(static_cast<std::uint32_t>(copy.sequence + 1), PACI_RT_P2P_PUBLISH);
  copied_.store(copy.sequence + 1, std::memory_order_release);
  if (channel_->receiver_waits.load() != 0) futex_wake(channel_->sent);
}

void ShmOutgoing::flush() {
  if (copied_.load() != sent_) copier_->wait();
}

std::int32_t ShmOutgoing::pick_buffer(std::int64_t bytes) {
  for (const std::uint32_t returned = channel_->returned.load(std::memory_order_acquire); collected_ != returned;
       ++collected_)
    free_.push_back(channel_->returns()[collected_ % static_cast<std::uint32_t>(channel_->buffers)]);
  const std::string what = concat("messages of ", bytes, " bytes on edge ", edge_.name());
  if (free_.empty()) {
    // The credit that was waited for says that there is another one.
    if (static_cast<std::int64_t>(buffers_.size()) >= channel_->buffers)
      throw OrderError(concat("channel ", edge_.name(), ": all ", channel_->buffers, " buffers are out"));
    const std::int64_t offset = own_->allocate(bytes, what);
    buffers_.push_back({offset, bytes});
    least_free_ = 0;
    return static_cast<std::int32_t>(buffers_.size()) - 1;
  }
  auto found = std::find_if(free_.rbegin(), free_.rend(), [&](std::int32_t number) {
    return buffers_[static_cast<std::size_t>(number)].bytes >= bytes;
  });
  if (found == free_.rend()) found = free_.rbegin();
  const std::int32_t number = *found;
  free_.erase(std::next(found).base());
  least_free_ = std::min(least_free_, free_.size());
  Buffer& buffer = buffers_[static_cast<std::size_t>(number)];
  if (buffer.bytes < bytes) {
    // With room to spare where sizes change, so that sizes that grow slowly do not make each message allocate.
    const std::int64_t enough = buffer.bytes == 0 ? bytes : bytes + bytes / 8;
    if (buffer.bytes > 0) own_->release(buffer.offset, buffer.bytes);
    buffer = {};
    try {
      buffer = {own_->allocate(enough, what), enough};
    } catch (...) {
      free_.push_back(number);
      throw;
    }
  }
  return number;
}

// Buffers that have long been idle go back to the system: once in a while the receiver holds many.
void ShmOutgoing::trim() {
  for (std::size_t at = 0; at < std::min(least_free_, free_.size()); ++at) {
    Buffer& buffer = buffers_[static_cast<std::size_t>(free_[at])];
    if (buffer.bytes > 0) own_->release(buffer.offset, buffer.bytes);
    buffer = {};
  }
  least_free_ = free_.size();
}

void ShmOutgoing::wake() { futex_wake(channel_->sent); }

void ShmOutgoing::close() {
  if (closed_) return;
  closed_ = true;
  flush();
  events_->note(Moment::close, kNone, kNone, kNone, kNone);
  wake();
}

// --- the receiver ---

struct ShmIncoming::State {
  std::shared_ptr<ShmSegment> peer;
  std::shared_ptr<EventRing> events;
  ShmChannel* channel = nullptr;
  pid_t process = getpid();
  std::atomic<std::int64_t> held{0};
  std::mutex mutex;  // of `returned` and the entries behind it: tensors die on any thread

  void give_back(std::int32_t buffer) {
    const std::lock_guard<std::mutex> lock(mutex);
    const std::uint32_t count = channel->returned.load(std::memory_order_relaxed);
    channel->returns()[count % static_cast<std::uint32_t>(channel->buffers)] = buffer;
    channel->returned.store(count + 1, PACI_RT_P2P_RETURN);
  }
};

namespace {

std::shared_ptr<void> private_copy(const char* from, std::int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, Layout::kAlign, static_cast<std::size_t>(bytes)) != 0) throw std::bad_alloc();
  std::memcpy(memory, from, static_cast<std::size_t>(bytes));
  return {memory, std::free};
}

}  // namespace

ShmIncoming::ShmIncoming(Edge edge, Options options, std::shared_ptr<ShmSegment> peer)
    : Incoming(std::move(edge), std::move(options)), state_(std::make_shared<State>()) {
  state_->peer = std::move(peer);
  state_->events = events_;
  events_->note(Moment::open, kNone, kNone, kNone, kNone);
}

bool ShmIncoming::find_channel() {
  if (state_->channel != nullptr) return true;
  const std::int64_t offset = state_->peer->find(edge_.name());
  if (offset >= 0) state_->channel = reinterpret_cast<ShmChannel*>(state_->peer->at(offset));
  return offset >= 0;
}

bool ShmIncoming::arrived() {
  return find_channel() && state_->channel->sent.load() != static_cast<std::uint32_t>(taken_);
}

bool ShmIncoming::ready() { return arrived(); }
std::int64_t ShmIncoming::held() const { return state_->held.load(); }

Progress ShmIncoming::progress() const {
  const std::int64_t sent = state_->channel == nullptr ? 0 : extend(taken_, state_->channel->sent.load());
  return {sent - 1, taken_ - 1};
}

void ShmIncoming::wait_for_message(std::int64_t index) {
  if (arrived()) return;
  const Waiting waiting = waiting_for(index, taken_ % slots(), layout_ == nullptr ? kUnknown : layout_->bytes, "");
  events_->note(Moment::wait, taken_, index, waiting.slot, waiting.bytes);
  const auto look = [&](bool look_closely, double waited_s) {
    const std::string why = state_->peer->lost(concat("stage ", peer()), look_closely);
    if (!why.empty() && !arrived()) lose(waiting, why);  // what it sent before is still good
    if (waited_s >= timeout_s()) {
      Waiting missing = waiting;
      missing.doing = "no message has arrived";
      time_out(missing, waited_s);
    }
    if (look_closely && options_.poll) options_.poll();
  };
  // The first send makes the channel.
  if (!find_channel())
    sleep_until(state_->peer->channels_word(), nullptr, timeout_s(), [this] { return find_channel(); }, look);
  sleep_until(state_->channel->sent, &state_->channel->receiver_waits, timeout_s(), [this] { return arrived(); }, look);
}

Arrival ShmIncoming::take(std::int64_t index, Stream stream) {
  stream.require_supported();
  check_value(!closed_, "channel ", edge_.name(), " is closed");
  wait_for_message(index);
  State& state = *state_;
  ShmChannel& channel = *state.channel;
  const Descriptor& message = channel.descriptor(taken_);
  if (message.sequence != taken_ || message.index != index)
    throw OrderError(concat("channel ", edge_.name(), ": message ", message.index, " (sequence ", message.sequence,
                            ") arrived where message ", index, " (sequence ", taken_, ") was due"));
  const char* body = message.buffer < 0 ? message.body : state.peer->at(message.offset);
  if (message.description_bytes > 0)
    layout_ = Layout::parse({body, static_cast<std::size_t>(message.description_bytes)});
  body += align_up(message.description_bytes);

  Arrival arrival{taken_, index, taken_ % channel.slots, layout_, 0, nullptr};
  // The receiver alone adds to `held`, so that it cannot pass the limit behind its back.
  const bool lend = message.buffer >= 0 && layout_->bytes > 0 && state.held.load() < channel.buffers - channel.slots;
  if (lend) {
    state.held.fetch_add(1);
    const auto give_back = [shared = state_, buffer = message.buffer, sequence = taken_, slot = arrival.slot,
                            bytes = message.bytes](void*) {
      if (getpid() != shared->process) return;  // a child of fork() has copies of the tensors, but not this task
      shared->give_back(buffer);
      shared->held.fetch_sub(1);
      shared->events->note(Moment::release, sequence, kNone, slot, bytes);
    };
    arrival.lease = {const_cast<char*>(body), give_back};
  } else {
    if (layout_->bytes > 0) arrival.lease = private_copy(body, layout_->bytes);
    if (message.buffer >= 0) {
      events_->note(Moment::copy, taken_, index, arrival.slot, message.bytes);
      state.give_back(message.buffer);
    }
  }
  arrival.address = reinterpret_cast<std::uintptr_t>(arrival.lease.get());
  events_->note(Moment::take, taken_, index, arrival.slot, message.bytes);
  ++taken_;
  channel.taken.store(static_cast<std::uint32_t>(taken_));
  if (channel.sender_waits.load() != 0) futex_wake(channel.taken);
  return arrival;
}

void ShmIncoming::wake() {
  if (find_channel()) futex_wake(state_->channel->taken);
}

void ShmIncoming::close() {
  if (closed_) return;
  closed_ = true;
  events_->note(Moment::close, kNone, kNone, kNone, kNone);
  wake();
}

}  // namespace paci_rt
