#include "p2p/device_channel.hpp"

#include "p2p/device_engine.hpp"

namespace paci_rt {

// --- both ends ---

template <typename Base, typename LaneOfBase>
DeviceEnd<Base, LaneOfBase>::DeviceEnd(DeviceEngine& engine, Edge edge, Options options,
                                       std::unique_ptr<ControlLink> link, std::unique_ptr<LaneOfBase> lane)
    : Base(std::move(edge), std::move(options)),
      engine_(engine),
      state_(std::move(link), Event(engine.ops_, engine.device_)),
      lane_(std::move(lane)) {}

template <typename Base, typename LaneOfBase>
void DeviceEnd<Base, LaneOfBase>::close() {
  engine_.close();
}

template <typename Base, typename LaneOfBase>
void DeviceEnd<Base, LaneOfBase>::capture(std::int64_t index, std::shared_ptr<const Layout> layout,
                                          const std::vector<std::uintptr_t>& addresses, Stream stream) {
  engine_.check();
  check_value(engine_.ops_->capturing(stream), "edge ", this->edge().name(),
              ": no CUDA graph is being recorded on stream ", stream.handle);
  {
    const std::lock_guard<std::mutex> lock(engine_.mutex_);
    const std::string blocked = in_the_way();
    if (!blocked.empty()) throw OrderError(concat("edge ", this->edge().name(), ": ", blocked));
  }
  const std::lock_guard<std::mutex> issuing(engine_.issue_mutex_);
  check_value(lane_ != nullptr, "edge ", this->edge().name(), " is closed: make a new transport");
  lane_->capture({kNone, index, kNone, std::move(layout), addresses}, stream);
}

template <typename Base, typename LaneOfBase>
template <typename Work>
void DeviceEnd<Base, LaneOfBase>::put_on_stream(std::unique_lock<std::mutex>& lock, const Transfer& transfer,
                                                const Work& work) {
  Event done = engine_.take_event();
  issuing_ = true;
  lock.unlock();
  try {
    const std::lock_guard<std::mutex> issuing(engine_.issue_mutex_);
    work();
    done.record(lane_->stream());
  } catch (...) {
    lock.lock();
    issuing_ = false;
    throw;
  }
  const std::int64_t bytes = transfer.layout->bytes;
  this->events_->note(Moment::post, transfer.sequence, transfer.index, transfer.slot, bytes);
  lock.lock();
  issuing_ = false;
  in_flight_.push_back({transfer.sequence, transfer.index, transfer.slot, bytes, now_ns(), std::move(done)});
  engine_.watch_.notify_all();
}

template <typename Base, typename LaneOfBase>
void DeviceEnd<Base, LaneOfBase>::poll_done() {
  if (engine_.failure_) {
    // What is still on the device may touch memory, and is waited for before that is given back.
    drop_queued();
    try {
      while (!in_flight_.empty() && in_flight_.front().done.done()) in_flight_.pop_front();
    } catch (const std::exception&) {  // the device itself has failed, and does nothing any more
      in_flight_.clear();
    }
    return;
  }
  while (!in_flight_.empty() && in_flight_.front().done.done()) {
    InFlight first = std::move(in_flight_.front());
    in_flight_.pop_front();
    on_done(first);
    engine_.give_event(std::move(first.done));
  }
}

template <typename Base, typename LaneOfBase>
void DeviceEnd<Base, LaneOfBase>::check_deadline() {
  if (in_flight_.empty()) return;
  const InFlight& first = in_flight_.front();
  const double age_s = seconds_since(first.issued_ns);
  if (age_s > this->timeout_s())
    this->time_out(this->waiting_for(first.index, first.slot, first.bytes, overdue()), age_s);
}

template class DeviceEnd<Outgoing, SendLane>;
template class DeviceEnd<Incoming, RecvLane>;

// --- sending ---

DeviceOutgoing::DeviceOutgoing(DeviceEngine& engine, Edge edge, Options options, std::unique_ptr<ControlLink> link,
                               std::unique_ptr<SendLane> lane)
    : DeviceEnd(engine, std::move(edge), std::move(options), std::move(link), std::move(lane)),
      vacant_(static_cast<std::size_t>(slots()), true) {}

std::int64_t DeviceOutgoing::send(std::int64_t index, std::shared_ptr<const Layout> layout,
                                  const std::vector<std::uintptr_t>& addresses, Stream stream) {
  check_value(addresses.size() == layout->tensors.size(), addresses.size(), " addresses for ", layout->tensors.size(),
              " tensors: give one for each, 0 for absent ones");
  engine_.check();
  const std::int64_t bytes = layout->bytes;
  std::unique_lock<std::mutex> lock(engine_.mutex_);
  Event ready = engine_.take_event();
  ready.record(stream);
  const std::int64_t sequence = next_++;
  layout_ = layout;
  last_index_ = index;
  pending_.push_back({{sequence, index, sequence % slots(), std::move(layout), addresses}, std::move(ready)});
  lock.unlock();
  events_->note(Moment::send, sequence, index, sequence % slots(), bytes);
  engine_.wake();
  return sequence;
}

bool DeviceOutgoing::advance(std::unique_lock<std::mutex>& lock) {
  if (idle() && told_ != completed_) {
    told_ = completed_;
    state_.link->queue({FrameType::done, 0, 0, told_, 0, {}});
  }
  if (pending_.empty() || issuing_ || state_.phase != LinkState::Phase::ready) return false;
  {
    const Transfer& next = pending_.front().transfer;
    if (!vacant_[static_cast<std::size_t>(next.slot)]) return false;
    if (!lane_->ready(next.slot, next.layout->bytes, *state_.link)) return false;
  }
  Pending message = std::move(pending_.front());
  pending_.pop_front();
  const Transfer& transfer = message.transfer;
  vacant_[static_cast<std::size_t>(transfer.slot)] = false;
  put_on_stream(lock, transfer, [&] {
    message.ready.block(lane_->stream());
    lane_->issue(transfer);
  });
  const bool changed = announced_ == nullptr || announced_->packed != transfer.layout->packed;
  state_.link->queue({FrameType::issue, transfer.sequence, transfer.index, completed_, changed ? 1 : 0,
                      changed ? transfer.layout->packed : std::string()});
  announced_ = transfer.layout;
  told_ = completed_;
  engine_.give_event(std::move(message.ready));
  return true;
}

void DeviceOutgoing::on_frame(const Frame& frame) {
  check_value(frame.type == FrameType::vacant && frame.a >= 0 && frame.a < slots(), "edge ", edge().name(),
              ": the other side sent what only a sender sends: both need the same version of paci_rt");
  vacant_[static_cast<std::size_t>(frame.a)] = true;
  peer_taken_ = frame.c;
}

void DeviceOutgoing::on_done(const InFlight& transfer) {
  completed_ = transfer.sequence;
  events_->note(Moment::release, transfer.sequence, transfer.index, transfer.slot, transfer.bytes);
  // The next message says so too; without one, it is what the other side would like to know of this one.
  if (idle()) engine_.wake();
}

const char* DeviceOutgoing::overdue() const {
  return "the message was issued, but has not left this device: either what computes it is not done, or the other side "
         "does not receive";
}

std::string DeviceOutgoing::in_the_way() const {
  const std::size_t waiting = pending_.size() + (issuing_ ? 1 : 0);
  if (waiting == 0) return {};
  return concat(waiting, " messages wait for a free slot of the receiver, and a CUDA graph cannot overtake them: ",
                "flush() on this side and take them on the other before both record");
}

std::int64_t DeviceOutgoing::completed() {
  const std::lock_guard<std::mutex> lock(engine_.mutex_);
  engine_.throw_if_failed();
  poll_done();
  return completed_;
}

void DeviceOutgoing::flush() {
  std::unique_lock<std::mutex> lock(engine_.mutex_);
  const std::int64_t start = now_ns(), last = next_ - 1;
  for (;;) {
    engine_.throw_if_failed();
    poll_done();
    if (completed_ >= last) return;
    try {
      check_flush(start);
    } catch (...) {
      const std::exception_ptr error = std::current_exception();
      lock.unlock();
      engine_.fail(error);
      throw;
    }
    // Nobody is told when a device is done, so it is asked.
    engine_.changed_.wait_for(lock, std::chrono::milliseconds(1));
    if (!engine_.options_.poll) continue;
    lock.unlock();
    engine_.options_.poll();
    lock.lock();
  }
}

void DeviceOutgoing::check_flush(std::int64_t start_ns) {
  const bool issued = pending_.empty();
  const std::int64_t index = issued && !in_flight_.empty() ? in_flight_.front().index
                             : issued                      ? last_index_
                                                           : pending_.front().transfer.index;
  const std::int64_t slot = (completed_ + 1) % slots();
  if (!issued && state_.bye)
    lose(waiting_for(index, slot, kNone, {}),
         concat("stage ", peer(), " has closed its transport and takes nothing any more"));
  const double waited_s = seconds_since(start_ns);
  if (waited_s > timeout_s())
    time_out(waiting_for(index, slot, layout_->bytes,
                         issued ? "the message has not left this device" : concat("slot ", slot, " is still full")),
             waited_s);
}

void DeviceOutgoing::join_captured(Stream stream) {
  engine_.check();
  const std::lock_guard<std::mutex> issuing(engine_.issue_mutex_);
  check_value(lane_ != nullptr, "edge ", edge().name(), " is closed: make a new transport");
  lane_->join_captured(stream);
}

// --- receiving ---

DeviceIncoming::DeviceIncoming(DeviceEngine& engine, Edge edge, Options options, std::unique_ptr<ControlLink> link,
                               std::unique_ptr<RecvLane> lane)
    : DeviceEnd(engine, std::move(edge), std::move(options), std::move(link), std::move(lane)),
      slots_(static_cast<std::size_t>(slots())) {}

bool DeviceIncoming::advance(std::unique_lock<std::mutex>& lock) {
  bool advanced = false;
  for (; !vacated_.empty(); vacated_.pop_front(), advanced = true)
    state_.link->queue({FrameType::vacant, vacated_.front(), 0, next_take_ - 1, 0, {}});
  if (announced_.empty() || state_.phase != LinkState::Phase::ready) return advanced;
  const Transfer transfer = announced_.front();
  if (at(transfer.slot).state != SlotState::vacant)
    throw OrderError(concat("edge ", edge().name(), ": message ", transfer.sequence, " was issued for slot ",
                            transfer.slot, ", which is not free: both sides need the same version of paci_rt"));
  announced_.pop_front();
  put_on_stream(lock, transfer, [&] { lane_->post(transfer); });
  at(transfer.slot) = {SlotState::posted, transfer};
  ++next_post_;
  engine_.changed_.notify_all();
  return true;
}

void DeviceIncoming::on_frame(const Frame& frame) {
  if (frame.type == FrameType::done) return void(peer_completed_ = frame.c);
  check_value(frame.type == FrameType::issue, "edge ", edge().name(),
              ": the other side sent what only a receiver sends: both need the same version of paci_rt");
  const std::int64_t due = next_post_ + static_cast<std::int64_t>(announced_.size()) + (issuing_ ? 1 : 0);
  if (frame.a != due)
    throw OrderError(concat("edge ", edge().name(), ": the message of sequence number ", frame.a,
                            " was issued where number ", due, " was due"));
  if (frame.d != 0 || layout_ == nullptr) layout_ = Layout::parse(frame.payload);
  peer_completed_ = frame.c;
  announced_.push_back({frame.a, frame.b, frame.a % slots(), layout_, {}});
}

void DeviceIncoming::on_done(const InFlight& transfer) {
  events_->note(Moment::arrive, transfer.sequence, transfer.index, transfer.slot, transfer.bytes);
}

const char* DeviceIncoming::overdue() const { return "the message was issued by the other side and has not arrived"; }

std::string DeviceIncoming::in_the_way() const {
  std::size_t untaken = announced_.size() + (issuing_ ? 1 : 0);
  for (const Slot& slot : slots_) untaken += slot.state == SlotState::posted ? 1 : 0;
  if (untaken == 0) return {};
  return concat(untaken, " messages have not been taken, and a CUDA graph cannot overtake them: ",
                "take them before both sides record");
}

bool DeviceIncoming::ready() {
  const std::lock_guard<std::mutex> lock(engine_.mutex_);
  engine_.throw_if_failed();
  const Slot& slot = at(next_take_ % slots());
  return slot.state == SlotState::posted && slot.transfer.sequence == next_take_;
}

Transfer DeviceIncoming::take_next(std::int64_t index) {
  std::unique_lock<std::mutex> lock(engine_.mutex_);
  try {
    wait_for_message(lock, index);
    Slot& slot = at(next_take_ % slots());
    if (slot.transfer.index != index)
      throw OrderError(concat("channel ", edge().name(), ": message ", slot.transfer.index, " (sequence ",
                              slot.transfer.sequence, ") arrived where message ", index, " was due"));
    slot.state = SlotState::taken;
    taken_layout_ = slot.transfer.layout;
    last_index_ = index;
    ++next_take_;
    return slot.transfer;
  } catch (const TransferError&) {
    engine_.fail_locked(std::current_exception());
    throw;
  } catch (const OrderError&) {
    engine_.fail_locked(std::current_exception());
    throw;
  }
}

Arrival DeviceIncoming::take(std::int64_t index, Stream stream) {
  engine_.check();
  const Transfer transfer = take_next(index);
  lane_->wait_arrived(transfer.slot, stream);
  events_->note(Moment::take, transfer.sequence, index, transfer.slot, transfer.layout->bytes);
  const auto release = [engine = engine_.shared_from_this(), this, slot = transfer.slot, stream](void*) {
    vacate(slot, stream);
  };
  return {transfer.sequence,
          index,
          transfer.slot,
          transfer.layout,
          lane_->address(transfer.slot),
          std::shared_ptr<void>(this, release)};
}

void DeviceIncoming::wait_for_message(std::unique_lock<std::mutex>& lock, std::int64_t index) {
  const std::int64_t start = now_ns();
  const std::int64_t number = next_take_ % slots();
  const Slot& slot = at(number);
  bool told = false;
  while (slot.state != SlotState::posted || slot.transfer.sequence != next_take_) {
    engine_.throw_if_failed();
    if (!told) events_->note(Moment::wait, next_take_, index, number, kNone);
    told = true;
    const std::int64_t bytes = taken_layout_ == nullptr ? kNone : taken_layout_->bytes;
    if (state_.bye && announced_.empty() && !issuing_)
      lose(waiting_for(index, number, bytes, {}),
           concat("stage ", peer(), " has closed its transport without sending this message"));
    const double waited_s = seconds_since(start);
    if (waited_s > timeout_s())
      time_out(waiting_for(index, number, bytes, concat("slot ", number, " is still empty: nothing was issued for it")),
               waited_s);
    engine_.wait(lock);
  }
}

// Called wherever the last copy of a lease goes: by any thread.
void DeviceIncoming::vacate(std::int64_t slot, Stream stream) noexcept {
  try {
    lane_->free(slot, stream);
    std::unique_lock<std::mutex> lock(engine_.mutex_);
    at(slot) = {};
    vacated_.push_back(slot);
    lock.unlock();
    engine_.wake();
  } catch (...) {
    engine_.fail(std::current_exception());
  }
}

std::int64_t DeviceIncoming::held() const {
  const std::lock_guard<std::mutex> lock(engine_.mutex_);
  std::int64_t count = 0;
  for (const Slot& slot : slots_) count += slot.state == SlotState::taken ? 1 : 0;
  return count;
}

const std::shared_ptr<DeviceOps>& DeviceIncoming::ops() const { return engine_.ops_; }

std::shared_ptr<const Layout> DeviceIncoming::layout() const {
  const std::lock_guard<std::mutex> lock(engine_.mutex_);
  return taken_layout_;
}

}  // namespace paci_rt
