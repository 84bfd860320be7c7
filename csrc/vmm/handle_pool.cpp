#include "vmm/handle_pool.hpp"

#include <utility>

#include "error.hpp"

namespace aegaeon {

HandlePool::HandlePool(std::shared_ptr<Driver> driver, std::size_t capacity_bytes,
                       std::size_t handle_bytes)
    : driver_(std::move(driver)), capacity_(capacity_bytes), handle_bytes_(handle_bytes) {}

std::shared_ptr<Allocation> HandlePool::remove(FreeHandles& from, std::uint64_t age) {
  auto found = from.by_age.find(age);
  auto memory = std::move(found->second.memory);
  from.by_use.erase({found->second.last.region_id, found->second.last.offset, age});
  from.by_age.erase(found);
  return memory;
}

std::shared_ptr<Allocation> HandlePool::take(std::size_t bytes, LastUse wanted) {
  auto& own = free_[size_index(bytes)];
  if (!own.by_age.empty()) {
    auto [region_id, offset] = wanted;
    auto near = own.by_use.lower_bound({region_id, offset, 0});
    if (near == own.by_use.end() || std::get<0>(*near) != region_id) {
      near = own.by_use.lower_bound({region_id, 0, 0});
    }
    bool used_here = near != own.by_use.end() && std::get<0>(*near) == region_id;
    return remove(own, used_here ? std::get<2>(*near) : own.by_age.begin()->first);
  }
  auto& other = free_[1 - size_index(bytes)];
  while (created_bytes_ + bytes > capacity_ && !other.by_age.empty()) {
    release_oldest(other);
    ++total_converted_;
  }
  auto memory = std::make_shared<Allocation>(driver_, bytes);
  created_bytes_ += bytes;
  ++num_handles_[size_index(bytes)];
  ++total_created_;
  return memory;
}

void HandlePool::give(std::shared_ptr<Allocation> memory, LastUse last) {
  auto& own = free_[size_index(memory->bytes())];
  auto age = next_age_++;
  own.by_use.emplace(last.region_id, last.offset, age);
  own.by_age.emplace(age, Free{std::move(memory), last});
}

void HandlePool::release_oldest(FreeHandles& from) {
  auto oldest = from.by_age.begin();
  auto bytes = oldest->second.memory->bytes();
  check(*driver_, oldest->second.memory->release(), "mem_release", bytes);
  remove(from, oldest->first);
  created_bytes_ -= bytes;
  --num_handles_[size_index(bytes)];
  ++total_released_;
}

void HandlePool::release_free() {
  for (auto& handles : free_) {
    while (!handles.by_age.empty()) release_oldest(handles);
  }
}

HandlePoolStats HandlePool::stats() const noexcept {
  return {.created_bytes = created_bytes_,
          .num_handles = num_handles_[0],
          .num_tail_handles = num_handles_[1],
          .num_free_handles = free_[0].by_age.size(),
          .num_free_tail_handles = free_[1].by_age.size(),
          .total_created = total_created_,
          .total_released = total_released_,
          .total_converted = total_converted_};
}

}  // namespace aegaeon
