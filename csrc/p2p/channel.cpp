#include "p2p/channel.hpp"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <limits>

namespace paci_rt {

namespace {

std::string number(std::int64_t value) {
  return value == kNone ? "none" : value == kUnknown ? "unknown" : std::to_string(value);
}

// How payload.py numbers dtypes, with DLPack's codes: 0 int, 1 uint, 2 float, 4 bfloat, 5 complex, 6 bool, 10 to 14
// float8_e4m3fn and so on.
constexpr DTypeInfo kDTypes[] = {
    {"float32", 2, 32},
    {"float64", 2, 64},
    {"float16", 2, 16},
    {"bfloat16", 4, 16},
    {"int64", 0, 64},
    {"int32", 0, 32},
    {"int16", 0, 16},
    {"int8", 0, 8},
    {"uint8", 1, 8},
    {"bool", 6, 8},
    {"complex64", 5, 64},
    {"complex128", 5, 128},
    {"uint16", 1, 16},
    {"uint32", 1, 32},
    {"uint64", 1, 64},
    {"float8_e4m3fn", 10, 8},
    {"float8_e5m2", 12, 8},
    {"float8_e4m3fnuz", 11, 8},
    {"float8_e5m2fnuz", 13, 8},
    {"float8_e8m0fnu", 14, 8},
    {"complex32", 5, 32},
};

}  // namespace

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

std::string Edge::name() const { return concat(kind, " ", sender, "->", receiver); }
std::string Edge::send_action(std::int64_t index) const { return concat(sender, "SEND_", kind, index); }
std::string Edge::recv_action(std::int64_t index) const { return concat(receiver, "RECV_", kind, index); }
const char* Edge::counted() const { return kind == "F" || kind == "B" ? "micro-batch" : "window"; }

const DTypeInfo& dtype_info(int wire_code) {
  static_assert(std::size(kDTypes) == kDTypeCount);
  check_value(wire_code >= 0 && wire_code < kDTypeCount, "dtype code ", wire_code, " is unknown: there are ",
              kDTypeCount);
  return kDTypes[wire_code];
}

std::int64_t TensorMeta::numel() const {
  std::uint64_t count = 1;  // wraps where a size behind it is 0
  for (const std::int64_t size : shape) count *= static_cast<std::uint64_t>(size);
  return static_cast<std::int64_t>(count);
}

bool TensorMeta::fits(std::int64_t most) const {
  std::int64_t left = most / (dtype_info(dtype).bits / 8);
  bool empty = false;
  for (const std::int64_t size : shape) {
    empty |= size == 0;
    if (size > 0) left /= size;
  }
  return empty || left > 0;
}

std::int64_t TensorMeta::bytes() const { return present ? numel() * (dtype_info(dtype).bits / 8) : 0; }

std::shared_ptr<const Layout> Layout::parse(const std::string& packed) {
  const auto layout = std::make_shared<Layout>();
  layout->packed = packed;
  std::size_t at = 0;
  const auto next = [&] {
    check_value(packed.size() - at >= sizeof(std::int64_t), "the description of a message ends too early, after ",
                packed.size(), " bytes");
    std::int64_t value;
    std::memcpy(&value, packed.data() + at, sizeof value);
    at += sizeof value;
    return value;
  };
  while (at < packed.size()) {
    TensorMeta meta;
    const std::int64_t code = next();
    check_value(code >= 0 && code < kDTypeCount, "dtype code ", code, " is unknown: there are ", kDTypeCount);
    meta.dtype = static_cast<int>(code);
    const std::int64_t flags = next();
    meta.present = (flags & 1) != 0;
    meta.requires_grad = (flags & 2) != 0;
    const std::int64_t rank = next();
    check_value(rank >= 0 && rank <= 64, "a tensor of ", rank, " dimensions cannot travel between stages: at most 64");
    for (std::int64_t i = 0; i < rank; ++i) {
      meta.shape.push_back(next());
      check_value(meta.shape.back() >= 0, "a tensor of size ", meta.shape.back(), " is not possible");
    }
    // Sizes of absent tensors may be anything: with the device transports they carry a message's structure.
    check_value(!meta.present || meta.fits(kMostBytes), "a tensor of dtype ", dtype_info(meta.dtype).name, " and ",
                rank, " dimensions is larger than any memory: at most ", kMostBytes, " bytes");
    layout->offsets.push_back(layout->bytes);
    layout->bytes += (meta.bytes() + kAlign - 1) / kAlign * kAlign;
    check_value(layout->bytes <= kMostBytes, "a message of ", layout->bytes,
                " bytes is larger than any memory: at most ", kMostBytes);
    layout->tensors.push_back(std::move(meta));
  }
  return layout;
}

const char* name_of(Moment moment) {
  constexpr const char* names[] = {"open",    "post", "send",    "arrive", "take", "copy",
                                   "release", "wait", "timeout", "fail",   "close"};
  return names[static_cast<int>(moment)];
}

void EventRing::note(Moment moment, std::int64_t sequence, std::int64_t index, std::int64_t slot, std::int64_t bytes) {
  const std::int64_t now = now_ns();
  const std::lock_guard<std::mutex> lock(mutex_);
  records_[count_++ % records_.size()] = {now, moment, sequence, index, slot, bytes};
}

std::vector<EventRecord> EventRing::last() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<EventRecord> found;
  const std::size_t size = std::min(count_, records_.size());
  for (std::size_t i = count_ - size; i < count_; ++i) found.push_back(records_[i % records_.size()]);
  return found;
}

std::string EventRing::json() const {
  std::string out = "[";
  for (const EventRecord& record : last()) {
    out += concat(out.size() > 1 ? ", " : "", "{\"time_ns\": ", record.time_ns, ", \"event\": \"",
                  name_of(record.moment), "\"");
    const auto add = [&](const char* key, std::int64_t value) {
      if (value != kNone) out += concat(", \"", key, "\": ", value);
    };
    add("sequence", record.sequence);
    add("index", record.index);
    add("slot", record.slot);
    add("bytes", record.bytes);
    out += "}";
  }
  return out + "]";
}

void Options::check() const {
  check_value(slots >= 1 && slots <= kMostSlots, "slots is ", slots,
              ": a channel holds at least 1 message and at most ", kMostSlots);
  check_value(timeout_s > 0 && timeout_s <= kLongestS, "transfer_timeout_s is ", timeout_s,
              ": give a number of seconds above 0 and up to ", kLongestS);
}

Endpoint::Endpoint(Edge edge, Options options)
    : edge_(std::move(edge)), options_(std::move(options)), events_(std::make_shared<EventRing>()) {
  const auto plain = [](unsigned char letter) { return std::isalnum(letter) != 0; };
  check_value(
      !edge_.kind.empty() && edge_.kind.size() <= 16 && std::all_of(edge_.kind.begin(), edge_.kind.end(), plain),
      "the kind of a channel has 1 to 16 letters and digits, such as F, and this one has ", edge_.kind.size(),
      " characters");
  options_.check();
}

std::string Endpoint::json() const {
  const Progress at = progress();
  const auto json_number = [](std::int64_t value) { return value < 0 ? std::string("null") : std::to_string(value); };
  return concat("{\"edge\": \"", edge_.name(), "\", \"side\": \"", sends() ? "sender" : "receiver",
                "\", \"slots\": ", options_.slots, ", \"timeout_s\": ", options_.timeout_s,
                ", \"sent\": ", json_number(at.sent), ", \"taken\": ", json_number(at.taken),
                ", \"events\": ", events_->json(), "}");
}

void Endpoint::time_out(const Waiting& waiting, double waited_s) {
  events_->note(Moment::timeout, kNone, waiting.index, waiting.slot, waiting.bytes);
  const Progress at = progress();
  const char* carried = edge_.kind == "F"   ? "activations"
                        : edge_.kind == "B" ? "gradients"
                                            : "a tied weight or its gradient";
  throw TransferTimeout(
      waiting.action,
      concat("action ", waiting.action, " timed out after ", waited_s, " s: ", waiting.doing, "; edge ", edge_.name(),
             " (", carried, " from stage ", edge_.sender, " to stage ", edge_.receiver, "), ", edge_.counted(), " ",
             waiting.index, ", slot ", number(waiting.slot), ", ", number(waiting.bytes),
             " bytes; last completed sequence number: sender ", number(at.sent), ", receiver ", number(at.taken),
             ". Look for what holds stage ", peer(), " up, or, if it may take that long, raise transfer_timeout_s ",
             "(--transfer-timeout), which is ", options_.timeout_s));
}

void Endpoint::lose(const Waiting& waiting, const std::string& origin) {
  events_->note(Moment::fail, kNone, waiting.index, waiting.slot, waiting.bytes);
  throw PeerLost(waiting.action,
                 concat("action ", waiting.action, " lost the connection to stage ", peer(), ": ", origin), origin);
}

Endpoint::Waiting Endpoint::waiting_for(std::int64_t index, std::int64_t slot, std::int64_t bytes,
                                        std::string doing) const {
  return {sends() ? edge_.send_action(index) : edge_.recv_action(index), std::move(doing), index, slot, bytes};
}

}  // namespace paci_rt
