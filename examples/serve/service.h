// The endpoints: what a request must bring, who answers it, and how answers end early (the client left, time is up, the server drains).
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "examples/serve/api.h"
#include "examples/serve/broker.h"
#include "examples/serve/http_server.h"

namespace moebius_examples {

struct ServiceOptions {
  std::string api_key;  // empty: none is asked for
  size_t max_body_bytes = 1 << 20;
  size_t max_generations = 320;  // HTTP requests that generate at a time
  std::chrono::milliseconds request_timeout{600000};
};

class Service {
 public:
  Service(moebius_cpp::Engine& engine, Broker& broker, const Serving& serving, const ServiceOptions& options);

  void attach(HttpServer& server);
  // No new generation from now on; returns once none is left, or after `most`, when the rest is told to end, which it then does.
  void drain(std::chrono::milliseconds most);

 private:
  // Counts one generation from its acceptance to the last byte of its answer.
  class Ticket {
   public:
    explicit Ticket(Service& service);
    ~Ticket();
    Ticket(const Ticket&) = delete;
    Ticket& operator=(const Ticket&) = delete;

   private:
    Service& service_;
  };
  struct Job;
  using Request = httplib::Request;
  using Response = httplib::Response;

  httplib::Server::HandlerResponse admit(const Request& request, Response& response);
  void check_body_headers(const Request& request) const;
  std::string read_body(const httplib::ContentReader& reader, Response& response) const;
  void get(const Request& request, Response& response);

  void generate(const Request& request, bool chat, const std::string& body, Response& response);
  void answer_whole(Job& job, Response& response);
  bool stream_next(Job& job, httplib::DataSink& sink);
  void end_if_due(const Job& job) const;

  void switch_layout(const std::string& body, Response& response);
  nlohmann::json layout() const;
  nlohmann::json models() const;
  void health(Response& response) const;
  std::string metrics();
  void count(int status);

  moebius_cpp::Engine& engine_;
  Broker& broker_;
  const Serving& serving_;
  const ServiceOptions options_;
  const moebius_model_info model_;
  const int64_t started_;
  const std::string id_prefix_, fingerprint_;
  HttpServer* server_ = nullptr;

  std::mutex mutex_;
  std::condition_variable idle_;
  size_t generations_ = 0;
  std::map<int, uint64_t> answers_;  // by status
  std::atomic<uint64_t> next_id_{1}, clients_gone_{0};
  std::atomic<int64_t> streams_{0};
  std::atomic<bool> draining_{false}, ending_{false};
};

}  // namespace moebius_examples
