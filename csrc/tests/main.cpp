// Runs the named tests, or all:
//   aegaeon_native_tests [--list] [--soak] [NAME[=SIZE]...]
// A test's size is what its claim counts: steps, runs, transfers, files. --list prints every name
// with its three sizes: ordinary, under sanitizers (the default of a build with them), soak.
#include <chrono>
#include <cstdlib>

#include "tests/support.hpp"

namespace {

using namespace aegaeon::tests;

struct Test {
  void (*run)(std::size_t size);
  std::size_t ordinary, sanitized, soak;

  [[nodiscard]] std::size_t size(bool is_soak) const {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return is_soak ? soak : sanitized;
#else
    return is_soak ? soak : ordinary;
#endif
  }
};

std::map<std::string, Test> const kTests{
    {"access_random", {access_random, 40, 40, 2'000}},
    {"alias_set_threads", {alias_set_threads, 2'000, 2'000, 100'000}},
    {"arena_random", {arena_random, 15, 60, 300}},
    {"arena_threads", {arena_threads, 20, 20, 2'000}},
    {"arena_walk", {arena_walk, 200'000, 200'000, 3'000'000}},
    {"fault_sweep", {fault_sweep, 20'000, 4'000, 100'000}},
    {"file_reader_random", {file_reader_random, 25, 25, 500}},
    {"handovers", {handovers, 100'000, 20'000, 1'000'000}},
    {"host_copy", {host_copy, 60, 60, 600}},
    {"host_driver_random", {host_driver_random, 200'000, 200'000, 1'000'000}},
    {"image_files_random", {image_files_random, 40, 40, 1'000}},
    {"images_fuzz", {images_fuzz, 20'000, 100'000, 1'000'000}},
    {"page_copy_random", {page_copy_random, 300, 300, 10'000}},
    {"safetensors_fuzz", {safetensors_fuzz, 100'000, 100'000, 1'000'000}},
    {"suballocator_random", {suballocator_random, 100, 100, 2'000}},
    {"torch_pool_random", {torch_pool_random, 30, 60, 1'000}},
    {"torch_pool_threads", {torch_pool_threads, 300, 300, 20'000}},
    {"transfer_faults", {transfer_faults, 30, 100, 1'000}},
    {"transfers_on_host", {transfers_on_host, 20'000, 20'000, 100'000}},
    {"transfers_on_simulated", {transfers_on_simulated, 20'000, 20'000, 100'000}},
};

}  // namespace

int main(int argc, char** argv) {
  bool soak = false;
  std::vector<std::pair<std::string, std::size_t>> wanted;
  for (std::string argument : std::vector<std::string>(argv + 1, argv + argc)) {
    if (argument == "--list") {
      for (auto const& [name, test] : kTests) {
        std::printf("%s %zu %zu %zu\n", name.c_str(), test.ordinary, test.sanitized, test.soak);
      }
      return 0;
    }
    if (argument == "--soak") {
      soak = true;
      continue;
    }
    auto equals = argument.find('=');
    auto name = argument.substr(0, equals);
    auto found = kTests.find(name);
    if (found == kTests.end()) {
      std::printf("no test is called %s; --list prints them\n", name.c_str());
      return 2;
    }
    auto size = equals == std::string::npos ? found->second.size(soak)
                                            : std::strtoull(&argument[equals + 1], nullptr, 10);
    wanted.emplace_back(name, size);
  }
  if (wanted.empty()) {
    for (auto const& [name, test] : kTests) wanted.emplace_back(name, test.size(soak));
  }
  int num_failed = 0;
  for (auto const& [name, size] : wanted) {
    auto begin = std::chrono::steady_clock::now();
    try {
      kTests.at(name).run(size);
      auto took = std::chrono::steady_clock::now() - begin;
      std::printf("ok      %s=%zu (%.1f s)\n", name.c_str(), size,
                  std::chrono::duration<double>(took).count());
    } catch (std::exception const& error) {
      ++num_failed;
      std::printf("FAILED  %s=%zu: %s\n", name.c_str(), size, error.what());
    }
    std::fflush(stdout);
  }
  return num_failed == 0 ? 0 : 1;
}
