// Spoilt safetensors files through the parser, in memory that ends where they do; and random fills
// from several threads against copying piece by piece, with some that are cancelled.
#include <unistd.h>

#include <memory>
#include <span>

#include "tests/support.hpp"
#include "transfer/file_reader.hpp"

namespace aegaeon::tests {
namespace {

constexpr std::size_t kChunk = HostImage::kChunkBytes;

std::string with_length(std::string const& header, std::size_t data_bytes) {
  std::uint64_t length = header.size();
  std::string file(sizeof length, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  return file + header + std::string(data_bytes, '\x5a');
}

std::string random_safetensors(Random& random) {
  static constexpr char const* kDtypes[] = {"F32", "BF16", "U8", "F4", "F8_E4M3", "I64"};
  static constexpr std::size_t kBits[] = {32, 16, 8, 4, 8, 64};
  std::string header = random.one_in(4) ? R"({"__metadata__":{"format":"pt"})" : "{";
  std::size_t end = 0;
  for (std::size_t i = 0, count = random.below(4); i < count; ++i) {
    auto dtype = random.below(std::size(kDtypes));
    auto rows = random.below(4), columns = 2 * random.below(5);
    auto begin = end;
    end += rows * columns * kBits[dtype] / 8;
    header += concat(header.size() > 1 ? "," : "", R"("t)", i, R"(":{"dtype":")", kDtypes[dtype],
                     R"(","shape":[)", rows, ",", columns, R"(],"data_offsets":[)", begin, ",", end,
                     random.one_in(5) ? R"(],"x":["\u00e9\ud83d\ude00",-1.5e3,null,{}]})" : "]}");
  }
  return with_length(header + "}", end);
}

void spoil(std::string& file, Random& random) {
  static constexpr std::string_view kTokens[] = {
      "{",
      "}",
      "[",
      "]",
      "\"",
      ",",
      ":",
      "\\u",
      "\\ud800",
      "1e999",
      "-",
      "0",
      "null",
      "\xff",
      "\xe2",
      "\xf0\x9f",
      "18446744073709551616",
      "[[[[[[[[[[[[[[[[",
      "__metadata__",
      "99999999999999999999",
  };
  for (auto i = random.below(4); i > 0 && !file.empty(); --i) {
    auto at = random.below(file.size());
    switch (random.below(5)) {
      case 0:
        file[at] = static_cast<char>(random.below(256));
        break;
      case 1:
        file.erase(at, 1 + random.below(9));
        break;
      case 2:
        file.insert(at, kTokens[random.below(std::size(kTokens))]);
        break;
      case 3:
        file.insert(at, file.substr(at, random.below(200)));
        break;
      default:
        file.resize(at);
    }
  }
}

class TemporaryFile {
 public:
  explicit TemporaryFile(std::string const& contents) {
    FileDescriptor file(mkstemp(path_.data()));
    require(static_cast<bool>(file), "there is room for a temporary file");
    write_all(file.get(), contents.data(), contents.size(), 0, path_);
  }
  ~TemporaryFile() { unlink(path_.c_str()); }
  TemporaryFile(TemporaryFile const&) = delete;  // owns the name
  TemporaryFile& operator=(TemporaryFile const&) = delete;

  [[nodiscard]] std::string const& path() const noexcept { return path_; }

 private:
  std::string path_ = "/tmp/aegaeon-test-XXXXXX";
};

std::string random_bytes(Random& random, std::size_t size) {
  std::string bytes(size, '\0');
  auto state = static_cast<std::uint32_t>(random.below(1u << 31));
  for (auto& byte : bytes) {
    state = state * 1664525u + 1013904223u;
    byte = static_cast<char>(state >> 24);
  }
  return bytes;
}

std::vector<FilePiece> random_pieces(Random& random, std::vector<std::string> const& files,
                                     std::size_t image_bytes) {
  std::vector<FilePiece> pieces;
  std::size_t at = random.below(3000);
  while (at < image_bytes && pieces.size() < 40) {
    auto file = random.below(files.size());
    auto longest = std::min(files[file].size(), image_bytes - at);
    auto size = random.one_in(3) ? random.below(longest + 1) : random.below(5000) % (longest + 1);
    auto offset = random.below(files[file].size() - size + 1);
    if (!pieces.empty() && random.one_in(3)) {  // go on where the last one ended, if there is more
      auto const& last = pieces.back();
      auto behind = last.file_offset + last.size_bytes;
      if (last.image_end() == at && behind + size <= files[last.file_idx].size()) {
        file = last.file_idx;
        offset = behind;
      }
    }
    pieces.push_back({file, offset, at, size});
    at += size + (random.one_in(2) ? random.below(70000) : 0);
  }
  return pieces;
}

void fill_once(Random& random, std::shared_ptr<Driver> const& driver) {
  auto header = [](std::size_t size) {
    return with_length(
        concat(R"({"a":{"dtype":"U8","shape":[)", size, R"(],"data_offsets":[0,)", size, "]}}"), 0);
  };
  std::vector<std::string> contents;
  std::vector<std::unique_ptr<TemporaryFile>> names;
  std::vector<std::shared_ptr<SafetensorsFile>> files;
  for (std::size_t i = 0; i <= random.below(3); ++i) {
    auto size = random.below(kChunk);
    contents.push_back(header(size) + random_bytes(random, size));
    names.push_back(std::make_unique<TemporaryFile>(contents.back()));
    files.push_back(std::make_shared<SafetensorsFile>(names.back()->path()));
  }
  auto image_bytes = 1 + random.below(3 * kChunk);
  auto pieces = random_pieces(random, contents, image_bytes);
  std::string expected(image_bytes, '\0');
  for (auto const& piece : pieces) {
    expected.replace(piece.image_offset, piece.size_bytes, contents[piece.file_idx],
                     piece.file_offset, piece.size_bytes);
  }
  FileReader reader(files, pieces);
  auto image = std::make_shared<HostImage>(driver, image_bytes, "filled");
  std::memset(image->data(), 0xEE, image_bytes);
  auto num_threads = 1 + random.below(4);
  if (random.one_in(3)) {
    struct Enough {};
    auto limit = random.below(image_bytes);
    bool stopped = false;
    try {
      reader.fill(*image, "", {}, num_threads, [&](std::size_t num_bytes) {
        if (num_bytes >= limit) throw Enough();
      });
    } catch (Enough const&) {
      stopped = true;
    }
    require(stopped && !image->sealed(), "what progress throws ends the filling");
  }
  auto differences = reader.fill(*image, "{}", {&reader}, num_threads, nullptr);
  require(differences.empty() && image->sealed() && image->layout() == "{}", "a fill seals");
  require(std::memcmp(image->data(), expected.data(), image_bytes) == 0, "every byte arrives");
  image->verify(num_threads);
  if (reader.size_bytes() == 0) return;
  auto const& piece = *std::ranges::find_if(pieces, [](auto const& p) { return p.size_bytes > 0; });
  auto at = piece.image_offset + random.below(piece.size_bytes);
  image->data()[at] ^= std::byte{1};
  differences = reader.differences(*image, num_threads, nullptr);
  require(differences == std::vector{at}, "the one byte that differs is found");
}

}  // namespace

void safetensors_fuzz(std::size_t num_files) {
  std::size_t num_valid = 0;
  for (std::uint32_t seed = 0; seed < num_files; ++seed) {
    Random random(seed);
    auto file = random_safetensors(random);
    spoil(file, random);
    // An allocation of exactly that size: the address sanitizer sees a read behind it.
    auto view = std::as_bytes(std::span(file));
    std::vector<std::byte> bytes(view.begin(), view.end());
    try {
      auto header = parse_safetensors(bytes, "f");
      std::uint64_t end = 0;
      for (auto const& tensor : header.tensors) {
        require(tensor.begin == end && tensor.end >= end, "tensors lie behind each other");
        end = tensor.end;
      }
      require(header.data_offset() + end == file.size(), "tensors cover the data");
      ++num_valid;
    } catch (IntegrityError const& error) {
      require(std::string_view(error.what()).starts_with("f: "), "the message names the file");
    }
  }
  require(num_valid > num_files / 10 && num_valid < num_files / 2, "both verdicts are common");
}

void file_reader_random(std::size_t num_fills) {
  auto driver = std::make_shared<FaultyDriver>(make_host_driver(kGranule, true));
  for (std::uint32_t seed = 0; seed < num_fills; ++seed) {
    Random random(seed);
    fill_once(random, driver);
  }
  require_nothing_alive(*driver);
}

}  // namespace aegaeon::tests
