// The screen of a gate for Hopper (sm_90a): which blocks exact scores need not be computed for.
//
// Scores of 8-bit integers cost half of exact ones. Where a block's largest integer score is under the bar by more than
// rounding Q and K can have moved it, no exact score reaches the bar: the gate would skip the block. All others are listed, in
// the order of visit, and attention decides on them by exact scores. So with the whole bound (`margin` 1) what is kept is what
// the gate alone keeps; with a part of it, nearly so.
//
// The bound: q = q' + dq and k = k' + dk, with q' and k' as rounded, give |q.k - q'.k'| <= (|q'| + |dq|) |dk| + |dq| |k'|. Of a
// key block the largest |dk| and |k'| are kept with its scale, of a row of Q both norms.
//
// Two kernels. `quantize` makes a record of each pair of key blocks: 128 keys of 8-bit integers, laid out as wgmma reads them,
// then a `Rounding` for each block. In `screen` a warpgroup has the 128 rows of a query block, whose Q it rounds on its way
// into registers, and goes through the pairs that it sees: scores, maxima, comparison. Nobody waits for a decision, so that
// its four warps meet only to list 32 blocks at a time. A CTA has two such warpgroups, which share the records that one warp
// copies.
//
//   records   kStages in shared memory; full[stage] (bytes) -> consumers, empty[stage] (their eight warps) -> producer
//   votes     for each consumer twice four words: what its warps want of 32 blocks
//
// The products of one warpgroup run under the maxima of the other, and so do its own: a step's first products stand in line behind
// the second ones of the step before, for `kTogether` steps; then there is a gap, for none may be in flight around a loop.
#include "ptx_sm90.cuh"
#include "work.cuh"

namespace bsfa {

constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kStages = 6;
constexpr int kPairKeys = 2 * kBlockK;
constexpr int kWordPairs = 16;  // of a word of 32 blocks
constexpr int kTiles = 2;
constexpr int kRows = 4;        // rows that a thread has a share of: two a tile
constexpr int kTogether = 4;    // steps whose products follow each other
constexpr float kLargest = 127.f;
constexpr float kToInteger = 12582912.f;  // 2^23 + 2^22: what is added to it is rounded to an integer, whose bits are the lowest
constexpr float kFinite = 3.4028235e38f;  // the largest that is
constexpr float kRoundingError = 1e-5f;  // of 32-bit sums over a head's columns, relative to the norms' product

// What rounding did to a key block.
struct Rounding {
  float scale;   // of its integers
  float error;   // the largest |k - k'|, with what 32-bit sums may lose
  float length;  // the largest |k'|
  float unused;
};

// The one argument of both kernels. Mirrored by bsfa/launch_screen.py.
struct Arguments {
  Tensor q, k;
  char* records;    // (B, Hkv, pairs, record bytes)
  i32* indices;     // (B, Hq, nQ, list_width) to fill
  i32* counts;      // (B, Hq, nQ)
  i32 pairs;        // of a sequence and head, at most
  float margin;     // share of the bound
  Call call;
};

template <int D> struct Layout {
  static constexpr int keys = kPairKeys * D;
  static constexpr int record = keys + 2 * int(sizeof(Rounding));
  static constexpr int stage = keys + 1024;
  static constexpr int votes = kStages * stage;
  static constexpr int full = votes + kConsumers * 2 * 16;
  static constexpr int empty = full + 8 * kStages;
  static constexpr int cta = empty + 8 * kStages;
  static constexpr int bytes = cta + 64 * kConsumers;
  static_assert(bytes - votes <= 1024);  // what bsfa/launch_screen.py takes them for
};

template <class T> __device__ __forceinline__ void unpack(u32 word, float& low, float& high) {
  if constexpr (same<T, bf16>::value) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000);
  } else {
    asm("{\n.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high) : "r"(word));
  }
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The squared norms of what rounding loses, and of the result in units of its scale.
struct Norms {
  float lost = 0.f;
  int rounded = 0;
};
// Four numbers as bytes, the first lowest; `inverse` is the scale's, as nearly as may be. Adds to the norms.
__device__ __forceinline__ u32 round_four(const float (&x)[4], float scale, float inverse, Norms& norms) {
  u32 bytes[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float sum = fmaf(x[i], inverse, kToInteger), lost = fmaf(kToInteger - sum, scale, x[i]);
    bytes[i] = __float_as_uint(sum);
    norms.lost = fmaf(lost, lost, norms.lost);
  }
  const u32 word = __byte_perm(__byte_perm(bytes[0], bytes[1], 0x40), __byte_perm(bytes[2], bytes[3], 0x40), 0x5410);
  asm("dp4a.s32.s32 %0, %1, %1, %0;" : "+r"(norms.rounded) : "r"(word));
  return word;
}

// Of absolute values, two 16-bit floats in a word: the larger ones.
__device__ __forceinline__ u32 larger_halves(u32 a, u32 b) {
  asm("max.u16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
__device__ __forceinline__ u32 without_signs(u32 halves) { return halves & 0x7fff7fff; }

// A key block for each CTA of 128 threads: eight columns of some of its rows a thread.
template <class T, int D> __global__ void __launch_bounds__(128) quantize(const __grid_constant__ Arguments arguments) {
  using L = Layout<D>;
  constexpr int kLanes = D / 8, kPass = 128 / kLanes, kPasses = kBlockK / kPass;
  __shared__ float shared[4][2];
  const Call& a = arguments.call;
  const int block = blockIdx.x, kv_head = blockIdx.y, batch = blockIdx.z;
  const i32* span = a.spans_k + batch * a.span_step_k;
  const int start = a.spans_k ? span[0] : 0, length = a.spans_k ? span[1] - start : a.k_length;
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes, warp = threadIdx.x / kWarp;
  const u16* rows = arguments.k.data + (a.packed ? 0 : batch) * arguments.k.batch_stride + kv_head * arguments.k.head_stride;

  float x[kPasses][2][4];
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < kPasses; i++) {
    int key = block * kBlockK + i * kPass + first;
    uint4 words = {};
    if (key < length) words = *reinterpret_cast<const uint4*>(rows + (start + key) * arguments.k.row_stride + lane * 8);
    unpack<T>(words.x, x[i][0][0], x[i][0][1]);
    unpack<T>(words.y, x[i][0][2], x[i][0][3]);
    unpack<T>(words.z, x[i][1][0], x[i][1][1]);
    unpack<T>(words.w, x[i][1][2], x[i][1][3]);
#pragma unroll
    for (int n = 0; n < 8; n++) largest = fmaxf(largest, fabsf(x[i][n / 4][n % 4]));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  if (threadIdx.x % kWarp == 0) shared[warp][0] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++) largest = fmaxf(largest, shared[i][0]);
  __syncthreads();
  const float scale = largest / kLargest, inverse = largest > 0.f ? fminf(kLargest / largest, kFinite) : 0.f;

  char* record = arguments.records + ((i64(batch) * a.kv_heads + kv_head) * arguments.pairs + block / 2) * L::record;
  float worst[2] = {};  // |dk|, |k'|, squared
#pragma unroll
  for (int i = 0; i < kPasses; i++) {
    const int row = block % 2 * kBlockK + i * kPass + first;
    Norms norms;
    uint2 words{round_four(x[i][0], scale, inverse, norms), round_four(x[i][1], scale, inverse, norms)};
    // 128- or 64-byte swizzle: 16-byte chunks of rows of D bytes, permuted by bits 7 and up of the address.
    const int chunk = lane / 2 ^ (D == 128 ? row % 8 : row / 2 % 4);
    *reinterpret_cast<uint2*>(record + row * D + chunk * 16 + lane % 2 * 8) = words;
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      norms.lost += __shfl_xor_sync(~0u, norms.lost, distance);
      norms.rounded += __shfl_xor_sync(~0u, norms.rounded, distance);
    }
    worst[0] = max_nan(worst[0], norms.lost);
    worst[1] = max_nan(worst[1], float(norms.rounded));
  }
#pragma unroll
  for (int n = 0; n < 2; n++) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) worst[n] = max_nan(worst[n], __shfl_xor_sync(~0u, worst[n], distance));
    if (threadIdx.x % kWarp == 0) shared[warp][n] = worst[n];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int n = 0; n < 2; n++)
      for (int i = 0; i < 4; i++) worst[n] = max_nan(worst[n], shared[i][n]);
    const float lost = sqrtf(worst[0]), length = scale * sqrtf(worst[1]);
    *reinterpret_cast<Rounding*>(record + L::keys + block % 2 * sizeof(Rounding)) = {
        scale, lost + kRoundingError * (length + lost), length, 0.f};
  }
}

// The pairs of a consumer's sight, as the CTA goes through them.
struct Walk {
  int pairs, steps;
  Order order;
  __device__ Walk(const Call& a, int visible) : pairs((visible + 1) / 2), order(a.order) {
    steps = pairs + (order == Order::sink && pairs > 0);  // the first pair twice: block 0, in the end block 1
  }
  __device__ int pair(int step) const {
    if (order == Order::ascending) return step;
    if (order == Order::sink) return step ? pairs - step : 0;
    return pairs - 1 - step;
  }
  // Whether no block of this word comes later.
  __device__ bool ends_word(int step) const {
    if (order == Order::ascending) return step % kWordPairs == kWordPairs - 1 || step == steps - 1;
    return pair(step) % kWordPairs == 0;
  }
  // The blocks of a word that a step which ends it lists, a bit each.
  __device__ u32 listed(int step) const {
    if (order != Order::sink || pair(step)) return ~0u;
    return step ? ~1u : 1u;
  }
};

// The low `n` bits.
__device__ __forceinline__ u32 low_bits(int n) { return n <= 0 ? 0 : n >= 32 ? ~0u : (1u << n) - 1; }

// A consumer, number `c`. kRelative: the gate has cuts against running maxima.
template <class T, int D, bool kRelative>
__device__ __forceinline__ void decide(const Arguments& arguments, const Work& work, const Walk& walk, u32 base, int c) {
  using L = Layout<D>;
  constexpr int kSteps = D / 32;
  const Call& a = arguments.call;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x % 128 / kWarp;
  // An item past the last has no place in the tables.
  const float threshold = work.visible ? work.look_up(a.threshold, a.scale) : infinity();
  const float relative = kRelative && work.visible ? work.look_up(a.relative, a.scale) : -infinity();

  // Q as wgmma takes it from registers: a thread has 4 columns in each half of a product's 32, of rows lane / 4 and 8 more.
  u32 q[kTiles][kSteps][4];
  // In units of a row's own scale times a key: its bar, its share of the bound by either norm, its running maximum at least.
  float bar[kRows], by_error[kRows], by_length[kRows], cut[kRows], most[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int row = work.q_block * kBlockQ + warp * 16 + lane / 4 + r / 2 * 64 + r % 2 * 8;
    const bool there = row < work.q_length;
    const u16* from = arguments.q.data + work.plane(a) * arguments.q.batch_stride +
                      (work.q_start + row) * arguments.q.row_stride + work.head * arguments.q.head_stride + lane % 4 * 4;
    uint2 words[2 * kSteps];
#pragma unroll
    for (int i = 0; i < 2 * kSteps; i++) words[i] = there ? *reinterpret_cast<const uint2*>(from + 16 * i) : uint2{};
    u32 halves = 0;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; i++)
      halves = larger_halves(halves, larger_halves(without_signs(words[i].x), without_signs(words[i].y)));
    halves = larger_halves(halves, __shfl_xor_sync(~0u, halves, 1));
    halves = larger_halves(halves, __shfl_xor_sync(~0u, halves, 2));
    float low, high;
    unpack<T>(halves, low, high);
    const float largest = max_nan(low, high);
    const float scale = largest > 0.f ? largest * (1.f / kLargest) : 1.f, inverse = reciprocal(scale);
    const float to_integer = largest > 0.f ? fminf(inverse, kFinite) : 0.f;
    Norms norms;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; i++) {
      float x[4];
      unpack<T>(words[i].x, x[0], x[1]);
      unpack<T>(words[i].y, x[2], x[3]);
      q[r / 2][i / 2][i % 2 * 2 + r % 2] = round_four(x, scale, to_integer, norms);
    }
    const float lost = sqrtf(quad_sum(norms.lost)), length = scale * sqrtf(quad_sum(float(norms.rounded)));
    const float share = arguments.margin * inverse;
    by_error[r] = share * (length + lost);
    by_length[r] = share * lost;
    bar[r] = there ? threshold * inverse : infinity();
    cut[r] = relative <= 0.f ? relative * inverse : -infinity();  // above 0 what is skipped may be above what is kept
    most[r] = -infinity();
  }

  // Blocks that every row sees whole; the others are listed unseen, as the diagonal band is, where it is kept anyway.
  int clear = work.k_length / kBlockK;
  if (a.causal) clear = min(clear, max(0, work.offset + work.q_block * kBlockQ + 1) / kBlockK);
  const int always = a.keep_diagonal ? min(clear, work.band) : clear;
  const int row_blocks = (a.q_length + kBlockQ - 1) / kBlockQ;
  const i64 list = (i64(work.batch) * a.q_heads + work.head) * row_blocks + work.q_block;
  i32* indices = arguments.indices + list * a.list_width;
  int count = 0, words = 0;
  u32 wanted = 0;  // by this thread's rows, of the blocks of a word

  int s[kTiles][64];
  auto start_scores = [&](int m, u32 keys) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; i++) wgmma_rs(s[m], q[m][i], descriptor_of_bytes<D>(keys, 32 * i), i != 0);
    wgmma_commit();
  };
  // Of two rows and either block.
  auto maxima = [&](int m, int(&largest)[2][2]) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int* x = s[m] + 32 * h + 2 * r;
        auto at = [&](int n) { return x[n / 2 * 4 + n % 2]; };
        int three[5];
#pragma unroll
        for (int i = 0; i < 5; i++) three[i] = max3(at(3 * i), at(3 * i + 1), at(3 * i + 2));
        largest[h][r] = max3(max3(three[0], three[1], three[2]), max3(three[3], three[4], at(15)), three[0]);
      }
  };
  // Whether a row of tile `m` may reach its bar in a block, where `x` are the largest scores of its two rows.
  auto wants = [&](int m, const int(&x)[2], const float4& rounding, bool seen) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = 2 * m + r;
      const float moved = fmaf(by_error[row], rounding.y, by_length[row] * rounding.z), score = x[r] * rounding.x;
      float least = bar[row];
      if constexpr (kRelative) least = fmaxf(least, most[row] + cut[row]);  // a maximum that is NaN says nothing, as the gate's
      any |= !(score + moved < least);
      if constexpr (kRelative) {
        const float low = quad_max(score - moved);
        if (seen || !(low == low)) most[row] = max_nan(most[row], low);  // a bad key may be one that the row sees
      }
    }
    return any;
  };

  // A step's verdict: on its two blocks by their largest scores, on the word that it ends by all four warps'.
  int largest[kTiles][2][2];
  float4 rounding[2];
  auto half = [&](int n) { return a.order == Order::ascending ? n : 1 - n; };  // of a pair, in the order of visit
  auto judge = [&](int step) {
    const int pair = walk.pair(step);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int block = 2 * pair + half(n);
      const bool seen = block < clear && !(a.order == Order::sink && pair == 0 && (block == 0) != (step == 0));
      bool any = false;
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        int x[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int low = largest[m][0][r], high = largest[m][1][r];
          x[r] = half(n) ? high : low;
        }
        any |= wants(m, x, rounding[n], seen);
      }
      wanted |= u32(any) << block % 32;
    }
    if (walk.ends_word(step)) {
      const int first = pair / kWordPairs * 32;
      u32 word = __reduce_or_sync(~0u, wanted);
      wanted = 0;
      const u32 votes = base + L::votes + c * 32 + words++ % 2 * 16;
      if (lane == 0) store_shared(votes + 4 * warp, word);
      barrier_or(1 + c, false);
      if (warp == 0) {
        word = load_shared(votes) | load_shared(votes + 4) | load_shared(votes + 8) | load_shared(votes + 12);
        word |= ~low_bits(always - first);
        if (a.keep_first && first == 0) word |= 1;
        word &= low_bits(work.visible - first) & walk.listed(step);
        const int bit = a.order == Order::ascending ? lane : 31 - lane;
        const u32 before = a.order == Order::ascending ? low_bits(bit) : ~low_bits(bit + 1);
        if (word >> bit & 1) indices[count + __popc(word & before)] = first + bit;
        count += __popc(word);
      }
    }
  };

  Place<kStages> stage;
  auto keys = [&] { return tile(base) + stage.at() * (L::stage >> 4); };
  auto await = [&] { mbarrier_wait(base + L::full + 8 * stage.at(), stage.parity()); };
  // Steps from `step` on, `number` of them. What the last one has found is judged under the products that come next.
  auto take = [&](int step, auto number) {
    constexpr int kNumber = decltype(number)::value;
    await();
    start_scores(0, keys());
    start_scores(1, keys());
    if (step) judge(step - 1);
#pragma unroll
    for (int i = 0; i < kNumber; i++) {
      const bool last = i == kNumber - 1;
      const Place<kStages> now = stage;
#pragma unroll
      for (int n = 0; n < 2; n++) rounding[n] = load_shared4(base + now.at() * L::stage + L::keys + half(n) * sizeof(Rounding));
      wgmma_wait<1>();
      maxima(0, largest[0]);
      stage.advance();
      if (!last) {
        await();
        start_scores(0, keys());
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      __syncwarp();  // its lanes have read what is said of the blocks
      mbarrier_arrive_if(lane == 0, base + L::empty + 8 * now.at());
      maxima(1, largest[1]);
      if (!last) {
        start_scores(1, keys());
        judge(step + i);
      }
    }
  };
  int step = 0;
  for (; step + kTogether <= walk.steps; step += kTogether) take(step, Constant<kTogether>{});
  for (; step < walk.steps; step++) take(step, Constant<1>{});
  if (step) judge(step - 1);
  if (warp == 0 && lane == 0 && work.q_block < row_blocks) arguments.counts[list] = count;
}

template <class T, int D, bool kRelative>
__global__ void __launch_bounds__(kThreads, 1) screen(const __grid_constant__ Arguments arguments) {
  using L = Layout<D>;
  extern __shared__ __align__(1024) char shared[];  // of swizzled tiles
  const u32 base = shared_address(shared);
  Work* works = reinterpret_cast<Work*>(shared + L::cta);
  static_assert(sizeof(Work) <= 64);
  const Call& a = arguments.call;

  if (threadIdx.x < kConsumers * kWarp && threadIdx.x % kWarp == 0) {  // a warp each, for it takes its time
    const int c = threadIdx.x / kWarp;
    works[c] = Work(a, blockIdx.x, kConsumers, c);
  } else if (threadIdx.x == kConsumers * kWarp) {
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(base + L::full + 8 * i, 1);
      mbarrier_init(base + L::empty + 8 * i, 4 * kConsumers);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  int visible = 0;
  for (int c = 0; c < kConsumers; c++) visible = max(visible, works[c].visible);
  const Walk walk(a, visible);

  if (threadIdx.x < 128) {
    registers_shrink<24>();
    if (threadIdx.x == 0) {
      const i64 first = (i64(works[0].batch) * a.kv_heads + works[0].kv_head) * arguments.pairs;
      const char* records = arguments.records + first * L::record;
      Place<kStages> stage;
      for (int step = 0; step < walk.steps; step++) {
        const u32 full = base + L::full + 8 * stage.at();
        mbarrier_wait(base + L::empty + 8 * stage.at(), stage.parity() ^ 1);
        mbarrier_expect(full, L::record);
        copy_bytes(base + stage.at() * L::stage, records + i64(walk.pair(step)) * L::record, L::record, full);
        stage.advance();
      }
    }
  } else {
    registers_grow<240>();
    const int c = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
    decide<T, D, kRelative>(arguments, works[c], walk, base, c);
  }
}

}  // namespace bsfa
