// Runs the named tests, or all.
#include <chrono>

#include "tests/support.hpp"

int main(int argc, char** argv) {
  using namespace aegaeon::tests;
  std::map<std::string, std::function<void()>> const tests{
      {"arena_random", arena_random},
      {"arena_threads", arena_threads},
      {"file_reader_random", file_reader_random},
      {"host_copy", host_copy},
      {"host_driver_random", host_driver_random},
      {"page_copy_random", page_copy_random},
      {"safetensors_random", safetensors_random},
      {"suballocator_random", suballocator_random},
      {"torch_pool_random", torch_pool_random},
      {"torch_pool_threads", torch_pool_threads},
      {"transfer_faults", transfer_faults},
      {"transfers_on_host", transfers_on_host},
      {"transfers_on_simulated", transfers_on_simulated},
  };
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) {
    for (auto const& [name, test] : tests) names.push_back(name);
  }
  int num_failed = 0;
  for (auto const& name : names) {
    auto begin = std::chrono::steady_clock::now();
    try {
      tests.at(name)();
      auto took = std::chrono::steady_clock::now() - begin;
      std::printf("ok      %s (%.1f s)\n", name.c_str(),
                  std::chrono::duration<double>(took).count());
    } catch (std::exception const& error) {
      ++num_failed;
      std::printf("FAILED  %s: %s\n", name.c_str(), error.what());
    }
  }
  return num_failed == 0 ? 0 : 1;
}
