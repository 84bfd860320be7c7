#include "vmm/alias_set.hpp"

#include <algorithm>
#include <set>
#include <utility>

#include "error.hpp"
#include "vmm/transaction.hpp"

namespace aegaeon {

AliasSet::AliasSet(std::shared_ptr<Arena> arena, bool debug)
    : arena_(std::move(arena)), debug_(debug) {}

std::shared_ptr<AliasSet> AliasSet::create(std::shared_ptr<Arena> arena, std::size_t slot_bytes,
                                           std::vector<std::string> const& owners,
                                           std::string const& tag, bool debug) {
  if (owners.empty() || std::set(owners.begin(), owners.end()).size() != owners.size()) {
    throw std::invalid_argument("an alias set needs at least one owner, and each of them once");
  }
  auto set = std::make_shared<AliasSet>(std::move(arena), debug);
  set->build(slot_bytes, owners, tag);  // what a failure leaves ends with the set
  return set;
}

void AliasSet::build(std::size_t slot_bytes, std::vector<std::string> const& owners,
                     std::string const& tag) {
  for (auto const& owner : owners) {
    members_.push_back(arena_->make_region(slot_bytes, owner, tag));
    std::lock_guard lock(arena_->mutex_);
    members_.back()->alias_set_ = this;
    members_.back()->owns_slot_ = members_.size() == 1;
  }
  {
    std::lock_guard lock(arena_->mutex_);
    ++arena_->num_alias_sets_;
    counted_ = true;
  }
  std::vector<Step> steps{{.region = shared(0), .size_bytes = {}}};
  Transaction(*arena_, std::move(steps), nullptr, false, this).commit();
  if (!debug_) map_at_all();
}

void AliasSet::map_at_all() {
  auto& driver = arena_->driver_;
  std::lock_guard lock(arena_->mutex_);
  auto const& first = *members_[0];
  for (std::size_t i = 1; i < members_.size(); ++i) {
    auto& member = *members_[i];
    for (auto const& [offset, mapping] : first.mapped_) {
      auto placed =
          member.mapped_.try_emplace(offset, driver, member.range_, offset, mapping.memory()).first;
      placed->second.record.number = arena_->next_id_++;
    }
    Result result =
        set_run_access(*driver, member.mapped_.begin(), member.mapped_.end(), Access::kReadWrite);
    check(*driver, result, "mem_set_access", member.size_bytes());
    member.slots_ = first.slots_;
    member.mapped_bytes_ = member.size_bytes();
    ++member.generation_;
  }
}

// Nobody else has a region of it any more.
AliasSet::~AliasSet() {
  auto& driver = *arena_->driver_;
  std::vector<Region*> all;
  for (auto const& member : members_) all.push_back(member.get());
  auto work = Region::finish_work(*arena_, all);
  if (fill_unconfirmed_) {
    Result result = driver.stream_synchronize(arena_->fill_stream_->id());
    report(result, "stream_synchronize");
    fill_unconfirmed_ = result != kSuccess;
  }
  {
    Lock lock(arena_->mutex_);
    if (fill_unconfirmed_) ++arena_->unconfirmed_fills_;
    HandlePool::Handles memories;
    for (std::size_t i = 0; i < members_.size(); ++i) {
      auto& member = *members_[i];
      auto mappings = member.extract({0, member.size_bytes()});
      if (!work && !fill_unconfirmed_) {
        for_each_run(
            mappings.begin(), mappings.end(),
            [](Mapping const& mapping) { return mapping.mapped(); },
            [&](auto first, auto last) { report(unmap_run(driver, first, last), "mem_unmap"); });
      }
      for (auto& [offset, mapping] : mappings) {
        if (i == owner_idx_) {
          arena_->discharge(member, mapping.bytes());
          memories.push_back(mapping.memory());
        }
        if (mapping.mapped()) {
          arena_->quarantine_.add(std::move(mapping), fill_unconfirmed_, work);
        }
      }
      member.slots_ = {};
      member.mapped_bytes_ = 0;
      member.alias_set_ = nullptr;
    }
    for (auto& memory : memories) {
      if (memory->record.quarantined == 0) arena_->pool_.give(std::move(memory));
    }
    if (counted_) --arena_->num_alias_sets_;
  }
  members_.clear();  // their end takes the mutex
}

// -- who owns it ---------------------------------------------------------------------------------

std::size_t AliasSet::index_of(std::string const& owner) const {
  auto found = std::find_if(members_.begin(), members_.end(),
                            [&](auto const& member) { return member->owner() == owner; });
  if (found != members_.end()) return static_cast<std::size_t>(found - members_.begin());
  std::string names;
  for (auto const& member : members_) names += concat(names.empty() ? "" : ", ", member->owner());
  throw std::invalid_argument(
      concat("'", owner, "' is none of the owners of this alias set: ", names));
}

// The mutex: Arena::close asks the same of all its regions.
std::shared_ptr<Region> AliasSet::shared(std::size_t idx) {
  std::lock_guard lock(arena_->mutex_);
  auto& member = *members_[idx];
  if (auto alive = member.weak_from_this().lock()) return alive;
  // Let go of when called: the region's weak reference to itself keeps the deleter until then.
  auto let_go = [set = shared_from_this()](Region*) mutable { set.reset(); };
  return {&member, std::move(let_go)};
}

std::shared_ptr<Region> AliasSet::region(std::string const& owner) {
  return shared(index_of(owner));
}

std::string AliasSet::owner() const {
  std::lock_guard lock(arena_->mutex_);
  return members_[owner_idx_]->owner();
}

void AliasSet::give(std::string const& owner, Contents contents) {
  auto to_idx = index_of(owner);
  std::lock_guard turn(turn_);
  auto from = shared(owner_idx_), to = shared(to_idx);  // owner_idx_ changes in turns only
  Lock lock(arena_->mutex_);
  if (closing_) throw LifecycleError(concat("give to ", to->title(), ": the alias set is closed"));
  if (to_idx == owner_idx_) return;
  auto changes_hands = [&] {
    from->owns_slot_ = false;
    to->owns_slot_ = true;
    owner_idx_ = to_idx;
  };
  if (debug_) {
    lock.unlock();
    std::vector<Step> steps{
        {.kind = Step::Kind::kMap, .region = to, .size_bytes = {}, .contents = contents}};
    // Nothing is mapped there when an earlier handover and its way back have failed.
    if (from->mapped_bytes() != 0) {
      steps.insert(steps.begin(), {.kind = Step::Kind::kUnmap, .region = from, .size_bytes = {}});
    }
    Transaction(*arena_, std::move(steps), nullptr, false, this).commit(changes_hands);
    return;
  }
  hand_over(lock, to_idx, contents);
  arena_->charge(*to, to->size_bytes());
  arena_->discharge(*from, from->size_bytes());
  for (auto const& [offset, mapping] : to->mapped_) mapping.memory()->record.owner = owner;
  changes_hands();
}

// Checks, waits, and fills as the contents ask for.
void AliasSet::hand_over(Lock& lock, std::size_t to_idx, Contents contents) {
  auto& from = *members_[owner_idx_];
  auto& to = *members_[to_idx];
  Range all{0, from.size_bytes()};
  std::vector<PlannedStep> plan{
      {Step::Kind::kUnmap, from.shared_from_this(), all, all.size_bytes, contents, false},
      {Step::Kind::kMap, to.shared_from_this(), all, all.size_bytes, contents, false}};
  do {
    confirm_fill(lock);
    from.require_unused("give");
    if (auto shortage = arena_->shortage(plan)) {
      OutOfMemory error(shortage->message, "give", kDriverOutOfMemory, shortage->requested_bytes);
      error.shortage = std::make_shared<Shortage const>(*std::move(shortage));
      throw error;
    }
  } while (Region::wait_for_events(lock, {&from}));
  if (arena_->poison_ && contents == Contents::kPreserve) contents = Contents::kPoison;
  if (contents == Contents::kZero) fill(lock, from, to, 0);
  if (contents == Contents::kPoison) fill(lock, from, to, kPoisonByte);
}

void AliasSet::fill(Lock& lock, Region& from, Region& to, std::uint8_t value) {
  auto& driver = *arena_->driver_;
  auto stream = arena_->fill_stream();
  from.changing_ = to.changing_ = true;
  lock.unlock();
  char const* call = "memset_async";
  Result result = driver.memset_async(to.address(), value, to.size_bytes(), stream);
  bool submitted = result == kSuccess, drained = true;
  if (submitted) {
    call = "stream_synchronize";
    result = driver.stream_synchronize(stream);
    drained = result == kSuccess || driver.stream_synchronize(stream) == kSuccess;
  }
  lock.lock();
  from.changing_ = to.changing_ = false;
  arena_->changed_.notify_all();
  fill_unconfirmed_ = !drained;
  try {
    check(driver, result, call, to.size_bytes());
  } catch (DriverError& error) {
    if (submitted) {
      error.lost_contents.push_back({from.owner(), from.tag(), 0, from.size_bytes()});
    }
    throw;
  }
}

void AliasSet::confirm_fill(Lock& lock) {
  if (!fill_unconfirmed_) return;
  auto stream = arena_->fill_stream();
  lock.unlock();
  Result result = arena_->driver_->stream_synchronize(stream);
  lock.lock();
  check(*arena_->driver_, result, "stream_synchronize");
  fill_unconfirmed_ = false;
}

// -- its end -------------------------------------------------------------------------------------

void AliasSet::close(bool abandon_views) {
  std::lock_guard turn(turn_);
  std::vector<std::shared_ptr<Region>> regions;
  std::vector<Region*> all;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    regions.push_back(shared(i));
    all.push_back(regions.back().get());
  }
  {
    Lock lock(arena_->mutex_);
    if (!counted_) return;
    do {
      confirm_fill(lock);
      for (auto const& region : regions) {
        region->require_unused("close");
        if (!abandon_views) region->require_no_views("close");
      }
    } while (Region::wait_for_events(lock, all) || tell_before_unmap(lock, regions));
    closing_ = true;
    unmap_aliases();
  }
  for (auto const& region : regions) {
    Transaction(*arena_, {}, region, abandon_views, this).commit();
  }
  std::lock_guard lock(arena_->mutex_);
  --arena_->num_alias_sets_;
  counted_ = false;
}

// Of the owner's region its transaction does it.
bool AliasSet::tell_before_unmap(Lock& lock, std::vector<std::shared_ptr<Region>> const& regions) {
  std::vector<PlannedStep> going;
  for (auto const& region : regions) {
    if (region->owns_slot_) continue;
    Range all{0, region->size_bytes()};
    going.push_back({Step::Kind::kUnmap, region, all, all.size_bytes, Contents::kPreserve, false});
  }
  return notices_.tell_before(lock, going);
}

// At every address but the owner's.
void AliasSet::unmap_aliases() {
  auto& driver = *arena_->driver_;
  Result result = kSuccess;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    auto& member = *members_[i];
    if (i == owner_idx_) continue;
    member.slots_ = {};
    member.mapped_bytes_ = 0;
    for_each_run(
        member.mapped_.begin(), member.mapped_.end(), [](Mapping const&) { return true; },
        [&](auto first, auto last) {
          if (result == kSuccess) result = unmap_run(driver, first, last);
        });
    std::erase_if(member.mapped_, [](auto const& entry) { return !entry.second.mapped(); });
    check(driver, result, "mem_unmap", member.size_bytes());
    ++member.generation_;
  }
}

}  // namespace aegaeon
