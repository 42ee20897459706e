// The layout that the CPU kernel reads, and its entry points. No torch here, so that a plain compiler takes it.
//
// A panel is 16 rows. Eight columns of a panel are a block of 16 words of 32 bits: word r holds row r's eight nibbles,
// the lowest column in the lowest bits, each an integer plus 8. So one vector of words is one column after another of
// as many rows, and neither a shuffle nor a horizontal sum is ever needed.
//
//     words  [panels][ceil(k / 8)][16]   uint32
//     scales [panels][groups][16]        bfloat16 bits
//
// Sparse entries of a panel are in order of their columns, in chunks of 4096 columns: an entry's place in its chunk is
// 16 · (column mod 4096) + row, 16 bits, which is also its place in a buffer of unpacked columns.
//
//     starts [panels][chunks] + 1        int32, the entries of panel p and chunk c start at starts[p · chunks + c]
//     places [entries]                   uint16
//     values [entries]                   float32, what is added to the base there
#pragma once
#include <algorithm>
#include <cstdint>

namespace libortho {

constexpr int64_t kRows = 16, kBlock = 8, kChunk = 4096, kSlice = 128;
constexpr int64_t kPiece = 16;  // most blocks in a sum whose offset is taken out beforehand: longer ones lose digits
constexpr int64_t kMaxTokens = 128;  // more go through a library product

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Weight {
  const uint32_t* words = nullptr;
  const uint16_t* scales = nullptr;
  const int32_t* starts = nullptr;  // null: no sparse stream
  const uint16_t* places = nullptr;
  const float* values = nullptr;
  int64_t n, k, group;  // group: columns that share a scale; divides k, and is k or a multiple of 8

  int64_t panels() const { return ceil_div(n, kRows); }
  int64_t blocks() const { return ceil_div(k, kBlock); }
  int64_t groups() const { return ceil_div(k, group); }
  int64_t chunks() const { return ceil_div(k, kChunk); }
  int64_t pieces() const { return groups() * ceil_div(ceil_div(std::min(group, k), kBlock), kPiece); }
};

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2, avx512_vnni = 3 };
Isa best_isa();  // what this processor can do

// Rows [0, n) of canonical nibbles [n, ceil(k / 2)] to words.
void repack(const uint8_t* packed, int64_t n, int64_t k, uint32_t* words);

// What a product needs from its input beside x itself; made once a call, read by every thread.
struct Input {
  const float* x;  // m = 1 and int8: [m, k], a row every `stride`, padded to chunks; else [slices][m][kSlice]
  int64_t m, stride;
  const float* folded = nullptr;  // x with each column divided by the weight of its nibble, padded to chunks; if m = 1
  const float* offset = nullptr;  // m = 1: −8 Σ x over each piece, at most kPiece blocks of a group
  const int8_t* bytes = nullptr;  // int8: [m][blocks][8], the columns of a block in the order 0 2 4 6 1 3 5 7
  const float* step = nullptr;    // int8: [m], x ≈ step · bytes
  const float* sums = nullptr;    // int8: [m][groups], −8 Σ step · bytes over each group
};

// For one token that is finite: fills `padded` and `folded`, zeros of chunks · kChunk, and `offset`, of pieces, and
// points `in` at them.
void prepare_one(const float* x, const Weight& w, float* padded, float* folded, float* offset, Input& in);

// For several tokens: fills `sliced`, [slices][m][kSlice] of which what lies beyond column k is not read.
void prepare_many(const float* x, int64_t m, const Weight& w, float* sliced, Input& in);

// For int8: every token rounded to 127 steps of its largest value; `bytes` and `padded` must be zeros. A token that is
// not finite gets a step that is not a number, and so does its result.
void prepare_int8(const float* x, int64_t m, const Weight& w, float* padded, int8_t* bytes, float* step, float* sums,
                  Input& in);

// Panels [first, last) of y = x Wᵀ, [m, n]; m at most kMaxTokens.
void product(const Input& in, const Weight& w, int64_t first, int64_t last, float* y, Isa isa);
void product_int8(const Input& in, const Weight& w, int64_t first, int64_t last, float* y, Isa isa);
// The same panels of Wᵀ itself, [k, columns] with panel `first` at column 0.
void dequantize(const Weight& w, int64_t first, int64_t last, float* out, int64_t columns, Isa isa);

}  // namespace libortho
