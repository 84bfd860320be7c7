// Work over many items in several threads, watched by the thread that asked for it.
#pragma once

#include <cstddef>
#include <functional>

namespace aegaeon {

// Called with the number of items that are done, on the thread that asked for the work and never on
// two at once: it may call into Python. What it throws stops the work.
using Progress = std::function<void(std::size_t num_done)>;

// For work whose items are pieces of item_bytes, the last one shorter: what is passed on is bytes.
// It refers to `progress`; null stays null.
Progress in_bytes(Progress const& progress, std::size_t item_bytes, std::size_t size_bytes);

// As many as this process may use at a time, up to 8: with so many the memory is the limit.
std::size_t default_num_threads() noexcept;

// Runs work(i) for every i below num_items, roughly in order, in up to num_threads threads; with
// fewer when the system has no more. Rethrows what the first failing call threw, when no call runs
// any more; items not begun by then are left out.
void parallel_for(std::size_t num_items, std::size_t num_threads,
                  std::function<void(std::size_t item)> const& work,
                  Progress const& progress = nullptr);

}  // namespace aegaeon
