// Connections for httplib::Server, which parses and writes HTTP over them: deadlines for a whole request and for every write, a bound on
// what a request may weigh, a look at whether the client is still there, and an answer where there is no thread left for a connection.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include <httplib.h>

namespace moebius_examples {

// For clients to be told that the server ends, and again to take what they were told.
inline constexpr std::chrono::seconds kLastWords{1};

struct HttpLimits {
  size_t connections = 128;                // each has a thread while it is open
  size_t header_bytes = 64 << 10;
  size_t body_bytes = 1 << 20;             // on the wire
  std::chrono::milliseconds idle{5000};    // until the next request of a connection
  std::chrono::milliseconds read{30000};   // from a request's first byte to its last
  std::chrono::milliseconds write{10000};  // until the client takes something again
};

// One client's socket; closes it.
class Connection : public httplib::Stream {
 public:
  Connection(int fd, const HttpLimits& limits);
  ~Connection() override;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Whose request the calling thread handles; null outside of a handler.
  static Connection* current();

  // Waits for a request's first byte and starts its deadline.
  bool await_request();
  // The request's headers were taken: its body may come.
  void allow_body() { budget_ += limits_.body_bytes; }
  // The client has closed the connection, or its sending half: it wants no answer.
  bool gone() const;
  // No request follows on it: what the client still sends, for so long, is not read as one.
  void end_after_answer(std::chrono::milliseconds linger = std::chrono::milliseconds(500)) { linger_ = linger; }
  bool ends() const { return linger_.count() > 0; }

  bool is_readable() const override;
  bool is_writable() const override;
  ssize_t read(char* out, size_t size) override;
  ssize_t write(const char* data, size_t size) override;
  using Stream::write;
  void get_remote_ip_and_port(std::string& ip, int& port) const override;
  void get_local_ip_and_port(std::string& ip, int& port) const override;
  socket_t socket() const override { return fd_; }

 private:
  using Clock = std::chrono::steady_clock;
  bool fill(Clock::time_point deadline);
  void linger();

  const int fd_;
  const HttpLimits& limits_;
  Clock::time_point deadline_{};
  size_t budget_ = 0;  // bytes of this request that may still come
  std::chrono::milliseconds linger_{0};
  std::vector<char> buffer_;
  size_t begin_ = 0, end_ = 0;  // of what was received and not yet read
};

class HttpServer : public httplib::Server {
 public:
  explicit HttpServer(const HttpLimits& limits);

  // The port; -1 where the address cannot be had.
  int bind(const std::string& host, int port);
  // After the last answer that matters: ends listen_after_bind(), also one that is yet to begin, and the connections that wait for another
  // request; those that write an answer have kLastWords to end.
  void stop_all();
  size_t open_connections();
  uint64_t refused_connections() const { return refused_; }

 private:
  bool process_and_close_socket(socket_t fd) override;
  void refuse(Connection& connection);

  const HttpLimits limits_;
  std::mutex mutex_;
  std::set<int> open_;
  std::condition_variable all_closed_;
  std::atomic<uint64_t> refused_{0};
};

}  // namespace moebius_examples
