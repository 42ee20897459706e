// What the CUDA kernel needs of the device: the two 16-bit formats, tensor-core products, copies in the background.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace libortho::cuda {

// Both formats hold a nibble exactly behind a leading one: 1024 + v in float16, 128 + v in bfloat16.
struct Half {
  static __device__ uint32_t integers(uint32_t word) {  // nibbles at bits 0 and 16, minus 8, as a pair of halves
    const uint32_t bits = (word & 0x000f000fu) | 0x64006400u, offset = 0x64086408u;
    const __half2 v = __hsub2(*reinterpret_cast<const __half2*>(&bits), *reinterpret_cast<const __half2*>(&offset));
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static __device__ float widen(uint16_t v) { return __half2float(__ushort_as_half(v)); }
  static __device__ uint16_t narrow(float v) { return __half_as_ushort(__float2half_rn(v)); }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Bfloat16 {
  static __device__ uint32_t integers(uint32_t word) {
    const uint32_t bits = (word & 0x000f000fu) | 0x43004300u, offset = 0x43084308u;
    const __nv_bfloat162 v =
        __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&bits), *reinterpret_cast<const __nv_bfloat162*>(&offset));
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static __device__ float widen(uint16_t v) { return __uint_as_float(uint32_t(v) << 16); }
  static __device__ uint16_t narrow(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// 16 bytes from global to shared memory, past the registers and the nearest cache.
inline __device__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
}
inline __device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
inline __device__ void wait() {  // until at most `Pending` of the committed groups of this thread are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
inline __device__ float from_lane(float v, int distance) { return __shfl_xor_sync(0xffffffffu, v, distance); }

template <class... A, class... B>
int launch(void (*kernel)(A...), unsigned blocks, unsigned threads, void* stream, B... args) {
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  return cudaGetLastError();
}

// Not inline: this file is a part of dual_gemm.cu and of nothing else.
const char* message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
int processors(int device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) ? 1 : count;
}

}  // namespace libortho::cuda
