// The experts on Hopper (sm_90a), fast precision, where units are so few that each has a block of its own; see
// experts_wgmma.cuh. There is a launch for each matrix.
//
// What bounds such a unit is how long a warp takes to decode 16 rows of it, column after column. So others decode: a block's
// first warpgroup multiplies only, a warp copies, and two groups of DECODERS warps take halves of its stages in turn and put
// them, widened, to shared memory, where wgmma finds its A:
// [16 columns][8 row groups][2][8 rows][8 columns] bf16, the slots of a second ring.
#include "experts_wgmma.cuh"

// As in src/cuda/choose/experts.rs.
struct Few {
  // Blocks of 32 columns of a stage, and of the half of it that a slot has.
  static const u32 ITEMS = 8, BLOCKS = 6, HALF = BLOCKS / 2, STAGES = 3, SLOTS = 3;
  // Row tiles, which are warps of products and of a group of decoders; and the warps in their order.
  static const u32 WARPS = 4, COPIERS = 1, GROUPS = 2, DECODERS = GROUPS * WARPS;
  static const u32 THREADS = (WARPS + COPIERS + DECODERS) * WARP;
  static const u32 CODES = 0, SCALES = CODES + WARPS * BLOCKS * 256, PIECES = SCALES + WARPS * BLOCKS * 16;
  static const u32 STAGE = PIECES + ITEMS * BLOCKS * 64;
  // Bytes of 16 columns, and of a slot.
  static const u32 COLUMN_TILE = WARPS * 512, SLOT = HALF * 2 * COLUMN_TILE;
  // Barriers of stages and of slots, stages, slots, the expert slots' first chunks.
  static const u32 SLOT_BARRIERS = 64, START = RING_BARRIERS, WIDENED = START + STAGES * STAGE;
  static const u32 CHUNKS = WIDENED + SLOTS * SLOT;
};
static_assert(2 * Few::STAGES * 8 <= Few::SLOT_BARRIERS, "barriers of stages lie before those of slots");

// Turns of both rings.
struct Turns {
  Turn<Few::STAGES> stage;
  Turn<Few::SLOTS> slot;
};

DEVICE void arrive(u64* barrier) {
  if (barrier != nullptr && lane_id() == 0) barrier_arrive(barrier);
}

// Decoding ----------------------------------------------------------------------------------------------------------

// COUNT blocks of a row tile, to where a lane's rows of their first 16 columns go.
template <u32 COUNT>
DEVICE void widen_blocks(const u8* codes, const u8* scales, u8* to) {
  uint2 words[COUNT];
  u32 both[COUNT], any = 0;
#pragma unroll
  for (u32 i = 0; i < COUNT; i++) {
    words[i] = *(const uint2*)(codes + i * 256);
    both[i] = *(const u16*)(scales + i * 16);
    any |= both[i];
  }
  bool large = __ballot_sync(FULL, (any & 0x8080) != 0) != 0;
#pragma unroll
  for (u32 i = 0; i < COUNT; i++) {
    u32 left[4], right[4];
    if (large)
      widen_large_block(words[i], both[i], left, right);
    else
      widen_block(words[i], both[i], left, right);
    store_pieces(to + 2 * i * Few::COLUMN_TILE, left);
    store_pieces(to + (2 * i + 1) * Few::COLUMN_TILE, right);
  }
}

// A unit's weights, by one of the groups.
DEVICE void decode_unit(u32 blocks, u8* smem, Turns& turns) {
  u32 decoder = of_warp(warp_id()) - Few::WARPS - Few::COPIERS, group = decoder / Few::WARPS, tile = decoder % Few::WARPS;
  u32 piece = lane_id() / 8, row = lane_id() % 8;
  u8* slots = smem + Few::WIDENED + tile * 512 + piece % 2 * 256 + piece / 2 * 128 + row * 16;
  for (u32 first = 0; first < blocks; first += Few::BLOCKS) {
    const u8* stage = smem + Few::START + turns.stage.stage * Few::STAGE;
    const u8* codes = stage + Few::CODES + tile * Few::BLOCKS * 256 + lane_id() * 8;
    const u8* scales = stage + Few::SCALES + tile * Few::BLOCKS * 16 + lane_id() / 4 * 2;
    u32 count = least(blocks - first, Few::BLOCKS);
    barrier_wait(turns.stage.full(smem), turns.stage.parity);
    for (u32 from = 0; from < count; from += Few::HALF) {
      if (from / Few::HALF == group) {
        u8* to = slots + turns.slot.stage * Few::SLOT;
        barrier_wait(turns.slot.empty(smem + Few::SLOT_BARRIERS), turns.slot.parity ^ 1);
        if (count - from >= Few::HALF) {
          widen_blocks<Few::HALF>(codes + from * 256, scales + from * 16, to);
        } else {
          for (u32 i = 0; from + i < count; i++)
            widen_blocks<1>(codes + (from + i) * 256, scales + (from + i) * 16, to + 2 * i * Few::COLUMN_TILE);
        }
        fence_async();
        __syncwarp();
        arrive(turns.slot.full(smem + Few::SLOT_BARRIERS));
      }
      turns.slot.advance();
    }
    __syncwarp();
    arrive(turns.stage.empty(smem));
    turns.stage.advance();
  }
}

// Products ----------------------------------------------------------------------------------------------------------

// The sums of a unit, when all decoders have done their part.
DEVICE void multiply_unit(u32 blocks, u8* smem, Turns& turns, float (&sums)[Few::ITEMS / 2]) {
  u32 origin = shared_address(smem);
  // Of the products under way: what they read, given back when they are done.
  u64 *stage_left = nullptr, *slot_left = nullptr;
  for (u32 first = 0; first < blocks; first += Few::BLOCKS) {
    u32 stage = origin + Few::START + turns.stage.stage * Few::STAGE, count = least(blocks - first, Few::BLOCKS);
    barrier_wait(turns.stage.full(smem), turns.stage.parity);
    u64 items = matrix_descriptor(of_warp(stage + Few::PIECES), 128, Few::BLOCKS * 512);
    for (u32 from = 0; from < count; from += Few::HALF) {
#ifndef PLANT_WAIT
      barrier_wait(turns.slot.full(smem + Few::SLOT_BARRIERS), turns.slot.parity);
#endif
      u64 widened = matrix_descriptor(of_warp(origin + Few::WIDENED + turns.slot.stage * Few::SLOT), 128, 256);
      __syncwarp();
      // A group of products does not span a branch: the compiler would end it in each and add an empty one.
      if (count - from >= Few::HALF) {
        wgmma_fence();
#pragma unroll
        for (u32 i = 0; i < 2 * Few::HALF; i++)
          wgmma_shared(sums, widened + i * (Few::COLUMN_TILE >> 4), items + (2 * from + i) * 16);
        wgmma_commit();
#ifdef PLANT_EARLY
        arrive(turns.slot.empty(smem + Few::SLOT_BARRIERS));
#endif
        wgmma_wait<1>();
      } else {
        for (u32 i = 0; i < 2 * (count - from); i++) {
          wgmma_fence();
          wgmma_shared(sums, widened + i * (Few::COLUMN_TILE >> 4), items + (2 * from + i) * 16);
          wgmma_commit();
          wgmma_wait<0>();
        }
      }
      arrive(slot_left);
      arrive(stage_left);
#ifndef PLANT_EARLY
      slot_left = turns.slot.empty(smem + Few::SLOT_BARRIERS);
#endif
      stage_left = from + Few::HALF >= count ? turns.stage.empty(smem) : nullptr;
      turns.slot.advance();
    }
    turns.stage.advance();
  }
  wgmma_wait_for(sums);
  arrive(slot_left);
  arrive(stage_left);
}

template <bool GATE_UP>
DEVICE void few_units(const ExpertArgs& a) {
  SHARED(smem);
  u32* chunks = (u32*)(smem + Few::CHUNKS);
  Matrix m = matrix_of(a, GATE_UP);
  u32 stretches = stretches_of<Few>(m), warp = of_warp(warp_id());
  if (threadIdx.x == 0) {
    make_ring<Few::STAGES>(smem, Few::COPIERS, Few::WARPS + Few::DECODERS);
    make_ring<Few::SLOTS>(smem + Few::SLOT_BARRIERS, Few::WARPS, Few::WARPS);
  }
  if (warp_id() == Few::WARPS) count_chunks<Few::ITEMS>(a, chunks);
  __syncthreads();
  u32 units = chunks[a.slots_count] * stretches;
  Turns turns = {{0, 0}, {0, 0}};
  for (u32 i = blockIdx.x; i < units; i += gridDim.x) {
    if (warp > Few::WARPS) {
      decode_unit(m.blocks, smem, turns);
      continue;
    }
    Unit unit = find_unit<Few>(a, chunks, i, stretches);
    if (warp == Few::WARPS) {
      copy_unit<GATE_UP, Few>(a, m, unit, smem, turns.stage);
      continue;
    }
    float sums[Few::ITEMS / 2];
    wgmma_zero(sums);
    Biases biases = biases_of<GATE_UP>(a, m, unit, warp);
    multiply_unit(m.blocks, smem, turns, sums);
    put_unit<GATE_UP, Few::ITEMS>(a, m, unit, warp, biases, sums);
  }
}

RESIDENT_KERNEL(gate_up_wgmma_8, Few::THREADS, 3, ExpertArgs) { few_units<true>(a); }
RESIDENT_KERNEL(down_wgmma_8, Few::THREADS, 3, ExpertArgs) { few_units<false>(a); }
