#include "vmm/handle_pool.hpp"

#include <utility>

#include "error.hpp"

namespace aegaeon {

HandlePool::HandlePool(std::shared_ptr<Driver> driver, std::size_t capacity_bytes,
                       std::size_t handle_bytes, bool exportable)
    : driver_(std::move(driver)),
      capacity_(capacity_bytes),
      handle_bytes_(handle_bytes),
      small_bytes_(driver_->granularity_bytes()),
      exportable_(exportable) {}

void HandlePool::take(std::size_t slot_bytes, std::uint64_t region_id, std::size_t offset,
                      Handles& taken) {
  auto& own = free_[size_index(slot_bytes)];
  if (!own.by_age.empty()) {
    taken.push_back(take_free(own, region_id, offset));
    return;
  }
  if (room() >= slot_bytes) {
    taken.push_back(create(slot_bytes));
    return;
  }
  if (slot_bytes == small_bytes_) {
    // The oldest: what the current transaction has just freed, and may want back, goes last.
    release_oldest(free_[0]);
    ++total_converted_;
    taken.push_back(create(slot_bytes));
    return;
  }
  for (auto end = offset + slot_bytes; offset < end; offset += small_bytes_) {
    take(small_bytes_, region_id, offset, taken);
  }
}

void HandlePool::give(std::shared_ptr<Allocation> memory) {
  auto& own = free_[size_index(memory->bytes())];
  auto age = next_age_++;
  auto& record = memory->record;
  record.pool_age = age;
  own.by_use.emplace(record.region_id, record.offset, age);
  own.by_age.emplace(age, std::move(memory));
}

std::shared_ptr<Allocation> HandlePool::withdraw(Allocation const& memory) {
  if (memory.record.pool_age == 0) return nullptr;
  return remove(free_[size_index(memory.bytes())], memory.record.pool_age);
}

std::shared_ptr<Allocation> HandlePool::remove(FreeHandles& from, std::uint64_t age) {
  auto found = from.by_age.find(age);
  auto memory = std::move(found->second);
  from.by_use.erase({memory->record.region_id, memory->record.offset, age});
  from.by_age.erase(found);
  memory->record.pool_age = 0;
  return memory;
}

std::shared_ptr<Allocation> HandlePool::take_free(FreeHandles& from, std::uint64_t region_id,
                                                  std::size_t offset) {
  auto near = from.by_use.lower_bound({region_id, offset, 0});
  if (near == from.by_use.end() || std::get<0>(*near) != region_id) {
    near = from.by_use.lower_bound({region_id, 0, 0});
  }
  bool used_here = near != from.by_use.end() && std::get<0>(*near) == region_id;
  return remove(from, used_here ? std::get<2>(*near) : from.by_age.begin()->first);
}

std::shared_ptr<Allocation> HandlePool::create(std::size_t bytes) {
  auto memory = std::make_shared<Allocation>(driver_, bytes, exportable_);
  created_bytes_ += bytes;
  ++num_handles_[size_index(bytes)];
  ++total_created_;
  return memory;
}

void HandlePool::release_oldest(FreeHandles& from) {
  if (from.by_age.empty()) throw std::logic_error("the ledger promised memory no handle has");
  auto [age, memory] = *from.by_age.begin();
  check(*driver_, memory->release(), "mem_release", memory->bytes());
  remove(from, age);
  created_bytes_ -= memory->bytes();
  --num_handles_[size_index(memory->bytes())];
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
