#include "memory.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "machine.h"

namespace emulator {
namespace {

constexpr size_t kCellBytes = 2;  // one shadow cell per two bytes: the smallest element type

/// The last write and the last reads: by any thread, by another thread, by another block.
struct Cell {
  Access write, reads[3];
  bool written = false;  ///< by this launch or an earlier one
};

struct Region {
  char *map, *begin, *end, *map_end;  // [begin, end) is valid, the rest of [map, map_end) is slack
  std::string name;
  bool initialised;
  std::vector<Cell> cells;
};

std::map<char*, std::unique_ptr<Region>>& regions() {  // by map_end
  static std::map<char*, std::unique_ptr<Region>> all;
  return all;
}
Region* last_region = nullptr;
const char *watched_begin = nullptr, *watched_end = nullptr;

Region* find_region(const char* address) {
  if (last_region && address >= last_region->map && address < last_region->map_end) {
    return last_region;
  }
  auto it = regions().upper_bound(const_cast<char*>(address));
  if (it == regions().end() || address < it->second->map) return nullptr;
  return last_region = it->second.get();
}

bool happened_before(const Access& earlier, const Accessor& now) {
  if (earlier.thread == ~0u || earlier.thread == now.thread) return true;
  if (earlier.grid_epoch < now.grid_epoch) return true;
  const uint32_t block = earlier.thread / now.threads_per_block;
  if (block == now.block && earlier.block_epoch < now.block_epoch) return true;
  return earlier.thread / 32 == now.warp && earlier.warp_epoch < now.warp_epoch;
}

}  // namespace

char* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("mmap failed");
  return static_cast<char*>(p);
}

Buffer::Buffer(std::string name, size_t bytes, size_t alignment, bool at_end, bool initialised)
    : bytes_(bytes) {
  const size_t body = (bytes + alignment + kPage - 1) / kPage * kPage;
  map_bytes_ = body + 2 * kPage;
  map_ = map_pages(map_bytes_);
  mprotect(map_, kPage, PROT_NONE);
  mprotect(map_ + kPage + body, kPage, PROT_NONE);
  if (!sparse()) memset(map_ + kPage, 0xFF, body);
  data_ = map_ + kPage + (at_end ? (body - bytes) / alignment * alignment : 0);
  char* map_end = map_ + kPage + body;
  last_region = nullptr;
  regions()[map_end].reset(
      new Region{map_ + kPage, data_, data_ + bytes, map_end, std::move(name), initialised, {}});
}

Buffer::~Buffer() {
  regions().erase(map_ + map_bytes_ - kPage);
  last_region = nullptr;
  munmap(map_, map_bytes_);
}

bool Buffer::slack_intact() const {
  if (sparse()) return true;
  const auto untouched = [](char c) { return c == char(0xFF); };
  return std::all_of(map_ + kPage, data_, untouched) &&
         std::all_of(data_ + bytes_, map_ + map_bytes_ - kPage, untouched);
}

void watch(const void* begin, size_t bytes) {
  watched_begin = static_cast<const char*>(begin);
  watched_end = watched_begin + bytes;
  statistics().watched_reads = 0;
}

void start_access_record(bool enabled) {
  for (auto& [end, region] : regions()) {
    const size_t cells = enabled ? (region->map_end - region->map) / kCellBytes : 0;
    region->cells.resize(cells);
    for (Cell& cell : region->cells) {  // one launch is over before the next begins
      const bool written = cell.written;
      cell = Cell{};
      cell.written = written;
    }
  }
}

bool is_buffer_memory(const void* address) {
  return find_region(static_cast<const char*>(address)) != nullptr;
}

bool record_access(const Accessor& who, const char* address, size_t bytes, bool write,
                   const void* instruction) {
  Region* region = find_region(address);
  if (!region) return false;
  const std::string verb = write ? "write" : "read";
  const auto me = [&] {
    return describe_thread(who.thread, who.threads_per_block) + " at " +
           describe_instruction(instruction);
  };
  if (address < region->begin || address + bytes > region->end) {
    fail("out of bounds: " + verb + " of " + describe_address(address) + " by " + me());
  }
  const auto race = [&](const char* earlier_verb, const Access& earlier) {
    fail("race on " + describe_address(address) + ": " + earlier_verb + " by " +
         describe_thread(earlier.thread, who.threads_per_block) + " at " +
         describe_instruction(earlier.instruction) + ", then " + verb + " by " + me() +
         ", nothing orders them");
  };
  if (!write && address < watched_end && address + bytes > watched_begin) {
    statistics().watched_reads +=
        std::min(address + bytes, watched_end) - std::max<const char*>(address, watched_begin);
  }
  const Access now{who.thread, who.grid_epoch, who.block_epoch, who.warp_epoch, instruction};
  const size_t first = (address - region->map) / kCellBytes;
  const size_t last = (address + bytes - 1 - region->map) / kCellBytes;
  for (size_t c = first; c <= last; ++c) {
    Cell& cell = region->cells[c];
    if (!happened_before(cell.write, who)) race("write", cell.write);
    if (write) {
      for (const Access& read : cell.reads) {
        if (!happened_before(read, who)) race("read", read);
      }
      cell = Cell{};
      cell.write = now;
      cell.written = true;
      continue;
    }
    if (!region->initialised && !cell.written) {
      fail("read of uninitialised " + describe_address(address) + " by " + me());
    }
    if (cell.reads[0].thread != now.thread) {
      if (cell.reads[0].thread / who.threads_per_block != who.block) cell.reads[2] = cell.reads[0];
      cell.reads[1] = cell.reads[0];
    }
    cell.reads[0] = now;
  }
  return true;
}

std::string describe_address(const char* address) {
  for (auto& [end, region] : regions()) {
    if (address >= region->map - kPage && address < region->map_end + kPage) {
      const bool inside = address >= region->map && address < region->map_end;
      return region->name + "[byte " + std::to_string(address - region->begin) + " of " +
             std::to_string(region->end - region->begin) + "]" + (inside ? "" : " (guard page)");
    }
  }
  return "unknown memory";
}

std::string describe_instruction(const void* instruction) {
  Dl_info info;
  if (!instruction || !dladdr(instruction, &info) || !info.dli_fname) return "?";
  char command[512], line[512], found[512] = "?";
  const size_t offset =
      static_cast<const char*>(instruction) - 1 - static_cast<const char*>(info.dli_fbase);
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           offset);
  if (FILE* pipe = popen(command, "r")) {
    // innermost frame first: the wrappers of an instruction say less than who called them
    bool wrapper = true;
    while (fgets(line, sizeof line, pipe)) {
      if (!wrapper) continue;
      line[strcspn(line, "\n (")] = 0;
      wrapper = strstr(line, "emulator/intrinsics.h") || strstr(line, "warp_instructions.h");
      const char* slash = strrchr(line, '/');
      strcpy(found, slash ? slash + 1 : line);
    }
    pclose(pipe);
  }
  return found;
}

std::string describe_thread(uint32_t thread, uint32_t threads_per_block) {
  return "block " + std::to_string(thread / threads_per_block) + " thread " +
         std::to_string(thread % threads_per_block);
}

}  // namespace emulator
