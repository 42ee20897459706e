// The dual-stream product on a CPU: y = x (W_base + Σ α_c W_ortho[c])ᵀ from packed nibbles and a scaled sparse stream.
//
// One body for every instruction set, written in the compiler's vector types; `target` attributes compile it several
// times and `best_isa` picks at run time. The only intrinsics are the byte products of the int8 path.
#include "panels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#if defined(__x86_64__)
#include <immintrin.h>
#define LIBORTHO_X86 1
#define AVX2         __attribute__((target("avx2,fma")))
#define AVX512       __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))
#define VNNI         __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#endif

#define INLINE   inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

namespace libortho {
namespace {

template <int W>
struct Vec {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef int32_t I __attribute__((vector_size(4 * W)));
  typedef uint32_t U __attribute__((vector_size(4 * W)));
  typedef uint16_t H __attribute__((vector_size(2 * W)));
};

template <class T>
INLINE T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}
template <class T>
INLINE void store(void* p, const T& v) {
  std::memcpy(p, &v, sizeof(T));
}

// bfloat16 bits are the upper half of a float's.
template <int W>
INLINE typename Vec<W>::F widen(const uint16_t* p) {
  const auto u = __builtin_convertvector(load<typename Vec<W>::H>(p), typename Vec<W>::U) << 16;
  return (typename Vec<W>::F)u;
}

// Nibbles i and i + 4 of every word, as floats: (nibble) · 16^(i mod 4). The power is taken out of x or of the scale,
// which saves a shift for every column.
template <int W>
INLINE typename Vec<W>::F nibble(typename Vec<W>::U half, int i) {
  return __builtin_convertvector((typename Vec<W>::I)(half & (0xFu << (4 * i))), typename Vec<W>::F);
}
constexpr float kFold[4] = {1.0f, 1.0f / 16, 1.0f / 256, 1.0f / 4096};

// One token uses every weight once, so it goes from memory straight into a multiply-add.
// V vectors of W rows each, C independent sums for each vector to hide the latency of the additions.
template <int W, int V, int C>
INLINE void rows_of_one(const Input& in, const Weight& w, int64_t panel, float* y) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  constexpr int per_panel = kRows / W;
  const int64_t blocks = w.blocks(), groups = w.groups();
  const int64_t span = ceil_div(std::min(w.group, w.k), kBlock);
  const uint32_t* words[V];
  const uint16_t* scales[V];
  for (int v = 0; v < V; ++v) {
    words[v] = w.words + (panel + v / per_panel) * blocks * kRows + v % per_panel * W;
    scales[v] = w.scales + (panel + v / per_panel) * groups * kRows + v % per_panel * W;
  }
  F total[V] = {};
  for (int64_t b = 0, piece = 0; b < blocks; ++piece) {
    const int64_t g = b / span, end = std::min({b + kPiece, (g + 1) * span, blocks});
    F sum[V][C] = {};
    for (int v = 0; v < V; ++v) sum[v][0] += in.offset[piece];
    for (; b < end; ++b) {
      const float* x = in.folded + b * kBlock;
      for (int v = 0; v < V; ++v) {
        const U low = load<U>(words[v] + b * kRows), high = low >> 16;
        for (int i = 0; i < 4; ++i) sum[v][i % C] += nibble<W>(low, i) * x[i];
        for (int i = 0; i < 4; ++i) sum[v][i % C] += nibble<W>(high, i) * x[i + 4];
      }
    }
    for (int v = 0; v < V; ++v) {
      F all = sum[v][0];
      for (int c = 1; c < C; ++c) all += sum[v][c];
      total[v] += all * widen<W>(scales[v] + g * kRows);
    }
  }
  for (int v = 0; v < V; ++v) store(y + v * W, total[v]);
}

// The sparse stream of a panel, for one token.
INLINE void add_sparse_of_one(const Input& in, const Weight& w, int64_t panel, float* y) {
  const int64_t chunks = w.chunks();
  for (int64_t c = 0; c < chunks; ++c) {
    const float* x = in.x + c * kChunk;
    const int32_t end = w.starts[panel * chunks + c + 1];
    for (int32_t j = w.starts[panel * chunks + c]; j < end; ++j)
      y[w.places[j] & 15] += w.values[j] * x[w.places[j] >> 4];
  }
}

template <int W, int V, int C>
INLINE void product_of_one(const Input& in, const Weight& w, int64_t first, int64_t last, float* out) {
  constexpr int together = V * W / kRows;  // panels at a time
  alignas(64) float y[V * W];
  int64_t p = first;
  const auto finish = [&](int64_t panels) __attribute__((always_inline)) {
    for (int64_t i = 0; i < panels; ++i, ++p) {
      if (w.starts) add_sparse_of_one(in, w, p, y + i * kRows);
      std::memcpy(out + p * kRows, y + i * kRows, sizeof(float) * std::min(kRows, w.n - p * kRows));
    }
  };
  while (p + together <= last) rows_of_one<W, V, C>(in, w, p, y), finish(together);
  while (p < last) rows_of_one<W, kRows / W, C>(in, w, p, y), finish(1);
}

// Several tokens share a slice of a panel that is unpacked once, into the nearest cache: columns [k0, k0 + kSlice) as
// floats, column by column, the sparse stream added.
template <int W>
INLINE void unpack(const Weight& w, int64_t panel, int64_t k0, int32_t& entry, float* out, int64_t stride) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  const int64_t blocks = w.blocks(), end = std::min(ceil_div(k0 + kSlice, kBlock), blocks);
  const uint32_t* words = w.words + panel * blocks * kRows;
  const uint16_t* scales = w.scales + panel * w.groups() * kRows;
  for (int v = 0; v < kRows; v += W) {
    for (int64_t b = k0 / kBlock; b < end;) {
      const int64_t g = b * kBlock / w.group, until = std::min(ceil_div((g + 1) * w.group, kBlock), end);
      const F scale = widen<W>(scales + g * kRows + v), offset = scale * -8.0f;
      for (; b < until; ++b) {
        const U low = load<U>(words + b * kRows + v), high = low >> 16;
        float* to = out + (b * kBlock - k0) * stride + v;
        for (int i = 0; i < 4; ++i) store(to + i * stride, nibble<W>(low, i) * (scale * kFold[i]) + offset);
        for (int i = 0; i < 4; ++i) store(to + (i + 4) * stride, nibble<W>(high, i) * (scale * kFold[i]) + offset);
      }
    }
  }
  if (!w.starts) return;
  const int64_t chunks = w.chunks(), c = k0 / kChunk, base = k0 % kChunk * kRows;
  if (k0 % kChunk == 0) entry = w.starts[panel * chunks + c];
  const int32_t stop = w.starts[panel * chunks + c + 1];
  for (; entry < stop && w.places[entry] < base + kSlice * kRows; ++entry) {
    const int64_t at = (w.places[entry] - base) & (kSlice * kRows - 1);
    out[(at >> 4) * stride + (at & 15)] += w.values[entry];
  }
}

// T tokens times `columns` columns of 16 rows: sum[t][row] += Σ x[t][column] · slice[column][row].
template <int W, int T>
INLINE void micro(const float* x, const float* slice, int64_t columns, float* sum) {
  using F = typename Vec<W>::F;
  constexpr int V = kRows / W;
  F a[T][V];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) a[t][v] = load<F>(sum + t * kRows + v * W);
  for (int64_t k = 0; k < columns; ++k) {
    F row[V];
    for (int v = 0; v < V; ++v) row[v] = load<F>(slice + k * kRows + v * W);
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < V; ++v) a[t][v] += row[v] * x[t * kSlice + k];
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) store(sum + t * kRows + v * W, a[t][v]);
}

using Micro = void (*)(const float*, const float*, int64_t, float*);

// `some` has the sums for 1, 2, … tokens. They are functions of their own: inlined here, their sums would share the
// registers with what `unpack` keeps in some, and spill.
template <int W, int T>
INLINE void product_of_many(const Input& in, const Weight& w, int64_t first, int64_t last, float* y,
                            const Micro (&some)[T]) {
  alignas(64) float slice[kSlice * kRows], sum[kMaxTokens * kRows];
  for (int64_t p = first; p < last; ++p) {
    std::fill_n(sum, in.m * kRows, 0.0f);
    int32_t entry = 0;
    for (int64_t k0 = 0; k0 < w.k; k0 += kSlice) {
      unpack<W>(w, p, k0, entry, slice, kRows);
      const int64_t columns = std::min(kSlice, w.k - k0);
      for (int64_t t = 0; t < in.m; t += T)
        some[std::min<int64_t>(T, in.m - t) - 1](in.x + k0 * in.m + t * kSlice, slice, columns, sum + t * kRows);
    }
    for (int64_t t = 0; t < in.m; ++t)
      std::memcpy(y + t * w.n + p * kRows, sum + t * kRows, sizeof(float) * std::min(kRows, w.n - p * kRows));
  }
}

template <int W>
INLINE void dequantize_panels(const Weight& w, int64_t first, int64_t last, float* out, int64_t columns) {
  alignas(64) float slice[kSlice * kRows];
  for (int64_t p = first; p < last; ++p) {
    int32_t entry = 0;
    const int64_t rows = std::min(kRows, w.n - p * kRows);
    for (int64_t k0 = 0; k0 < w.k; k0 += kSlice) {
      unpack<W>(w, p, k0, entry, slice, kRows);
      for (int64_t k = 0; k < std::min(kSlice, w.k - k0); ++k)
        std::memcpy(out + (k0 + k) * columns + (p - first) * kRows, slice + k * kRows, sizeof(float) * rows);
    }
  }
}

// int8 activations: products of bytes, sums of integers, one scale a group.
// Σ nibble · byte over blocks [b0, b1) of a panel, for T tokens: integers [T][16].
template <int T>
void bytes_generic(const uint32_t* words, const int8_t* x, int64_t stride, int64_t b0, int64_t b1, int32_t* sum) {
  std::fill_n(sum, T * kRows, 0);
  for (int64_t b = b0; b < b1; ++b)
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < kRows; ++r) {
        const uint32_t word = words[b * kRows + r];
        const int8_t* at = x + t * stride + b * kBlock;
        for (int i = 0; i < 4; ++i) {
          sum[t * kRows + r] += int32_t(word >> (8 * i) & 15) * at[i];
          sum[t * kRows + r] += int32_t(word >> (8 * i + 4) & 15) * at[i + 4];
        }
      }
}

#ifdef LIBORTHO_X86
template <int T>
AVX2 void bytes_avx2(const uint32_t* words, const int8_t* x, int64_t stride, int64_t b0, int64_t b1, int32_t* sum) {
  const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i wide[T][2] = {};
  for (int64_t b = b0; b < b1;) {
    __m256i narrow[T][2] = {};  // 16 bits hold four blocks: 4 · 4 · 15 · 127 = 30,480
    for (const int64_t stop = std::min(b + 4, b1); b < stop; ++b) {
      for (int v = 0; v < 2; ++v) {
        const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + b * kRows + 8 * v));
        const __m256i even = _mm256_and_si256(word, mask), odd = _mm256_and_si256(_mm256_srli_epi16(word, 4), mask);
        for (int t = 0; t < T; ++t) {
          const int8_t* at = x + t * stride + b * kBlock;
          const __m256i e = _mm256_maddubs_epi16(even, _mm256_set1_epi32(load<int32_t>(at)));
          const __m256i o = _mm256_maddubs_epi16(odd, _mm256_set1_epi32(load<int32_t>(at + 4)));
          narrow[t][v] = _mm256_add_epi16(narrow[t][v], _mm256_add_epi16(e, o));
        }
      }
    }
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < 2; ++v) wide[t][v] = _mm256_add_epi32(wide[t][v], _mm256_madd_epi16(narrow[t][v], ones));
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < 2; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum + t * kRows + 8 * v), wide[t][v]);
}

template <int T>
VNNI void bytes_vnni(const uint32_t* words, const int8_t* x, int64_t stride, int64_t b0, int64_t b1, int32_t* sum) {
  const __m512i mask = _mm512_set1_epi8(15);
  __m512i wide[T] = {};
  for (int64_t b = b0; b < b1; ++b) {
    const __m512i word = _mm512_loadu_si512(words + b * kRows);
    const __m512i even = _mm512_and_si512(word, mask), odd = _mm512_and_si512(_mm512_srli_epi16(word, 4), mask);
    for (int t = 0; t < T; ++t) {
      const int8_t* at = x + t * stride + b * kBlock;
      wide[t] = _mm512_dpbusd_epi32(wide[t], even, _mm512_set1_epi32(load<int32_t>(at)));
      wide[t] = _mm512_dpbusd_epi32(wide[t], odd, _mm512_set1_epi32(load<int32_t>(at + 4)));
    }
  }
  for (int t = 0; t < T; ++t) _mm512_storeu_si512(sum + t * kRows, wide[t]);
}
#endif

using Bytes = void (*)(const uint32_t*, const int8_t*, int64_t, int64_t, int64_t, int32_t*);

// `some` has the sums for 1, 2, 3 and 4 tokens.
INLINE void product_of_bytes(const Input& in, const Weight& w, int64_t first, int64_t last, float* y,
                             const Bytes (&some)[4]) {
  constexpr int T = 4;
  const int64_t blocks = w.blocks(), groups = w.groups(), stride = blocks * kBlock, chunks = w.chunks();
  const int64_t span = ceil_div(std::min(w.group, w.k), kBlock);
  alignas(64) float total[kMaxTokens * kRows];
  alignas(64) int32_t sum[T * kRows];
  for (int64_t p = first; p < last; ++p) {
    std::fill_n(total, in.m * kRows, 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      float scale[kRows];
      for (int r = 0; r < kRows; ++r) {
        const uint32_t bits = uint32_t(w.scales[(p * groups + g) * kRows + r]) << 16;
        std::memcpy(scale + r, &bits, 4);
      }
      for (int64_t t0 = 0; t0 < in.m; t0 += T) {
        const int64_t tokens = std::min<int64_t>(T, in.m - t0);
        some[tokens - 1](w.words + p * blocks * kRows, in.bytes + t0 * stride, stride, g * span,
                         std::min((g + 1) * span, blocks), sum);
        for (int64_t t = 0; t < tokens; ++t)
          for (int r = 0; r < kRows; ++r)
            total[(t0 + t) * kRows + r] +=
                scale[r] * (float(sum[t * kRows + r]) * in.step[t0 + t] + in.sums[(t0 + t) * groups + g]);
      }
    }
    for (int64_t c = 0; w.starts && c < chunks; ++c)
      for (int32_t j = w.starts[p * chunks + c]; j < w.starts[p * chunks + c + 1]; ++j)
        for (int64_t t = 0; t < in.m; ++t)
          total[t * kRows + (w.places[j] & 15)] += w.values[j] * in.x[t * in.stride + c * kChunk + (w.places[j] >> 4)];
    for (int64_t t = 0; t < in.m; ++t)
      std::memcpy(y + t * w.n + p * kRows, total + t * kRows, sizeof(float) * std::min(kRows, w.n - p * kRows));
  }
}

// The bodies, compiled for each instruction set.

template <int T>
NOINLINE void micro_generic(const float* x, const float* slice, int64_t columns, float* sum) {
  micro<4, T>(x, slice, columns, sum);
}
void product_generic(const Input& in, const Weight& w, int64_t first, int64_t last, float* y) {
  if (in.folded) return product_of_one<4, 4, 2>(in, w, first, last, y);
  product_of_many<4, 2>(in, w, first, last, y, {micro_generic<1>, micro_generic<2>});
}
void bytes_product_generic(const Input& in, const Weight& w, int64_t first, int64_t last, float* y) {
  product_of_bytes(in, w, first, last, y, {bytes_generic<1>, bytes_generic<2>, bytes_generic<3>, bytes_generic<4>});
}
void dequantize_generic(const Weight& w, int64_t first, int64_t last, float* out, int64_t columns) {
  dequantize_panels<4>(w, first, last, out, columns);
}
#ifdef LIBORTHO_X86
template <int T>
AVX2 NOINLINE void micro_avx2(const float* x, const float* slice, int64_t columns, float* sum) {
  micro<8, T>(x, slice, columns, sum);
}
AVX2 void product_avx2(const Input& in, const Weight& w, int64_t first, int64_t last, float* y) {
  if (in.folded) return product_of_one<8, 4, 2>(in, w, first, last, y);
  product_of_many<8, 6>(in, w, first, last, y,
                        {micro_avx2<1>, micro_avx2<2>, micro_avx2<3>, micro_avx2<4>, micro_avx2<5>, micro_avx2<6>});
}
AVX2 void bytes_product_avx2(const Input& in, const Weight& w, int64_t first, int64_t last, float* y) {
  product_of_bytes(in, w, first, last, y, {bytes_avx2<1>, bytes_avx2<2>, bytes_avx2<3>, bytes_avx2<4>});
}
AVX2 void dequantize_avx2(const Weight& w, int64_t first, int64_t last, float* out, int64_t columns) {
  dequantize_panels<8>(w, first, last, out, columns);
}
template <int T>
AVX512 NOINLINE void micro_avx512(const float* x, const float* slice, int64_t columns, float* sum) {
  micro<16, T>(x, slice, columns, sum);
}
AVX512 void product_avx512(const Input& in, const Weight& w, int64_t first, int64_t last, float* y) {
  if (in.folded) return product_of_one<16, 4, 2>(in, w, first, last, y);
  product_of_many<16, 16>(
      in, w, first, last, y,
      {micro_avx512<1>, micro_avx512<2>, micro_avx512<3>, micro_avx512<4>, micro_avx512<5>, micro_avx512<6>,
       micro_avx512<7>, micro_avx512<8>, micro_avx512<9>, micro_avx512<10>, micro_avx512<11>, micro_avx512<12>,
       micro_avx512<13>, micro_avx512<14>, micro_avx512<15>, micro_avx512<16>});
}
AVX512 void dequantize_avx512(const Weight& w, int64_t first, int64_t last, float* out, int64_t columns) {
  dequantize_panels<16>(w, first, last, out, columns);
}
VNNI void bytes_product_vnni(const Input& in, const Weight& w, int64_t first, int64_t last, float* y) {
  product_of_bytes(in, w, first, last, y, {bytes_vnni<1>, bytes_vnni<2>, bytes_vnni<3>, bytes_vnni<4>});
}
#endif

}  // namespace

Isa best_isa() {
#ifdef LIBORTHO_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) return Isa::avx512_vnni;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::generic;
}

void repack(const uint8_t* packed, int64_t n, int64_t k, uint32_t* words) {
  const int64_t bytes = ceil_div(k, 2), blocks = ceil_div(k, kBlock);
  for (int64_t r = 0; r < ceil_div(n, kRows) * kRows; ++r)
    for (int64_t b = 0; b < blocks; ++b) {
      uint32_t word = 0x88888888;  // zeros
      if (r < n) std::memcpy(&word, packed + r * bytes + 4 * b, std::min<int64_t>(4, bytes - 4 * b));
      words[(r / kRows * blocks + b) * kRows + r % kRows] = word;
    }
}

void prepare_one(const float* x, const Weight& w, float* padded, float* folded, float* offset, Input& in) {
  const int64_t group = std::min(w.group, w.k), per_group = w.pieces() / w.groups();
  for (int64_t i = 0; i < w.k; ++i) padded[i] = x[i], folded[i] = x[i] * kFold[i % 4];
  for (int64_t i = 0; i < w.pieces(); ++i) {
    const int64_t end = (i / per_group + 1) * group, begin = end - group + i % per_group * kPiece * kBlock;
    offset[i] = float(-8 * std::accumulate(x + begin, x + std::min(begin + kPiece * kBlock, end), 0.0));
  }
  in = {padded, 1, w.chunks() * kChunk, folded, offset};
}

void prepare_many(const float* x, int64_t m, const Weight& w, float* sliced, Input& in) {
  for (int64_t k0 = 0; k0 < w.k; k0 += kSlice)
    for (int64_t t = 0; t < m; ++t)
      std::copy_n(x + t * w.k + k0, std::min(kSlice, w.k - k0), sliced + k0 * m + t * kSlice);
  in = {sliced, m, kSlice};
}

void prepare_int8(const float* x, int64_t m, const Weight& w, float* padded, int8_t* bytes, float* step, float* sums,
                  Input& in) {
  const int64_t width = w.chunks() * kChunk, stride = w.blocks() * kBlock, group = std::min(w.group, w.k);
  for (int64_t t = 0; t < m; ++t) {
    const float* row = x + t * w.k;
    float largest = 0;
    for (int64_t i = 0; i < w.k; ++i) {
      largest = std::isfinite(row[i]) ? std::max(largest, std::abs(row[i])) : NAN;
      padded[t * width + i] = row[i];
    }
    step[t] = largest / 127;
    for (int64_t g = 0; g < w.groups(); ++g) {
      int64_t sum = 0;
      for (int64_t i = g * group; i < (g + 1) * group && step[t] > 1e-36f; ++i) {
        const int value = int(std::nearbyint(row[i] / step[t]));
        bytes[t * stride + i / kBlock * kBlock + i % 2 * 4 + i % kBlock / 2] = int8_t(value);
        sum += value;
      }
      sums[t * w.groups() + g] = float(-8.0 * double(sum) * step[t]);
    }
  }
  in = {padded, m, width, nullptr, nullptr, bytes, step, sums};
}

void product(const Input& in, const Weight& w, int64_t first, int64_t last, float* y, Isa isa) {
#ifdef LIBORTHO_X86
  if (isa >= Isa::avx512) return product_avx512(in, w, first, last, y);
  if (isa == Isa::avx2) return product_avx2(in, w, first, last, y);
#endif
  product_generic(in, w, first, last, y);
}

void product_int8(const Input& in, const Weight& w, int64_t first, int64_t last, float* y, Isa isa) {
#ifdef LIBORTHO_X86
  if (isa == Isa::avx512_vnni) return bytes_product_vnni(in, w, first, last, y);
  if (isa >= Isa::avx2) return bytes_product_avx2(in, w, first, last, y);
#endif
  bytes_product_generic(in, w, first, last, y);
}

void dequantize(const Weight& w, int64_t first, int64_t last, float* out, int64_t columns, Isa isa) {
#ifdef LIBORTHO_X86
  if (isa >= Isa::avx512) return dequantize_avx512(w, first, last, out, columns);
  if (isa == Isa::avx2) return dequantize_avx2(w, first, last, out, columns);
#endif
  dequantize_generic(w, first, last, out, columns);
}

}  // namespace libortho
