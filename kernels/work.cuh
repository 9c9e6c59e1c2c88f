// What a call asks for, and how it falls into CTAs: block geometry, the part of the kernel argument that says nothing
// about how tensors are read, the order of work, the order of visit.
#pragma once
#include "common.cuh"

namespace bsfa {

constexpr int kBlockQ = 128;  // query rows of a block
constexpr int kBlockK = 64;   // keys of a block

enum class Order : int { diagonal = 0, sink = 1, ascending = 2 };

// What a kernel does with a block's scores.
enum class Mode {
  all,        // keep every visible block: dense attention
  gate_max,   // the gate; r[row] is the running maximum
  gate_lse,   // the gate; r[row] is the running log-sum-exp
  maxima,     // write every block's largest scaled score, no softmax
  lists,      // keep every listed block
  lists_max,  // the gate by the running maximum over the listed blocks
};
constexpr bool of_lists(Mode m) { return m == Mode::lists || m == Mode::lists_max; }
constexpr bool by_max(Mode m) { return m == Mode::gate_max || m == Mode::lists_max; }
constexpr bool gated(Mode m) { return by_max(m) || m == Mode::gate_lse; }
constexpr bool keeps_all(Mode m) { return m == Mode::all || m == Mode::lists; }

// A tensor by its address: (B, S, H, D), or (S, H, D) with batch_stride unused; D contiguous, all else in multiples of 16
// bytes.
struct Tensor {
  const u16* data;
  i64 batch_stride, row_stride, head_stride;
};

// A number a head and query block: one a query block of this call, or, where `rows` is not 0, one an absolute position,
// clamped to the last row. Mirrored, as `Call`, by bsfa/launch.py.
struct Table {
  const float* data;  // or null
  i64 head_stride, row_stride;
  i32 rows;
};

// Lengths and strides count elements.
struct Call {
  u16* out;                       // (planes, q_rows, Hq, D) contiguous
  float* lse;                     // (planes, Hq, q_rows); may be null
  u64* kept;                      // (B, Hq), zeroed by the caller; may be null
  float* maxima;                  // (B, Hq, nQ, nK), filled with -inf by the caller; Mode::maxima
  Table threshold, relative;      // the gate, in units of scale * q.k; no data: no such part
  const i32* indices;             // (B, Hq, nQ, list_width) key blocks in the order of visit; null where none are listed
  const i32* counts;              // (B, Hq, nQ)
  u32* claimed;                   // how many query blocks are claimed, zeroed by the caller; where sm90a is given lists
  const i32* spans_q;             // (B, 2) a sequence's first row and end, or null: all rows of its plane
  const i32* spans_k;
  i32 span_step_q, span_step_k;   // from a sequence's pair to the next one's; 1: cumulative lengths
  i32 list_width;
  i32 batch, q_heads, kv_heads;
  i32 q_length, k_length;         // the longest, where there are spans
  i32 q_rows;                     // of a plane
  i32 packed;                     // all sequences lie in one plane, else each has its own
  i32 causal, keep_diagonal, keep_first;
  Order order;
  float scale;                    // softmax scale, positive
  i32 abreast;                    // K and V that CTAs take turns over

  // CTAs over one K and V, which compute so many query blocks each.
  __device__ u32 ctas_of_one(u32 query_blocks) const {
    return (u32(q_heads) / u32(kv_heads) * (u32(q_length + kBlockQ - 1) / kBlockQ) + query_blocks - 1) / query_blocks;
  }
};

// A key block to visit: its number in the low bits, flags above. No flag at all: there is nothing to visit.
struct Visit {
  static constexpr u32 valid = 1u << 31;
  static constexpr u32 forced = 1u << 30;  // kept whatever its scores
  static constexpr u32 masked = 1u << 29;  // some entry of it is hidden from some row
  static constexpr u32 end = 1u << 28;     // no block: none is listed any more
  static constexpr u32 block = end - 1;
};

// A query block that a CTA computes, and the key blocks it visits.
struct Work {
  int batch, head, kv_head, q_block;
  int q_length, k_length, q_start, k_start;  // of this sequence; where it starts in its plane
  int offset;                                // absolute position of the sequence's first query
  int visible;                               // key blocks with a visible entry: 0 .. visible - 1
  int band;                                  // first block of the diagonal band; past all where there is none
  int visits;                                // blocks to visit
  const i32* list;

  Work() = default;

  // The `n`-th query block of the `index`-th CTA, where a CTA computes `together` of them.
  __device__ Work(const Call& a, u32 index, u32 together, u32 n) { set(a, index, together, n); }

  // The same, field by field where it is. Over one K and V heads are innermost, query blocks go from the longest. As many K and
  // V as stay in L2 take turns, so that it is short ones that are left when CTAs run out of them; then come others. A query
  // block past the last has no rows.
  __device__ void set(const Call& a, u32 index, u32 together = 1, u32 n = 0) {
    const u32 ctas = a.ctas_of_one(together), first = index / (a.abreast * ctas) * a.abreast;
    const u32 among = min(u32(a.abreast), u32(a.batch * a.kv_heads) - first), turn = index - first * ctas;
    const u32 kv = first + turn % among, item = turn / among * together + n;
    const u32 group = u32(a.q_heads) / u32(a.kv_heads), q_blocks = u32(a.q_length + kBlockQ - 1) / kBlockQ;
    q_block = item / group < q_blocks ? q_blocks - 1 - item / group : q_blocks;
    kv_head = kv % u32(a.kv_heads);
    head = kv_head * group + item % group;
    batch = kv / u32(a.kv_heads);
    const i32* span_q = a.spans_q + batch * a.span_step_q;
    const i32* span_k = a.spans_k + batch * a.span_step_k;
    q_start = a.spans_q ? span_q[0] : 0;
    k_start = a.spans_k ? span_k[0] : 0;
    q_length = a.spans_q ? span_q[1] - q_start : a.q_length;
    k_length = a.spans_k ? span_k[1] - k_start : a.k_length;
    offset = k_length - q_length;
    int first_row = q_block * kBlockQ;
    int last_row = min(first_row + kBlockQ, q_length) - 1;
    int keys = a.causal ? min(k_length, offset + last_row + 1) : k_length;
    visible = first_row < q_length && keys > 0 ? (keys + kBlockK - 1) / kBlockK : 0;
    band = a.causal ? max(0, offset + first_row) / kBlockK : visible;
    list = nullptr;
    visits = visible;
    if (a.indices) {
      i64 row = (i64(batch) * a.q_heads + head) * q_blocks + q_block;
      list = a.indices + row * a.list_width;
      visits = visible ? a.counts[row] : 0;
    }
  }

  // The plane of q, k, v and out that the sequence lies in.
  __device__ int plane(const Call& a) const { return a.packed ? 0 : batch; }

  // What a table says of this query block, over `scale`: in units of q.k. -inf where there is none.
  __device__ float look_up(const Table& table, float scale) const {
    if (!table.data) return -infinity();
    int row = table.rows ? min(max(0, offset + q_block * kBlockQ) / kBlockQ, table.rows - 1) : q_block;
    return table.data[head * table.head_stride + row * table.row_stride] / scale;
  }

  // The p-th block visited, with its flags; 0 past the last one and for a listed block that no row sees.
  __device__ u32 visit(const Call& a, int p) const { return p < visits ? describe(a, block(a, p)) : 0; }

  // The p-th block visited.
  __device__ int block(const Call& a, int p) const {
    if (list) return list[p];
    if (a.order == Order::diagonal) return visible - 1 - p;
    if (a.order == Order::sink) return p == 0 ? 0 : visible - p;
    return p;
  }

  // A block with its flags; 0 where no row sees it.
  __device__ u32 describe(const Call& a, int block) const {
    if (u32(block) >= u32(visible)) return 0;
    u32 word = Visit::valid | u32(block);
    if ((a.keep_diagonal && block >= band) || (a.keep_first && block == 0)) word |= Visit::forced;
    bool hidden = a.causal && (block + 1) * kBlockK - 1 > offset + q_block * kBlockQ;
    if (hidden || (block + 1) * kBlockK > k_length || (q_block + 1) * kBlockQ > q_length) word |= Visit::masked;
    return word;
  }
};

}  // namespace bsfa
