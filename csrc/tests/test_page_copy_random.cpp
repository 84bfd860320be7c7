// Random planes, pages and moves against a byte-by-byte copy, guard bytes and all.
#include "kv/page_copy.hpp"
#include "tests/support.hpp"

namespace aegaeon::tests {
namespace {

constexpr std::size_t kGuardBytes = 64;

// Pages of random planes in one buffer each, in the order of blocks or of planes.
struct Side {
  std::size_t num_blocks;
  std::size_t plane_step;
  std::size_t block_stride;
  std::vector<unsigned char> bytes;

  Side(Random& random, std::size_t num_planes, std::size_t page_bytes, std::size_t blocks)
      : num_blocks(blocks) {
    auto gap = random.one_in(2) ? 0 : random.below(70);
    if (random.one_in(2)) {
      block_stride = page_bytes + gap;
      plane_step = block_stride * blocks;
    } else {
      plane_step = page_bytes + gap;
      block_stride = plane_step * num_planes;
    }
    bytes.resize(kGuardBytes * 2 + num_planes * (page_bytes + gap) * blocks);
    for (auto& byte : bytes) byte = static_cast<unsigned char>(random.below(256));
  }

  [[nodiscard]] std::size_t at(std::size_t plane, std::size_t block) const {
    return kGuardBytes + plane * plane_step + block * block_stride;
  }
};

std::vector<std::size_t> shuffled(Random& random, std::size_t count) {
  std::vector<std::size_t> ids(count);
  for (std::size_t i = 0; i < count; ++i) ids[i] = i;
  for (std::size_t i = count; i > 1; --i) std::swap(ids[i - 1], ids[random.below(i)]);
  return ids;
}

void copy_once(Random& random, std::size_t page_bytes, std::size_t max_blocks) {
  auto num_planes = 1 + random.below(4);
  Side source(random, num_planes, page_bytes, 1 + random.below(max_blocks));
  Side destination(random, num_planes, page_bytes, 1 + random.below(max_blocks));
  std::vector<PlanePair> planes;
  for (std::size_t plane = 0; plane < num_planes; ++plane) {
    planes.push_back(
        {.source = reinterpret_cast<std::uintptr_t>(&source.bytes[source.at(plane, 0)]),
         .source_stride = static_cast<std::int64_t>(source.block_stride),
         .destination =
             reinterpret_cast<std::uintptr_t>(&destination.bytes[destination.at(plane, 0)]),
         .destination_stride = static_cast<std::int64_t>(destination.block_stride)});
  }
  auto targets = shuffled(random, destination.num_blocks);
  targets.resize(random.below(targets.size() + 1));
  if (random.one_in(3)) std::sort(targets.begin(), targets.end());  // neighbours, to be merged
  auto expected = destination.bytes;
  std::vector<BlockMove> moves;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    auto from = random.one_in(2) ? random.below(source.num_blocks) : i % source.num_blocks;
    moves.push_back({.source = static_cast<std::int64_t>(from),
                     .destination = static_cast<std::int64_t>(targets[i])});
    for (std::size_t plane = 0; plane < num_planes; ++plane) {
      for (std::size_t byte = 0; byte < page_bytes; ++byte) {
        expected[destination.at(plane, targets[i]) + byte] =
            source.bytes[source.at(plane, from) + byte];
      }
    }
  }
  copy_pages(planes, page_bytes, moves, 1 + random.below(4));
  require(destination.bytes == expected, concat("pages of ", page_bytes, " bytes are copied"));
}

}  // namespace

void page_copy_random(std::size_t num_rounds) {
  Random random(11);
  for (std::size_t round = 0; round < num_rounds; ++round)
    copy_once(random, 1 + random.below(3000), 30);
  // Several threads, and copies that pass the caches by.
  for (int round = 0; round < 8; ++round) copy_once(random, 1 + random.below(120'000), 60);
}

}  // namespace aegaeon::tests
