// Streams and events of the host driver: a stream is a worker thread that runs its operations in
// order; an event is a pair of counters.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

namespace aegaeon {

// Every record gets a number; whoever waits, waits for the number that was current when it asked.
class HostEvent {
 public:
  std::uint64_t begin_record();
  void complete(std::uint64_t record);
  [[nodiscard]] std::uint64_t last_record() const;
  [[nodiscard]] bool reached(std::uint64_t record) const;
  void wait(std::uint64_t record);

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t recorded_ = 0;
  std::uint64_t completed_ = 0;
};

class HostStream {
 public:
  HostStream();
  ~HostStream();                           // finishes what was queued, then joins
  HostStream(HostStream const&) = delete;  // owns a thread
  HostStream& operator=(HostStream const&) = delete;

  void copy(void* destination, void const* source, std::size_t bytes);
  void fill(void* destination, std::uint8_t value, std::size_t bytes);
  void record(std::shared_ptr<HostEvent> event);
  void wait(std::shared_ptr<HostEvent> event);
  void synchronize();

 private:
  enum class Kind { kCopy, kFill, kRecord, kWait };
  struct Operation {
    Kind kind;
    void* destination = nullptr;
    void const* source = nullptr;
    std::size_t bytes = 0;
    std::uint8_t value = 0;
    std::shared_ptr<HostEvent> event;
    std::uint64_t record = 0;
  };

  void push(Operation operation);
  void run();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable drained_;
  std::deque<Operation> queue_;
  std::uint64_t pushed_ = 0;
  std::uint64_t finished_ = 0;
  bool idle_ = false;
  bool stopping_ = false;
  std::thread worker_;  // last: it uses all of the above
};

}  // namespace aegaeon
