// Guarded memory and the race detector's record of accesses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator {

constexpr size_t kPage = 4096;

/// Pages of zeros; throws Error when there are none left.
char* map_pages(size_t bytes);

/// Memory whose end (or start) touches an inaccessible page. Fresh contents are 0xFF bytes, which
/// read as NaN in every floating-point type, so that a missing initialisation shows.
class Buffer {
 public:
  Buffer(std::string name, size_t bytes, size_t alignment, bool at_end, bool initialised);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t size() const { return bytes_; }
  /// False when something was written between the data and the page's edge.
  bool slack_intact() const;
  /// Beyond this size pages stay untouched zeros, so that offsets above 2^31 can be tested.
  bool sparse() const { return bytes_ > (size_t(1) << 28); }

 private:
  size_t bytes_, map_bytes_;
  char *map_, *data_;
};

/// When and by whom a location was accessed, in barrier epochs of the accessing thread.
struct Access {
  uint32_t thread = ~0u, grid_epoch = 0, block_epoch = 0, warp_epoch = 0;
  const void* instruction = nullptr;
};

/// The thread that accesses memory now, as the detector needs to know it.
struct Accessor {
  uint32_t thread, warp, block, threads_per_block;
  uint32_t grid_epoch, block_epoch, warp_epoch;
};

/// Counts the bytes that kernels read of [begin, begin + bytes) from now on, while accesses are
/// recorded: statistics().watched_reads.
void watch(const void* begin, size_t bytes);

/// Forgets all accesses, but not what has been written; with `enabled`, makes room to record those
/// of one launch.
void start_access_record(bool enabled);

/// Reports (through fail) what is out of bounds, uninitialised or not ordered by a barrier.
/// Returns false for memory that is not a Buffer's: stacks, arguments, constants.
bool record_access(const Accessor& who, const char* address, size_t bytes, bool write,
                   const void* instruction);
bool is_buffer_memory(const void* address);

/// "name[byte n]" for an address in or next to a buffer.
std::string describe_address(const char* address);
/// "file:line" of an instruction.
std::string describe_instruction(const void* instruction);
std::string describe_thread(uint32_t thread, uint32_t threads_per_block);

}  // namespace emulator
