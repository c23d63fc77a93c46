// What ranks sent to the experts of this one: checked, grouped by slot, and brought to where the experts read it.
//
// Parts and records are as exchange.cu says. A record has K entries; those that name a slot here are items. All entries
// follow each other part by part, record by record, choice by choice: so items arrive. Experts have them grouped by slot,
// in order of arrival within a slot.
//
// A block lists items in two walks over the entries, of which each warp has a stretch: it counts how many it has of each
// slot, and places them behind those of lower slots and of lower warps. So no place depends on which warp is first.
// - receive: one block lists for all; receive_rows or receive_tiles then moves the rows.
// - receive_few: each block lists all items for itself, and moves every gridDim-th of them.
// - receive_warp: so few entries that each warp lists them all for itself, an entry a lane; a block moves one.
#include "common.cuh"

#define RECEIVE_THREADS 1024
#define FEW_THREADS 512
#define WARP_THREADS 128  // of receive_warp
#define MOVE_THREADS 256
#define NOT_MOVED 0xffffffffffffffffull
#define AHEAD 8  // entries that a lane loads before it looks at the first

struct ReceiveArgs {
  const u8* received;
  const Part* parts;      // [ranks]
  const u32* filled;      // [slots]: 1 where an expert is loaded
  u64* row_source;        // [rows]: where a row's numbers begin among what was received
  u32* item_row;          // [items], in order of arrival
  u32* order;             // [items]: grouped by slot, an item's place in the order of arrival
  u32* starts;            // [slots + 1]: first item of each slot
  u32* counts;            // [2]: rows, items
  Part* results;          // [ranks]: the parts that go back
  u16* tiles;             // as experts_wgmma.cu has them; of kernels that move
  Status* status;
  u64 record_bytes, result_bytes;
  u32 ranks, top_k, slots, rows_max, items_max;
  u32 me;         // of gathered records, those of this rank; NO_SLOT: they are all its own
  u32 stretches;  // of entries, at most
  u32 moves;      // items that a block of receive_few moves, at most; a block of receive_warp moves one
  u32 hidden, unused;
};

// What a block knows of a rank's part.
struct Sender {
  u64 start;
  u32 records;  // none if the part is left out
  u32 row;      // its first record's among all rows
  u32 held;     // entries that name a slot here
  u32 bad;      // and such whose slot is empty or does not exist
  u32 whole, unused;
};

struct Entry {
  u32 slot;  // NO_SLOT: another rank's, or nobody's
  u32 rank, record;
  u32 choice;  // NO_SLOT: there are no more entries
};

// A row to a place of its item.
struct Move {
  u64 from, to;
};

static_assert(sizeof(Sender) == 32 && sizeof(Move) == 16, "as src/cuda/choose.rs counts them");

// Shared memory of a block.
struct Lists {
  Sender* senders;  // [ranks]
  Move* moves;      // [moves]
  u32* held;        // [warps]: items of a stretch
  u32* sums;        // [warps]
  u32* totals;      // [4]: rows, items, whether to count again
  u32* firsts;      // [slots]: first item of each slot
  u32* counts;      // [stretches, slots]: items of a slot in a stretch, and then where its next one goes
};

// A stretch of a warp.
struct Stretch {
  u32 first, end, used;  // and how many have entries
};

// Entries -----------------------------------------------------------------------------------------------------------

// Walks over a lane's entries, ascending.
struct Walk {
  u32 rank, first;  // the part, and the entry where it begins

  // Loads every WARP-th entry from `from` on, up to `end`, which is not beyond the last part.
  DEVICE void load(const ReceiveArgs& a, const Sender* senders, u32 from, u32 end, Entry (&entries)[AHEAD]) {
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) {
      u32 e = from + i * WARP;
      entries[i] = {NO_SLOT, 0, 0, NO_SLOT};
      if (e >= end) continue;
      while (e - first >= senders[rank].records * a.top_k) first += senders[rank++].records * a.top_k;
      u32 record = (e - first) / a.top_k, choice = e - first - record * a.top_k;
      u32 slot = *(const u32*)(a.received + senders[rank].start + record * a.record_bytes + choice * 4);
      if (a.me != NO_SLOT) slot = slot >> 16 == a.me ? slot & 0xffff : NO_SLOT;
      entries[i] = {slot, rank, record, choice};
    }
  }
};

DEVICE Stretch stretch_of(const ReceiveArgs& a, const Sender* senders) {
  u32 entries = 0;
  for (u32 rank = 0; rank < a.ranks; rank++) entries += senders[rank].records * a.top_k;
  u32 all = a.stretches * WARP, length = (entries + all - 1) / all * WARP, first = warp_id() * length;
  return {first, least(first + length, entries), length == 0 ? 0 : (entries + length - 1) / length};
}

// Counts a warp's items, by slot and by rank.
DEVICE void count_items(const ReceiveArgs& a, const Lists& lists, const Stretch& stretch) {
  u32 held = 0, *own = lists.counts + warp_id() * a.slots;
  Walk walk = {0, 0};
  for (u32 chunk = stretch.first; chunk < stretch.end; chunk += AHEAD * WARP) {
    Entry entries[AHEAD];
    bool good[AHEAD];
    walk.load(a, lists.senders, chunk + lane_id(), stretch.end, entries);
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) good[i] = entries[i].slot < a.slots && a.filled[entries[i].slot] != 0;
    // Counts of integers: the order does not matter.
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) {
      if (entries[i].slot == NO_SLOT) continue;
      Sender& sender = lists.senders[entries[i].rank];
      atomicAdd(&sender.held, 1u);
      held += 1;
      if (good[i])
        atomicAdd(&own[entries[i].slot], 1u);
      else
        atomicAdd(&sender.bad, 1u);
    }
  }
  held = warp_sum(held);
  if (lane_id() == 0) lists.held[warp_id()] = held;
}

// Leaves out what is not whole, names a slot that it must not, or does not fit; one thread. The first block says so, and
// what goes back. True if entries must be counted again, without those of parts that are left out now.
DEVICE bool leave_out(const ReceiveArgs& a, const Lists& lists) {
  u32 rows = 0, items = 0;
  bool again = false;
  for (u32 rank = 0; rank < a.ranks; rank++) {
    Sender& sender = lists.senders[rank];
    bool fits = rows + sender.records <= a.rows_max && items + sender.held <= a.items_max;
    if (!sender.whole || sender.bad != 0 || !fits) {
      u32 wrong = sender.whole ? sender.bad != 0 ? SLOT_EMPTY : TOO_MANY_ROWS : PART_NOT_WHOLE;
      if (blockIdx.x == 0) report(a.status, STATUS_RECEIVED, wrong, rank, 0);
      again |= sender.records != 0;
      sender.records = sender.held = 0;
    }
    if (blockIdx.x == 0) a.results[rank] = {items * a.result_bytes, sender.held * a.result_bytes};
    sender.row = rows;
    rows += sender.records;
    items += sender.held;
  }
  lists.totals[0] = rows;
  lists.totals[1] = items;
  for (u32 rank = 0; again && rank < a.ranks; rank++) lists.senders[rank].held = lists.senders[rank].bad = 0;
  return again;
}

// Slots --------------------------------------------------------------------------------------------------------------

// The sum of the numbers of lower threads; all: that of all threads.
template <u32 WARPS>
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
  for (u32 w = 0; w < WARPS; w++) {
    if (w < warp_id()) before += sums[w];
    all += sums[w];
  }
  return before + sum - value;
}

// Counts of slots become places of their items.
template <u32 WARPS>
DEVICE void begin_slots(const ReceiveArgs& a, const Lists& lists, u32 stretches) {
  u32 before = 0;
  for (u32 chunk = 0; chunk < a.slots; chunk += WARPS * WARP) {
    u32 slot = chunk + threadIdx.x, sum = 0, all;
    if (slot < a.slots)
      for (u32 s = 0; s < stretches; s++) sum += lists.counts[s * a.slots + slot];
    u32 at = before + block_sum_below<WARPS>(sum, lists.sums, all);
    before += all;
    if (slot >= a.slots) continue;
    lists.firsts[slot] = at;
    if (blockIdx.x == 0) a.starts[slot] = at;
    for (u32 s = 0; s < stretches; s++) {
      u32 count = lists.counts[s * a.slots + slot];
      lists.counts[s * a.slots + slot] = at;
      at += count;
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) a.starts[a.slots] = before;
}

// Places a warp's items.
template <bool MOVES>
DEVICE void place_items(const ReceiveArgs& a, const Lists& lists, const Stretch& stretch) {
  u32 item = 0, *own = lists.counts + warp_id() * a.slots;
  for (u32 w = 0; w < warp_id(); w++) item += lists.held[w];
  Walk walk = {0, 0};
  for (u32 chunk = stretch.first; chunk < stretch.end; chunk += AHEAD * WARP) {
    Entry entries[AHEAD];
    walk.load(a, lists.senders, chunk + lane_id(), stretch.end, entries);
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) {
      if (chunk + i * WARP >= stretch.end) break;
      Entry entry = entries[i];
      bool is_item = entry.slot != NO_SLOT;
      u32 ballot = __ballot_sync(FULL, is_item), alike = __match_any_sync(FULL, entry.slot);
      u32 at = is_item ? own[entry.slot] : 0;
      __syncwarp();
      if (is_item && below(alike) == 0) own[entry.slot] = at + __popc(alike);
      __syncwarp();
      const Sender& sender = lists.senders[entry.rank];
      u64 from = sender.start + entry.record * a.record_bytes + a.top_k * 4;
      u32 arrived = item + below(ballot), row = sender.row + entry.record;
      at += below(alike);
      item += __popc(ballot);
      if (blockIdx.x == 0 && is_item) {
        a.item_row[arrived] = row;
        a.order[at] = arrived;
      }
      if (blockIdx.x == 0 && entry.choice == 0) a.row_source[row] = from;
      if (MOVES && is_item && at % gridDim.x == blockIdx.x) {
        u32 first = lists.firsts[entry.slot], within = at - first;
        u64 tile = first / 8 + entry.slot + within / 8;
        lists.moves[at / gridDim.x] = {from, tile * a.hidden * 8 + within % 8 * 8};
      }
    }
  }
}

// Rows --------------------------------------------------------------------------------------------------------------

// 16 bytes on a border of 4.
DEVICE uint4 load_piece(const u8* from) {
  if (((u64)from & 15) == 0) return *(const uint4*)from;
  const u32* words = (const u32*)from;
  return {words[0], words[1], words[2], words[3]};
}

template <u32 THREADS, bool MOVES>
DEVICE void receive(const ReceiveArgs& a) {
  const u32 WARPS = THREADS / WARP;
  SHARED(smem);
  Lists lists;
  lists.senders = (Sender*)smem;
  lists.moves = (Move*)(lists.senders + a.ranks);
  lists.held = (u32*)(lists.moves + a.moves);
  lists.sums = lists.held + WARPS;
  lists.totals = lists.sums + WARPS;
  lists.firsts = lists.totals + 4;
  lists.counts = lists.firsts + a.slots;
  for (u32 rank = threadIdx.x; rank < a.ranks; rank += THREADS) {
    Part part = a.parts[rank];
    u64 records = part.bytes / a.record_bytes;
    bool whole = records * a.record_bytes == part.bytes;
    lists.senders[rank] = {part.start, whole ? (u32)records : 0, 0, 0, 0, whole, 0};
  }
  Stretch stretch;
  for (bool again = true; again;) {
    for (u32 i = threadIdx.x; i < a.stretches * a.slots; i += THREADS) lists.counts[i] = 0;
    __syncthreads();
    stretch = stretch_of(a, lists.senders);
    count_items(a, lists, stretch);
    __syncthreads();
    if (threadIdx.x == 0) lists.totals[2] = leave_out(a, lists);
    __syncthreads();
    again = lists.totals[2] != 0;
  }
  u32 items = lists.totals[1];
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    a.counts[0] = lists.totals[0];
    a.counts[1] = items;
  }
  begin_slots<WARPS>(a, lists, stretch.used);
  __syncthreads();
  place_items<MOVES>(a, lists, stretch);
  if (!MOVES) return;
  __syncthreads();
  u32 pieces = a.hidden / 8, own = items > blockIdx.x ? (items - blockIdx.x - 1) / gridDim.x + 1 : 0;
  for (u32 i = threadIdx.x; i < own * pieces; i += THREADS) {
    u32 piece = i % pieces;
    Move move = lists.moves[i / pieces];
    *(uint4*)(a.tiles + move.to + piece * 64) = load_piece(a.received + move.from + piece * 16);
  }
}

// Checks every rank's records and lists rows and items. Rows of a rank whose bytes do not fit are left out.
KERNEL(receive, RECEIVE_THREADS, ReceiveArgs) { receive<RECEIVE_THREADS, false>(a); }
// The same for few entries, and items to their tiles.
KERNEL(receive_few, FEW_THREADS, ReceiveArgs) { receive<FEW_THREADS, true>(a); }

// At most as many entries and ranks as a warp has lanes ---------------------------------------------------------------

// How many of the entries' slots are lower than this lane's.
DEVICE u32 lower_slots(u32 slot, u32 entries, u32 than) {
  u32 lower = 0;
  for (u32 e = 0; e < entries; e++) lower += __shfl_sync(FULL, slot, e) < than;
  return lower;
}

// The same as receive_few, by lanes that have a part and an entry each: no warp waits for another. A block an entry and a
// stretch of columns; numbers are under way before it is known where they go.
KERNEL(receive_warp, WARP_THREADS, ReceiveArgs) {
  u32 lane = lane_id();
  Part part = {0, 0};
  if (lane < a.ranks) part = a.parts[lane];
  u64 of_part = part.bytes / a.record_bytes;
  bool whole = of_part * a.record_bytes == part.bytes;
  // One more than lanes is too many, as any number beyond.
  u32 records = whole ? of_part > WARP ? WARP + 1 : (u32)of_part : 0;

  // The rank of the lane's entry, and the record in its part.
  u32 rank = 0, record = lane / a.top_k, choice = lane - record * a.top_k, all = 0;
#pragma unroll 1
  for (u32 r = 0; r < a.ranks; r++) {
    u32 of_rank = __shfl_sync(FULL, records, r);
    bool beyond = rank == r && record >= of_rank;
    if (beyond) record -= of_rank;
    rank += beyond;
    all += of_rank;
  }
  u32 entries = least(all * a.top_k, WARP), slot = NO_SLOT;
  u64 from = __shfl_sync(FULL, part.start, rank % WARP) + record * a.record_bytes;
  if (lane < entries) slot = *(const u32*)(a.received + from + choice * 4);
  from += a.top_k * 4;

  u32 moved = blockIdx.x, piece = blockIdx.y * WARP_THREADS + threadIdx.x;
  bool moves = moved < entries && piece < a.hidden / 8;
  u64 row_from = __shfl_sync(FULL, from, moved % WARP);
  uint4 numbers = {};
  if (moves) numbers = load_piece(a.received + row_from + piece * 16);

  if (a.me != NO_SLOT && lane < entries) slot = slot >> 16 == a.me ? slot & 0xffff : NO_SLOT;
  bool bad = slot != NO_SLOT && (slot >= a.slots || a.filled[slot] == 0);
  bool lists = blockIdx.x == 0 && blockIdx.y == 0, says = lists && warp_id() == 0;

  // What is not whole, names a slot that it must not, or does not fit is left out, as leave_out does it.
  u32 rows = 0, items = 0, row = NO_SLOT, end = 0;
#pragma unroll 1
  for (u32 r = 0; r < a.ranks; r++) {
    u32 of_rank = __shfl_sync(FULL, records, r), held = __popc(__ballot_sync(FULL, rank == r && slot != NO_SLOT));
    bool empty = __ballot_sync(FULL, rank == r && bad) != 0, is_whole = __shfl_sync(FULL, (u32)whole, r) != 0;
    end += of_rank * a.top_k;
    // Entries have a block each.
    bool fits = end <= gridDim.x && rows + of_rank <= a.rows_max && items + held <= a.items_max;
    bool kept = is_whole && !empty && fits;
    if (says && lane == 0) {
      u32 wrong = is_whole ? empty ? SLOT_EMPTY : TOO_MANY_ROWS : PART_NOT_WHOLE;
      if (!kept) report(a.status, STATUS_RECEIVED, wrong, r, 0);
      a.results[r] = {items * a.result_bytes, kept ? held * a.result_bytes : 0};
    }
    if (rank == r && kept) row = rows + record;
    if (kept) rows += of_rank, items += held;
  }
  if (row == NO_SLOT) slot = NO_SLOT;

  bool is_item = slot != NO_SLOT;
  u32 arrived = below(__ballot_sync(FULL, is_item));
  u32 first = lower_slots(slot, entries, slot), within = below(__match_any_sync(FULL, slot));
  u64 to = ((u64)(first / 8 + slot + within / 8) * a.hidden + within % 8) * 8;
  to = __shfl_sync(FULL, is_item ? to : NOT_MOVED, moved % WARP);
  if (moves && to != NOT_MOVED) *(uint4*)(a.tiles + to + piece * 64) = numbers;

  if (!lists) return;
  for (u32 chunk = warp_id() * WARP; chunk <= a.slots; chunk += WARP_THREADS) {
    u32 lower = lower_slots(slot, entries, chunk + lane);
    if (chunk + lane <= a.slots) a.starts[chunk + lane] = lower;
  }
  if (!says) return;
  if (row != NO_SLOT && choice == 0) a.row_source[row] = from;
  if (is_item) {
    a.item_row[arrived] = row;
    a.order[first + within] = arrived;
  }
  if (lane == 0) {
    a.counts[0] = rows;
    a.counts[1] = items;
  }
}

// Rows alone ---------------------------------------------------------------------------------------------------------

struct RowsArgs {
  const u8* received;
  const u64* row_source;
  const u32* counts;
  u8* rows;  // [rows, H] of the wire type
  u32 row_bytes, unused;
};

// Rows to where they are aligned. A block a row, and every further one that is as far away as there are blocks.
KERNEL(receive_rows, MOVE_THREADS, RowsArgs) {
  for (u32 row = blockIdx.x; row < a.counts[0]; row += gridDim.x) {
    const u8* from = a.received + a.row_source[row];
    u8* to = a.rows + (u64)row * a.row_bytes;
    for (u32 i = threadIdx.x * 16; i < a.row_bytes; i += MOVE_THREADS * 16) *(uint4*)(to + i) = load_piece(from + i);
  }
}

struct TilesArgs {
  const u8* received;
  const u64* row_source;  // [rows]
  const u32* item_row;    // [items], in order of arrival
  const u32* order;       // [items]
  const u32* starts;      // [slots + 1]
  u16* tiles;             // as experts_wgmma.cu has them
  u32 hidden, slots;
};

// Rows to the places of their items. A block a tile, and every further one that is as far away as there are blocks; eight
// threads have the same columns of the tile's items.
KERNEL(receive_tiles, MOVE_THREADS, TilesArgs) {
  u32 pieces = a.hidden / 8, tiles = a.starts[a.slots] / 8 + a.slots;
  for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    u32 low = 0, high = a.slots;
    // The slot that has the tile.
    while (high - low > 1) {
      u32 middle = (low + high) / 2;
      if (a.starts[middle] / 8 + middle <= tile)
        low = middle;
      else
        high = middle;
    }
    u32 start = a.starts[low], item = start + (tile - start / 8 - low) * 8 + threadIdx.x % 8;
    if (item >= a.starts[low + 1]) continue;
    const u8* from = a.received + a.row_source[a.item_row[a.order[item]]];
    uint4* to = (uint4*)a.tiles + (u64)tile * a.hidden + threadIdx.x % 8;
#pragma unroll 4
    for (u32 piece = threadIdx.x / 8; piece < pieces; piece += MOVE_THREADS / 8)
      to[piece * 8] = load_piece(from + piece * 16);
  }
}
