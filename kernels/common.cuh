// What both GPU generations share: fixed-width types, element types, packing, and the few scalar operations of the
// online softmax. No host header and no CUDA header is included: the sources compile with NVRTC alone.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

namespace bsfa {

// Element types by name; the bits travel as 16- and 32-bit words.
struct bf16 {};
struct fp16 {};

template <class A, class B> struct same { static constexpr bool value = false; };
template <class A> struct same<A, A> { static constexpr bool value = true; };

// A value as an argument whose type says it.
template <auto V> struct Constant { static constexpr auto value = V; };

constexpr int kWarp = 32;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// Two floats to one 32-bit word of two elements, `low` in the lower half.
template <class T> __device__ __forceinline__ u32 pack(float low, float high) {
  u32 word;
  if constexpr (same<T, bf16>::value) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Maximum that keeps a NaN: a NaN score must keep its block (fmaxf would drop it).
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// The largest of three floats as integers, in one instruction on Hopper: a maximum that keeps a NaN the products made, and
// right but where all three are negative; then it is one of them. Volatile, so that it stays behind the wait for scores.
__device__ __forceinline__ float max3_signed(float a, float b, float c) {
  float y;
  asm volatile("{\n.reg .s32 a, b, c;\nmov.b32 a, %1;\nmov.b32 b, %2;\nmov.b32 c, %3;\n"
               "max.s32 a, a, b;\nmax.s32 a, a, c;\nmov.b32 %0, a;\n}" : "=f"(y) : "f"(a), "f"(b), "f"(c));
  return y;
}

// The largest of three, in one instruction on Hopper. Volatile, as above.
__device__ __forceinline__ int max3(int a, int b, int c) {
  int y;
  asm volatile("{\n.reg .s32 ab;\nmax.s32 ab, %1, %2;\nmax.s32 %0, ab, %3;\n}" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

// The four lanes of a quad hold one row of an accumulator tile between them.
__device__ __forceinline__ float quad_max(float x) {
  x = max_nan(x, __shfl_xor_sync(~0u, x, 1));
  return max_nan(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace bsfa
