// Runs a CUDA kernel on a CPU, to test its logic where there is no GPU: a thread for every thread of a block, blocks
// one after the other, shared memory that all threads see, and background copies that are made at once or only when
// they are waited for, by lot. The fragments of the tensor-core product are as the PTX ISA lays them out (mma.m16n8k16,
// "Matrix Fragments").
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(n)

struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));
struct Index {
  unsigned x;
};

namespace emulator {

constexpr int kLanes = 32;

struct Warp {
  std::barrier<> barrier{kLanes};
  float values[kLanes];
  uint32_t a[kLanes][4], b[kLanes][2];
};

struct Copy {
  void* to;
  const void* from;
};

inline thread_local Index thread, block;
inline thread_local Warp* warp;
inline thread_local std::barrier<>* all;
inline thread_local uint32_t lot = 1;
inline thread_local std::vector<Copy> open;                // copies not committed yet
inline thread_local std::deque<std::vector<Copy>> groups;  // committed, not made yet

inline int lane() { return int(thread.x % kLanes); }

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen)(uint16_t)) {
  std::memcpy(warp->a[lane()], a, sizeof a);
  warp->b[lane()][0] = b0, warp->b[lane()][1] = b1;
  warp->barrier.arrive_and_wait();
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int upper = k / 8, from = k % 8 / 2, shift = k % 2 * 16;
      const uint32_t left = warp->a[row % 8 * 4 + from][row / 8 + 2 * upper], right = warp->b[column * 4 + from][upper];
      d[i] += widen(uint16_t(left >> shift)) * widen(uint16_t(right >> shift));
    }
  }
  warp->barrier.arrive_and_wait();
}

}  // namespace emulator

#define threadIdx emulator::thread
#define blockIdx  emulator::block

inline void __syncthreads() { emulator::all->arrive_and_wait(); }
inline void __syncwarp() { emulator::warp->barrier.arrive_and_wait(); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace libortho::cuda {

// What follows from a format's `widen` and `narrow`.
template <class T>
struct Format {
  static uint32_t integers(uint32_t word) {
    return T::narrow(float(word & 15) - 8) | uint32_t(T::narrow(float(word >> 16 & 15) - 8)) << 16;
  }
  static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::mma(d, a, b0, b1, T::widen);
  }
};

struct Half : Format<Half> {
  static float widen(uint16_t v) {
    _Float16 f;
    std::memcpy(&f, &v, 2);
    return float(f);
  }
  static uint16_t narrow(float v) {
    const _Float16 f = _Float16(v);
    uint16_t bits;
    std::memcpy(&bits, &f, 2);
    return bits;
  }
};

struct Bfloat16 : Format<Bfloat16> {
  static float widen(uint16_t v) {
    const uint32_t bits = uint32_t(v) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  static uint16_t narrow(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

inline void copy16(void* to, const void* from) {
  emulator::lot = emulator::lot * 1664525 + 1013904223;
  if (emulator::lot >> 31) *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
  else emulator::open.push_back({to, from});
}
inline void commit() { emulator::groups.push_back(std::move(emulator::open)), emulator::open.clear(); }
template <int Pending>
void wait() {
  for (; emulator::groups.size() > Pending; emulator::groups.pop_front())
    for (const auto& c : emulator::groups.front()) *static_cast<uint4*>(c.to) = *static_cast<const uint4*>(c.from);
}
inline float from_lane(float v, int distance) {
  auto& w = *emulator::warp;
  w.values[emulator::lane()] = v;
  w.barrier.arrive_and_wait();
  const float other = w.values[emulator::lane() ^ distance];
  w.barrier.arrive_and_wait();
  return other;
}

template <class... A, class... B>
int launch(void (*kernel)(A...), unsigned blocks, unsigned threads, void*, B... args) {
  std::vector<std::unique_ptr<emulator::Warp>> warps;
  for (unsigned i = 0; i < threads / emulator::kLanes; ++i) warps.push_back(std::make_unique<emulator::Warp>());
  std::barrier<> all(threads);
  std::vector<std::thread> running;
  for (unsigned t = 0; t < threads; ++t)
    running.emplace_back([&, t] {
      emulator::thread = {t}, emulator::lot = t * 2654435761u + blocks,
      emulator::warp = warps[t / emulator::kLanes].get(), emulator::all = &all;
      for (unsigned b = 0; b < blocks; ++b) {
        emulator::block = {b}, emulator::groups.clear(), emulator::open.clear();
        kernel(args...);
        all.arrive_and_wait();
      }
    });
  for (auto& t : running) t.join();
  return 0;
}

const char* message(int) { return "an error"; }
int processors(int) { return 1; }

}  // namespace libortho::cuda
