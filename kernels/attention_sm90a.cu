// Block-sparse attention forward for Hopper (sm_90a): block iterator x gate on a FlashAttention loop.
//
// One CTA computes one query block (128 rows) of one head. It visits key blocks (64 keys) two at a time, a *step*: the
// exact scores S = Q K^T of both (128 x 128), then one decision for each 64-key half over all 128 rows: is any scaled
// score not below the bar max(threshold, r[row] + relative)? A kept half goes through softmax and P V; a skipped one is
// done, and its V is never read. The halves are decided one after the other: a warp votes on the half visited later
// twice, by the bar before the step and by the bar as the other half would raise it, and the joint decision on the first
// half says which of the two counts.
//
// Warpgroups (128 threads each; setmaxnreg gives the consumers the producer's registers)
//   0        producer, one warp of it: Q once; K two blocks a step, with what the consumers must know of the step; V of
//            a half once it is known to be kept (without a gate: a step ahead)
//   1, 2     consumers, 64 query rows each: S (64 x 128, two accumulators in turn), O (64 x D), row maxima and sums
//
// A consumer is one S ahead of the decision. While S(j+1) is on the tensor cores it learns the decision on step j, whose
// votes all eight warps have posted, and does softmax(j) and O += P(j) V(j):
//
//   tensor cores   | S(j+1)                             | P(j) V(j)            | S(j+2)
//   registers      | joint(j)  softmax(j)  await K(j+2) | maxima, vote (j+1)   | joint(j+1) ...
//
// Nothing is in flight from one step to the next, so the two consumers drift half a step apart and one's products cover
// the other's maxima and vote; a vote has a whole S to travel. A warp whose own 16 rows keep all of a step does not wait
// for the other votes.
//
// Shared memory (offsets in `Layout`)
//   Q              128 x D, as D/64 panels of 128 rows x 64 columns, 128-byte swizzle (as all tiles here)
//   K ring         kStages x (128 keys x D), the step's half 0 in rows 0-63 of each panel
//   V ring         kSlots x (64 keys x D), one kept block a slot
//   step ring      kRing x two words (see `Step`): what a step's halves are
//   exchange       kRing x eight warps x 8 bytes: the votes on a step (for block maxima, their values)
//   work           the CTA's `Work`
//
// Barriers (mbarriers)
//   q_full         producer (TMA bytes)     -> consumers, once
//   k_full[stage]  producer (TMA bytes)     -> consumers: K and the step's words are there
//   k_empty[stage] eight consumer warps     -> producer: S is computed, the words are read
//   v_full[slot]   producer (TMA bytes)     -> consumers
//   v_empty[slot]  eight consumer warps     -> producer; ungated calls only
//   voted[ring]    eight consumer warps     -> consumers and producer: the votes on a step are in the exchange
//
// With a gate, V's slot is free by construction: it last held the kept block four before, which belongs to step j-2 or
// earlier, and a warp votes on step j after its P V of step j-2. Rings of kRing steps outlast any drift: no warp can be
// more than kStages steps ahead of another, or K's stage would not have been free.
#include "ptx_sm90.cuh"
#include "work.cuh"

namespace bsfa {

constexpr int kStepKeys = 2 * kBlockK;
constexpr int kPanel = 64;         // columns of a swizzled panel: 128 bytes
constexpr int kStages = 4;         // steps of K in flight
constexpr int kSlots = 4;          // blocks of V in shared memory; see the head on why four suffice
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 384;
constexpr float kSlack = 8.f;      // P stays under 2^8
constexpr float kNoShift = -1e30f; // of a row that has seen nothing
constexpr int kRing = 8;           // steps whose words and votes are kept: more than any warp can be ahead of another

// The one kernel argument. Mirrored by bsfa/launch_sm90.py.
struct Arguments {
  // Axes (64 columns, rows, D/64 panels, heads, batch). A box is one head of: q 128 rows, all panels; k_step the same;
  // k_block 64 rows, one panel; v 64 rows, all panels.
  TensorMap q, k_step, k_block, v;
  Call call;
};

// What a warp says about a step, one byte; the bitwise or over the eight warps decides. Bit h speaks of half h.
struct Vote {
  static constexpr u32 halves = 3;       // bits 0, 1: kept by the bar that stands before the step
  static constexpr u32 raised = 4;       // bits 2, 3: the same for the half visited later, by the bar as the other half,
                                         // kept, raises it; relative gates only
  static constexpr u32 swapped = 128;    // half 1 is visited before half 0 (the same from every warp)

  // The halves kept: the one visited first by the bar before the step, the other by the bar that came of the first.
  static __device__ __forceinline__ u32 kept(u32 vote, bool relative) {
    if (!relative) return vote & halves;
    u32 first = vote & swapped ? 2 : 1;
    u32 keep = vote & first;
    return keep | ((keep ? vote / raised : vote) & (halves - first));
  }
};

// The two visits of a step as the consumers read them: the block numbers, and above the first what holds of each half.
struct Step {
  static constexpr u32 block = (1u << 24) - 1;

  static __device__ __forceinline__ u64 pack(u32 first, u32 second, bool swapped) {
    u32 flags = first >> 31 | second >> 31 << 1 | (first >> 30 & 1) << 2 | (second >> 30 & 1) << 3 |
                (first >> 29 & 1) << 4 | (second >> 29 & 1) << 5 | (swapped ? Vote::swapped : 0);
    return u64(second & block) << 32 | (first & block) | flags << 24;
  }
  static __device__ __forceinline__ u32 number(u64 words, int half) { return u32(words >> 32 * half) & block; }
  static __device__ __forceinline__ u32 flags(u64 words) { return u32(words) >> 24; }
  // Bit h: half h exists; is kept whatever its scores; needs a mask.
  static __device__ __forceinline__ u32 valid(u64 words) { return flags(words) & 3; }
  static __device__ __forceinline__ u32 forced(u64 words) { return flags(words) >> 2 & 3; }
  static __device__ __forceinline__ u32 hidden(u64 words) { return flags(words) >> 4 & 3; }
};

template <int D> struct Layout {
  static constexpr int panels = D / kPanel;
  static constexpr int q_panel = kBlockQ * kPanel * 2;
  static constexpr int k_panel = kStepKeys * kPanel * 2;
  static constexpr int v_panel = kBlockK * kPanel * 2;
  static constexpr int q_bytes = panels * q_panel;
  static constexpr int k_bytes = panels * k_panel;
  static constexpr int v_bytes = panels * v_panel;
  static constexpr int q = 0;
  static constexpr int k = q + q_bytes;
  static constexpr int v = k + kStages * k_bytes;
  static constexpr int steps = v + kSlots * v_bytes;
  static constexpr int exchange = steps + kRing * 8;
  static constexpr int work = exchange + kRing * kConsumerWarps * 8;
  static constexpr int barriers = work + 64;
  static constexpr int q_full = barriers;
  static constexpr int k_full = q_full + 8;
  static constexpr int k_empty = k_full + 8 * kStages;
  static constexpr int v_full = k_empty + 8 * kStages;
  static constexpr int v_empty = v_full + 8 * kSlots;
  static constexpr int voted = v_empty + 8 * kSlots;
  static constexpr int bytes = voted + 8 * kRing;
  static constexpr int alignment = 1024;  // of a swizzled tile; the launch adds as much
};

// The decision on a step once every consumer warp has voted: bit h is set where half h is kept.
template <int D> __device__ __forceinline__ u32 decide(u32 base, u32 step, bool relative) {
  using L = Layout<D>;
  u32 votes = base + L::exchange + threadIdx.x % kConsumerWarps + (step % kRing) * kConsumerWarps * 8;
  mbarrier_wait(base + L::voted + 8 * (step % kRing), (step / kRing) & 1);
  return Vote::kept(__reduce_or_sync(~0u, load_shared_byte(votes)), relative);
}

// The producer: one warp. Its lanes describe 32 blocks at once, lane 0 issues the copies.
template <class T, int D, Mode M>
__device__ __forceinline__ void produce(const Arguments& arguments, const Work& work, u32 base) {
  using L = Layout<D>;
  const Call& a = arguments.call;
  const int lane = threadIdx.x % kWarp;
  const int kv_head = work.kv_head;
  const int packed_batch = a.cu_q ? 0 : work.batch;
  const int k_start = work.k_start;
  const int n = (work.visits + 1) / 2;
  if (lane == 0) {
    mbarrier_expect(base + L::q_full, L::q_bytes);
    copy_tile(base + L::q, &arguments.q, base + L::q_full, 0, work.q_start + work.q_block * kBlockQ, 0, work.head, packed_batch);
  }

  // V of a step `kLag` behind K. Without a gate that is the last step's, ahead of its use; with one, the step that K's
  // free stage came from: its votes are about to be complete.
  constexpr bool kGated = M == Mode::gate_max || M == Mode::gate_lse;
  constexpr int kLag = kGated ? kStages : 1;
  int kept = 0;
  auto load_v = [&](int step) {
    u64 words = load_shared(base + L::steps + 8 * (step % kRing));
    u32 keep = kGated ? decide<D>(base, step, a.relative.data) : Step::valid(words);
    for (int half = 0; half < 2; half++) {
      if (!(keep >> half & 1)) continue;
      int slot = kept % kSlots;
      u32 full = base + L::v_full + 8 * slot;
      if constexpr (!kGated) mbarrier_wait(base + L::v_empty + 8 * slot, ((kept / kSlots) & 1) ^ 1);
      if (lane == 0) {
        mbarrier_expect(full, L::v_bytes);
        copy_tile(base + L::v + slot * L::v_bytes, &arguments.v, full, 0,
                  k_start + int(Step::number(words, half)) * kBlockK, 0, kv_head, packed_batch);
      }
      kept++;
    }
  };

  u32 described = 0;
  for (int step = 0; step < n; step++) {
    if (step % 16 == 0) described = work.visit(a, 2 * step + lane);
    u32 words[2] = {__shfl_sync(~0u, described, 2 * step % kWarp), __shfl_sync(~0u, described, 2 * step % kWarp + 1)};
    int first = words[0] & Visit::block, second = words[1] & Visit::block;
    bool pair = words[1] & Visit::valid && (first - second == 1 || second - first == 1);
    bool swapped = pair && second < first;
    if (swapped) {  // neighbours travel as one tile, in ascending order
      u32 swap = words[0];
      words[0] = words[1];
      words[1] = swap;
      first = second;
    }
    int stage = step % kStages;
    u32 full = base + L::k_full + 8 * stage;
    u32 tile = base + L::k + stage * L::k_bytes;
    mbarrier_wait(base + L::k_empty + 8 * stage, ((step / kStages) & 1) ^ 1);
    if (lane == 0) {
      store_shared(base + L::steps + 8 * (step % kRing), Step::pack(words[0], words[1], swapped));
      if (pair) {
        mbarrier_expect(full, L::k_bytes);
        copy_tile(tile, &arguments.k_step, full, 0, k_start + first * kBlockK, 0, kv_head, packed_batch);
      } else {
        mbarrier_expect(full, ((words[0] >> 31) + (words[1] >> 31)) * (L::k_bytes / 2));
        for (int half = 0; half < 2; half++)
          for (int panel = 0; panel < L::panels; panel++)
            if (words[half] & Visit::valid)
              copy_tile(tile + panel * L::k_panel + half * (L::k_panel / 2), &arguments.k_block, full, 0,
                        k_start + int(words[half] & Visit::block) * kBlockK, panel, kv_head, packed_batch);
      }
    }
    __syncwarp();
    if (M != Mode::maxima && step >= kLag) load_v(step - kLag);
  }
  if constexpr (M != Mode::maxima) {
    for (int step = max(0, n - kLag); step < n; step++) load_v(step);
  }
}

// A step's scores as its consumer sees them beside the accumulator.
struct Seen {
  float largest[2][2];  // [half][row], over this thread's columns
  u64 words;            // `Step`; 0 past the last one
  u32 vote;             // this warp's `Vote`
  bool outgrows;        // some row of this warp has a score far above its shift
};

template <class T, int D, Mode M, bool kPositive>
__device__ __forceinline__ void consume(const Call& a, const Work& work, u32 base, float threshold) {
  using L = Layout<D>;
  constexpr bool kGated = M == Mode::gate_max || M == Mode::gate_lse;
  constexpr bool kVotes = M != Mode::all;
  constexpr int kOut = D / 2;  // accumulator words of O a thread holds

  const int warp = __shfl_sync(~0u, threadIdx.x / kWarp, 0) - 4;  // 0 .. 7; the shuffle tells the compiler it is uniform
  const int consumer = warp / 4;
  const int thread = threadIdx.x % 128;
  const int lane = threadIdx.x % kWarp;
  const int row = work.q_block * kBlockQ + warp * 16 + lane / 4;  // and row + 8
  const u32 n = u32(work.visits + 1) / 2;
  const float scale_log2 = a.scale * kLog2e;

  const bool relative_gate = kGated && !kPositive && a.relative.data;
  const float relative = relative_gate ? work.look_up(a.relative, a.scale) : -infinity();

  float o[kOut], even[64], odd[64];
#pragma unroll
  for (int i = 0; i < kOut; i++) o[i] = 0.f;
  // Softmax: P = 2^(score - shift), in units of log2; a shift is a whole number and moves only when a score outgrows it by
  // kSlack, so that O and the sums are hardly ever rescaled, and then exactly.
  float shift[2] = {kNoShift, kNoShift};
  float outgrown[2] = {-infinity(), -infinity()};  // shift + kSlack in units of q.k
  float row_sum[2] = {0.f, 0.f};  // this thread's columns alone
  float row_max[2] = {-infinity(), -infinity()};  // running maximum of kept blocks; relative gates only
  float row_lse[2] = {-infinity(), -infinity()};  // Mode::gate_lse: the running log-sum-exp, in units of q.k
  u32 kept = 0;                   // blocks kept so far: the next one's V slot

  // ---- the pieces of a step --------------------------------------------------------------------------------------

  // K of a step is there. Past the last step that is a stale stage, and nobody looks at what comes of it: cheaper than a
  // branch around instructions in flight.
  auto await_keys = [&](u32 step) {
    if (step < n) mbarrier_wait(base + L::k_full + 8 * (step % kStages), (step / kStages) & 1);
  };
  // The descriptor of the next step's K, its low word: carried from step to step, for what is recomputed stands between a
  // step's end and the next one's first product.
  const u32 k_first = u32(tile_descriptor(base + L::k)), k_last = k_first + (kStages - 1) * (L::k_bytes >> 4);
  u32 k_next = k_first;

  // Starts S = Q K^T.
  auto start_scores = [&](float(&s)[64]) {
    u64 q = tile_descriptor(base + L::q + consumer * (L::q_panel / 2));
    u64 k = tile_descriptor(0) | k_next;
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < D; c += 16)
      wgmma_ss<T>(s, advance(q, (c / kPanel) * L::q_panel + (c % kPanel) * 2),
                  advance(k, (c / kPanel) * L::k_panel + (c % kPanel) * 2), c != 0);
    wgmma_commit();
    k_next = k_next == k_last ? k_first : k_next + (L::k_bytes >> 4);
  };

  // Hides what row `row` does not see of a masked half; a row that sees none of it must not vote.
  auto mask_half = [&](float(&s)[64], int half, u64 words, float(&bar)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int at = row + 8 * r;
      int last = at < work.q_length ? work.k_length - 1 : -1;
      if (a.causal) last = min(last, work.offset + at);
      last -= int(Step::number(words, half)) * kBlockK;
      if (last < 0) bar[r] = infinity();
      last -= 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < 16; i++) {
        float& score = s[half * 32 + (i / 2) * 4 + 2 * r + i % 2];
        if ((i / 2) * 8 + i % 2 > last) score = -infinity();
      }
    }
  };

  // Does the half visited later reach its bar once the other one is kept and r[row] has grown by it?
  auto still_wants = [&](const float(&s)[64], const Seen& seen, bool swapped, const float(&bar)[2], bool wants) {
    if (!__any_sync(~0u, wants)) return false;  // r[row] only rises
    bool still = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float raised = max_nan(row_max[r], quad_max(swapped ? seen.largest[1][r] : seen.largest[0][r]));
      if constexpr (M == Mode::gate_lse) {
        float top = fmaxf(shift[r], raised * scale_log2);
        float sum = row_sum[r] * exp2_approx(shift[r] - top);
#pragma unroll
        for (int i = 0; i < 16; i++) {
          int at = (i / 2) * 4 + 2 * r + i % 2;
          sum += exp2_approx(fmaf(swapped ? s[32 + at] : s[at], scale_log2, -top));
        }
        raised = (top + log2_approx(quad_sum(sum))) / scale_log2;
      }
      float own = swapped ? seen.largest[0][r] : seen.largest[1][r];
      still |= !(own < (bar[r] == infinity() ? bar[r] : fmaxf(threshold, raised + relative)));
    }
    return still;
  };

  // S(step) is complete: free its stage, mask, take the maxima, post this warp's vote.
  auto post = [&](float(&s)[64], Seen& seen, u32 step) {
    seen.vote = 0;
    if (step >= n) {  // past the last step nothing is kept
      seen.words = 0;
      return;
    }
    float bar[2][2];  // [half][row]
#pragma unroll
    for (int r = 0; r < 2; r++)
      bar[0][r] = bar[1][r] = fmaxf(threshold, (M == Mode::gate_lse ? row_lse[r] : row_max[r]) + relative);
    const u64 words = seen.words;
    __syncwarp();  // all lanes have read the words
    mbarrier_arrive_if(lane == 0, base + L::k_empty + 8 * (step % kStages));
    if (Step::hidden(words)) {
      if (Step::hidden(words) & 1) mask_half(s, 0, words, bar[0]);
      if (Step::hidden(words) & 2) mask_half(s, 1, words, bar[1]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float* at = s + half * 32 + 2 * r;
        float x = at[0];
        if constexpr (kPositive) {
          x = max3_signed(at[0], at[1], at[4]);
#pragma unroll
          for (int i = 1; i < 7; i++) x = max3_signed(x, at[4 * i + 1], at[4 * i + 4]);
          x = max3_signed(x, x, at[29]);
        } else {
#pragma unroll
          for (int i = 0; i < 8; i++) x = max_nan(x, max_nan(at[4 * i], at[4 * i + 1]));
        }
        seen.largest[half][r] = x;
      }
    u32 slot = base + L::exchange + (step % kRing) * kConsumerWarps * 8;
    u32 vote = 0;
    if constexpr (kGated) {
      bool wants[2];
#pragma unroll
      for (int half = 0; half < 2; half++)
        wants[half] = !(seen.largest[half][0] < bar[half][0]) || !(seen.largest[half][1] < bar[half][1]);
      u32 plain = (wants[0] ? 1 : 0) | (wants[1] ? 2 : 0);
      vote |= (plain | Step::forced(words)) & Step::valid(words);
      if (relative_gate) {
        u32 swapped = Step::flags(words) & Vote::swapped;
        u32 still = swapped ? still_wants(s, seen, true, bar[0], wants[0]) : still_wants(s, seen, false, bar[1], wants[1]) * 2;
        vote |= ((still | Step::forced(words)) & Step::valid(words)) * Vote::raised | swapped;
      }
    }
    seen.vote = __reduce_or_sync(~0u, vote);
    if (kGated) store_shared_byte_if(lane == 0, slot + warp, seen.vote);
    if constexpr (M == Mode::maxima) {
      u32 largest[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float x = max_nan(seen.largest[half][0], seen.largest[half][1]);
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) x = max_nan(x, __shfl_xor_sync(~0u, x, distance));
        largest[half] = __float_as_uint(x);
      }
      if (lane == 0) store_shared(slot + warp * 8, u64(largest[1]) << 32 | largest[0]);
    }
    if (kVotes) mbarrier_arrive_if(lane == 0, base + L::voted + 8 * (step % kRing));
    bool outgrows = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      outgrows |= seen.largest[0][r] > outgrown[r] || seen.largest[1][r] > outgrown[r];
      if (kPositive) outgrows |= outgrown[r] < 0.f;
    }
    seen.outgrows = __any_sync(~0u, outgrows);
  };

  // The decision on a step. A warp whose own rows keep all of it need not wait for the others.
  auto joint = [&](const Seen& seen, u32 step) -> u32 {
    u32 valid = Step::valid(seen.words);
    if constexpr (!kGated) {
      if (kVotes && valid) mbarrier_wait(base + L::voted + 8 * (step % kRing), (step / kRing) & 1);
      return valid;
    }
    return Vote::kept(seen.vote, relative_gate) == valid ? valid : decide<D>(base, step, relative_gate);
  };

  // P V of `blocks` kept blocks is done.
  auto release_v = [&](u32 blocks) {
    if constexpr (M == Mode::all) {
      if (lane == 0)
        for (u32 i = 0; i < blocks; i++) mbarrier_arrive(base + L::v_empty + 8 * ((kept + i) % kSlots));
    }
    kept += blocks;
  };

  // Rows of this warp whose kept scores have outgrown their shift get a new one; O and the sums follow.
  auto reshift = [&]<int First, int Count>(const float(&s)[64]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float x = -infinity();
#pragma unroll
      for (int i = 0; i < 16 * Count; i++) x = max_nan(x, s[32 * First + 4 * (i / 2) + 2 * r + i % 2]);
      x = quad_max(x) * scale_log2;
      float now = x > shift[r] + kSlack ? ceilf(x) : shift[r];
      float correction = exp2_approx(shift[r] - now);
      shift[r] = now;
      outgrown[r] = (now + kSlack) / scale_log2;
      row_sum[r] *= correction;
#pragma unroll
      for (int i = 0; i < kOut / 2; i++) o[4 * (i / 2) + 2 * r + i % 2] *= correction;
    }
  };

  // Softmax of halves First .. First + Count - 1 and the start of O += P V over them.
  auto attend = [&]<int First, int Count>(float(&s)[64], const Seen& seen) {
    if (seen.outgrows) reshift.template operator()<First, Count>(s);
    u32 p[16 * Count];
#pragma unroll
    for (int i = 0; i < 8 * Count; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float x = exp2_approx(fmaf(s[32 * First + 4 * i + 2 * r], scale_log2, -shift[r]));
        float y = exp2_approx(fmaf(s[32 * First + 4 * i + 2 * r + 1], scale_log2, -shift[r]));
        row_sum[r] += x + y;
        p[2 * i + r] = pack<T>(x, y);
      }
    for (int half = 0; half < Count; half++)
      mbarrier_wait(base + L::v_full + 8 * ((kept + half) % kSlots), ((kept + half) / kSlots) & 1);
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < Count; half++) {
      u64 v = tile_descriptor(base + L::v + ((kept + half) % kSlots) * L::v_bytes, L::v_panel);
#pragma unroll
      for (int k = 0; k < 4; k++)
        wgmma_rs<T>(o, p + 16 * half + 4 * k, advance(v, k * 16 * kPanel * 2));
    }
    wgmma_commit();
    if (relative_gate) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if constexpr (M == Mode::gate_lse) row_lse[r] = (shift[r] + log2_approx(quad_sum(row_sum[r]))) / scale_log2;
        float x = seen.largest[First][r];
        if (Count == 2) x = max_nan(x, seen.largest[1][r]);
        row_max[r] = max_nan(row_max[r], quad_max(x));
      }
    }
  };

  // ---- the loop --------------------------------------------------------------------------------------------------

  // The largest scores of step j's halves over all 128 rows, from what the eight warps posted.
  auto write_maxima = [&](u32 valid, u32 step) {
    u64 words = load_shared(base + L::steps + 8 * (step % kRing));
    if (consumer == 0 && thread < 2 && (valid >> thread & 1)) {
      float largest = -infinity();
      for (int i = 0; i < kConsumerWarps; i++) {
        u64 pair = load_shared(base + L::exchange + ((step % kRing) * kConsumerWarps + i) * 8);
        largest = max_nan(largest, __uint_as_float(u32(thread ? pair >> 32 : pair)));
      }
      i64 q_blocks = (a.q_length + kBlockQ - 1) / kBlockQ, k_blocks = (a.k_length + kBlockK - 1) / kBlockK;
      i64 q_block = (i64(work.batch) * a.q_heads + work.head) * q_blocks + work.q_block;
      a.maxima[q_block * k_blocks + Step::number(words, thread)] = largest * a.scale;
    }
  };

  // Finishes step j, whose scores are in `s` and voted on, and brings step j+1, in `t`, to the same point; `k` goes on from
  // K of step j+1 to K of step j+2. Each path waits for itself: ptxas keeps wgmma asynchronous across a branch only where
  // every path accounts for what is in flight, and never around a loop.
  auto finish = [&](float(&s)[64], Seen& now, float(&t)[64], Seen& next, u32 j) {
    start_scores(t);
    next.words = load_shared(base + L::steps + 8 * ((j + 1) % kRing));
    u32 keep = joint(now, j);
    auto keep_path = [&]<int First, int Count>() {
      attend.template operator()<First, Count>(s, now);
      wgmma_wait<1>();  // S(j+1)
      post(t, next, j + 1);
      await_keys(j + 2);
      wgmma_wait<0>();  // P V
      release_v(Count);
    };
    if (M == Mode::maxima || keep == 0) {
      if constexpr (M == Mode::maxima) write_maxima(keep, j);
      await_keys(j + 2);
      wgmma_wait<0>();
      post(t, next, j + 1);
    } else if (!(keep & 1)) {
      keep_path.template operator()<1, 1>();
    } else if (!(keep & 2)) {
      keep_path.template operator()<0, 1>();
    } else {
      keep_path.template operator()<0, 2>();
    }
  };

  if (n > 0) {
    Seen seen_even, seen_odd;
    mbarrier_wait(base + L::q_full, 0);
    await_keys(0);
    start_scores(even);
    seen_even.words = load_shared(base + L::steps);
    await_keys(1);
    wgmma_wait<0>();
    post(even, seen_even, 0);
    for (u32 j = 0; j < n; j += 2) {
      finish(even, seen_even, odd, seen_odd, j);
      finish(odd, seen_odd, even, seen_even, j + 1);
    }
  }

  // ---- the end ---------------------------------------------------------------------------------------------------
  if constexpr (M != Mode::maxima) {
    if (threadIdx.x == 128 && a.kept && kept) atomicAdd(a.kept + i64(work.batch) * a.q_heads + work.head, u64(kept));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int at = row + 8 * r;
      float sum = quad_sum(row_sum[r]);
      float inverse = sum == 0.f ? 0.f : 1.f / sum;
      if (at >= work.q_length) continue;
      i64 packed_row = i64(a.cu_q ? work.q_start : i64(work.batch) * a.q_length) + at;
      u16* out = a.out + (packed_row * a.q_heads + work.head) * D + 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < kOut / 4; i++)
        *reinterpret_cast<u32*>(out + 8 * i) = pack<T>(o[4 * i + 2 * r] * inverse, o[4 * i + 2 * r + 1] * inverse);
      if (a.lse && lane % 4 == 0) {
        i64 where = a.cu_q ? i64(work.head) * a.total_q + packed_row
                           : (i64(work.batch) * a.q_heads + work.head) * a.q_length + at;
        a.lse[where] = sum == 0.f ? -infinity() : shift[r] * kLn2 + __logf(sum);
      }
    }
  }
}

template <class T, int D, Mode M> __global__ void __launch_bounds__(kThreads, 1) attention(const __grid_constant__ Arguments arguments) {
  using L = Layout<D>;
  extern __shared__ char dynamic[];
  u32 start = shared_address(dynamic);
  char* shared = dynamic + (L::alignment - start % L::alignment) % L::alignment;
  u32 base = shared_address(shared);
  Work& work = *reinterpret_cast<Work*>(shared + L::work);

  if (threadIdx.x == 0) {
    work = Work(arguments.call, blockIdx.x);
    prefetch_tensor_map(&arguments.q);
    prefetch_tensor_map(&arguments.k_step);
    prefetch_tensor_map(&arguments.k_block);
    prefetch_tensor_map(&arguments.v);
    mbarrier_init(base + L::q_full, 1);
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(base + L::k_full + 8 * i, 1);
      mbarrier_init(base + L::k_empty + 8 * i, kConsumerWarps);
    }
    for (int i = 0; i < kSlots; i++) {
      mbarrier_init(base + L::v_full + 8 * i, 1);
      mbarrier_init(base + L::v_empty + 8 * i, kConsumerWarps);
    }
    for (int i = 0; i < kRing; i++) mbarrier_init(base + L::voted + 8 * i, kConsumerWarps);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (work.q_block * kBlockQ >= work.q_length) return;  // a packed sequence shorter than the longest

  if (threadIdx.x < 128) {
    registers_shrink<24>();
    if (threadIdx.x < kWarp) produce<T, D, M>(arguments, work, base);
  } else {
    registers_grow<240>();
    const Call& a = arguments.call;
    const float threshold = work.look_up(a.threshold, a.scale);
    if (M == Mode::all || (M == Mode::gate_max && !a.relative.data && (threshold > 0.f || threshold == -infinity())))
      consume<T, D, M, M != Mode::maxima>(a, work, base, threshold);
    else
      consume<T, D, M, false>(a, work, base, threshold);
  }
}

}  // namespace bsfa
