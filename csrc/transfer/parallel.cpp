#include "transfer/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace aegaeon {
namespace {

constexpr auto kProgressInterval = std::chrono::milliseconds(50);

struct Shared {
  std::atomic<std::size_t> next{0};
  std::atomic<std::size_t> num_done{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;  // guards all that follows
  std::condition_variable ended;
  std::size_t num_running = 0;
  std::exception_ptr error;
};

void take_items(Shared& shared, std::size_t num_items,
                std::function<void(std::size_t)> const& work) {
  try {
    while (!shared.stop) {
      auto item = shared.next++;
      if (item >= num_items) break;
      work(item);
      ++shared.num_done;
    }
  } catch (...) {
    shared.stop = true;
    std::lock_guard lock(shared.mutex);
    if (!shared.error) shared.error = std::current_exception();
  }
}

}  // namespace

Progress in_bytes(Progress const& progress, std::size_t item_bytes, std::size_t size_bytes) {
  if (!progress) return nullptr;
  return [&progress, item_bytes, size_bytes](std::size_t num_items) {
    progress(std::min(num_items * item_bytes, size_bytes));
  };
}

std::size_t default_num_threads() noexcept {
  return std::clamp<std::size_t>(std::thread::hardware_concurrency(), 1, 8);
}

void parallel_for(std::size_t num_items, std::size_t num_threads,
                  std::function<void(std::size_t item)> const& work, Progress const& progress) {
  num_threads = std::min(num_threads, num_items);
  Shared shared;
  std::vector<std::thread> threads;
  // The caller is one of the workers, unless it is kept free to watch.
  auto num_helpers = num_threads <= 1 ? 0 : progress ? num_threads : num_threads - 1;
  threads.reserve(num_helpers);
  try {
    while (threads.size() < num_helpers) {
      {
        std::lock_guard lock(shared.mutex);
        ++shared.num_running;
      }
      threads.emplace_back([&] {
        take_items(shared, num_items, work);
        std::lock_guard lock(shared.mutex);
        --shared.num_running;
        shared.ended.notify_one();
      });
    }
  } catch (std::exception const&) {  // no more threads to be had: those there are do the work
    std::lock_guard lock(shared.mutex);
    --shared.num_running;
  }
  try {
    if (!progress) {
      take_items(shared, num_items, work);
    } else if (threads.empty()) {
      for (std::size_t item = 0; item < num_items; ++item) {
        work(item);
        progress(item + 1);
      }
    } else {
      std::unique_lock lock(shared.mutex);
      while (!shared.ended.wait_for(lock, kProgressInterval,
                                    [&] { return shared.num_running == 0; })) {
        lock.unlock();
        progress(shared.num_done);
        lock.lock();
      }
      bool complete = shared.num_done == num_items;
      lock.unlock();
      if (complete) progress(num_items);
    }
  } catch (...) {
    shared.stop = true;
    std::lock_guard lock(shared.mutex);
    if (!shared.error) shared.error = std::current_exception();
  }
  for (auto& thread : threads) thread.join();
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace aegaeon
