#include "transfer/host_pool.hpp"

#include <algorithm>
#include <utility>

#include "error.hpp"
#include "transfer/host_pages.hpp"

namespace aegaeon {
namespace {

std::size_t rounded_capacity(std::size_t bytes) {
  constexpr auto kUnit = HostPool::kAlignmentBytes;
  if (bytes == 0 || bytes > (std::size_t{1} << 56)) {
    throw std::invalid_argument(concat("a host pool of ", bytes, " bytes"));
  }
  return (bytes + kUnit - 1) / kUnit * kUnit;
}

}  // namespace

// Memory that is taken from a pool; goes back to it.
class HostPool::Part {
 public:
  Part(std::shared_ptr<HostPool> pool, std::size_t offset, std::size_t bytes, std::string holder)
      : pool_(std::move(pool)), offset_(offset), bytes_(bytes), holder_(std::move(holder)) {}
  ~Part() { pool_->free(offset_, bytes_, holder_); }
  Part(Part const&) = delete;  // owns the memory
  Part& operator=(Part const&) = delete;

 private:
  std::shared_ptr<HostPool> const pool_;
  std::size_t const offset_;
  std::size_t const bytes_;
  std::string const holder_;
};

HostPool::HostPool(std::shared_ptr<Driver> driver, std::size_t capacity_bytes,
                   HostMemoryOptions const& options)
    : driver_(std::move(driver)),
      capacity_bytes_(rounded_capacity(capacity_bytes)),
      num_threads_(options.num_threads),
      memory_(allocate_host_memory(driver_, capacity_bytes_, options, &attempts_)),
      free_(capacity_bytes_, kAlignmentBytes),
      used_before_(capacity_bytes_ / kAlignmentBytes) {
  pinned_ = memory_.pinned;
}

HostMemory HostPool::allocate(std::size_t bytes, std::string const& holder) {
  if (bytes == 0) throw std::invalid_argument("an image has at least one byte");
  HostMemory result;
  std::vector<std::pair<std::byte*, std::size_t>> stale;
  {
    std::lock_guard lock(mutex_);
    if (memory_.data == nullptr) throw LifecycleError("the host pool is closed");
    auto offset = free_.take(bytes);
    if (!offset) {
      throw OutOfMemory(
          concat("'", holder, "' asked a host pool for ", human_bytes(bytes), ": ",
                 human_bytes(free_.free_bytes()), " of ", human_bytes(capacity_bytes_),
                 " are free, at most ", human_bytes(free_.largest_bytes()), " in one piece; ",
                 describe_holders()),
          "host_pool", kDriverOutOfMemory, bytes);
    }
    holders_[holder] += free_.rounded(bytes);
    auto part = std::make_shared<Part>(shared_from_this(), *offset, bytes, holder);
    result = memory_.part(*offset, bytes, std::move(part));
    auto end = (*offset + free_.rounded(bytes)) / kAlignmentBytes;
    for (auto unit = *offset / kAlignmentBytes; unit < end; ++unit) {
      if (!used_before_[unit]) continue;
      auto* data = memory_.data + unit * kAlignmentBytes;
      if (!stale.empty() && stale.back().first + stale.back().second == data) {
        stale.back().second += kAlignmentBytes;
      } else {
        stale.emplace_back(data, kAlignmentBytes);
      }
    }
  }
  for (auto [data, size] : stale) fill_zero(data, size, num_threads_);
  return result;
}

void HostPool::free(std::size_t offset, std::size_t bytes, std::string const& holder) noexcept {
  std::lock_guard lock(mutex_);
  free_.give_back(offset, bytes);
  auto begin = offset / kAlignmentBytes;
  auto count = free_.rounded(bytes) / kAlignmentBytes;
  std::fill_n(used_before_.begin() + static_cast<std::ptrdiff_t>(begin), count, true);
  auto held = holders_.find(holder);
  held->second -= free_.rounded(bytes);
  if (held->second == 0) holders_.erase(held);
}

std::string HostPool::describe_holders() const {
  constexpr std::size_t kMostNamed = 8;
  std::vector<std::pair<std::size_t, std::string>> largest;
  for (auto const& [name, bytes] : holders_) largest.emplace_back(bytes, name);
  std::sort(largest.rbegin(), largest.rend());
  std::string text = "held by";
  if (largest.empty()) text += " nobody";
  for (std::size_t i = 0; i < std::min(largest.size(), kMostNamed); ++i) {
    text += concat(i > 0 ? "," : "", " '", largest[i].second, "' ", human_bytes(largest[i].first));
  }
  if (largest.size() > kMostNamed) {
    text += concat(" and ", largest.size() - kMostNamed, " more");
  }
  return text;
}

HostPoolStats HostPool::stats() const {
  std::lock_guard lock(mutex_);
  return {.capacity_bytes = capacity_bytes_,
          .free_bytes = free_.free_bytes(),
          .largest_free_bytes = free_.largest_bytes(),
          .num_free_parts = free_.num_parts(),
          .holders = holders_};
}

void HostPool::close() {
  HostMemory gone;  // given back outside the lock
  std::lock_guard lock(mutex_);
  if (!holders_.empty()) {
    throw LifecycleError(concat("closing a host pool that is in use: ", describe_holders()));
  }
  gone = std::exchange(memory_, HostMemory{});
}

}  // namespace aegaeon
