#include "examples/serve/http_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>
#include <algorithm>
#include <climits>
#include <cstring>
#include <system_error>

#include "examples/serve/http_error.h"

namespace moebius_examples {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

constexpr int kBacklog = 512;  // connections that the system holds until they are accepted
constexpr int kRequestsPerConnection = 1000;
constexpr int kSendBuffer = 128 << 10;  // what a client that does not read can hold of the system's memory
constexpr auto kRefusalLinger = 100ms, kCrowdedLinger = 5ms;  // one thread refuses all

thread_local Connection* current_connection = nullptr;
thread_local bool overflowing = false;  // this thread serves connections beyond the limit,
thread_local bool crowded = false;      // and others wait for it

void set_option(int fd, int level, int name, int value) { setsockopt(fd, level, name, &value, sizeof value); }

// Waits for one of `events` until the deadline; false: it passed, or the socket is unusable.
bool wait_for(int fd, short events, Clock::time_point deadline) {
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd p{fd, events, 0};
    const int n = poll(&p, 1, static_cast<int>(std::clamp<int64_t>(left, 0, INT_MAX)));
    if (n > 0) return (p.revents & (events | POLLHUP | POLLERR)) != 0;
    if (n == 0 ? left <= INT_MAX : errno != EINTR) return false;
  }
}

void address_of(int fd, decltype(getpeername)* name, std::string& ip, int& port) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  if (name(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) return;
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET) {
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(&address);
    inet_ntop(AF_INET, &v4->sin_addr, text, sizeof text);
    port = ntohs(v4->sin_port);
  } else if (address.ss_family == AF_INET6) {
    const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&address);
    inet_ntop(AF_INET6, &v6->sin6_addr, text, sizeof text);
    port = ntohs(v6->sin6_port);
  }
  ip = text;
}

// A thread for each connection, started when first needed; one more for connections beyond, which only hear so.
class ThreadPerConnection : public httplib::TaskQueue {
 public:
  explicit ThreadPerConnection(size_t most) : most_(most), refuser_([this] { refuse_all(); }) {}

  void enqueue(std::function<void()> task) override {
    std::lock_guard lock(mutex_);
    const bool served = has_thread();
    (served ? tasks_ : beyond_).push_back(std::move(task));
    (served ? serve_ : refuse_).notify_one();
    taken_ += served;
  }

  void shutdown() override {
    {
      std::lock_guard lock(mutex_);
      ends_ = true;
    }
    serve_.notify_all();
    refuse_.notify_all();
    for (std::thread& t : threads_) t.join();
    refuser_.join();
  }

 private:
  // For one more connection.
  bool has_thread() {
    if (taken_ < threads_.size()) return true;
    if (taken_ == most_) return false;
    try {
      threads_.emplace_back([this] { serve_all(); });
      return true;
    } catch (const std::system_error&) {
      return false;  // the system has no more
    }
  }
  bool take(std::deque<std::function<void()>>& from, std::condition_variable& filled, std::function<void()>& out) {
    std::unique_lock lock(mutex_);
    filled.wait(lock, [&] { return !from.empty() || ends_; });
    if (from.empty()) return false;
    out = std::move(from.front());
    from.pop_front();
    return true;
  }
  void serve_all() {
    for (std::function<void()> task; take(tasks_, serve_, task);) {
      task();
      std::lock_guard lock(mutex_);
      --taken_;
    }
  }
  void refuse_all() {
    overflowing = true;
    for (std::function<void()> task; take(beyond_, refuse_, task);) {
      {
        std::lock_guard lock(mutex_);
        crowded = !beyond_.empty();
      }
      task();
    }
  }

  const size_t most_;
  std::mutex mutex_;
  std::condition_variable serve_, refuse_;
  std::deque<std::function<void()>> tasks_, beyond_;
  size_t taken_ = 0;  // connections that have a thread or are given one
  bool ends_ = false;
  std::vector<std::thread> threads_;
  std::thread refuser_;  // last: it uses the others
};

}  // namespace

Connection::Connection(int fd, const HttpLimits& limits) : fd_(fd), limits_(limits), buffer_(16 << 10) {
  set_option(fd, SOL_SOCKET, SO_SNDBUF, kSendBuffer);
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  // A host that is lost without a word is noticed within a minute, also while nothing is written.
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 30);
  set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 10);
  set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
}

Connection::~Connection() {
  if (ends()) linger();
  ::shutdown(fd_, SHUT_RDWR);
  close(fd_);
}

Connection* Connection::current() { return current_connection; }

bool Connection::await_request() {
  budget_ = limits_.header_bytes;
  if (begin_ == end_ && !fill(Clock::now() + limits_.idle)) return false;
  deadline_ = Clock::now() + limits_.read;
  return true;
}

bool Connection::gone() const {
  pollfd p{fd_, POLLRDHUP, 0};
  return poll(&p, 1, 0) > 0;  // POLLHUP and POLLERR count too
}

bool Connection::fill(Clock::time_point deadline) {
  if (!wait_for(fd_, POLLIN, deadline)) return false;
  const ssize_t n = recv(fd_, buffer_.data(), buffer_.size(), MSG_DONTWAIT);
  if (n <= 0) return false;
  begin_ = 0;
  end_ = static_cast<size_t>(n);
  return true;
}

bool Connection::is_readable() const { return begin_ < end_ || wait_for(fd_, POLLIN, deadline_); }

bool Connection::is_writable() const { return !gone() && wait_for(fd_, POLLOUT, Clock::now() + limits_.write); }

ssize_t Connection::read(char* out, size_t size) {
  if (budget_ == 0 || (begin_ == end_ && !fill(deadline_))) {
    end_after_answer();
    return -1;
  }
  const size_t n = std::min({size, end_ - begin_, budget_});
  std::memcpy(out, buffer_.data() + begin_, n);
  begin_ += n;
  budget_ -= n;
  return static_cast<ssize_t>(n);
}

ssize_t Connection::write(const char* data, size_t size) {
  if (!wait_for(fd_, POLLOUT, Clock::now() + limits_.write)) return -1;
  const ssize_t n = send(fd_, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
  return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : n;
}

void Connection::get_remote_ip_and_port(std::string& ip, int& port) const { address_of(fd_, getpeername, ip, port); }
void Connection::get_local_ip_and_port(std::string& ip, int& port) const { address_of(fd_, getsockname, ip, port); }

// Closing a socket with unread bytes resets it, and the client would lose the answer that says why.
void Connection::linger() {
  ::shutdown(fd_, SHUT_WR);
  for (const auto deadline = Clock::now() + linger_; fill(deadline);) {
  }
}

HttpServer::HttpServer(const HttpLimits& limits) : limits_(limits) {
  set_keep_alive_timeout(limits.idle.count() / 1000);
  set_keep_alive_max_count(kRequestsPerConnection);
  set_socket_options([](int fd) { set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1); });  // httplib would let two servers share a port
  new_task_queue = [most = limits.connections] { return new ThreadPerConnection(most); };
}

int HttpServer::bind(const std::string& host, int port) {
  const int bound = port == 0 ? bind_to_any_port(host) : bind_to_port(host, port) ? port : -1;
  if (bound > 0 && ::listen(svr_sock_, kBacklog) != 0) return -1;  // httplib's own backlog is 5
  return bound;
}

void HttpServer::stop_all() {
  // httplib's stop() does nothing before listen_after_bind() has come to its loop, which then would not end.
  if (const socket_t listening = svr_sock_.exchange(INVALID_SOCKET); listening != INVALID_SOCKET) {
    ::shutdown(listening, SHUT_RDWR);
    close(listening);
  }
  std::unique_lock lock(mutex_);
  for (int fd : open_) ::shutdown(fd, SHUT_RD);
  all_closed_.wait_for(lock, kLastWords, [&] { return open_.empty(); });
  for (int fd : open_) ::shutdown(fd, SHUT_RDWR);
}

size_t HttpServer::open_connections() {
  std::lock_guard lock(mutex_);
  return open_.size();
}

bool HttpServer::process_and_close_socket(socket_t fd) {
  Connection connection(fd, limits_);
  if (overflowing) {
    refuse(connection);
    return false;
  }
  {
    std::lock_guard lock(mutex_);
    open_.insert(fd);
  }
  current_connection = &connection;
  bool well = true;
  for (int left = kRequestsPerConnection; well && left > 0 && svr_sock_ != INVALID_SOCKET && connection.await_request(); --left) {
    bool closed = false;
    well = process_request(connection, left == 1, closed, [](httplib::Request& r) { r.ranges.clear(); });  // no part of an answer is one
    if (closed || connection.ends()) break;
  }
  current_connection = nullptr;
  std::lock_guard lock(mutex_);
  open_.erase(fd);
  if (open_.empty()) all_closed_.notify_all();
  return well;
}

void HttpServer::refuse(Connection& connection) {
  static const std::string body = HttpError(503, "all connections are taken: try again", "", "no_connection").body().dump();
  ++refused_;
  connection.write(
      "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: " +
      std::to_string(body.size()) + "\r\n\r\n" + body);
  connection.end_after_answer(svr_sock_ == INVALID_SOCKET ? 0ms : crowded ? kCrowdedLinger : kRefusalLinger);  // once it ends nobody is waited for
}

}  // namespace moebius_examples
