// Rows to the ranks of their experts and results back home: dispatch, receive, combine.
//
// The parts of all ranks lie in one buffer in rank order, each on a border of 4 bytes; where they begin and how long they
// are stays on the device. A dispatch record is K slots and the row in the wire type (f32 or bf16).
//
// Records may also be gathered: one part for all ranks, in which every row is once, and an entry says the rank above the
// slot (16 bits each). Each rank picks its own when it receives.
//
// Nothing is counted twice or by chance: a block that needs the number of records before its own counts them itself,
// from the routes, so that no block waits for another.
#include "common.cuh"

#define EXCHANGE_THREADS 256
#define EXCHANGE_ROWS 32  // of a block of dispatch and combine

struct Place {
  u32 rank, slot;
};

// Dispatch ----------------------------------------------------------------------------------------------------------

struct DispatchArgs {
  const float* x;        // [T, H]
  const u32* experts;    // [T, K]
  const Place* places;   // [E]
  u8* out;               // records
  Part* parts;           // [ranks]
  u32 rows, hidden, top_k, ranks;
  u32 gathered, unused;  // 1: one part for all ranks
};

DEVICE bool visits(const DispatchArgs& a, u32 row, u32 rank) {
  if (a.gathered) return true;
  for (u32 k = 0; k < a.top_k; k++)
    if (a.places[a.experts[row * a.top_k + k]].rank == rank) return true;
  return false;
}

// Sums a number of each thread of the block.
DEVICE u32 block_sum(u32 value, u32* sums) {
  value = warp_sum(value);
  __syncthreads();
  if (lane_id() == 0) sums[warp_id()] = value;
  __syncthreads();
  u32 sum = 0;
  for (u32 w = 0; w < EXCHANGE_THREADS / WARP; w++) sum += sums[w];
  return sum;
}

// A block a stretch of rows and a rank.
template <class W>
DEVICE void dispatch(const DispatchArgs& a) {
  SHARED(smem);
  u32* sums = (u32*)smem;                         // [8]
  u32* records = sums + EXCHANGE_THREADS / WARP;  // [EXCHANGE_ROWS]
  u32 rank = blockIdx.y, first = blockIdx.x * EXCHANGE_ROWS;
  // Records of lower ranks, of this rank, and of this rank before the stretch.
  u32 lower = 0, own = 0, before_own = 0;
  for (u32 row = threadIdx.x; row < a.rows; row += EXCHANGE_THREADS) {
    for (u32 r = 0; r < rank; r++) lower += visits(a, row, r);
    u32 here = visits(a, row, rank);
    own += here;
    if (row < first) before_own += here;
  }
  lower = block_sum(lower, sums);
  own = block_sum(own, sums);
  before_own = block_sum(before_own, sums);
  u64 record_bytes = a.top_k * 4 + (u64)a.hidden * sizeof(W);
  if (blockIdx.x == 0 && threadIdx.x == 0) a.parts[rank] = {lower * record_bytes, own * record_bytes};
  if (threadIdx.x < EXCHANGE_ROWS) {
    u32 row = first + threadIdx.x;
    bool here = row < a.rows && visits(a, row, rank);
    u32 ballot = __ballot_sync(FULL, here);
    records[threadIdx.x] = here ? lower + before_own + below(ballot) : NO_SLOT;
  }
  __syncthreads();
  for (u32 i = 0; i < EXCHANGE_ROWS; i++) {
    if (records[i] == NO_SLOT) continue;
    u32 row = first + i;
    u8* record = a.out + records[i] * record_bytes;
    for (u32 k = threadIdx.x; k < a.top_k; k += EXCHANGE_THREADS) {
      Place place = a.places[a.experts[row * a.top_k + k]];
      u32 own_slot = place.rank == rank ? place.slot : NO_SLOT;
      ((u32*)record)[k] = a.gathered ? place.rank << 16 | place.slot : own_slot;
    }
    W* values = (W*)(record + a.top_k * 4);
    for (u32 c = threadIdx.x; c < a.hidden; c += EXCHANGE_THREADS) store(values + c, a.x[(u64)row * a.hidden + c]);
  }
}

KERNEL(dispatch_f32, EXCHANGE_THREADS, DispatchArgs) { dispatch<float>(a); }
KERNEL(dispatch_bf16, EXCHANGE_THREADS, DispatchArgs) { dispatch<u16>(a); }

// Receive -----------------------------------------------------------------------------------------------------------

struct ReceiveArgs {
  const u8* received;
  const Part* parts;      // [ranks]
  const u32* filled;      // [slots]: 1 where an expert is loaded
  u64* row_source;        // [rows]: where a row's numbers begin among what was received
  u32* item_row;          // [items], in order of arrival: row by row, choice by choice
  u32* item_slot;         // [items]
  u32* counts;            // [2]: rows, items
  Part* results;          // [ranks]: the parts that go back
  Status* status;
  u64 record_bytes, result_bytes;
  u32 ranks, top_k, slots, rows_max, items_max;
  u32 me;  // of gathered records, those of this rank; NO_SLOT: they are all its own
};

// The slot of an entry of a part, or NO_SLOT if it is for another rank.
DEVICE u32 slot_of(const ReceiveArgs& a, const u8* part, u32 entry) {
  u32 slot = *(const u32*)(part + entry / a.top_k * a.record_bytes + entry % a.top_k * 4);
  if (a.me == NO_SLOT) return slot;
  return slot >> 16 == a.me ? slot & 0xffff : NO_SLOT;
}

// Checks every rank's records, and lists rows and items; one block. Rows of a rank whose bytes do not fit are left out.
KERNEL(receive, EXCHANGE_THREADS, ReceiveArgs) {
  SHARED(smem);
  u32* sums = (u32*)smem;  // [8]
  u32 rows = 0, items = 0;
  for (u32 rank = 0; rank < a.ranks; rank++) {
    const u8* part = a.received + a.parts[rank].start;
    u64 bytes = a.parts[rank].bytes;
    u32 items_before = items;
    u32 records = (u32)(bytes / a.record_bytes);
    u32 entries = records * a.top_k;
    bool whole = bytes % a.record_bytes == 0;
    u32 bad = 0, held = 0;
    if (whole) {
      for (u32 e = threadIdx.x; e < entries; e += EXCHANGE_THREADS) {
        u32 slot = slot_of(a, part, e);
        if (slot == NO_SLOT) continue;
        held += 1;
        bad |= slot >= a.slots || a.filled[slot] == 0;
      }
    }
    bad = block_sum(bad, sums);
    held = block_sum(held, sums);
    bool fits = rows + records <= a.rows_max && items + held <= a.items_max;
    if (whole && bad == 0 && fits) {
      // The place of an entry is the number of those before it: chunk by chunk.
      for (u32 chunk = 0; chunk < entries; chunk += EXCHANGE_THREADS) {
        u32 e = chunk + threadIdx.x;
        u32 slot = NO_SLOT;
        if (e < entries) slot = slot_of(a, part, e);
        u32 ballot = __ballot_sync(FULL, slot != NO_SLOT);
        __syncthreads();
        if (lane_id() == 0) sums[warp_id()] = __popc(ballot);
        __syncthreads();
        u32 at = items + below(ballot), all = 0;
        for (u32 w = 0; w < EXCHANGE_THREADS / WARP; w++) {
          if (w < warp_id()) at += sums[w];
          all += sums[w];
        }
        if (slot != NO_SLOT) {
          a.item_row[at] = rows + e / a.top_k;
          a.item_slot[at] = slot;
        }
        items += all;
      }
      for (u32 r = threadIdx.x; r < records; r += EXCHANGE_THREADS)
        a.row_source[rows + r] = a.parts[rank].start + r * a.record_bytes + a.top_k * 4;
      rows += records;
    } else if (threadIdx.x == 0) {
      report(a.status, STATUS_RECEIVED, whole ? (bad ? SLOT_EMPTY : TOO_MANY_ROWS) : PART_NOT_WHOLE, rank, 0);
    }
    if (threadIdx.x == 0) a.results[rank] = {items_before * a.result_bytes, (items - items_before) * a.result_bytes};
  }
  if (threadIdx.x == 0) {
    a.counts[0] = rows;
    a.counts[1] = items;
  }
}

struct CopyRowsArgs {
  const u8* received;
  const u64* row_source;
  const u32* counts;
  u8* rows;  // [rows, H] of the wire type
  u32 words, unused;  // u16 in a row
};

// Rows to where they are aligned. A block a row, as many as there may be.
KERNEL(receive_rows, EXCHANGE_THREADS, CopyRowsArgs) {
  if (blockIdx.x >= a.counts[0]) return;
  const u16* from = (const u16*)(a.received + a.row_source[blockIdx.x]);
  u16* to = (u16*)a.rows + (u64)blockIdx.x * a.words;
  for (u32 i = threadIdx.x; i < a.words; i += EXCHANGE_THREADS) to[i] = from[i];
}

struct GroupArgs {
  const u32* item_slot;  // [items]
  const u32* counts;
  u32* order;   // [items]: grouped by slot, in order of arrival within a slot
  u32* starts;  // [slots + 1]
  u32 slots, unused;
};

// A warp a slot: it counts the items of lower slots, and then places its own behind them.
KERNEL(receive_group, WARP, GroupArgs) {
  u32 slot = blockIdx.x, items = a.counts[1];
  u32 lower = 0, own = 0;
  for (u32 i = lane_id(); i < items; i += WARP) {
    lower += a.item_slot[i] < slot;
    own += a.item_slot[i] == slot;
  }
  lower = warp_sum(lower);
  own = warp_sum(own);
  if (lane_id() == 0) {
    a.starts[slot] = lower;
    if (slot + 1 == a.slots) a.starts[a.slots] = lower + own;
  }
  for (u32 chunk = 0; chunk < items; chunk += WARP) {
    u32 i = chunk + lane_id();
    bool mine = i < items && a.item_slot[i] == slot;
    u32 ballot = __ballot_sync(FULL, mine);
    if (mine) a.order[lower + below(ballot)] = i;
    lower += __popc(ballot);
  }
}

// Combine -----------------------------------------------------------------------------------------------------------

struct CombineArgs {
  const u8* results;
  const Part* parts;      // [ranks]
  const u32* experts;     // [T, K]
  const float* weights;   // [T, K]
  const Place* places;    // [E]
  float* residual;        // [T, H]
  Status* status;
  u32 rows, hidden, top_k, ranks;
};

// residual += sum over k ascending of weight_k * result_k, the sum from zero, fused. A block a stretch of rows. Every
// block sees whether each rank sent as many results as there are, so that either all rows are added or none.
template <class W>
DEVICE void combine(const CombineArgs& a) {
  SHARED(smem);
  u32* before_of = (u32*)smem;              // [ranks]: results for rows before the stretch
  u32* all_of = before_of + a.ranks;        // [ranks]
  u32* places = all_of + a.ranks;           // [EXCHANGE_ROWS * K]: index among the results
  u32* wrong = places + EXCHANGE_ROWS * a.top_k;
  u32 first = blockIdx.x * EXCHANGE_ROWS, entries = a.rows * a.top_k;
  for (u32 i = threadIdx.x; i < 2 * a.ranks; i += EXCHANGE_THREADS) before_of[i] = 0;
  __syncthreads();
  for (u32 e = threadIdx.x; e < entries; e += EXCHANGE_THREADS) {
    u32 rank = a.places[a.experts[e]].rank;
    // Counts of integers: the order does not matter.
    atomicAdd(&all_of[rank], 1u);
    if (e < first * a.top_k) atomicAdd(&before_of[rank], 1u);
  }
  __syncthreads();
  u64 result_bytes = (u64)a.hidden * sizeof(W);
  u32 count = least(entries - first * a.top_k, EXCHANGE_ROWS * a.top_k);
  if (threadIdx.x == 0) {
    *wrong = 0;
    for (u32 rank = 0; rank < a.ranks && !*wrong; rank++) {
      u64 bytes = a.parts[rank].bytes, need = all_of[rank] * result_bytes;
      if (bytes == need) continue;
      *wrong = 1;
      if (blockIdx.x == 0) report(a.status, STATUS_RECEIVED, bytes < need ? FEWER_RESULTS : MORE_RESULTS, rank, 0);
    }
    for (u32 e = 0; e < count; e++) places[e] = before_of[a.places[a.experts[first * a.top_k + e]].rank]++;
  }
  __syncthreads();
  if (*wrong) return;
  for (u32 row = first; row < least(first + EXCHANGE_ROWS, a.rows); row++) {
    for (u32 c = threadIdx.x; c < a.hidden; c += EXCHANGE_THREADS) {
      float sum = 0.0f;
      for (u32 k = 0; k < a.top_k; k++) {
        u32 e = row * a.top_k + k;
        u64 start = a.parts[a.places[a.experts[e]].rank].start + places[e - first * a.top_k] * result_bytes;
        sum = fmaf(load((const W*)(a.results + start) + c), a.weights[e], sum);
      }
      a.residual[(u64)row * a.hidden + c] += sum;
    }
  }
}

KERNEL(combine_f32, EXCHANGE_THREADS, CombineArgs) { combine<float>(a); }
KERNEL(combine_bf16, EXCHANGE_THREADS, CombineArgs) { combine<u16>(a); }
