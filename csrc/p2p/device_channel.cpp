// The two ends of a channel of the device engine.
#include "p2p/device_engine.hpp"

namespace paci_rt {

// After a failure: what is still on the device may touch memory, and is waited for before that is given back.
void forget_done(std::deque<InFlight>& transfers) {
  try {
    while (!transfers.empty() && transfers.front().done.done()) transfers.pop_front();
  } catch (const std::exception&) {  // the device itself has failed, and does nothing any more
    transfers.clear();
  }
}

// --- sending ---

DeviceOutgoing::DeviceOutgoing(DeviceEngine& engine, Edge edge, Options options, std::unique_ptr<ControlLink> link,
                               std::unique_ptr<SendLane> lane)
    : Outgoing(std::move(edge), std::move(options)),
      engine_(engine),
      state_(std::move(link), Event(engine.ops_, engine.device_)),
      lane_(std::move(lane)),
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
  issuing_ = true;
  Event done = engine_.take_event();
  lock.unlock();
  try {
    const std::lock_guard<std::mutex> issuing(engine_.issue_mutex_);
    message.ready.block(lane_->stream());
    lane_->issue(transfer);
    done.record(lane_->stream());
  } catch (...) {
    lock.lock();
    issuing_ = false;
    throw;
  }
  events_->note(Moment::post, transfer.sequence, transfer.index, transfer.slot, transfer.layout->bytes);
  lock.lock();
  issuing_ = false;
  const bool changed = announced_ == nullptr || announced_->packed != transfer.layout->packed;
  state_.link->queue({FrameType::issue, transfer.sequence, transfer.index, completed_, changed ? 1 : 0,
                      changed ? transfer.layout->packed : std::string()});
  announced_ = transfer.layout;
  told_ = completed_;
  in_flight_.push_back(
      {transfer.sequence, transfer.index, transfer.slot, transfer.layout->bytes, now_ns(), std::move(done)});
  engine_.give_event(std::move(message.ready));
  engine_.watch_.notify_all();
  return true;
}

void DeviceOutgoing::on_frame(const Frame& frame) {
  check_value(frame.type == FrameType::vacant && frame.a >= 0 && frame.a < slots(), "edge ", edge().name(),
              ": the other side sent what only a sender sends: both need the same version of paci_rt");
  vacant_[static_cast<std::size_t>(frame.a)] = true;
  peer_taken_ = frame.c;
}

void DeviceOutgoing::poll_done() {
  if (engine_.failure_) {
    pending_.clear();
    return forget_done(in_flight_);
  }
  while (!in_flight_.empty() && in_flight_.front().done.done()) {
    InFlight& first = in_flight_.front();
    completed_ = first.sequence;
    events_->note(Moment::release, first.sequence, first.index, first.slot, first.bytes);
    engine_.give_event(std::move(first.done));
    in_flight_.pop_front();
    // The next message says so too; without one, it is what the other side would like to know of this one.
    if (idle()) engine_.wake();
  }
}

void DeviceOutgoing::check_deadline() {
  if (in_flight_.empty()) return;
  const InFlight& first = in_flight_.front();
  const double age_s = static_cast<double>(now_ns() - first.issued_ns) * 1e-9;
  if (age_s > timeout_s())
    time_out(waiting_for(first.index, first.slot, first.bytes,
                         "the message was issued, but has not left this device: either what computes it is not done, "
                         "or the other side does not receive"),
             age_s);
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
    const bool issued = pending_.empty();
    const std::int64_t index = issued && !in_flight_.empty() ? in_flight_.front().index
                               : issued                      ? last_index_
                                                             : pending_.front().transfer.index;
    const std::int64_t slot = (completed_ + 1) % slots();
    std::exception_ptr error;
    try {
      if (!issued && state_.bye)
        lose(waiting_for(index, slot, kNone, {}),
             concat("stage ", peer(), " has closed its transport and takes nothing any more"));
      const double waited_s = static_cast<double>(now_ns() - start) * 1e-9;
      if (waited_s > timeout_s())
        time_out(waiting_for(index, slot, layout_->bytes,
                             issued ? "the message has not left this device" : concat("slot ", slot, " is still full")),
                 waited_s);
    } catch (...) {
      error = std::current_exception();
    }
    if (error) {
      lock.unlock();
      engine_.fail(error);
      std::rethrow_exception(error);
    }
    // Nobody is told when a device is done, so it is asked.
    engine_.changed_.wait_for(lock, std::chrono::milliseconds(1));
    if (!engine_.options_.poll) continue;
    lock.unlock();
    engine_.options_.poll();
    lock.lock();
  }
}

Progress DeviceOutgoing::progress() const { return {completed_, peer_taken_}; }

void DeviceOutgoing::close() { engine_.close(); }

void DeviceOutgoing::capture(std::int64_t index, std::shared_ptr<const Layout> layout,
                             const std::vector<std::uintptr_t>& addresses, Stream stream) {
  engine_.check();
  check_value(engine_.ops_->capturing(stream), "edge ", edge().name(), ": no CUDA graph is being recorded on stream ",
              stream.handle);
  std::unique_lock<std::mutex> lock(engine_.mutex_);
  if (!pending_.empty() || issuing_)
    throw OrderError(concat("edge ", edge().name(), ": ", pending_.size() + (issuing_ ? 1 : 0),
                            " messages wait for a free slot of the receiver, and a CUDA graph cannot overtake them: ",
                            "flush() on this side and take them on the other before both record"));
  lock.unlock();
  const std::lock_guard<std::mutex> issuing(engine_.issue_mutex_);
  lane_->capture({kNone, index, kNone, std::move(layout), addresses}, stream);
}

void DeviceOutgoing::join_captured(Stream stream) {
  const std::lock_guard<std::mutex> issuing(engine_.issue_mutex_);
  lane_->join_captured(stream);
}

Endpoint::Waiting DeviceOutgoing::waiting_for(std::int64_t index, std::int64_t slot, std::int64_t bytes,
                                              std::string doing) const {
  return {edge().send_action(index), std::move(doing), index, slot, bytes};
}

// --- receiving ---

DeviceIncoming::DeviceIncoming(DeviceEngine& engine, Edge edge, Options options, std::unique_ptr<ControlLink> link,
                               std::unique_ptr<RecvLane> lane)
    : Incoming(std::move(edge), std::move(options)),
      engine_(engine),
      state_(std::move(link), Event(engine.ops_, engine.device_)),
      lane_(std::move(lane)),
      slots_(static_cast<std::size_t>(slots())) {}

bool DeviceIncoming::advance(std::unique_lock<std::mutex>& lock) {
  bool advanced = false;
  for (; !vacated_.empty(); vacated_.pop_front(), advanced = true)
    state_.link->queue({FrameType::vacant, vacated_.front(), 0, next_take_ - 1, 0, {}});
  if (announced_.empty() || state_.phase != LinkState::Phase::ready) return advanced;
  const Transfer transfer = announced_.front();
  Event done = engine_.take_event();
  if (at(transfer.slot).state != SlotState::vacant)
    throw OrderError(concat("edge ", edge().name(), ": message ", transfer.sequence, " was issued for slot ",
                            transfer.slot, ", which is not free: both sides need the same version of paci_rt"));
  announced_.pop_front();
  posting_ = true;
  lock.unlock();
  try {
    const std::lock_guard<std::mutex> issuing(engine_.issue_mutex_);
    lane_->post(transfer);
    done.record(lane_->stream());
  } catch (...) {
    lock.lock();
    posting_ = false;
    throw;
  }
  events_->note(Moment::post, transfer.sequence, transfer.index, transfer.slot, transfer.layout->bytes);
  lock.lock();
  posting_ = false;
  at(transfer.slot) = {SlotState::posted, transfer};
  in_flight_.push_back(
      {transfer.sequence, transfer.index, transfer.slot, transfer.layout->bytes, now_ns(), std::move(done)});
  ++next_post_;
  engine_.changed_.notify_all();
  engine_.watch_.notify_all();
  return true;
}

void DeviceIncoming::on_frame(const Frame& frame) {
  if (frame.type == FrameType::done) return void(peer_completed_ = frame.c);
  check_value(frame.type == FrameType::issue, "edge ", edge().name(),
              ": the other side sent what only a receiver sends: both need the same version of paci_rt");
  const std::int64_t due = next_post_ + static_cast<std::int64_t>(announced_.size()) + (posting_ ? 1 : 0);
  if (frame.a != due)
    throw OrderError(concat("edge ", edge().name(), ": the message of sequence number ", frame.a,
                            " was issued where number ", due, " was due"));
  if (frame.d != 0 || layout_ == nullptr) layout_ = Layout::parse(frame.payload);
  peer_completed_ = frame.c;
  announced_.push_back({frame.a, frame.b, frame.a % slots(), layout_, {}});
}

void DeviceIncoming::poll_done() {
  if (engine_.failure_) {
    announced_.clear();
    return forget_done(in_flight_);
  }
  while (!in_flight_.empty() && in_flight_.front().done.done()) {
    InFlight& first = in_flight_.front();
    events_->note(Moment::arrive, first.sequence, first.index, first.slot, first.bytes);
    engine_.give_event(std::move(first.done));
    in_flight_.pop_front();
  }
}

void DeviceIncoming::check_deadline() {
  if (in_flight_.empty()) return;
  const InFlight& first = in_flight_.front();
  const double age_s = static_cast<double>(now_ns() - first.issued_ns) * 1e-9;
  if (age_s > timeout_s())
    time_out(waiting_for(first.index, first.slot, first.bytes,
                         "the message was issued by the other side and has not arrived"),
             age_s);
}

bool DeviceIncoming::ready() {
  const std::lock_guard<std::mutex> lock(engine_.mutex_);
  engine_.throw_if_failed();
  const Slot& slot = at(next_take_ % slots());
  return slot.state == SlotState::posted && slot.transfer.sequence == next_take_;
}

Arrival DeviceIncoming::take(std::int64_t index, Stream stream) {
  engine_.check();
  std::unique_lock<std::mutex> lock(engine_.mutex_);
  try {
    wait_for_message(lock, index);
  } catch (const TransferError&) {
    lock.unlock();
    engine_.fail(std::current_exception());
    throw;
  }
  Slot& slot = at(next_take_ % slots());
  const Transfer transfer = slot.transfer;
  if (transfer.index != index) {
    const auto error = std::make_exception_ptr(
        OrderError(concat("channel ", edge().name(), ": message ", transfer.index, " (sequence ", transfer.sequence,
                          ") arrived where message ", index, " was due")));
    lock.unlock();
    engine_.fail(error);
    std::rethrow_exception(error);
  }
  slot.state = SlotState::taken;
  taken_layout_ = transfer.layout;
  last_index_ = index;
  ++next_take_;
  lock.unlock();
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
    if (state_.bye && announced_.empty() && !posting_)
      lose(waiting_for(index, number, bytes, {}),
           concat("stage ", peer(), " has closed its transport without sending this message"));
    const double waited_s = static_cast<double>(now_ns() - start) * 1e-9;
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

Progress DeviceIncoming::progress() const { return {peer_completed_, next_take_ - 1}; }

void DeviceIncoming::close() { engine_.close(); }

void DeviceIncoming::capture(std::int64_t index, std::shared_ptr<const Layout> layout,
                             const std::vector<std::uintptr_t>& addresses, Stream stream) {
  engine_.check();
  check_value(engine_.ops_->capturing(stream), "edge ", edge().name(), ": no CUDA graph is being recorded on stream ",
              stream.handle);
  std::unique_lock<std::mutex> lock(engine_.mutex_);
  std::size_t untaken = announced_.size() + (posting_ ? 1 : 0);
  for (const Slot& slot : slots_) untaken += slot.state == SlotState::posted ? 1 : 0;
  if (untaken != 0)
    throw OrderError(concat("edge ", edge().name(), ": ", untaken, " messages have not been taken, and a CUDA graph ",
                            "cannot overtake them: take them before both sides record"));
  lock.unlock();
  const std::lock_guard<std::mutex> issuing(engine_.issue_mutex_);
  lane_->capture({kNone, index, kNone, std::move(layout), addresses}, stream);
}

const std::shared_ptr<DeviceOps>& DeviceIncoming::ops() const { return engine_.ops_; }

std::shared_ptr<const Layout> DeviceIncoming::layout() const {
  const std::lock_guard<std::mutex> lock(engine_.mutex_);
  return taken_layout_;
}

Endpoint::Waiting DeviceIncoming::waiting_for(std::int64_t index, std::int64_t slot, std::int64_t bytes,
                                              std::string doing) const {
  return {edge().recv_action(index), std::move(doing), index, slot, bytes};
}

}  // namespace paci_rt
