// Block-sparse attention forward for compute capability 8.0 and every later chip without a kernel of its own: block
// iterator x gate on a FlashAttention loop of cp.async, ldmatrix and mma.sync.
//
// One CTA of four warps computes one query block (128 rows) of one head; a warp holds 32 rows. It visits key blocks (64
// keys) one at a time: the exact scores S = Q K^T (128 x 64), then one decision over all 128 rows: is any visible
// scaled score not below the bar max(threshold, r[row] + relative)? A kept block goes through softmax and P V; a
// skipped one is done, and its V is never read. r[row] covers the blocks kept before: decisions are strictly one after
// the other.
//
// The dataflow of block j; `^` are the CTA's barriers, copies run below what they hide behind:
//
//   all warps   | S(j)  mask  row maxima | softmax(j)        | P(j) V(j)      | S(j+1) ...
//   copies      | K(j+1) ............... | V(j) ............ |                |
//               |                        | K(j+2) ............................ ...
//                                        ^ decision          ^ only where kept
//
// The first barrier does three things at once. It is the vote (a barrier that ORs a predicate). It says that all warps
// are done with K(j), whose stage then takes K(j+2), and with V of the last kept block, whose buffer then takes V(j).
// And it makes K(j+1), for whose copy each thread waited just before, everybody's. So a skipped block costs its share
// of Q K^T, its maxima and one barrier. What one CTA spends waiting, the other CTA of the same SM fills: registers and
// shared memory are cut for two (one where an SM has 100 KB of shared memory: compute capability 8.6, 8.9, 12.x).
//
// A warp's tile is 32 x 64 because shared memory, not the tensor cores, is what a smaller one would wait for: each row
// of K and V that a warp reads serves 32 rows of Q. O (32 x D) and S then fill the registers at D = 128, and Q is
// reread from shared memory; at D = 64 it stays in registers.
//
// Shared memory (offsets in `Layout`)
//   Q          128 x D
//   K          2 stages x (64 keys x D)
//   V          64 keys x D
//   exchange   2 x four floats: the warps' largest scores of a block; block maxima only
//   visits     kRing words: the key blocks to visit, described by the lanes of one warp at once
//   bars       128 floats: what a score of each row must reach; raised by the row's own lanes where a block is kept
//   cta        the CTA's `Cta`
//
// A tile is rows of D elements; the 16-byte chunk c of row r lies at position c ^ (r % 8), so that the eight rows a
// matrix load touches, and the eight chunks a quarter of a warp copies, each cover all 32 banks.
#include "ptx_sm80.cuh"
#include "work.cuh"

namespace bsfa {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpRows = kBlockQ / kWarps;
constexpr int kStages = 2;
constexpr int kRing = 2 * kWarp;  // blocks whose description is at hand
constexpr int kRows = 4;          // rows of S and O that a thread has a share of: lane / 4 + 0, 8, 16, 24 of the warp's

// The one kernel argument. Mirrored by bsfa/launch_sm80.py.
struct Arguments {
  Tensor q, k, v;
  Call call;
};

template <int D> struct Layout {
  static constexpr int row = 2 * D;
  static constexpr int q = 0;
  static constexpr int k = q + kBlockQ * row;
  static constexpr int k_stage = kBlockK * row;
  static constexpr int v = k + kStages * k_stage;
  static constexpr int exchange = v + kBlockK * row;
  static constexpr int visits = exchange + 2 * kWarps * 4;
  static constexpr int bars = visits + kRing * 4;
  static constexpr int cta = bars + kBlockQ * 4;
  static constexpr int bytes = cta + 144;
};

// The rows of one head of one sequence.
struct Rows {
  const u16* data;
  i64 stride;
  int length;

  Rows() = default;
  __device__ Rows(const Tensor& t, int plane, int head, int start, int length)
      : data(t.data + plane * t.batch_stride + head * t.head_stride + start * t.row_stride),
        stride(t.row_stride),
        length(length) {}
};

// Copies rows first .. first + Count - 1 into the tile at `tile`; those past the end arrive as zeros, for they may be a
// neighbour's.
template <int D, int Count>
__device__ __forceinline__ void copy_rows(u32 tile, const Rows& rows, int first, int thread) {
  constexpr int kChunks = D / 8;
  constexpr int kStep = kThreads / kChunks;  // a thread copies one chunk of every kStep-th row
  static_assert(kStep % 8 == 0);             // so that one swizzle serves all of them
  int chunk = thread % kChunks, row = thread / kChunks;
  u32 destination = tile + row * Layout<D>::row + (chunk ^ row % 8) * 16;
  const i64 stride = rows.stride;
  const int valid = rows.length - first - row;
  const u16* source = rows.data + (first + row) * stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < Count; i += kStep, source += kStep * stride)
    copy_async(destination + i * Layout<D>::row, source, i < valid);
}

// What all threads of a CTA know; in shared memory for want of registers.
struct Cta {
  Work work;
  Rows q, k, v;
  float threshold, relative;  // the gate, in units of q.k
  int kept;                   // blocks so far
  int zero;                   // see `thread`

  Cta() = default;
  __device__ Cta(const Arguments& arguments, u32 index) : work(arguments.call, index, 1, 0) {
    int plane = work.plane(arguments.call);
    q = Rows(arguments.q, plane, work.head, work.q_start, work.q_length);
    k = Rows(arguments.k, plane, work.kv_head, work.k_start, work.k_length);
    v = Rows(arguments.v, plane, work.kv_head, work.k_start, work.k_length);
    const Call& a = arguments.call;
    kept = zero = 0;
    threshold = work.look_up(a.threshold, a.scale);
    relative = work.look_up(a.relative, a.scale);
  }
};

// Matrix loads fetch 16 x 16 elements of a tile, as four 8 x 8 matrices: of Q and V column by column, of K row by row.
// Where the row lies that a lane gives the address of, and the same 16 c columns further on.
template <int D> __device__ __forceinline__ u32 matrix_row(int row, int chunk) {
  return row * Layout<D>::row + (chunk ^ row % 8) * 16;
}
template <int D> __device__ __forceinline__ u32 by_column(int thread) {
  return matrix_row<D>(thread % 16, thread / 16 % 2);
}
template <int D> __device__ __forceinline__ u32 by_row(int thread) {
  return matrix_row<D>(thread % 8 + thread / 16 % 2 * 8, thread / 8 % 2);
}
__device__ __forceinline__ u32 advance(u32 address, int c) { return (address ^ c % 4 * 32) + c / 4 * 128; }

template <class T, int D, Mode M>
__global__ void __launch_bounds__(kThreads, 2) attention(const __grid_constant__ Arguments arguments) {
  using L = Layout<D>;
  constexpr bool kGated = gated(M);
  constexpr bool kQueriesStay = D == 64;
  constexpr int kChunks = D / 16;  // depth of Q K^T, in products of 16

  extern __shared__ __align__(1024) char dynamic[];
  const u32 base = shared_address(dynamic);
  const Call& a = arguments.call;
  static_assert(sizeof(Cta) == L::bytes - L::cta);
  Cta& cta = *reinterpret_cast<Cta*>(dynamic + L::cta);
  const Work& work = cta.work;
  if (threadIdx.x == 0) cta = Cta(arguments, blockIdx.x);
  __syncthreads();
  u32* visits = reinterpret_cast<u32*>(dynamic + L::visits);  // of the next blocks, a ring
  if (threadIdx.x < kWarp) visits[threadIdx.x] = work.visit(a, threadIdx.x);
  __syncthreads();
  if (work.q_block * kBlockQ >= work.q_length) return;  // a packed sequence shorter than the longest

  const float scale_log2 = a.scale * kLog2e;

  // A dozen addresses follow from it, which ptxas would keep over the loop and has no registers for. So every block
  // takes it anew, plus a zero in shared memory of which ptxas knows nothing.
  int thread = threadIdx.x;
  auto row_in_block = [](int thread) { return thread / kWarp * kWarpRows + thread % kWarp / 4; };  // the first of four

  float o[2][D / 8][4] = {};  // [16 rows][8 columns][as mma]
  float row_max[kRows], row_sum[kRows];  // sums of this thread's columns alone
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    row_max[r] = -infinity();
    row_sum[r] = 0.f;
  }
  float* bars = reinterpret_cast<float*>(dynamic + L::bars);
  bars[thread] = cta.threshold;

  // ---- the pieces of a block ---------------------------------------------------------------------------------------

  u32 queries[kQueriesStay ? kChunks : 1][2][4];
  auto load_queries = [&](u32(&q)[2][4], int c) {
    const u32 tile = base + L::q + by_column<D>(thread) + thread / kWarp * kWarpRows * L::row;
#pragma unroll
    for (int m = 0; m < 2; m++) load_matrices(q[m], advance(tile, c) + m * 16 * L::row);
  };

  // S, with the fragments of K one step of 16 x 16 ahead of their use, those of Q two.
  auto scores = [&](float(&s)[2][8][4], int stage) {
    const u32 tile = base + L::k + stage * L::k_stage + by_row<D>(thread);
    u32 q[2][2][4], k[2][4];
    auto load_keys = [&](int step) { load_matrices(k[step % 2], advance(tile, step / 4) + step % 4 * 16 * L::row); };
    if constexpr (!kQueriesStay) load_queries(q[0], 0);
    load_keys(0);
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
#pragma unroll
      for (int n = 0; n < 4; n++) {
        if (4 * c + n + 1 < 4 * kChunks) load_keys(4 * c + n + 1);
        if constexpr (!kQueriesStay)
          if (n == 2 && c + 1 < kChunks) load_queries(q[(c + 1) % 2], c + 1);
        const auto& rows = kQueriesStay ? queries[kQueriesStay ? c : 0] : q[c % 2];
        const auto& keys = k[n % 2];
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma<T>(s[m][2 * n], rows[m], keys[0], keys[1]);
          mma<T>(s[m][2 * n + 1], rows[m], keys[2], keys[3]);
        }
      }
    }
  };

  // Hides what the rows do not see of a block; a row that sees none of it must not vote.
  auto mask = [&](float(&s)[2][8][4], float(&bar)[kRows], int block) {
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      int at = work.q_block * kBlockQ + row_in_block(thread) + 8 * r;
      int last = at < work.q_length ? work.k_length - 1 : -1;
      if (a.causal) last = min(last, work.offset + at);
      last -= block * kBlockK;
      if (last < 0) bar[r] = infinity();
      last -= 2 * (thread % 4);
#pragma unroll
      for (int i = 0; i < 16; i++)
        if (i / 2 * 8 + i % 2 > last) s[r / 2][i / 2][r % 2 * 2 + i % 2] = -infinity();
    }
  };

  // What is subtracted from a row's scores: their maximum, or nothing where there is none yet.
  auto origin = [](float maximum) { return maximum == -infinity() ? 0.f : maximum; };

  // S becomes P, in the order in which P V takes it, and O follows the rows' maxima; most blocks raise none of a warp's.
  auto softmax = [&](float(&s)[2][8][4], const float(&largest)[kRows]) {
    float correction[kRows];
    bool rose = false;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      float now = max_nan(row_max[r], quad_max(largest[r]));
      correction[r] = exp2_approx((row_max[r] - origin(now)) * scale_log2);
      rose |= now != row_max[r];
      row_max[r] = now;
    }
    if (__any_sync(~0u, rose)) {
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        row_sum[r] *= correction[r];
#pragma unroll
        for (int i = 0; i < D / 4; i++) o[r / 2][i / 2][r % 2 * 2 + i % 2] *= correction[r];
      }
    }
    float shift[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) shift[r] = origin(row_max[r]) * scale_log2;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        float* x = &s[r / 2][n][r % 2 * 2];
        x[0] = exp2_approx(fmaf(x[0], scale_log2, -shift[r]));
        x[1] = exp2_approx(fmaf(x[1], scale_log2, -shift[r]));
        row_sum[r] += x[0] + x[1];
      }
    if constexpr (kGated) {
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        float statistic = row_max[r];
        if constexpr (M == Mode::gate_lse) statistic += log2_approx(quad_sum(row_sum[r])) * (kLn2 / a.scale);
        bars[row_in_block(thread) + 8 * r] = fmaxf(cta.threshold, statistic + cta.relative);  // from all four lanes
      }
    }
  };

  // O += P V.
  auto add_values = [&](const float(&s)[2][8][4]) {
    const u32 tile = base + L::v + by_column<D>(thread);
#pragma unroll
    for (int c = 0; c < kBlockK / 16; c++) {
      u32 p[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          p[m][i] = pack<T>(s[m][2 * c + i / 2][i % 2 * 2], s[m][2 * c + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < D / 16; n++) {
        u32 v[4];
        load_matrices_transposed(v, advance(tile, n) + c * 16 * L::row);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma<T>(o[m][2 * n], p[m], v[0], v[1]);
          mma<T>(o[m][2 * n + 1], p[m], v[2], v[3]);
        }
      }
    }
  };

  // This warp's largest score of a block, for `write_maxima` on the other side of a barrier.
  float* exchange = reinterpret_cast<float*>(dynamic + L::exchange);
  auto post_maxima = [&](const float(&largest)[kRows], int j) {
    float x = max_nan(max_nan(largest[0], largest[1]), max_nan(largest[2], largest[3]));
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x = max_nan(x, __shfl_xor_sync(~0u, x, distance));
    if (thread % kWarp == 0) exchange[j % 2 * kWarps + thread / kWarp] = x;
  };
  auto write_maxima = [&](u32 visit, int j) {
    if (threadIdx.x != 0) return;
    const float* x = exchange + j % 2 * kWarps;
    i64 q_blocks = (a.q_length + kBlockQ - 1) / kBlockQ, k_blocks = (a.k_length + kBlockK - 1) / kBlockK;
    i64 q_block = (i64(work.batch) * a.q_heads + work.head) * q_blocks + work.q_block;
    a.maxima[q_block * k_blocks + (visit & Visit::block)] = max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3])) * a.scale;
  };

  auto copy_k = [&](u32 visit, int stage) {
    if (visit & Visit::valid)
      copy_rows<D, kBlockK>(base + L::k + stage * L::k_stage, cta.k, int(visit & Visit::block) * kBlockK, thread);
    copy_commit();  // also where there is none, so that groups can be counted
  };

  // ---- the loop --------------------------------------------------------------------------------------------------

  copy_rows<D, kBlockQ>(base + L::q, cta.q, work.q_block * kBlockQ, thread);
  copy_k(visits[0], 0);
  copy_k(visits[1], 1);
  copy_wait<1>();
  __syncthreads();
  if constexpr (kQueriesStay) {
#pragma unroll
    for (int c = 0; c < kChunks; c++) load_queries(queries[c], c);
  }

  for (int j = 0; j < work.visits; j++) {
    const u32 visit = visits[j % kRing];
    const int stage = j % kStages;
    float s[2][8][4] = {};
    scores(s, stage);

    float bar[kRows], largest[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) bar[r] = kGated ? bars[row_in_block(thread) + 8 * r] : -infinity();
    if (visit & Visit::masked) mask(s, bar, visit & Visit::block);
    bool vote = visit & Visit::forced;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      largest[r] = s[r / 2][0][r % 2 * 2];
#pragma unroll
      for (int i = 1; i < 16; i++) largest[r] = max_nan(largest[r], s[r / 2][i / 2][r % 2 * 2 + i % 2]);
      vote |= !(largest[r] < bar[r]);
    }
    if constexpr (M == Mode::maxima) post_maxima(largest, j);

    copy_wait<0>();  // K(j+1)
    bool keep = visit & Visit::valid;
    if constexpr (kGated) keep = __syncthreads_or(vote);
    else __syncthreads();
    thread = threadIdx.x + cta.zero;

    if (M != Mode::maxima && keep) {
      copy_rows<D, kBlockK>(base + L::v, cta.v, int(visit & Visit::block) * kBlockK, thread);
      copy_commit();
    }
    copy_k(visits[(j + 2) % kRing], stage);
    if ((j + 3) % kWarp == 0 && threadIdx.x < kWarp)  // seen by all from the next barrier on, first used after it
      visits[(j + 3 + threadIdx.x) % kRing] = work.visit(a, j + 3 + threadIdx.x);

    if constexpr (M == Mode::maxima) write_maxima(visit, j);
    else if (keep) {
      if (thread == 0) cta.kept++;
      softmax(s, largest);
      copy_wait<1>();  // V(j)
      __syncthreads();
      add_values(s);
    }
  }
  copy_wait<0>();

  // ---- the end ---------------------------------------------------------------------------------------------------
  if constexpr (M != Mode::maxima) {
    if (thread == 0 && a.kept && cta.kept) atomicAdd(a.kept + i64(work.batch) * a.q_heads + work.head, u64(cta.kept));
    const i64 plane = work.plane(a);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      int at = work.q_block * kBlockQ + row_in_block(thread) + 8 * r;
      float sum = quad_sum(row_sum[r]);
      float inverse = sum == 0.f ? 0.f : 1.f / sum;
      if (at >= work.q_length) continue;
      i64 row = work.q_start + at;
      u16* out = a.out + ((plane * a.q_rows + row) * a.q_heads + work.head) * D + 2 * (thread % 4);
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        const float* x = &o[r / 2][i][r % 2 * 2];
        *reinterpret_cast<u32*>(out + 8 * i) = pack<T>(x[0] * inverse, x[1] * inverse);
      }
      if (a.lse && thread % 4 == 0)
        a.lse[(plane * a.q_heads + work.head) * a.q_rows + row] =
            sum == 0.f ? -infinity() : row_max[r] * a.scale + __logf(sum);
    }
  }
}

}  // namespace bsfa
