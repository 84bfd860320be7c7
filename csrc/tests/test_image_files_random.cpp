// Images that are sealed, saved, published, opened by several threads, altered and thrown away:
// what is opened is what was sealed, or it is refused with the chunk that differs.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "tests/support.hpp"
#include "transfer/host_image.hpp"
#include "transfer/host_pool.hpp"
#include "transfer/image_directory.hpp"
#include "transfer/image_file.hpp"

namespace aegaeon::tests {
namespace {

namespace fs = std::filesystem;

struct TemporaryFolder {
  TemporaryFolder() : path(fs::temp_directory_path() / "aegaeon-images-XXXXXX") {
    auto name = path.string();
    require(mkdtemp(name.data()) != nullptr, "there is room for a folder");
    path = name;
  }
  ~TemporaryFolder() { fs::remove_all(path); }
  TemporaryFolder(TemporaryFolder const&) = delete;  // owns the folder
  TemporaryFolder& operator=(TemporaryFolder const&) = delete;
  fs::path path;
};

void fill(HostImage& image, Random& random) {
  auto state = static_cast<std::uint32_t>(random.below(1u << 31));
  for (std::size_t i = 0; i < image.size_bytes(); i += 4) {
    state = state * 1664525u + 1013904223u;
    std::memcpy(image.data() + i, &state, std::min<std::size_t>(4, image.size_bytes() - i));
  }
}

void require_same(HostImage const& one, HostImage const& other) {
  require(one.size_bytes() == other.size_bytes() &&
              std::memcmp(one.data(), other.data(), one.size_bytes()) == 0,
          "every byte is that of the sealed image");
  require(one.metadata() == other.metadata() && one.layout() == other.layout(), "and its texts");
}

bool refused(ImageFile const& file, HostImage& into, std::size_t num_threads) {
  try {
    file.read_into(into, true, num_threads, nullptr);
  } catch (IntegrityError const& error) {
    require(std::string_view(error.what()).find("chunk") != std::string_view::npos,
            "the message names the chunk");
    return true;
  }
  return false;
}

void save_and_open(HostPool& pool, std::shared_ptr<HostImage> const& image, fs::path const& folder,
                   Random& random) {
  auto path = (folder / "saved.image").string();
  auto num_threads = 1 + random.below(4);
  save_image(*image, path, num_threads, nullptr);
  auto bytes = image->size_bytes();
  auto copy = std::make_shared<HostImage>(pool.allocate(bytes, "copy"), "copy");
  ImageFile(path).read_into(*copy, true, num_threads, nullptr);
  require_same(*copy, *image);
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    auto at = static_cast<std::streamoff>(random.below(bytes));
    file.seekg(at);
    auto byte = file.get();
    file.seekp(at);
    file.put(static_cast<char>(byte ^ 0x10));
  }
  auto spoilt = std::make_shared<HostImage>(pool.allocate(bytes, "spoilt"), "spoilt");
  require(refused(ImageFile(path), *spoilt, num_threads), "an altered byte is noticed");
  require(!spoilt->sealed(), "what is refused is not sealed");
}

void publish_and_open(std::shared_ptr<Driver> const& driver, HostImage const& source,
                      fs::path const& folder, Random& random) {
  ImageDirectory directory(folder.string());
  auto shared = std::make_shared<SharedImage>(driver, ImageDirectory(folder.string()),
                                              source.size_bytes(), 1 + random.below(3));
  HostImage image(SharedImage::memory(shared), "shared");
  std::memcpy(image.data(), source.data(), source.size_bytes());
  image.set_metadata(source.metadata());
  image.set_layout(source.layout());
  image.seal(2);
  shared->publish("model", image.footer());
  std::vector<std::thread> readers;
  std::atomic<int> num_wrong = 0;
  for (int i = 0; i < 3; ++i) {
    readers.emplace_back([&] {
      try {
        auto opened =
            std::make_shared<SharedImage>(driver, ImageDirectory(folder.string()), "model");
        HostImage view(SharedImage::memory(opened), "view");
        view.seal_as(opened->footer());
        view.verify(2);
        require_same(view, source);
      } catch (std::exception const& error) {
        std::printf("%s\n", error.what());
        ++num_wrong;
      }
    });
  }
  for (auto& reader : readers) reader.join();
  require(num_wrong == 0, "everybody sees the published image");
  require(directory.names() == std::vector<std::string>{"model"}, "it has its name");
  shared->unpublish();
  require(directory.names().empty(), "it has no name any more");
}

}  // namespace

void image_files_random(std::size_t num_images) {
  auto driver = std::make_shared<FaultyDriver>(make_host_driver(kGranule, true));
  for (std::uint32_t seed = 0; seed < num_images; ++seed) {
    Random random(seed);
    TemporaryFolder folder;
    auto bytes = 1 + random.below(random.one_in(4) ? 2 * kImageChunkBytes + 99 : 200'000);
    auto pool = std::make_shared<HostPool>(driver, 3 * bytes + (1 << 20), HostMemoryOptions{});
    auto image = std::make_shared<HostImage>(pool->allocate(bytes, "image"), "image");
    fill(*image, random);
    image->set_metadata(R"({"seed":1})");
    image->set_layout(std::string(random.below(99), ' ') + "{}");
    image->seal(1 + random.below(3));
    save_and_open(*pool, image, folder.path, random);
    publish_and_open(driver, *image, folder.path / "published", random);
    image.reset();
    pool->close();
  }
  require_nothing_alive(*driver);
}

}  // namespace aegaeon::tests
