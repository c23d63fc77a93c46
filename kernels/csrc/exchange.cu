// Rows to the ranks of their experts and results back home: dispatch and combine; receive.cu has what is between.
//
// The parts of all ranks lie in one buffer in rank order, each on a border of 4 bytes; where they begin and how long they
// are stays on the device. A dispatch record is K slots and the row in the wire type (f32 or bf16).
//
// Records may also be gathered: one part for all ranks, in which every row is once, and an entry says the rank above the
// slot (16 bits each). Each rank picks its own when it receives.
//
// An entry is a choice of a row: T * K of them, row by row. With one part, where an entry's record or result lies follows
// from its number; with several, place_entries finds it first. Then rows move in blocks of their own, four columns a
// thread: at once where all borders allow it, as they do at gpt-oss's widths.
//
// Nothing is counted by chance: a block that needs the number of records before its own counts them itself, from the
// routes, so that no block waits for another.
#include "common.cuh"

#define EXCHANGE_THREADS 256
#define PLACE_THREADS 512
#define COLUMNS 4  // of a thread
#define NOWHERE 0xffffffffffffffffull

struct Place {
  u32 rank, slot;
};

// Columns -----------------------------------------------------------------------------------------------------------

DEVICE void load_columns(const float* from, float (&values)[COLUMNS]) {
  uint4 words = *(const uint4*)from;
  values[0] = float_of(words.x), values[1] = float_of(words.y);
  values[2] = float_of(words.z), values[3] = float_of(words.w);
}

DEVICE void load_columns(const u16* from, float (&values)[COLUMNS]) {
  uint2 words = *(const uint2*)from;
  values[0] = float_of(words.x << 16), values[1] = float_of(words.x & 0xffff0000u);
  values[2] = float_of(words.y << 16), values[3] = float_of(words.y & 0xffff0000u);
}

DEVICE void store_columns(float* to, const float (&values)[COLUMNS]) {
  *(uint4*)to = {bits_of(values[0]), bits_of(values[1]), bits_of(values[2]), bits_of(values[3])};
}

DEVICE void store_columns(u16* to, const float (&values)[COLUMNS]) {
  *(uint2*)to = {narrow2(values[0], values[1]), narrow2(values[2], values[3])};
}

// The first column of a thread; a block has a stretch of a row.
DEVICE u32 first_column() { return (blockIdx.y * EXCHANGE_THREADS + threadIdx.x) * COLUMNS; }

template <class W>
DEVICE bool on_border(u64 address) {
  return address % (COLUMNS * sizeof(W)) == 0;
}

// Entries -----------------------------------------------------------------------------------------------------------

struct EntriesArgs {
  const u32* experts;   // [T, K]
  const Place* places;  // [E]
  Part* parts;          // [ranks]: of a dispatch, written here
  u64* at;              // [T, K]: where an entry's record or result begins
  u32* counts;          // [ranks]: how many results there should be; null: it is a dispatch, a row goes to a rank once
  u64 bytes;            // of a record or a result
  u32 entries, top_k;
};

DEVICE u32 rank_of(const EntriesArgs& a, u32 entry) { return a.places[a.experts[entry]].rank; }

// Whether an earlier choice of the row takes it to this rank.
DEVICE bool repeated(const EntriesArgs& a, u32 entry, u32 rank) {
  bool found = false;
  for (u32 e = entry - entry % a.top_k; e < entry; e++) found |= rank_of(a, e) == rank;
  return found;
}

// A block a rank: where its entries lie. Each warp counts a stretch of all entries, and then numbers it.
KERNEL(place_entries, PLACE_THREADS, EntriesArgs) {
  SHARED(smem);
  const u32 WARPS = PLACE_THREADS / WARP;
  u32* sums = (u32*)smem;  // [2 * WARPS]
  u32 rank = blockIdx.x, length = (a.entries + PLACE_THREADS - 1) / PLACE_THREADS * WARP;
  u32 first = warp_id() * length, end = least(first + length, a.entries);
  bool once = a.counts == nullptr;
  // Records for lower ranks, and for this one.
  u32 lower = 0, own = 0;
  for (u32 e = first + lane_id(); e < end; e += WARP) {
    u32 of = rank_of(a, e);
    if (once && repeated(a, e, of)) continue;
    lower += of < rank;
    own += of == rank;
  }
  lower = warp_sum(lower);
  own = warp_sum(own);
  if (lane_id() == 0) {
    sums[warp_id()] = own;
    sums[WARPS + warp_id()] = lower;
  }
  __syncthreads();
  u32 before = 0;
  own = lower = 0;
  for (u32 w = 0; w < WARPS; w++) {
    if (w < warp_id()) before += sums[w];
    own += sums[w];
    lower += sums[WARPS + w];
  }
  u64 start = once ? lower * a.bytes : a.parts[rank].start;
  if (threadIdx.x == 0) {
    if (once)
      a.parts[rank] = {start, own * a.bytes};
    else
      a.counts[rank] = own;
  }
  for (u32 chunk = first; chunk < end; chunk += WARP) {
    u32 e = chunk + lane_id();
    bool mine = e < end && rank_of(a, e) == rank, further = mine && once && repeated(a, e, rank);
    u32 ballot = __ballot_sync(FULL, mine && !further);
    if (mine) a.at[e] = further ? NOWHERE : start + (before + below(ballot)) * a.bytes;
    before += __popc(ballot);
  }
}

// Dispatch ----------------------------------------------------------------------------------------------------------

struct DispatchArgs {
  const float* x;        // [T, H]
  const u32* experts;    // [T, K]
  const Place* places;   // [E]
  u8* out;               // records
  Part* parts;           // [1], written if there is one part
  const u64* at;         // [T, K]: where an entry's record begins; null: there is one part, and a record a row
  u32 rows, hidden, top_k;
  u32 gathered;          // 1: the part is for all ranks
};

// A block a record and a stretch of columns.
template <class W>
DEVICE void dispatch(const DispatchArgs& a) {
  u64 record_bytes = a.top_k * 4 + (u64)a.hidden * sizeof(W), start = blockIdx.x * record_bytes;
  u32 row = blockIdx.x, rank = 0;
  if (a.at != nullptr) {
    row = blockIdx.x / a.top_k;
    rank = a.places[a.experts[blockIdx.x]].rank;
    start = a.at[blockIdx.x];
    if (start == NOWHERE) return;
  } else if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    a.parts[0] = {0, a.rows * record_bytes};
  }
  // A step without rows has a block too, which says so.
  if (row >= a.rows) return;
  u8* record = a.out + start;
  const float* from = a.x + (u64)row * a.hidden;
  W* to = (W*)(record + a.top_k * 4);
  u32 first = first_column();
  bool at_once = a.hidden % COLUMNS == 0 && on_border<float>((u64)from) && on_border<W>((u64)to) && first < a.hidden;
  float values[COLUMNS] = {};
  // Under way while slots are looked up.
  if (at_once) load_columns(from + first, values);
  if (blockIdx.y == 0) {
    for (u32 k = threadIdx.x; k < a.top_k; k += EXCHANGE_THREADS) {
      Place place = a.places[a.experts[row * a.top_k + k]];
      u32 own_slot = place.rank == rank ? place.slot : NO_SLOT;
      ((u32*)record)[k] = a.gathered ? place.rank << 16 | place.slot : own_slot;
    }
  }
  if (at_once)
    store_columns(to + first, values);
  else
    for (u32 c = first; c < least(first + COLUMNS, a.hidden); c++) store(to + c, from[c]);
}

KERNEL(dispatch_f32, EXCHANGE_THREADS, DispatchArgs) { dispatch<float>(a); }
KERNEL(dispatch_bf16, EXCHANGE_THREADS, DispatchArgs) { dispatch<u16>(a); }

// Combine -----------------------------------------------------------------------------------------------------------

struct CombineArgs {
  const u8* results;
  const Part* parts;      // [ranks]
  const u64* at;          // [T, K]: where an entry's result begins; null: there is one part, which has all in their order
  const u32* counts;      // [ranks]: how many results there should be, unless there is one part
  const float* weights;   // [T, K]
  float* residual;        // [T, H]
  Status* status;
  u32 rows, hidden, top_k, ranks;
};

// How many bytes a rank should have sent.
DEVICE u64 bytes_of(const CombineArgs& a, u32 rank, u64 result_bytes) {
  return (a.counts == nullptr ? a.rows * a.top_k : a.counts[rank]) * result_bytes;
}

// residual += sum over k ascending of weight_k * result_k, the sum from zero, fused. A block a row and a stretch of
// columns. Every warp sees whether each rank sent as many results as there are, so that either all rows are added or none.
template <class W>
DEVICE void combine(const CombineArgs& a) {
  u64 result_bytes = (u64)a.hidden * sizeof(W), borders = 0;
  bool wrong = false;
  for (u32 rank = lane_id(); rank < a.ranks; rank += WARP) {
    Part part = a.parts[rank];
    borders |= part.start;
    wrong |= part.bytes != bytes_of(a, rank, result_bytes);
  }
  if (__ballot_sync(FULL, wrong) != 0) {
    if (blockIdx.x > 0 || blockIdx.y > 0 || threadIdx.x > 0) return;
    for (u32 rank = 0; rank < a.ranks; rank++) {
      u64 bytes = a.parts[rank].bytes, need = bytes_of(a, rank, result_bytes);
      if (bytes != need) report(a.status, STATUS_RECEIVED, bytes < need ? FEWER_RESULTS : MORE_RESULTS, rank, 0);
    }
    return;
  }
  bool at_once = __ballot_sync(FULL, !on_border<W>((u64)a.results | borders)) == 0 && a.hidden % COLUMNS == 0;
  u32 row = blockIdx.x, first = first_column();
  if (row >= a.rows || first >= a.hidden) return;
  float* residual = a.residual + (u64)row * a.hidden;
  const float* weights = a.weights + row * a.top_k;
  u64 start = a.at == nullptr ? a.parts[0].start : 0;
  auto result = [&](u32 k) {
    u32 entry = row * a.top_k + k;
    return (const W*)(a.results + (a.at == nullptr ? start + entry * result_bytes : a.at[entry]));
  };
  if (at_once && on_border<float>((u64)residual)) {
    float sums[COLUMNS] = {0.0f, 0.0f, 0.0f, 0.0f}, before[COLUMNS], values[COLUMNS];
    load_columns(residual + first, before);
#pragma unroll 4
    for (u32 k = 0; k < a.top_k; k++) {
      load_columns(result(k) + first, values);
#pragma unroll
      for (u32 i = 0; i < COLUMNS; i++) sums[i] = fmaf(values[i], weights[k], sums[i]);
    }
#pragma unroll
    for (u32 i = 0; i < COLUMNS; i++) before[i] += sums[i];
    store_columns(residual + first, before);
    return;
  }
  for (u32 c = first; c < least(first + COLUMNS, a.hidden); c++) {
    float sum = 0.0f;
    for (u32 k = 0; k < a.top_k; k++) sum = fmaf(load(result(k) + c), weights[k], sum);
    residual[c] += sum;
  }
}

PASSING_KERNEL(combine_f32, EXCHANGE_THREADS, CombineArgs) { combine<float>(a); }
PASSING_KERNEL(combine_bf16, EXCHANGE_THREADS, CombineArgs) { combine<u16>(a); }
