// Block-sparse attention forward for Hopper (sm_90a): block iterator x gate on a FlashAttention loop.
//
// A warpgroup computes one query block (128 rows) of one head, by itself: it visits key blocks of 64 keys one after the
// other, computes the exact scores S = Q K^T (128 x 64), and decides: is any scaled score not below the bar
// max(threshold, r[row] + relative)? A kept block goes through softmax and P V; a skipped one is done, and its V is never
// read. The decision is one barrier of the warpgroup's four warps that ORs a predicate. A CTA has two such warpgroups, three
// where heads are of 64, on query blocks that share K: neighbouring heads of one KV group, or neighbouring query blocks. They
// share no decision and wait for nothing of each other's. They start one behind the other, so that one's products run under
// another's maxima, decision and exponentials: while all keep what they visit, they stay as far apart as they started. And
// within one, the products of a kept block's P V and of the next block's scores stand in one queue.
//
// Warpgroups (128 threads each; setmaxnreg gives the consumers the others' registers)
//   0        four warps, which ask for Q first. Then the producer: K in the order of visit of whichever sees most, with what
//            holds of a block for each consumer. A fetcher for each consumer: V of the blocks that it keeps. Where blocks are
//            listed, a feeder for each consumer instead, which brings it all three
//   1 ...    consumers: S (2 x 64 rows x 64 keys), P in registers, O (2 x 64 x D), shifts and sums of four rows a thread
//
// Shared memory (offsets in `Layout`)
//   Q              consumers x 128 x D, each as D/64 panels of 128 rows x 64 columns, 128-byte swizzle (as all tiles here);
//                  in the end O, on its way out
//   K ring         kStages x (64 keys x D)
//   V              kSlots x (64 keys x D) for each consumer
//   words          what a stage's block is to each consumer (`Visit`), for kDescribed stages; of lists to its own, for kStages
//   exchange       for block maxima: the four warps' values, twice, for each consumer
//   asked          the block that each consumer kept last
//   cta            what all threads know: `Cta`
//
// Barriers (mbarriers)
//   q_full[c]          TMA bytes                  -> consumer c, once; of lists once a query block, with what it is, of which
//                                                    every lane of its feeder writes a word
//   q_empty[c]         128 threads of consumer c  -> its feeder: O has left the place of Q. Of lists only
//   k_full[stage]      producer (TMA bytes)       -> consumers: K is there, and the words of the next stage too
//   k_empty[stage]     the consumers' warps       -> producer: S is computed, the next stage's words are read; of lists
//                                                    those of the stage's consumer
//   v_asked[c]         one thread of consumer c   -> its fetcher: a block is kept, or none is any more
//   v_full[c][slot]    fetcher c (TMA bytes)      -> consumer c
//   v_empty[c][slot]   four warps of consumer c   -> fetcher c, where V goes ahead as K does: without a gate, and of lists
//   v_landed[c]        fetcher c (TMA bytes)      -> itself, where what is past a packed sequence's end has to go first
// With a gate, V's slots are free by construction: all four warps are through with P V of the last kept block before they
// arrive at a decision. Asks do not overtake each other: the next one comes after V of the last. Named barriers 1 and up
// are the consumers' decisions.
//
// Where blocks are listed the consumers share nothing: each has a ring of its own among the stages of K, and a feeder that claims
// query blocks for it until there are none. So one consumer's start and end lie under the other's products, and a longer list is
// nobody else's wait. A list's end takes a stage of its own, without K.
// Block maxima need no V; they are visited in descending order, so that a consumer's stages follow each other and two halves
// of `exchange` do.
#include "ptx_sm90.cuh"
#include "work.cuh"

namespace bsfa {

constexpr int kPanel = 64;     // columns of a swizzled panel: 128 bytes
constexpr int kTiles = 2;      // of 64 rows in a query block, as wgmma takes them
constexpr int kRows = 4;       // rows of S and O that a thread has a share of: two a tile
constexpr int kStages = 6;     // blocks of K in flight
constexpr int kSlots = 2;      // blocks of V a consumer
constexpr int kDescribed = 8;  // stages whose words are kept: those of K and one ahead
static_assert(kDescribed > kStages);
// Warpgroups that compute a query block each: as many as O leaves registers for. Mirrored by bsfa/launch_sm90.py.
constexpr int consumers(int head_size) { return head_size == 64 ? 3 : 2; }
constexpr int threads(int head_size) { return 128 * (1 + consumers(head_size)); }
constexpr float kSlack = 8.f;       // P is at most 2^8
constexpr float kNoShift = -1e30f;  // of a row that has seen nothing
constexpr float kAbove = 1e-3f;     // a bar over this one stays over 0, however a log-sum-exp is rounded

// The one kernel argument. Mirrored by bsfa/launch_sm90.py.
struct Arguments {
  // Axes (64 columns, rows, D/64 panels, heads, batch). A box is one head's: q 128 rows, k and v 64 rows, all panels.
  TensorMap q, k, v;
  Call call;
};

template <int D> struct Layout {
  static constexpr int consumers = bsfa::consumers(D);
  static constexpr int panels = D / kPanel;
  static constexpr int q_panel = kBlockQ * kPanel * 2;
  static constexpr int k_panel = kBlockK * kPanel * 2;  // and V's
  static constexpr int q_bytes = panels * q_panel;
  static constexpr int k_bytes = panels * k_panel;      // and V's
  static constexpr int q = 0;
  static constexpr int k = q + consumers * q_bytes;
  static constexpr int v = k + kStages * k_bytes;
  static constexpr int words = v + consumers * kSlots * k_bytes;
  static constexpr int exchange = words + kDescribed * 16;
  static constexpr int asked = exchange + consumers * 2 * 16;
  static constexpr int q_full = asked + 16;
  static constexpr int q_empty = q_full + 8 * consumers;
  static constexpr int k_full = q_empty + 8 * consumers;
  static constexpr int k_empty = k_full + 8 * kStages;
  static constexpr int v_full = k_empty + 8 * kStages;
  static constexpr int v_empty = v_full + 8 * consumers * kSlots;
  static constexpr int v_asked = v_empty + 8 * consumers * kSlots;
  static constexpr int v_landed = v_asked + 8 * consumers;
  static constexpr int cta = v_landed + 8 * consumers;
  static constexpr int bytes = cta + 120 * consumers + 16;
  static_assert(bytes - words <= 1024);  // what bsfa/launch_sm90.py takes them for
  static constexpr int registers = consumers == 3 ? 160 : 240;  // a consumer's thread
  static constexpr int alignment = 1024;  // of a swizzled tile
  // Cycles from one consumer's start to the next one's; a kept block takes some 1,500 and 2,500.
  static constexpr int behind = consumers == 3 ? 500 : 1280;
};

// What all threads of a CTA know.
template <int Consumers> struct Cta {
  Work work[Consumers];
  // Of lists: a consumer's query block after this one, and the first words of both lists.
  Work coming[Consumers];
  u32 first_coming[Consumers], first[Consumers];
  static constexpr u32 kNothing = 1;  // there is no query block any more

  // The query block whose visits are also the others', as far as they see them.
  __device__ const Work& lead() const {
    int most = 0;
#pragma unroll
    for (int c = 1; c < Consumers; c++)
      if (work[c].visible > work[most].visible) most = c;
    return work[most];
  }
};

// Stages of K that a consumer goes through: all, or, where blocks are listed, a ring of its own.
template <int D, Mode M> constexpr int ring = of_lists(M) ? kStages / consumers(D) : kStages;
static_assert(kStages % consumers(64) == 0 && kStages % consumers(128) == 0);

// Where a sequence's K and V are. Rows of a plane from `end` keys on are another sequence's, or padding, with whatever is in them.
struct Keys {
  int start, end, head, plane;
  __device__ Keys(const Call& a, const Work& work)
      : start(work.k_start), end(a.spans_k ? work.k_length : 0x7fffffff), head(work.kv_head), plane(work.plane(a)) {}
};

// K of the `at`-th stage, asked for by one thread, which is yet to arrive there.
template <int D>
__device__ __forceinline__ void bring_keys(const TensorMap* map, const Keys& keys, u32 base, u32 at, int block) {
  using L = Layout<D>;
  const u32 full = base + L::k_full + 8 * at;
  mbarrier_expect_more(full, L::k_bytes);
  copy_tile(base + L::k + at * L::k_bytes, map, full, 0, keys.start + block * kBlockK, 0, keys.head, keys.plane);
}

// The producer of K: one warp. Its lanes describe 32 stages at once, lane 0 issues the copies past the first.
template <int D>
__device__ __forceinline__ void produce(const Arguments& arguments, const Cta<consumers(D)>& cta, u32 base) {
  using L = Layout<D>;
  const Call& a = arguments.call;
  const int lane = threadIdx.x % kWarp;
  const Work& lead = cta.lead();
  const int stages = lead.visits;
  const Keys keys(a, lead);
  // Those that there is room for from the start are asked for before they are described, which takes its time.
  if (lane < kStages && lane < stages) bring_keys<D>(&arguments.k, keys, base, lane, lead.block(a, lane));
  __syncwarp();
  Place<kStages> stage;
  // What lane l holds of stages is that of the l-th of 32. Lane 0 writes down a stage's words, for it also arrives.
  u32 described[L::consumers];
  u32 next = 0;  // the coming stage's words, ORed: all are of one block
  for (int i = -1; i <= stages; i++) {  // the one past the last holds nothing: consumers look a stage ahead
    if (i >= 0) mbarrier_wait(base + L::k_empty + 8 * stage.at(), stage.parity() ^ 1);
    if (i >= kStages && next && lane == 0) bring_keys<D>(&arguments.k, keys, base, stage.at(), next & Visit::block);
    const int coming = i + 1;
    if (coming % kWarp == 0) {
#pragma unroll
      for (int c = 0; c < L::consumers; c++)
        described[c] = coming + lane < stages ? cta.work[c].describe(a, lead.block(a, coming + lane)) : 0;
    }
    u32 word[4] = {};
#pragma unroll
    for (int c = 0; c < L::consumers; c++) word[c] = __shfl_sync(~0u, described[c], coming % kWarp);
    next = word[0] | word[1] | word[2];
    if (lane == 0) store_shared(base + L::words + 16 * (coming % kDescribed), word);
    if (i < 0) continue;
    mbarrier_arrive_if(lane == 0, base + L::k_full + 8 * stage.at());
    __syncwarp();
    stage.advance();
  }
}

// V of consumer `c`, block by block, by one warp.
template <int D> struct Values {
  using L = Layout<D>;
  Place<kSlots> slot;
  u32 landed_parity = 0;

  __device__ __forceinline__ void wait(u32 base, int c) const {
    mbarrier_wait(base + L::v_empty + 8 * (c * kSlots + slot.at()), slot.parity() ^ 1);
  }

  __device__ __forceinline__ void bring(const TensorMap* map, const Keys& keys, u32 base, int c, u32 word) {
    const bool first_lane = threadIdx.x % kWarp == 0;
    const u32 at = c * kSlots + slot.at(), to = base + L::v + at * L::k_bytes, full = base + L::v_full + 8 * at;
    const int first = int(word & Visit::block) * kBlockK, rows = keys.end - first;
    const u32 landed = rows < kBlockK ? base + L::v_landed + 8 * c : full;
    if (first_lane) {
      mbarrier_expect(landed, L::k_bytes);
      copy_tile(to, map, landed, 0, keys.start + first, 0, keys.head, keys.plane);
    }
    __syncwarp();
    if (rows < kBlockK) {
      mbarrier_wait(landed, landed_parity);
      landed_parity ^= 1;
      for (int i = rows * 8 + int(threadIdx.x % kWarp); i < kBlockK * 8; i += kWarp)
        for (int panel = 0; panel < L::panels; panel++) store_shared(to + panel * L::k_panel + 16 * i, {0, 0, 0, 0});
      async_proxy_fence();
      __syncwarp();
      mbarrier_arrive_if(first_lane, full);
    }
    slot.advance();
  }
};

// Q of consumer `c`.
template <int D>
__device__ __forceinline__ void bring_queries(const Arguments& arguments, const Work& work, u32 base, int c) {
  using L = Layout<D>;
  const u32 full = base + L::q_full + 8 * c;
  mbarrier_expect(full, work.visits ? L::q_bytes : 0);
  if (work.visits)
    copy_tile(base + L::q + c * L::q_bytes, &arguments.q, full, 0, work.q_start + work.q_block * kBlockQ, 0, work.head,
              work.plane(arguments.call));
}

// A fetcher: one warp, which brings V of the blocks that consumer `c` keeps.
template <int D, Mode M>
__device__ __forceinline__ void fetch(const Arguments& arguments, const Cta<consumers(D)>& cta, u32 base, int c) {
  using L = Layout<D>;
  const Call& a = arguments.call;
  const Work& work = cta.work[c];
  const bool first_lane = threadIdx.x % kWarp == 0;
  Values<D> values;
  const Keys keys(a, work);
  if constexpr (keeps_all(M)) {
    for (int i = 0; i < work.visits; i++) {
      u32 word = work.visit(a, i);
      if (!word) continue;
      values.wait(base, c);
      values.bring(&arguments.v, keys, base, c, word);
    }
  } else {
    for (u32 parity = 0;; parity ^= 1) {
      mbarrier_wait(base + L::v_asked + 8 * c, parity);
      u32 word = 0;
      if (first_lane) word = load_shared(base + L::asked + 4 * c);
      word = __shfl_sync(~0u, word, 0);
      if (!word) break;
      values.bring(&arguments.v, keys, base, c, word);
    }
  }
}

// A feeder: one warp, which claims query blocks for consumer `c`, one after the other, and brings all that their lists ask for: K
// and V as far ahead as there is room, Q when the last query block's O has left its place.
template <int D, Mode M>
__device__ __forceinline__ void feed(const Arguments& arguments, Cta<consumers(D)>& cta, u32 base, int c) {
  using L = Layout<D>;
  constexpr int kRing = ring<D, M>;
  const Call& a = arguments.call;
  const int lane = threadIdx.x % kWarp;
  Place<kRing> stage;
  Values<D> values;
  Work& work = cta.coming[c];
  u32 parity = 1;
  for (;;) {
    const u32 claimed = __reduce_or_sync(~0u, lane == 0 ? atomicAdd(a.claimed, 1) : 0);
    const bool any = claimed < a.batch * a.kv_heads * a.ctas_of_one(1);
    if (lane == 0 && any) work.set(a, claimed);
    __syncwarp();
    u32 described = 0;  // as the producer's
    auto describe = [&](int i) {
      if (i % kWarp == 0) described = i + lane < work.visits ? work.visit(a, i + lane) : Visit::end;
      return __shfl_sync(~0u, described, i % kWarp);
    };
    u32 word = any ? describe(0) : Cta<L::consumers>::kNothing, last = 0;  // this stage's and the one's before
    if (lane == 0) {
      cta.first_coming[c] = word;
      if (!any) work.visits = 0;
    }
    __syncwarp();
    auto hand_over = [&] {  // the query block to its consumer
      mbarrier_wait(base + L::q_empty + 8 * c, parity);
      parity ^= 1;
      if (lane < sizeof(Work) / 4)  // a lane a word: there are no registers for all of it
        reinterpret_cast<u32*>(&cta.work[c])[lane] = reinterpret_cast<u32*>(&work)[lane];
      if (lane == 0) {
        cta.first[c] = cta.first_coming[c];
        bring_queries<D>(arguments, work, base, c);
      } else {
        mbarrier_arrive_if(true, base + L::q_full + 8 * c);
      }
      __syncwarp();
    };
    if (!any) {
      hand_over();
      break;
    }
    for (int i = 0;; i++) {  // up to one past the last, which holds nothing: consumers look a stage ahead
      const u32 at = c * kRing + stage.at();
      mbarrier_wait(base + L::k_empty + 8 * at, stage.parity() ^ 1);
      if (word & Visit::valid && lane == 0) bring_keys<D>(&arguments.k, Keys(a, work), base, at, word & Visit::block);
      const bool over = word == Visit::end;
      stage.advance();
      const u32 next = over ? 0 : describe(i + 1);
      if (lane == 0) store_shared(base + L::words + 4 * (c * kRing + stage.at()), next);
      mbarrier_arrive_if(lane == 0, base + L::k_full + 8 * at);
      __syncwarp();
      if (i == kRing - 1 || (over && i < kRing)) hand_over();
      if (last & Visit::valid) {
        values.wait(base, c);
        values.bring(&arguments.v, Keys(a, work), base, c, last);
      }
      if (over) break;
      last = word;
      word = next;
    }
  }
}

// Where a consumer is in its rings of K and V.
template <int D, Mode M> struct Rings {
  Place<ring<D, M>> stage;
  Place<kSlots> slot;
};

// A consumer, number `c`, and one query block. kPositive: no score below 0 decides anything, for the gate keeps every block or has
// one bar above 0.
template <class T, int D, Mode M, bool kPositive>
__device__ __forceinline__ void consume(const Arguments& arguments, const Cta<consumers(D)>& cta, u32 base, int c, float threshold,
                                        Rings<D, M>& rings) {
  using L = Layout<D>;
  constexpr bool kGated = gated(M);
  constexpr bool kAsks = kGated && !of_lists(M);  // for V; else it goes ahead
  constexpr bool kEarly = L::registers > 200;  // P of the first 64 rows and their next scores have registers of their own
  constexpr int kOut = D / 2;  // accumulator words of a tile of O that a thread holds

  const Call& a = arguments.call;
  const Work& work = cta.work[c];
  const int lane = threadIdx.x % kWarp;
  // A thread's four rows are this one and 8, 64, 72 more.
  auto first_row = [&] {
    u32 thread = thread_index();
    return work.q_block * kBlockQ + int(thread % 128 / kWarp * 16 + thread % kWarp / 4);
  };
  auto further = [](int r) { return r / 2 * 64 + r % 2 * 8; };
  const float scale_log2 = a.scale * kLog2e;
  const bool relative_gate = kGated && !kPositive && a.relative.data;
  const float relative = relative_gate && work.visits ? work.look_up(a.relative, a.scale) : -infinity();

  float o[kTiles][kOut] = {}, s[kTiles][32];
  // Softmax: P = 2^(score - shift), in units of log2; a shift is a whole number and moves only when a score outgrows it by
  // kSlack, so that O and the sums are hardly ever rescaled, and then exactly.
  float shift[kRows];
  float row_sum[kRows];    // of this thread's columns alone
  float cut[kRows];        // r[row] + relative; a NaN stays
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    shift[r] = kNoShift;
    row_sum[r] = 0.f;
    cut[r] = -infinity();
  }
  u32 kept = 0;
  bool positive = kPositive;  // no score below 0 decides anything from here on: the bars of all rows are above 0
  bool low = false;           // some row's shift is so low that a score below 0 may outgrow it

  // ---- the pieces of a block -------------------------------------------------------------------------------------

  // S of one tile of rows, started.
  auto start_scores = [&](int m, u32 q, u32 k) {
#pragma unroll
    for (int i = 0; i < D; i += 16)
      wgmma_ss<T>(s[m], descriptor(q, m * (L::q_panel / 2) + i / kPanel * L::q_panel + i % kPanel * 2),
                  descriptor(k, i / kPanel * L::k_panel + i % kPanel * 2), i != 0);
    wgmma_commit();
  };

  // A thread's largest scores in the two rows of a tile.
  auto maxima = [&](int m, float(&largest)[kRows]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float* x = s[m] + 2 * r;
      float most = max_nan(x[0], x[1]);
#pragma unroll
      for (int i = 1; i < 8; i++) most = max_nan(most, max_nan(x[4 * i], x[4 * i + 1]));
      largest[2 * m + r] = most;
    }
  };
  // The same by half the instructions, but 0 where all are below.
  auto maxima_above = [&](int m, float(&largest)[kRows]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float* x = s[m] + 2 * r;
      float three[5];
#pragma unroll
      for (int i = 0; i < 5; i++) {
        auto at = [&](int n) { return x[n / 2 * 4 + n % 2]; };
        three[i] = max3_signed(at(3 * i), at(3 * i + 1), at(3 * i + 2));
      }
      largest[2 * m + r] =
          max3_signed(max3_signed(three[0], three[1], three[2]), max3_signed(three[3], three[4], x[29]), 0.f);
    }
  };

  // Hides what the rows do not see of a block. Gives the rows that see none of it, a bit each: they must not vote.
  auto mask = [&](int block) {
    u32 blind = 0;
    const int first = first_row(), column = int(thread_index() % 4 * 2);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      int at = first + further(r);
      int last = at < work.q_length ? work.k_length - 1 : -1;
      if (a.causal) last = min(last, work.offset + at);
      last -= block * kBlockK;
      blind |= u32(last < 0) << r;
      last -= column;
#pragma unroll
      for (int i = 0; i < 16; i++)
        if (i / 2 * 8 + i % 2 > last) s[r / 2][i / 2 * 4 + r % 2 * 2 + i % 2] = -infinity();
    }
    return blind;
  };

  // Rows of this warp whose scores have outgrown their shift get a new one; O and the sums follow.
  auto reshift = [&] {
    bool any_low = false;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      float x = -infinity();
#pragma unroll
      for (int i = 0; i < 16; i++) x = max_nan(x, s[r / 2][i / 2 * 4 + r % 2 * 2 + i % 2]);
      x = quad_max(x) * scale_log2;
      float now = x > shift[r] + kSlack ? ceilf(x) : shift[r];
      float correction = exp2_approx(shift[r] - now);
      shift[r] = now;
      any_low |= now < -kSlack;
      row_sum[r] *= correction;
#pragma unroll
      for (int i = 0; i < kOut / 2; i++) o[r / 2][i / 2 * 4 + r % 2 * 2 + i % 2] *= correction;
    }
    low = __any_sync(~0u, any_low);
  };

  // The rows' cuts follow their sums.
  auto recut = [&] {
    if constexpr (M == Mode::gate_lse) {
      if (!relative_gate) return;
#pragma unroll
      for (int r = 0; r < kRows; r++) cut[r] = (shift[r] + log2_approx(quad_sum(row_sum[r]))) / scale_log2 + relative;
    }
  };

  // P of one tile, in the order in which wgmma takes it from registers.
  auto exponentials = [&](int m, u32(&p)[16]) {
#pragma unroll
    for (int i = 0; i < 8; i += 2)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float e[4];
#pragma unroll
        for (int n = 0; n < 4; n++)
          e[n] = exp2_approx(fmaf(s[m][4 * (i + n / 2) + 2 * r + n % 2], scale_log2, -shift[2 * m + r]));
        p[2 * i + r] = pack<T>(e[0], e[1]);
        p[2 * i + 2 + r] = pack<T>(e[2], e[3]);
        row_sum[2 * m + r] += (e[0] + e[1]) + (e[2] + e[3]);
      }
  };

  // O += P V of one tile, started.
  auto start_values = [&](int m, const u32(&p)[16], u32 v) {
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_rs<T>(o[m], p + 4 * k, descriptor(v, k * 16 * kPanel * 2));
    wgmma_commit();
  };

  // This warp's largest score of a block, for `write_maxima` on the other side of a barrier.
  const u32 exchange = base + L::exchange + c * 32;
  auto post_maxima = [&](const float(&largest)[kRows], u32 parity) {
    float x = max_nan(max_nan(largest[0], largest[1]), max_nan(largest[2], largest[3]));
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x = max_nan(x, __shfl_xor_sync(~0u, x, distance));
    if (lane == 0) store_shared(exchange + parity * 16 + threadIdx.x % 128 / kWarp * 4, __float_as_uint(x));
  };
  auto write_maxima = [&](u32 block, u32 parity) {
    if (threadIdx.x % 128) return;
    float x = -infinity();
    for (int i = 0; i < 4; i++) x = max_nan(x, __uint_as_float(load_shared(exchange + parity * 16 + i * 4)));
    i64 q_blocks = (a.q_length + kBlockQ - 1) / kBlockQ, k_blocks = (a.k_length + kBlockK - 1) / kBlockK;
    i64 q_block = (i64(work.batch) * a.q_heads + work.head) * q_blocks + work.q_block;
    a.maxima[q_block * k_blocks + block] = x * a.scale;
  };

  // ---- the loop --------------------------------------------------------------------------------------------------

  const int first_stage = of_lists(M) ? c * ring<D, M> : 0;
  const u32 barriers = base + 8 * first_stage;  // of this consumer's first stage
  const u32 q_first = tile(base + L::q + c * L::q_bytes), k_first = tile(base + L::k + first_stage * L::k_bytes);
  auto& stage = rings.stage;
  auto& slot = rings.slot;
  const int stages = __shfl_sync(~0u, cta.lead().visits, 0);
  const u32 words = base + L::words + 4 * (of_lists(M) ? first_stage : c);
  // Of a stage: what its block is (`visit`), and the next one's (`next`), which lane 0 alone reads (`ahead`, 0 in others), for
  // it also tells the producer that it has.
  u32 visit = 0, next = 0, ahead = 0;
  u32 empty = 0;  // the barrier to tell
  u32 there = 0;  // the next stage's K was seen to be there
  int i = 0;
  auto read_ahead = [&](int i) {
    if constexpr (of_lists(M)) {
      const u32 coming = stage.at() + 1 == ring<D, M> ? 0 : stage.at() + 1;
      if (lane == 0) ahead = load_shared(words + 4 * coming);
      return;
    }
    // Fewer instructions if unsigned, but one release of NVRTC then spills with the log-sum-exp's cuts.
    const u32 at = M == Mode::gate_lse ? i % kDescribed : u32(i) % kDescribed;
    if (lane == 0) ahead = load_shared(words + 16 * at);
  };
  auto look_ahead = [&] {
    next = __reduce_or_sync(~0u, ahead);
    empty = barriers + L::k_empty + 8 * stage.at();
    stage.advance();
    there = mbarrier_test(barriers + L::k_full + 8 * stage.at(), stage.parity());
  };
  // To the next stage, when its K is there, and so is what the block after it is.
  auto proceed = [&] {
    mbarrier_wait(barriers + L::k_full + 8 * stage.at(), stage.parity(), there);
    visit = next;
  };
  auto v_full = [&] { return base + L::v_full + 8 * (c * kSlots + slot.at()); };
  auto release_values = [&] {
    if constexpr (!kAsks) mbarrier_arrive_if(lane == 0, base + L::v_empty + 8 * (c * kSlots + slot.at()));
    slot.advance();
  };
  // Tells the fetcher of a kept block; 0: no more are kept.
  auto ask = [&](u32 block) {
    const bool teller = threadIdx.x % 128 == 0;
    const u32 mine = M == Mode::gate_lse ? thread_index() / 128 - 1 : c;  // there is no register for it
    store_shared_if(teller, base + L::asked + 4 * mine, block);
    mbarrier_arrive_if(teller, base + L::v_asked + 8 * mine);
  };
  if constexpr (of_lists(M)) {
    next = cta.first[c];
  } else {
    read_ahead(0);
    next = ahead;
  }
  next = __shfl_sync(~0u, next, 0);
  proceed();
  // The loop, once by exact maxima, until no score below 0 decides anything any more, then by `maxima_above` to the end. Past
  // the last stage there is nothing to visit, so that only then it is asked whether there is another.
  auto visit_blocks = [&](auto above) {
    constexpr bool kOnlyAbove = decltype(above)::value;
    auto needed_maxima = [&](int m, float(&largest)[kRows]) {
      if constexpr (kOnlyAbove) maxima_above(m, largest);
      else maxima(m, largest);
    };
    while (kOnlyAbove || !positive) {
      if (!(visit & Visit::valid)) {
        if (of_lists(M) ? visit & Visit::end : i >= stages) break;
        read_ahead(i + 1);
        look_ahead();
        mbarrier_arrive_if(lane == 0, empty);
        i++;
        proceed();
        continue;
      }
      float largest[kRows];
      {
        const u32 k = k_first + stage.at() * (L::k_bytes >> 4), q = stays_in_the_loop(q_first);
        wgmma_fence();
        start_scores(0, q, k);
        start_scores(1, q, k);
        wgmma_wait<1>();
        hold(words, __float_as_uint(s[0][0]));  // the word is not asked for, and so not waited for, before
        read_ahead(i + 1);
        needed_maxima(0, largest);
        look_ahead();
        hold(words, __float_as_uint(largest[0]) | __float_as_uint(largest[1]) | next);  // under the second tile's products
        wgmma_wait<0>();
      }
      for (;;) {  // as long as blocks are kept, for then the next one's scores are there
        mbarrier_arrive_if(lane == 0, empty);
        needed_maxima(1, largest);
        float bar[kRows];
        auto set_bars = [&](u32 blind) {
#pragma unroll
          for (int r = 0; r < kRows; r++) bar[r] = !kOnlyAbove && blind >> r & 1 ? infinity() : fmaxf(threshold, cut[r]);
        };
        set_bars(0);
        if (visit & Visit::masked) {
          u32 blind = mask(visit & Visit::block);
          needed_maxima(0, largest);
          needed_maxima(1, largest);
          set_bars(blind);
        }

        auto outgrow = [&] {
          bool any = false;
#pragma unroll
          for (int r = 0; r < kRows; r++) any |= fmaf(largest[r], scale_log2, -kSlack) > shift[r];
          return any;
        };
        bool outgrows = outgrow() | (kOnlyAbove && low);  // or may: then exact maxima tell
        bool keep = M != Mode::maxima;
        if constexpr (kGated) {
          bool wants = !kPositive && visit & Visit::forced;
          if constexpr (kPositive) {
            const float least = visit & Visit::forced ? -infinity() : threshold;
            wants = !(max3_signed(max3_signed(largest[0], largest[1], largest[2]), largest[3], largest[3]) < least);
          } else if constexpr (kOnlyAbove) {
            float over[kRows];
#pragma unroll
            for (int r = 0; r < kRows; r++) over[r] = largest[r] - bar[r];
            wants |= __float_as_int(max3_signed(max3_signed(over[0], over[1], over[2]), over[3], over[3])) >= 0;
          } else {
#pragma unroll
            for (int r = 0; r < kRows; r++) wants |= !(largest[r] < bar[r]);
          }
          keep = __any_sync(~0u, barrier_or(1 + c, wants, outgrows));  // a vote, so that the compiler knows it to be uniform
        }
        if constexpr (M == Mode::maxima) {
          post_maxima(largest, i & 1);
          barrier_or(1 + c, false);
          write_maxima(visit & Visit::block, i & 1);
        }
        i++;
        if (!keep) {
          if constexpr (M == Mode::lists_max) {  // its V has come in vain
            mbarrier_wait(v_full(), slot.parity());
            release_values();
          }
          proceed();
          break;
        }
        if constexpr (kAsks) ask(visit);

        if (__any_sync(~0u, outgrows)) {
          if (kOnlyAbove && low) {
            maxima(0, largest);
            maxima(1, largest);
            outgrows = outgrow();
          }
          if (__any_sync(~0u, outgrows)) reshift();
        }
        if (by_max(M) && relative_gate) {
#pragma unroll
          for (int r = 0; r < kRows; r++) {
            float most = quad_max(largest[r]);
            if (most != -infinity()) cut[r] = max_nan(cut[r], most + relative);  // a row that sees nothing of it says nothing
          }
        }
        // Each branch below waits for its own products, else ptxas serialises them.
        const u32 v = tile(base + L::v + (c * kSlots + slot.at()) * L::k_bytes, L::k_panel);
        auto finish = [&] {
          release_values();
          kept++;
          // A cut that turns NaN leaves the threshold alone, which must not be a bar below 0 then.
          if (!kOnlyAbove && relative_gate && relative <= 0.f && (threshold > 0.f || threshold == -infinity())) {
            float least = infinity();
#pragma unroll
            for (int r = 0; r < kRows; r++) least = fminf(least, fmaxf(threshold, cut[r]));
            positive = !__any_sync(~0u, barrier_or(1 + c, !(least > kAbove)));
          }
        };
        u32 p[kTiles][16];
        exponentials(0, p[0]);
        if constexpr (kEarly) {
          u32 packed[3] = {};  // short chains, beside the exponentials
#pragma unroll
          for (int n = 0; n < 15; n++) packed[n / 5] |= p[0][n];
          hold(words, __float_as_uint(row_sum[0]) | __float_as_uint(row_sum[1]) | (packed[0] | packed[1] | packed[2]));
        }
        proceed();
        if (!(visit & Visit::valid) || (!kOnlyAbove && positive)) {
          exponentials(1, p[1]);
          mbarrier_wait(v_full(), slot.parity());
          wgmma_fence();
          start_values(0, p[0], v);
          start_values(1, p[1], v);
          wgmma_wait<0>();
          recut();
          finish();
          break;
        }
        const u32 k = k_first + stage.at() * (L::k_bytes >> 4), q = stays_in_the_loop(q_first);
        if constexpr (kEarly) {
          wgmma_fence();
          start_scores(0, q, k);
        }
        read_ahead(i + 1);
        exponentials(1, p[1]);
        mbarrier_wait(v_full(), slot.parity());
        wgmma_fence();
        if constexpr (kEarly) {
          start_values(1, p[1], v);
          start_values(0, p[0], v);
          recut();
          wgmma_wait<1>();  // P of the second tile was where its next scores go
          wgmma_fence();
          start_scores(1, q, k);
        } else {
          start_values(0, p[0], v);
          start_values(1, p[1], v);
          recut();
          wgmma_wait<1>();  // P of either tile was where its next scores go
          wgmma_fence();
          start_scores(0, q, k);
          wgmma_wait<1>();
          wgmma_fence();
          start_scores(1, q, k);
          wgmma_wait<1>();
        }
        needed_maxima(0, largest);
        look_ahead();
        hold(words, __float_as_uint(largest[0]) | __float_as_uint(largest[1]) | next);
        wgmma_wait<0>();
        finish();
      }
    }
  };
  if constexpr (!kPositive) visit_blocks(Constant<false>{});
  if constexpr (M != Mode::maxima) visit_blocks(Constant<true>{});

  // ---- the end ---------------------------------------------------------------------------------------------------
  if constexpr (kAsks) ask(0);
  if constexpr (of_lists(M)) {  // the stage past the last
    mbarrier_arrive_if(lane == 0, barriers + L::k_empty + 8 * stage.at());
    stage.advance();
  }
  if constexpr (M != Mode::maxima) {
    if (threadIdx.x % 128 == 0 && a.kept && kept) atomicAdd(a.kept + i64(work.batch) * a.q_heads + work.head, u64(kept));
    // O leaves through where Q was, so that whole rows are written at a time. A warp's rows are its own. The 16-byte chunks of a
    // row are permuted by its number, so that no bank is asked for twice.
    barrier_or(1 + c, false);  // all four warps are through with Q
    constexpr int kChunks = D / 8, kTogether = kWarp / kChunks;  // chunks of a row; rows that a warp writes at a time
    const u32 rows = base + L::q + c * L::q_bytes;
    auto chunk = [&](int row, int n) { return rows + 2 * D * row + 16 * (n ^ row % 8); };  // of further rows: the same and 2 D a row
    const i64 first_row = work.q_start + work.q_block * kBlockQ, plane = work.plane(a);
    const int warp_row = int(thread_index() % 128 / kWarp * 16), rows_left = work.q_length - work.q_block * kBlockQ;
    {
      const int row = warp_row + lane / 4;
      const u32 to = chunk(row, 0) + 4 * (lane % 4);
      float* lse = a.lse + (plane * a.q_heads + work.head) * a.q_rows + first_row + row;
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        float sum = quad_sum(row_sum[r]);
        float inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
        for (int i = 0; i < kOut / 4; i++) {
          const float* x = &o[r / 2][4 * i + r % 2 * 2];
          store_shared((to ^ 16 * i) + 2 * D * further(r), pack<T>(x[0] * inverse, x[1] * inverse));
        }
        if (a.lse && lane % 4 == 0 && row + further(r) < rows_left)
          lse[further(r)] = sum == 0.f ? -infinity() : shift[r] * kLn2 + __logf(sum);
      }
    }
    __syncwarp();
    {
      const int row = warp_row + lane / kChunks, n = lane % kChunks;
      const u32 from = chunk(row, n);
      const i64 step = i64(a.q_heads) * D;  // from a row to the next
      u16* to = a.out + (plane * a.q_rows + first_row + row) * step + work.head * D + 8 * n;
#pragma unroll
      for (int i = 0; i < 32; i += kTogether) {
        const int on = i / 16 * 64 + i % 16;
        if (row + on < rows_left) copy_to_global(to + on * step, (from ^ 16 * (i % 8)) + 2 * D * on);
      }
    }
  }
}

template <class T, int D, Mode M>
__global__ void __launch_bounds__(threads(D), 1) attention(const __grid_constant__ Arguments arguments) {
  using L = Layout<D>;
  using Cta = bsfa::Cta<L::consumers>;
  static_assert(sizeof(Cta) <= L::bytes - L::cta);
  extern __shared__ __align__(L::alignment) char shared[];
  u32 base = shared_address(shared);
  Cta& cta = *reinterpret_cast<Cta*>(shared + L::cta);

  if (threadIdx.x < L::consumers * kWarp && threadIdx.x % kWarp == 0) {  // a warp each, for it takes its time
    const int c = threadIdx.x / kWarp;
    mbarrier_init(base + L::q_full + 8 * c, of_lists(M) ? kWarp : 1);
    mbarrier_init_fence();
    if constexpr (!of_lists(M)) {
      const Work work(arguments.call, blockIdx.x, L::consumers, c);
      bring_queries<D>(arguments, work, base, c);
      cta.work[c] = work;
    }
  } else if (threadIdx.x == 3 * kWarp) {
    prefetch_tensor_map(&arguments.q);
    prefetch_tensor_map(&arguments.k);
    prefetch_tensor_map(&arguments.v);
    for (int i = 0; i < L::consumers; i++) {
      mbarrier_init(base + L::q_empty + 8 * i, 128);
      mbarrier_init(base + L::v_asked + 8 * i, 1);
      mbarrier_init(base + L::v_landed + 8 * i, 1);
    }
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(base + L::k_full + 8 * i, 1);
      mbarrier_init(base + L::k_empty + 8 * i, 4 * (of_lists(M) ? 1 : L::consumers));
    }
    for (int i = 0; i < L::consumers * kSlots; i++) {
      mbarrier_init(base + L::v_full + 8 * i, 1);
      mbarrier_init(base + L::v_empty + 8 * i, 4);
    }
    mbarrier_init_fence();
    put_off<6>(base);  // where a loop lies in the instruction cache's lines moves calls that keep all by 4%; found by trial
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    registers_shrink<D == 64 ? 32 : 24>();
    const int warp = __shfl_sync(~0u, threadIdx.x / kWarp, 0);
    if constexpr (of_lists(M)) {
      if (warp < L::consumers) feed<D, M>(arguments, cta, base, warp);
    } else {
      if (warp == 0) produce<D>(arguments, cta, base);
      else if (warp <= L::consumers && M != Mode::maxima) fetch<D, M>(arguments, cta, base, warp - 1);
    }
  } else {
    registers_grow<L::registers>();
    const Call& a = arguments.call;
    // Uniform either way; of lists one release of NVRTC spills with the shuffle.
    const int c = (of_lists(M) ? __reduce_or_sync(~0u, threadIdx.x / 128) : __shfl_sync(~0u, threadIdx.x / 128, 0)) - 1;
    const Work& work = cta.work[c];
    Rings<D, M> rings;
    auto look_up = [&] { return work.visits ? work.look_up(a.threshold, a.scale) : -infinity(); };
    auto consume_one = [&](float threshold) {
      if (keeps_all(M) || (by_max(M) && !a.relative.data && (threshold > 0.f || threshold == -infinity())))
        consume<T, D, M, keeps_all(M) || by_max(M)>(arguments, cta, base, c, threshold, rings);
      else
        consume<T, D, M, keeps_all(M)>(arguments, cta, base, c, threshold, rings);
    };
    if constexpr (of_lists(M)) {
      stagger(c * L::behind);
      for (u32 parity = 0;; parity ^= 1) {
        mbarrier_wait(base + L::q_full + 8 * c, parity);
        if (__shfl_sync(~0u, cta.first[c], 0) == Cta::kNothing) break;
        consume_one(look_up());
        async_proxy_fence();  // O was where Q comes
        mbarrier_arrive_if(true, base + L::q_empty + 8 * c);
      }
    } else {
      const float threshold = look_up();
      if (work.visits) mbarrier_wait(base + L::q_full + 8 * c, 0);
      mbarrier_wait(base + L::k_full, 0);
      stagger(c * L::behind);
      consume_one(threshold);
    }
  }
}

}  // namespace bsfa
