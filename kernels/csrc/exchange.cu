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
#define EXCHANGE_ROWS 32  // of a block of dispatch and combine, at most
#define RECEIVE_THREADS 1024
#define RECEIVE_ENTRIES 4  // of a thread at once

struct Place {
  u32 rank, slot;
};

// Four numbers at a border of four, and of the wire type at a border of 4 bytes.
DEVICE void store_four(float* to, const float (&values)[4]) {
  for (u32 i = 0; i < 4; i++) to[i] = values[i];
}
DEVICE void store_four(u16* to, const float (&values)[4]) {
  ((u32*)to)[0] = narrow2(values[0], values[1]);
  ((u32*)to)[1] = narrow2(values[2], values[3]);
}
DEVICE void load_four(const float* from, float (&values)[4]) {
  for (u32 i = 0; i < 4; i++) values[i] = from[i];
}
DEVICE void load_four(const u16* from, float (&values)[4]) {
  u32 low = ((const u32*)from)[0], high = ((const u32*)from)[1];
  values[0] = widen((u16)low);
  values[1] = widen((u16)(low >> 16));
  values[2] = widen((u16)high);
  values[3] = widen((u16)(high >> 16));
}

// Dispatch ----------------------------------------------------------------------------------------------------------

struct DispatchArgs {
  const float* x;        // [T, H]
  const u32* experts;    // [T, K]
  const Place* places;   // [E]
  u8* out;               // records
  Part* parts;           // [ranks]
  u32 rows, hidden, top_k, ranks;
  u32 gathered;  // 1: one part for all ranks
  u32 stretch;   // rows of a block
};

DEVICE bool visits(const DispatchArgs& a, u32 row, u32 rank) {
  if (a.gathered) return true;
  for (u32 k = 0; k < a.top_k; k++)
    if (a.places[a.experts[row * a.top_k + k]].rank == rank) return true;
  return false;
}

// Sums a number of each thread of the block.
template <u32 THREADS = EXCHANGE_THREADS>
DEVICE u32 block_sum(u32 value, u32* sums) {
  value = warp_sum(value);
  __syncthreads();
  if (lane_id() == 0) sums[warp_id()] = value;
  __syncthreads();
  u32 sum = 0;
  for (u32 w = 0; w < THREADS / WARP; w++) sum += sums[w];
  return sum;
}

// A block a stretch of rows and a rank.
template <class W>
DEVICE void dispatch(const DispatchArgs& a) {
  SHARED(smem);
  u32* sums = (u32*)smem;                         // [8]
  u32* records = sums + EXCHANGE_THREADS / WARP;  // [EXCHANGE_ROWS]
  u32 rank = blockIdx.y, first = blockIdx.x * a.stretch;
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
    bool here = threadIdx.x < a.stretch && row < a.rows && visits(a, row, rank);
    u32 ballot = __ballot_sync(FULL, here);
    records[threadIdx.x] = here ? lower + before_own + below(ballot) : NO_SLOT;
  }
  __syncthreads();
  for (u32 i = 0; i < a.stretch; i++) {
    if (records[i] == NO_SLOT) continue;
    u32 row = first + i;
    u8* record = a.out + records[i] * record_bytes;
    for (u32 k = threadIdx.x; k < a.top_k; k += EXCHANGE_THREADS) {
      Place place = a.places[a.experts[row * a.top_k + k]];
      u32 own_slot = place.rank == rank ? place.slot : NO_SLOT;
      ((u32*)record)[k] = a.gathered ? place.rank << 16 | place.slot : own_slot;
    }
    W* values = (W*)(record + a.top_k * 4);
    const float* x = a.x + (u64)row * a.hidden;
    u32 fours = a.hidden % 4 == 0 ? a.hidden : 0;
#pragma unroll 4
    for (u32 c = threadIdx.x * 4; c < fours; c += EXCHANGE_THREADS * 4) {
      uint4 four = *(const uint4*)(x + c);
      store_four(values + c, {float_of(four.x), float_of(four.y), float_of(four.z), float_of(four.w)});
    }
    for (u32 c = fours + threadIdx.x; c < a.hidden; c += EXCHANGE_THREADS) store(values + c, x[c]);
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
  u32* order;             // [items]: grouped by slot, in order of arrival within a slot
  u32* starts;            // [slots + 1]
  u32* counts;            // [2]: rows, items
  Part* results;          // [ranks]: the parts that go back
  Status* status;
  u64 record_bytes, result_bytes;
  u32 ranks, top_k, slots, rows_max, items_max;
  u32 me;  // of gathered records, those of this rank; NO_SLOT: they are all its own
  u32 stretches;  // of items, each counted by a warp; as many as there is room for
  u32 unused;
};

// The slot of an entry of a part, or NO_SLOT if it is for another rank.
DEVICE u32 slot_of(const ReceiveArgs& a, const u8* part, u32 entry) {
  u32 slot = *(const u32*)(part + entry / a.top_k * a.record_bytes + entry % a.top_k * 4);
  if (a.me == NO_SLOT) return slot;
  return slot >> 16 == a.me ? slot & 0xffff : NO_SLOT;
}

// The sum of the numbers of lower threads; all, that of all threads.
DEVICE u32 block_sum_below(u32 value, u32* sums, u32& all) {
  u32 sum = value;
  for (u32 step = 1; step < WARP; step *= 2) {
    u32 lower = __shfl_up_sync(FULL, sum, step);
    if (lane_id() >= step) sum += lower;
  }
  __syncthreads();
  if (lane_id() == WARP - 1) sums[warp_id()] = sum;
  __syncthreads();
  u32 before = 0;
  all = 0;
  for (u32 w = 0; w < RECEIVE_THREADS / WARP; w++) {
    if (w < warp_id()) before += sums[w];
    all += sums[w];
  }
  return before + sum - value;
}

// Lists the entries of a part that are items: each one's place is the number of those before it.
DEVICE void list_items(const ReceiveArgs& a, const u8* part, u32 entries, u32 rows, u32 items, u32* sums) {
  for (u32 chunk = 0; chunk < entries; chunk += RECEIVE_THREADS * RECEIVE_ENTRIES) {
    u32 first = chunk + threadIdx.x * RECEIVE_ENTRIES, held = 0, all, slots[RECEIVE_ENTRIES];
#pragma unroll
    for (u32 i = 0; i < RECEIVE_ENTRIES; i++) {
      slots[i] = first + i < entries ? slot_of(a, part, first + i) : NO_SLOT;
      held += slots[i] != NO_SLOT;
    }
    u32 at = items + block_sum_below(held, sums, all);
#pragma unroll
    for (u32 i = 0; i < RECEIVE_ENTRIES; i++) {
      if (slots[i] == NO_SLOT) continue;
      a.item_row[at] = rows + (first + i) / a.top_k;
      a.item_slot[at++] = slots[i];
    }
    items += all;
  }
}

// Groups items by slot: a warp counts a stretch of items, and places them when it is known how many come before.
DEVICE void group_items(const ReceiveArgs& a, u32 items, u32* sums, u32* counts) {
  u32 length = (items + a.stretches * WARP - 1) / (a.stretches * WARP) * WARP;
  u32 first = warp_id() * length, end = least(first + length, items);
  u32* own = counts + warp_id() * a.slots;
  for (u32 i = threadIdx.x; i < a.stretches * a.slots; i += RECEIVE_THREADS) counts[i] = 0;
  __syncthreads();
  if (warp_id() < a.stretches)
    // Counts of integers: the order does not matter.
    for (u32 i = first + lane_id(); i < end; i += WARP) atomicAdd(&own[a.item_slot[i]], 1u);
  __syncthreads();
  u32 before = 0;
  for (u32 chunk = 0; chunk < a.slots; chunk += RECEIVE_THREADS) {
    u32 slot = chunk + threadIdx.x, sum = 0, all;
    if (slot < a.slots)
      for (u32 s = 0; s < a.stretches; s++) sum += counts[s * a.slots + slot];
    u32 at = before + block_sum_below(sum, sums, all);
    if (slot < a.slots) {
      a.starts[slot] = at;
      for (u32 s = 0; s < a.stretches; s++) {
        u32 count = counts[s * a.slots + slot];
        counts[s * a.slots + slot] = at;
        at += count;
      }
    }
    before += all;
  }
  if (threadIdx.x == 0) a.starts[a.slots] = items;
  __syncthreads();
  if (warp_id() >= a.stretches) return;
  for (u32 chunk = first; chunk < end; chunk += WARP) {
    u32 i = chunk + lane_id(), slot = i < end ? a.item_slot[i] : NO_SLOT;
    u32 alike = __match_any_sync(FULL, slot), at = i < end ? own[slot] : 0;
    __syncwarp();
    if (i < end) {
      a.order[at + below(alike)] = i;
      if (below(alike) == 0) own[slot] = at + __popc(alike);
    }
    __syncwarp();
  }
}

// Checks every rank's records, lists rows and items, and groups these by slot; one block. Rows of a rank whose bytes do
// not fit are left out.
KERNEL(receive, RECEIVE_THREADS, ReceiveArgs) {
  SHARED(smem);
  u32* sums = (u32*)smem;                           // [32]
  u32* counts = sums + RECEIVE_THREADS / WARP;      // [stretches, slots]
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
      for (u32 e = threadIdx.x; e < entries; e += RECEIVE_THREADS) {
        u32 slot = slot_of(a, part, e);
        if (slot == NO_SLOT) continue;
        held += 1;
        bad |= slot >= a.slots || a.filled[slot] == 0;
      }
    }
    bad = block_sum<RECEIVE_THREADS>(bad, sums);
    held = block_sum<RECEIVE_THREADS>(held, sums);
    bool fits = rows + records <= a.rows_max && items + held <= a.items_max;
    if (whole && bad == 0 && fits) {
      list_items(a, part, entries, rows, items, sums);
      for (u32 r = threadIdx.x; r < records; r += RECEIVE_THREADS)
        a.row_source[rows + r] = a.parts[rank].start + r * a.record_bytes + a.top_k * 4;
      rows += records;
      items += held;
    } else if (threadIdx.x == 0) {
      report(a.status, STATUS_RECEIVED, whole ? (bad ? SLOT_EMPTY : TOO_MANY_ROWS) : PART_NOT_WHOLE, rank, 0);
    }
    if (threadIdx.x == 0) a.results[rank] = {items_before * a.result_bytes, (items - items_before) * a.result_bytes};
  }
  if (threadIdx.x == 0) {
    a.counts[0] = rows;
    a.counts[1] = items;
  }
  __syncthreads();
  group_items(a, items, sums, counts);
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
  u32 stretch, unused;    // rows of a block
};

// residual += sum over k ascending of weight_k * result_k, the sum from zero, fused. A block a stretch of rows. Every
// block sees whether each rank sent as many results as there are, so that either all rows are added or none.
template <class W>
DEVICE void combine(const CombineArgs& a) {
  SHARED(smem);
  u64* starts = (u64*)smem;                          // [stretch * K]: where an entry's result begins
  u32* before_of = (u32*)(starts + a.stretch * a.top_k);  // [ranks]: results for rows before the stretch
  u32* all_of = before_of + a.ranks;                 // [ranks]
  u32* wrong = all_of + a.ranks;
  u32 first = blockIdx.x * a.stretch, entries = a.rows * a.top_k;
  for (u32 i = threadIdx.x; i < 2 * a.ranks + 1; i += EXCHANGE_THREADS) before_of[i] = 0;
  __syncthreads();
  u64 result_bytes = (u64)a.hidden * sizeof(W);
  if (a.ranks == 1) {
    if (threadIdx.x == 0) {
      all_of[0] = entries;
      before_of[0] = least(first * a.top_k, entries);
    }
  } else {
    for (u32 e = threadIdx.x; e < entries; e += EXCHANGE_THREADS) {
      u32 rank = a.places[a.experts[e]].rank;
      // Counts of integers: the order does not matter.
      atomicAdd(&all_of[rank], 1u);
      if (e < first * a.top_k) atomicAdd(&before_of[rank], 1u);
    }
  }
  __syncthreads();
  for (u32 rank = threadIdx.x; rank < a.ranks; rank += EXCHANGE_THREADS) {
    u64 bytes = a.parts[rank].bytes, need = all_of[rank] * result_bytes;
    if (bytes == need) continue;
    // The lowest such rank is reported.
    atomicAdd(wrong, 1u);
  }
  u32 count = first < a.rows ? least(entries - first * a.top_k, a.stretch * a.top_k) : 0;
  if (warp_id() == 0) {
    // Results of a rank follow each other in the order of entries.
    for (u32 chunk = 0; chunk < count; chunk += WARP) {
      u32 e = chunk + lane_id();
      u32 rank = e < count ? a.places[a.experts[first * a.top_k + e]].rank : NO_SLOT;
      u32 alike = __match_any_sync(FULL, rank), before = e < count ? before_of[rank] : 0;
      __syncwarp();
      if (e < count) {
        starts[e] = a.parts[rank].start + (before + below(alike)) * result_bytes;
        if (below(alike) == 0) before_of[rank] = before + __popc(alike);
      }
      __syncwarp();
    }
  }
  __syncthreads();
  if (*wrong) {
    for (u32 rank = 0; blockIdx.x == 0 && threadIdx.x == 0 && rank < a.ranks; rank++) {
      u64 bytes = a.parts[rank].bytes, need = all_of[rank] * result_bytes;
      if (bytes == need) continue;
      report(a.status, STATUS_RECEIVED, bytes < need ? FEWER_RESULTS : MORE_RESULTS, rank, 0);
      break;
    }
    return;
  }
  u32 fours = a.hidden % 4 == 0 ? a.hidden : 0;
  for (u32 row = first; row < least(first + a.stretch, a.rows); row++) {
    const float* weights = a.weights + row * a.top_k;
    const u64* results = starts + (row - first) * a.top_k;
    float* residual = a.residual + (u64)row * a.hidden;
    for (u32 c = threadIdx.x * 4; c < fours; c += EXCHANGE_THREADS * 4) {
      float sums[4] = {};
#pragma unroll 4
      for (u32 k = 0; k < a.top_k; k++) {
        float values[4];
        load_four((const W*)(a.results + results[k]) + c, values);
        for (u32 i = 0; i < 4; i++) sums[i] = fmaf(values[i], weights[k], sums[i]);
      }
      uint4 before = *(const uint4*)(residual + c);
      store_four(residual + c, {float_of(before.x) + sums[0], float_of(before.y) + sums[1],
                                float_of(before.z) + sums[2], float_of(before.w) + sums[3]});
    }
    for (u32 c = fours + threadIdx.x; c < a.hidden; c += EXCHANGE_THREADS) {
      float sum = 0.0f;
      for (u32 k = 0; k < a.top_k; k++)
        sum = fmaf(load((const W*)(a.results + results[k]) + c), weights[k], sum);
      residual[c] += sum;
    }
  }
}

KERNEL(combine_f32, EXCHANGE_THREADS, CombineArgs) { combine<float>(a); }
KERNEL(combine_bf16, EXCHANGE_THREADS, CombineArgs) { combine<u16>(a); }
