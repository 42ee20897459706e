// The dual-stream product on an NVIDIA GPU (sm_80 and later): y = x (W_base + Σ α_c W_ortho[c])ᵀ for few tokens.
//
// Nibbles become integers of 16 bits in the registers of a tensor-core product; its sums, in float32, are scaled after
// every 32 columns. The warps of a block of threads share a panel's columns and add up at the end, always in the same
// order.
#include "dual_gemm_cuda.h"
#ifdef __CUDACC__
#include "warp.cuh"
#endif

namespace libortho::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kLanes;

// The eight columns of one token that a lane needs: zeros beyond the edges.
struct Eight {
  uint32_t pair[4];
};

__device__ Eight eight(const uint16_t* row, int column, int k, bool aligned) {
  Eight e{};
  if (aligned && column + 8 <= k) {
    const uint4 v = *reinterpret_cast<const uint4*>(row + column);
    e.pair[0] = v.x, e.pair[1] = v.y, e.pair[2] = v.z, e.pair[3] = v.w;
  } else {
    for (int i = 0; i < 8; ++i)
      if (column + i < k) e.pair[i / 2] |= uint32_t(row[column + i]) << (16 * (i % 2));
  }
  return e;
}

__device__ const uint32_t* words_of(const Weight& w, int panel, int block, int lane) {
  return w.words + ((int64_t(panel) * w.blocks() + block) * kLanes + lane) * 4;
}

// Of the rows of a panel, in the group of a column; one beyond the last belongs to the last.
__device__ const uint16_t* scales_of(const Weight& w, int panel, int column) {
  return w.scales + (int64_t(panel) * w.groups() + min(column / w.group, w.groups() - 1)) * kRows;
}

// The words and scales of `P` panels in one block of columns, as they lie in shared memory.
template <int P>
struct alignas(16) Slice {
  uint4 words[P][kLanes];
  uint16_t scales[P][2][kRows];  // of either half of the columns
};

template <int P>
__device__ void fetch(Slice<P>& slice, const Weight& w, int panel, int block, int lane) {
  for (int p = 0; p < P; ++p)
    if (panel + p < w.panels()) copy16(&slice.words[p][lane], words_of(w, panel + p, block, lane));
  const int p = lane / 4, half = lane / 2 % 2, part = lane % 2 * 8;
  if (p >= P || panel + p >= w.panels()) return;
  copy16(&slice.scales[p][half][part], scales_of(w, panel + p, block * kBlock + half * kGroup) + part);
}

// d += integers · x over 32 columns, for one panel and 8 tokens.
template <class T>
__device__ void half_block(float (&d)[4], uint32_t word0, uint32_t word1, const Eight& x) {
  uint32_t a[4];
  for (int j = 0; j < 4; ++j) a[j] = T::integers(word0 >> (4 * j));
  T::mma(d, a, x.pair[0], x.pair[1]);
  for (int j = 0; j < 4; ++j) a[j] = T::integers(word1 >> (4 * j));
  T::mma(d, a, x.pair[2], x.pair[3]);
}

// The sparse stream of one panel: the warps share its entries evenly, whatever rows they are in. `L` lanes hold tokens.
template <class T, int L>
__device__ void add_sparse(const Weight& w, int panel, const uint16_t* across, int m, int token0, float* sum,
                           int stride) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, token = lane % L;
  const int32_t* starts = w.starts + panel * kRows;
  const int64_t begin = starts[0], count = starts[kRows] - begin;
  const int from = int(begin + count * warp / kWarps), to = int(begin + count * (warp + 1) / kWarps);
  for (int r = 0; r < kRows; ++r) {
    const int low = max(max(starts[r], from), 0), high = min(min(starts[r + 1], to), w.entries);
    if (low >= high) continue;
    float part = 0;
    for (int j = low + lane / L; j < high; j += kLanes / L) {
      const int column = w.columns[j];
      if (column < w.k && token0 + token < m)
        part += w.values[j] * T::widen(across[int64_t(column) * m + token0 + token]);
    }
    for (int d = kLanes / 2; d >= L; d /= 2) part += from_lane(part, d);
    if (lane < L) sum[r * stride + token] += part;
  }
}

// One block of threads: `P` panels, `N` times 8 tokens.
template <class T, int N, int P>
__global__ void __launch_bounds__(kThreads)
    product_kernel(const uint16_t* x, const uint16_t* across, Weight w, uint16_t* y, int m, bool aligned) {
  constexpr int kStages = P == 1 ? 4 : 3;  // slices of each warp that are under way or in use: 48 KB is what there is
  __shared__ Slice<P> ring[kWarps][kStages];
  __shared__ float sums[kWarps][P * kRows][N * kTile];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, q = lane / 4, pair = lane % 4;
  const int tiles = (m + N * kTile - 1) / (N * kTile);
  const int panel = blockIdx.x / tiles * P, token0 = blockIdx.x % tiles * N * kTile, blocks = w.blocks();
  float total[P][N][4] = {};
  for (int s = 0; s < kStages - 1; ++s) {
    if (warp + s * kWarps < blocks) fetch(ring[warp][s], w, panel, warp + s * kWarps, lane);
    commit();
  }
  for (int i = 0, block = warp; block < blocks; ++i, block += kWarps) {
    Eight in[N][2] = {};
    for (int t = 0; t < N; ++t) {
      const int token = token0 + t * kTile + q;
      for (int h = 0; h < 2 && token < m; ++h)
        in[t][h] = eight(x + int64_t(token) * w.k, block * kBlock + h * kGroup + pair * 8, w.k, aligned);
    }
    wait<kStages - 2>();
    __syncwarp();  // the slice is there for all lanes, and all have read the one before it
    const int ahead = block + (kStages - 1) * kWarps;
    if (ahead < blocks) fetch(ring[warp][(i + kStages - 1) % kStages], w, panel, ahead, lane);
    commit();
    const Slice<P>& slice = ring[warp][i % kStages];
    for (int p = 0; p < P; ++p) {
      if (panel + p >= w.panels()) break;
      const uint4 words = slice.words[p][lane];
      for (int h = 0; h < 2; ++h) {
        const float low = Bfloat16::widen(slice.scales[p][h][q]), high = Bfloat16::widen(slice.scales[p][h][q + 8]);
        for (int t = 0; t < N; ++t) {
          float d[4] = {};
          half_block<T>(d, h ? words.z : words.x, h ? words.w : words.y, in[t][h]);
          total[p][t][0] += low * d[0], total[p][t][1] += low * d[1];
          total[p][t][2] += high * d[2], total[p][t][3] += high * d[3];
        }
      }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < N; ++t)
      for (int c = 0; c < 4; ++c) sums[warp][p * kRows + q + c / 2 * 8][t * kTile + pair * 2 + c % 2] = total[p][t][c];
  __syncwarp();
  for (int p = 0; w.starts && p < P && panel + p < w.panels(); ++p) {
    float* sum = &sums[warp][p * kRows][0];
    if (m == 1) add_sparse<T, 1>(w, panel + p, across, m, token0, sum, N * kTile);
    else add_sparse<T, N * kTile>(w, panel + p, across, m, token0, sum, N * kTile);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < P * kRows * N * kTile; i += kThreads) {
    const int row = i % (P * kRows), token = i / (P * kRows), at = panel * kRows + row;
    if (at >= w.n || token0 + token >= m) continue;
    float sum = 0;
    for (int v = 0; v < kWarps; ++v) sum += sums[v][row][token];
    y[int64_t(token0 + token) * w.n + at] = T::narrow(sum);
  }
}

__device__ uint32_t nibble(const uint8_t* packed, int n, int k, int row, int column) {
  if (row >= n || column >= k) return 8;  // zero
  return packed[int64_t(row) * ((k + 1) / 2) + column / 2] >> (column % 2 * 4) & 15;
}

__global__ void __launch_bounds__(kThreads)
    repack_kernel(const uint8_t* packed, int n, int k, uint32_t* words, int64_t count) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  const int s = at % 4, lane = at / 4 % kLanes, blocks = (k + kBlock - 1) / kBlock;
  const int row = int(at / 4 / kLanes / blocks) * kRows + lane / 4;
  const int column = int(at / 4 / kLanes % blocks) * kBlock + s / 2 * kGroup + lane % 4 * 8 + s % 2 * 4;
  uint32_t word = 0;
  for (int j = 0; j < 4; ++j)
    for (int c = 0; c < 2; ++c)
      word |= nibble(packed, n, k, row + j % 2 * 8, column + j / 2 * 2 + c) << (4 * j + 16 * c);
  words[at] = word;
}

// One weight of the base.
__device__ float weight_at(const Weight& w, int row, int column) {
  const int panel = row / kRows, block = column / kBlock, inner = column % kBlock;
  const int lane = row % 8 * 4 + inner % kGroup / 8, word = inner / kGroup * 2 + inner / 4 % 2;
  const int bit = 4 * (row % kRows / 8 + inner % 4 / 2 * 2) + 16 * (inner % 2);
  const int integer = int(words_of(w, panel, block, lane)[word] >> bit & 15) - 8;
  return integer * Bfloat16::widen(scales_of(w, panel, column)[row % kRows]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(Weight w, int first, int64_t count, uint16_t* out) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at < count) out[at] = T::narrow(weight_at(w, first + int(at / w.k), int(at % w.k)));
}

// One warp writes anew what the entries of one row change. Entries of several compartments at the same place follow
// each other, and the first of them speaks for all.
template <class T>
__global__ void __launch_bounds__(kThreads) add_entries_kernel(Weight w, int first, int rows, uint16_t* out) {
  const int row = int((int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes);
  if (row >= rows) return;
  const int begin = max(w.starts[first + row], 0), end = min(w.starts[first + row + 1], w.entries);
  for (int j = begin + int(threadIdx.x) % kLanes; j < end; j += kLanes) {
    const int column = w.columns[j];
    if (column >= w.k || (j > begin && w.columns[j - 1] == column)) continue;
    float sum = weight_at(w, first + row, column);
    for (int i = j; i < end && w.columns[i] == column; ++i) sum += w.values[i];
    out[int64_t(row) * w.k + column] = T::narrow(sum);
  }
}

unsigned blocks_of(int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); }

template <class T, int N, int P>
int start(const void* x, const void* across, const Weight& w, void* y, int m, void* stream) {
  const unsigned tiles = (m + N * kTile - 1) / (N * kTile), panels = (w.panels() + P - 1) / P;
  const bool aligned = w.k % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  return launch(product_kernel<T, N, P>, panels * tiles, kThreads, stream, static_cast<const uint16_t*>(x),
                static_cast<const uint16_t*>(across), w, static_cast<uint16_t*>(y), m, aligned);
}

// Two panels share what is read of x, where there are enough of them for every processor.
template <class T>
int start(const void* x, const void* across, const Weight& w, void* y, int m, int processors, void* stream) {
  if (m <= kTile) return start<T, 1, 1>(x, across, w, y, m, stream);
  if (w.panels() < 4 * processors) return start<T, 2, 1>(x, across, w, y, m, stream);
  return start<T, 2, 2>(x, across, w, y, m, stream);
}

template <class T>
int unpack(const Weight& w, int first, int rows, void* to, void* stream) {
  const int64_t count = int64_t(rows) * w.k;
  auto* out = static_cast<uint16_t*>(to);
  const int error = launch(dequantize_kernel<T>, blocks_of(count), kThreads, stream, w, first, count, out);
  if (error || !w.starts) return error;
  return launch(add_entries_kernel<T>, blocks_of(int64_t(rows) * kLanes), kThreads, stream, w, first, rows, out);
}

}  // namespace

int repack(const uint8_t* packed, int n, int k, uint32_t* words, void* stream) {
  const int64_t count = int64_t((n + kRows - 1) / kRows) * ((k + kBlock - 1) / kBlock) * kLanes * 4;
  return launch(repack_kernel, blocks_of(count), kThreads, stream, packed, n, k, words, count);
}

int product(const void* x, const void* across, const Weight& w, void* y, int m, Dtype dtype, int processors,
            void* stream) {
  if (dtype == Dtype::half) return start<Half>(x, across, w, y, m, processors, stream);
  return start<Bfloat16>(x, across, w, y, m, processors, stream);
}

int dequantize(const Weight& w, int first, int rows, void* out, Dtype dtype, void* stream) {
  if (dtype == Dtype::half) return unpack<Half>(w, first, rows, out, stream);
  return unpack<Bfloat16>(w, first, rows, out, stream);
}

}  // namespace libortho::cuda
