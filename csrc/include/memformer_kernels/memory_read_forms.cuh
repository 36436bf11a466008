// memory_read, forward: the forms of its kernel, how long each takes, and which is the fastest for the sizes of a call.
#pragma once

#include <cstdint>
#include <iterator>

#include "memformer_kernels/common.cuh"
#include "memformer_kernels/hopper.cuh"

namespace memformer_kernels {

struct MemoryReadForm {
  int width, slots, stages, groups;  // channels and slots of a tile, tiles on their way, groups of warps
  double row_time, slot_time;        // picoseconds, on an H200 full of blocks: of a row, and of each slot of its tiles;
                                     // fitted by hand, and anew by benchmarks/read_forms.py, for any GPU
};

// As many groups as there are registers for, or, for few rows, one. Tiles of fewer slots leave fewer of these empty,
// and registers for one group more, whose rows may leave fewer empty.
constexpr MemoryReadForm kMemoryReadForms[] = {
    {64, 128, 3, 3, 43, 0.50},
    {64, 128, 2, 1, 36, 0.64},
    {64, 96, 3, 3, 43, 0.55},
    {64, 96, 3, 1, 36, 0.69},
    {64, 64, 4, 4, 29, 0.585},
    {64, 64, 4, 1, 38, 0.78},
    {96, 128, 3, 2, 51, 0.83},
    {96, 128, 3, 1, 107, 1.02},
    {96, 96, 3, 3, 51, 0.71},
    {96, 96, 3, 1, 92, 1.22},
    {128, 128, 2, 2, 86, 0.82},
    {128, 128, 2, 1, 86, 1.27},
    {128, 96, 2, 2, 76, 0.93},
    {128, 96, 2, 1, 100, 1.32},
};

// Its place in kMemoryReadForms. The slots of a tile decide the bits of a row, which must not depend on how many heads
// there are: they are those of the form that is fastest on a GPU full of blocks. Of the forms that then differ in how
// they share out the rows it is the fastest for all heads.
inline int fastest_memory_read_form(int64_t tokens, int64_t slots, int channels, int64_t heads,
                                    int64_t multiprocessors) {
  constexpr int kForms = std::size(kMemoryReadForms);
  int width = 128;
  for (const MemoryReadForm& form : kMemoryReadForms) {
    if (form.width >= channels && form.width < width) width = form.width;
  }
  double of_a_head[kForms], of_all[kForms];
  int fastest = -1;
  for (int i = 0; i < kForms; ++i) {
    const MemoryReadForm& form = kMemoryReadForms[i];
    if (form.width != width) continue;
    const int64_t rows = form.groups * kGroupRows, tiles = ceil_div(tokens, rows);
    const int64_t slots_of_tiles = ceil_div<int64_t>(slots, form.slots) * form.slots;
    of_a_head[i] = form.row_time * tokens + form.slot_time * (tiles * rows) * slots_of_tiles;
    of_all[i] = of_a_head[i] / tiles * ceil_div(heads * tiles, multiprocessors);
    if (fastest < 0 || of_a_head[i] < of_a_head[fastest]) fastest = i;
  }
  const int slots_of_a_tile = kMemoryReadForms[fastest].slots;
  for (int i = 0; i < kForms; ++i) {
    const MemoryReadForm& form = kMemoryReadForms[i];
    if (form.width == width && form.slots == slots_of_a_tile && of_all[i] < of_all[fastest]) fastest = i;
  }
  return fastest;
}

}  // namespace memformer_kernels
