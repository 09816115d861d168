// Memory that notices what a kernel must not do. A buffer of exactly `bytes` lies between two
// inaccessible pages (a read or write there is a crash at the faulty instruction) and touches one
// of them; the rest of its pages is filled with a pattern that intact() checks. The buffer itself
// starts as 0xff bytes: NaN in every floating DType, so that an element that is never written, or
// scratch memory that is read before it is written, shows in the results.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

namespace normcore::kernels::testing {

enum class Placement : std::uint8_t {
  kEnd,    // ends where the upper page begins; aligned to `alignment` only
  kBegin,  // starts on a page boundary
  kShift,  // starts `alignment` bytes behind a page boundary: aligned to no vector
};

// Readable pages between two inaccessible ones. They are kept for the next buffer of the same size,
// since mapping costs more than most tests.
class GuardedPages {
 public:
  static unsigned char* acquire(std::size_t bytes) {
    std::vector<unsigned char*>& free = free_pages()[bytes];
    if (!free.empty()) {
      unsigned char* pages = free.back();
      free.pop_back();
      return pages;
    }
    const std::size_t guard = page_bytes();
    void* map = mmap(nullptr, bytes + 2 * guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) std::abort();
    unsigned char* pages = static_cast<unsigned char*>(map) + guard;
    if (mprotect(pages, bytes, PROT_READ | PROT_WRITE) != 0) std::abort();
    return pages;
  }
  static void release(unsigned char* pages, std::size_t bytes) {
    free_pages()[bytes].push_back(pages);
  }
  static std::size_t page_bytes() {
    static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
  }

 private:
  static std::map<std::size_t, std::vector<unsigned char*>>& free_pages() {
    static std::map<std::size_t, std::vector<unsigned char*>> pages;
    return pages;
  }
};

class GuardedBuffer {
 public:
  GuardedBuffer() = default;
  GuardedBuffer(std::size_t bytes, std::size_t alignment, Placement placement) : bytes_(bytes) {
    const std::size_t page = GuardedPages::page_bytes();
    pages_bytes_ = (bytes + alignment + page - 1) / page * page;
    pages_ = GuardedPages::acquire(pages_bytes_);
    switch (placement) {
      case Placement::kEnd:
        offset_ = (pages_bytes_ - bytes) / alignment * alignment;
        break;
      case Placement::kBegin:
        offset_ = 0;
        break;
      case Placement::kShift:
        offset_ = alignment;
        break;
    }
    std::memset(pages_, kPattern, offset_);
    std::memset(data(), 0xff, bytes_);
    std::memset(data() + bytes_, kPattern, pages_bytes_ - offset_ - bytes_);
  }

  GuardedBuffer(GuardedBuffer&& other) noexcept { swap(other); }
  GuardedBuffer& operator=(GuardedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~GuardedBuffer() {
    if (pages_ != nullptr) GuardedPages::release(pages_, pages_bytes_);
  }

  // Null for a default-constructed buffer only.
  unsigned char* data() const { return pages_ == nullptr ? nullptr : pages_ + offset_; }
  std::size_t bytes() const { return bytes_; }

  // True if nothing outside of the buffer was written.
  bool intact() const {
    if (pages_ == nullptr) return true;
    const auto is_pattern = [](unsigned char byte) { return byte == kPattern; };
    return std::all_of(pages_, pages_ + offset_, is_pattern) &&
           std::all_of(data() + bytes_, pages_ + pages_bytes_, is_pattern);
  }

  bool same_bytes(const GuardedBuffer& other) const {
    return bytes_ == other.bytes_ &&
           (bytes_ == 0 || std::memcmp(data(), other.data(), bytes_) == 0);
  }

 private:
  static constexpr unsigned char kPattern = 0xa5;

  void swap(GuardedBuffer& other) {
    std::swap(pages_, other.pages_);
    std::swap(pages_bytes_, other.pages_bytes_);
    std::swap(offset_, other.offset_);
    std::swap(bytes_, other.bytes_);
  }

  unsigned char* pages_ = nullptr;
  std::size_t pages_bytes_ = 0;
  std::size_t offset_ = 0;
  std::size_t bytes_ = 0;
};

}  // namespace normcore::kernels::testing
