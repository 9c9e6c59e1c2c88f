// Thin names for the Hopper instructions the mainloop uses: mbarriers, bulk tensor copies, wgmma.
// Shared-memory addresses are 32-bit throughout.
#pragma once
#include "common.cuh"

namespace bsfa {

// An opaque 128-byte tensor map, encoded on the host and passed by value as a __grid_constant__.
struct alignas(64) TensorMap { u64 opaque[16]; };

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- plain shared-memory words, by 32-bit address ----------------------------------------------------------------
__device__ __forceinline__ u32 load_shared(u32 address) {
  u32 word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}
__device__ __forceinline__ float4 load_shared4(u32 address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(u32 address, const u32 (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
__device__ __forceinline__ void store_shared(u32 address, u32 word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
__device__ __forceinline__ void store_shared_if(bool here, u32 address, u32 word) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.shared.b32 [%0], %1;\n}" ::"r"(address), "r"(word), "r"(int(here)) : "memory");
}
// 16 bytes, shared to global.
__device__ __forceinline__ void copy_to_global(void* to, u32 from) {
  asm volatile("{\n.reg .b32 w<4>;\nld.shared.v4.b32 {w0, w1, w2, w3}, [%1];\nst.global.v4.b32 [%0], {w0, w1, w2, w3};\n}"
               ::"l"(to), "r"(from) : "memory");
}
// What makes `value` stays before what follows: the compiler, which moves arithmetic past waits as it likes, takes it for
// stored. It never is, for no address here is 1.
__device__ __forceinline__ void hold(u32 address, u32 value) {
  asm volatile("{\n.reg .pred never;\nsetp.eq.u32 never, %0, 1;\n@never st.shared.b32 [%0], %1;\n}" ::"r"(address), "r"(value) : "memory");
}

// ---- mbarriers: `arrivals` arrive, then whoever waits on that phase's parity goes on -------------------------------
// A wait passes where the phase that runs has the other parity: so on a fresh barrier one for parity 1 does, and who waits
// may be one phase behind and no more.
__device__ __forceinline__ void mbarrier_init(u32 bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals));
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Without arriving.
__device__ __forceinline__ void mbarrier_expect_more(u32 bar, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_if(bool here, u32 bar) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(bar), "r"(int(here)) : "memory");
}
// Whether a wait would pass now: asked early, the answer costs nobody the time it takes.
__device__ __forceinline__ u32 mbarrier_test(u32 bar, u32 parity) {
  u32 passes;
  asm volatile("{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
               : "=r"(passes) : "r"(bar), "r"(parity) : "memory");
  return passes;
}
// For those who know that it `passes`, nothing.
__device__ __forceinline__ void mbarrier_wait(u32 bar, u32 parity, u32 passes = 0) {
  asm volatile(
      "{\n.reg .pred done;\nsetp.ne.b32 done, %2, 0;\n@done bra.uni ready;\n"
      "retry: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni ready;\nbra.uni retry;\nready:\n}" ::"r"(bar), "r"(parity), "r"(passes) : "memory");
}

// A place in a ring of barriers: where, and the parity of the phase that a wait for it is about. One register.
template <int Size> struct Place {
  u32 word = 0;
  __device__ __forceinline__ u32 at() const { return word >> 1; }
  __device__ __forceinline__ u32 parity() const { return word & 1; }
  __device__ __forceinline__ void advance() {
    word += 2;
    if (word >= 2 * Size) word = ~word & 1;
  }
};

// What this thread has written to shared memory is there for copies and wgmma.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- named barriers: a warpgroup's threads meet ------------------------------------------------------------------
// True where any of the 128 brings true.
__device__ __forceinline__ bool barrier_or(int name, bool vote) {
  u32 any;
  asm volatile("{\n.reg .pred mine, any;\nsetp.ne.b32 mine, %1, 0;\nbarrier.cta.red.or.pred any, %2, 128, mine;\n"
               "selp.u32 %0, 1, 0, any;\n}" : "=r"(any) : "r"(int(vote)), "r"(name) : "memory");
  return any;
}
// The same. What makes `other` is not put off to where it is used: it runs while the barrier does.
__device__ __forceinline__ bool barrier_or(int name, bool vote, bool& other) {
  u32 any, known = other;
  asm volatile("{\n.reg .pred mine, any;\nsetp.ne.b32 mine, %2, 0;\nbarrier.cta.red.or.pred any, %3, 128, mine;\n"
               "selp.u32 %0, 1, 0, any;\n}" : "=r"(any), "+r"(known) : "r"(int(vote)), "r"(name) : "memory");
  other = known;
  return any;
}

// ---- bulk tensor copies (TMA), global to shared ----------------------------------------------------------------
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void copy_tile(u32 destination, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3,
                                          int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6,%7}], "
      "[%2];" ::"r"(destination), "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// So many bytes as they lie, a multiple of 16.
__device__ __forceinline__ void copy_bytes(u32 destination, const void* from, int bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(destination), "l"(from), "r"(bytes), "r"(bar) : "memory");
}

// ---- registers of a warpgroup ------------------------------------------------------------------------------------
template <int R> __device__ __forceinline__ void registers_grow() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R)); }
template <int R> __device__ __forceinline__ void registers_shrink() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R)); }

// threadIdx.x, read anew: a register less that lives throughout.
__device__ __forceinline__ u32 thread_index() {
  u32 index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
// Lets so many cycles pass.
__device__ __forceinline__ void stagger(u32 cycles) {
  u32 began, now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(began)::"memory");
  do asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  while (now - began < cycles);
}
// N instructions that are never run: `address`, in shared memory, is not 1.
template <int N> __device__ __forceinline__ void put_off(u32 address) {
  if (address != 1) return;
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("nanosleep.u32 0;");
}
// A value that the compiler does not know to be the same in every trip of a loop, so that what follows from it is computed
// where it is used and takes no register before.
__device__ __forceinline__ u32 stays_in_the_loop(u32 value) {
  u32 same;
  asm volatile("mov.b32 %0, %1;" : "=r"(same) : "r"(value));
  return same;
}

// ---- wgmma -----------------------------------------------------------------------------------------------------
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// A tile of 64 elements a row, 128-byte swizzle, rows packed in groups of eight (1024 bytes), as the word of its descriptor
// that depends on where it lies. `panel` is the byte distance between 64-column panels; only a transposed operand looks at
// it.
__device__ __forceinline__ u32 tile(u32 address, u32 panel = 16) { return (panel >> 4) << 16 | (address & 0x3FFFF) >> 4; }
// The whole descriptor of a tile `bytes` further on. The address does not carry over: shared memory ends before.
__device__ __forceinline__ u64 descriptor(u32 tile, u32 bytes) {
  constexpr u32 high = 1u << 30 | 1024 >> 4;
  return u64(high) << 32 | (tile + (bytes >> 4));
}

// The same of a tile of 8-bit integers, whose rows are of D bytes: 128- or 64-byte swizzle, packed in groups of eight.
template <int D> __device__ __forceinline__ u64 descriptor_of_bytes(u32 tile, u32 bytes) {
  constexpr u32 high = (D == 128 ? 1u : 2u) << 30 | 8 * D >> 4;
  return u64(high) << 32 | (tile + (bytes >> 4));
}

// Operand lists of an accumulator held in float d[64] or d[32].
#define BSFA_F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define BSFA_I8(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define BSFA_I32(d, i) BSFA_I8(d, i), BSFA_I8(d, i + 8), BSFA_I8(d, i + 16), BSFA_I8(d, i + 24)
#define BSFA_F32(d, i) BSFA_F8(d, i), BSFA_F8(d, i + 8), BSFA_F8(d, i + 16), BSFA_F8(d, i + 24)
#define BSFA_D32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define BSFA_D64 BSFA_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d = (accumulate ? d : 0) + A B^T with A (64 x 16) and B (64 x 16) in shared memory, both K-major.
template <class T> __device__ __forceinline__ void wgmma_ss(float (&d)[32], u64 a, u64 b, int accumulate) {
  if constexpr (same<T, bf16>::value)
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" BSFA_D32 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                 : BSFA_F32(d, 0) : "l"(a), "l"(b), "r"(accumulate));
  else
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" BSFA_D32 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                 : BSFA_F32(d, 0) : "l"(a), "l"(b), "r"(accumulate));
}

// d += A B with A (64 x 16) in registers and B (16 x 128 or 16 x 64) in shared memory, N-major (transposed).
template <class T> __device__ __forceinline__ void wgmma_rs(float (&d)[64], const u32* a, u64 b) {
  if constexpr (same<T, bf16>::value)
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" BSFA_D64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : BSFA_F32(d, 0), BSFA_F32(d, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" BSFA_D64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : BSFA_F32(d, 0), BSFA_F32(d, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <class T> __device__ __forceinline__ void wgmma_rs(float (&d)[32], const u32* a, u64 b) {
  if constexpr (same<T, bf16>::value)
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" BSFA_D32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : BSFA_F32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" BSFA_D32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : BSFA_F32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// d = (accumulate ? d : 0) + A B^T with A (64 x 32) in registers and B (128 x 32) in shared memory, 8-bit integers, exactly.
__device__ __forceinline__ void wgmma_rs(int (&d)[64], const u32 (&a)[4], u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" BSFA_D64 "}, {%64,%65,%66,%67}, %68, p;\n}"
               : BSFA_I32(d, 0), BSFA_I32(d, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
#undef BSFA_I8
#undef BSFA_I32
#undef BSFA_F8
#undef BSFA_F32
#undef BSFA_D32
#undef BSFA_D64

}  // namespace bsfa
