// The layout that the CUDA kernel reads, and its entry points. No torch here, so that plain nvcc takes it.
//
// A panel is 16 rows, a block of it 64 columns: one fragment of 16 bytes for each lane of a warp, four words that are
// the left operands of four tensor-core products m16n8k16. Lane 4 q + p holds rows q and q + 8. Its word s holds
// columns 32 (s / 2) + 8 p + 4 (s mod 2) + {0, 1, 2, 3} of them, nibbles that are integers plus 8:
//
//     bits   0    4    8    12   16   20   24   28
//     row    q    q+8  q    q+8  q    q+8  q    q+8
//     column 0    0    2    2    1    1    3    3
//
// so that the nibbles at 4 j and 4 j + 16 are the pair in register j, and the eight columns that a lane needs of a
// token lie side by side: 16 bytes again.
//
//     words   [panels][ceil(k / 64)][32][4]   uint32
//     scales  [panels][groups][16]            bfloat16 bits
//     starts  [16 panels + 1]                 int32, the sparse entries of a row; null: there are none
//     columns [entries]                       uint16
//     values  [entries]                       float32, what is added to the base there
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define BOTH __host__ __device__
#else
#define BOTH
#endif

namespace libortho::cuda {

constexpr int kRows = 16, kBlock = 64, kLanes = 32, kTile = 8;  // kTile: tokens of a tensor-core product
constexpr int kMaxTokens = 64;                                  // more go through a library product
constexpr int kMaxColumns = 1 << 16;                            // 16 bits say where an entry is
constexpr int kGroup = 32;                                      // groups of scales are multiples of this, or one a row

enum class Dtype { half, bfloat16 };

struct Weight {
  const uint32_t* words = nullptr;
  const uint16_t* scales = nullptr;
  const int32_t* starts = nullptr;
  const uint16_t* columns = nullptr;
  const float* values = nullptr;
  int n, k, group, entries = 0;

  BOTH int panels() const { return (n + kRows - 1) / kRows; }
  BOTH int blocks() const { return (k + kBlock - 1) / kBlock; }
  BOTH int groups() const { return (k + group - 1) / group; }
};
#undef BOTH

// Each works on the current device and `stream`, waits for nothing, and returns a cudaError_t: 0, or see `message`.
const char* message(int error);
int processors(int device);  // of a GPU

// Canonical nibbles [n, ceil(k / 2)] to words.
int repack(const uint8_t* packed, int n, int k, uint32_t* words, void* stream);

// y [m, n] = x [m, k] Wᵀ, m at most kMaxTokens, `processors` of the device. `across` is x as [k, m]: the sparse stream
// reads it; it may be null without one, and is x itself for m = 1. The same input gives the same output, bit for bit.
int product(const void* x, const void* across, const Weight& w, void* y, int m, Dtype dtype, int processors,
            void* stream);

// Rows [first, first + rows) of W itself, [rows, k]; first is a multiple of kRows.
int dequantize(const Weight& w, int first, int rows, void* out, Dtype dtype, void* stream);

}  // namespace libortho::cuda
