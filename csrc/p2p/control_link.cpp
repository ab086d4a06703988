#include "p2p/control_link.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/check.hpp"

namespace paci_rt {
namespace {

constexpr std::uint32_t kMagic = 0x50434c4bU;
constexpr std::uint32_t kMaxPayload = 1U << 20;

struct Header {
  std::uint32_t magic, type, bytes, unused;
  std::int64_t a, b, c, d;
};
static_assert(sizeof(Header) == 48, "the wire format");

}  // namespace

ControlLink::ControlLink(int fd) : fd_(fd) {
  check_value(fd >= 0, "socket ", fd, " is not a file descriptor");
  struct stat kind{};
  check_value(fstat(fd_, &kind) == 0 && S_ISSOCK(kind.st_mode), "file descriptor ", fd, " is not a socket");
  const int flags = fcntl(fd_, F_GETFL, 0);
  check_value(flags >= 0 && fcntl(fd_, F_SETFL, flags | O_NONBLOCK) == 0, "file descriptor ", fd,
              " is not a socket: ", std::strerror(errno));
  // Frames are small and somebody waits for each. Pairs of one process are no TCP, and refuse.
  const int on = 1;
  (void)setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  (void)setsockopt(fd_, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
}

ControlLink::~ControlLink() { ::close(fd_); }

void ControlLink::queue(const Frame& frame) {
  if (mute_ || !broken_.empty()) return;
  const Header header{kMagic,
                      static_cast<std::uint32_t>(frame.type),
                      static_cast<std::uint32_t>(frame.payload.size()),
                      0,
                      frame.a,
                      frame.b,
                      frame.c,
                      frame.d};
  out_.append(reinterpret_cast<const char*>(&header), sizeof header);
  out_ += frame.payload;
}

void ControlLink::write() {
  while (!out_.empty()) {
    const ssize_t sent = ::send(fd_, out_.data(), out_.size(), MSG_NOSIGNAL);
    if (sent > 0) {
      out_.erase(0, static_cast<std::size_t>(sent));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return;
    } else if (errno != EINTR) {
      // Reading tells why, and whether the other side has left a last word.
      mute_ = true;
      out_.clear();
    }
  }
}

std::optional<Frame> ControlLink::read() {
  fill();
  if (in_.size() < sizeof(Header)) return std::nullopt;
  Header header;
  std::memcpy(&header, in_.data(), sizeof header);
  if (header.magic != kMagic || header.bytes > kMaxPayload) {
    in_.clear();
    if (broken_.empty()) broken_ = "what arrives is not of paci_rt: both sides need the same version";
    return std::nullopt;
  }
  if (in_.size() < sizeof header + header.bytes) return std::nullopt;
  Frame frame{static_cast<FrameType>(header.type),    header.a, header.b, header.c, header.d,
              in_.substr(sizeof header, header.bytes)};
  in_.erase(0, sizeof header + header.bytes);
  return frame;
}

// What has arrived is still read after the other side has gone.
void ControlLink::fill() {
  char buffer[16384];
  while (broken_.empty()) {
    const ssize_t got = ::recv(fd_, buffer, sizeof buffer, 0);
    if (got > 0) {
      in_.append(buffer, static_cast<std::size_t>(got));
    } else if (got == 0 || errno == ECONNRESET) {
      broken_ = "it closed the connection without a word, so its process ended or was killed";
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return;
    } else if (errno != EINTR) {
      broken_ = concat("the connection failed: ", std::strerror(errno));
    }
  }
}

}  // namespace paci_rt
