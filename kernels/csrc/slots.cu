// Parts in slots of one size, for exchanges whose sizes the host never learns: pack before they travel, unpack after.
//
// A slot is a header and room for the largest part there may be; how much of it counts is in the header, with what it
// belongs to. Slots lie one after the other in rank order. Nothing of a slot that belongs elsewhere is used.
#include "common.cuh"

#define SLOT_THREADS 256

// 64 bytes.
struct Header {
  u64 bytes;
  u64 moment[3];
  u32 exchange, from;
  u64 zeros[3];
};

struct PackArgs {
  const u8* bytes;
  const Part* parts;  // a slot each, or one for all
  const u64* moment;  // [3]
  u8* slots;
  Status* status;
  u64 slot_bytes;  // without the header; a multiple of 16
  u32 exchange, from;
};

// Eight bytes at a time where both sides allow it; the threads of all blocks of a slot together.
DEVICE void copy_part(u8* to, const u8* from, u64 bytes) {
  u64 first = (u64)blockIdx.x * SLOT_THREADS + threadIdx.x, stride = (u64)gridDim.x * SLOT_THREADS;
  if ((((u64)to | (u64)from | bytes) & 7) == 0) {
    for (u64 i = first; i < bytes / 8; i += stride) ((u64*)to)[i] = ((const u64*)from)[i];
  } else {
    for (u64 i = first; i < bytes; i += stride) to[i] = from[i];
  }
}

// Blocks and slots.
KERNEL(pack, SLOT_THREADS, PackArgs) {
  Part part = a.parts[blockIdx.y];
  u8* slot = a.slots + blockIdx.y * (sizeof(Header) + a.slot_bytes);
  bool fits = part.bytes <= a.slot_bytes;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    // A part that does not fit is not cut: whoever gets the slot refuses it.
    *(Header*)slot = {part.bytes, {a.moment[0], a.moment[1], a.moment[2]}, a.exchange, a.from, {0, 0, 0}};
    if (!fits) report(a.status, STATUS_RECEIVED, SLOT_TOO_SMALL, a.from, 0);
  }
  if (fits) copy_part(slot + sizeof(Header), a.bytes + part.start, part.bytes);
}

struct UnpackArgs {
  const u8* slots;
  const u64* moment;  // [3]
  Part* parts;        // [ranks]
  Status* status;
  u64 slot_bytes, row_bytes;
  u32 exchange, ranks;
};

// Says where each rank's part lies; the part of a slot that belongs elsewhere is empty. One block.
KERNEL(unpack, SLOT_THREADS, UnpackArgs) {
  SHARED(smem);
  u32* wrong = (u32*)smem;  // [ranks]: what is wrong with each slot
  for (u32 rank = threadIdx.x; rank < a.ranks; rank += SLOT_THREADS) {
    u64 start = rank * (sizeof(Header) + a.slot_bytes);
    const Header* header = (const Header*)(a.slots + start);
    u32 found = NOTHING_WRONG;
    if (header->bytes % a.row_bytes != 0) found = PART_NOT_WHOLE;
    if (header->bytes > a.slot_bytes) found = SLOT_TOO_SMALL;
    if (header->exchange != a.exchange || header->from != rank) found = SLOT_STRAY;
    for (u32 i = 0; i < 3; i++)
      if (header->moment[i] != a.moment[i]) found = SLOT_STALE;
    wrong[rank] = found;
    a.parts[rank] = {start + sizeof(Header), found == NOTHING_WRONG ? header->bytes : 0};
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (u32 rank = 0; rank < a.ranks; rank++)
    if (wrong[rank] != NOTHING_WRONG) report(a.status, STATUS_RECEIVED, wrong[rank], rank, 0);
}
