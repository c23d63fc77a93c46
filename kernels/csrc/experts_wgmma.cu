// The experts on Hopper (sm_90a), fast precision: products of warpgroups behind a ring of bulk copies.
//
// gate_up: for each item (a received row in an expert's hands) [H] -> [I], with SwiGLU. down: [I] -> [H], one row of the
// wire type for each item. Weights are wgmma's M, 64 rows a warpgroup; items its N, 8 to 176.
//
// Weights: as experts.cuh says; a lane's codes are widened to bf16 in registers, times their scale: wgmma's A. So an
// element is what a checkpoint's weights are as bf16: exact, but for scales of 2^126 and 2^127, where codes from 4 and 2
// on are infinite.
// Items: [tile of 8 items][columns / 8][8 items][8 columns] bf16, as wgmma reads B: such a piece is 128 contiguous bytes,
// so it needs no swizzle, and a tile's columns follow each other, so bulk copies need no tensor map. Slot s has the tiles
// from starts[s] / 8 + s on. receive_tiles puts received rows there, gate_up its activations.
//
// A block has a row stretch of WARPGROUPS * 64 and ITEMS items of a slot, and goes on to the next such unit, in an order
// that slots without items are no part of. Its last warps copy, a stage of BLOCKS * 32 columns at a time, as far ahead
// as there are stages; each warpgroup decodes a block of 32 columns while the products of the block before are under way.
//
// Order: columns ascending by 16, in one sum of the tensor core from zero; bias last. The same for every N and unit.
#include "ptx_sm90.cuh"

#include "experts.cuh"
#include "ring.cuh"

// Shared memory -----------------------------------------------------------------------------------------------------

// As in src/cuda/choose.rs.
template <u32 WARPGROUPS, u32 COPIERS_, u32 ITEMS_, u32 BLOCKS_, u32 STAGES_>
struct Ring {
  static const u32 ITEMS = ITEMS_, BLOCKS = BLOCKS_, STAGES = STAGES_;
  // Warps of products, a row tile each; warps that copy.
  static const u32 WARPS = WARPGROUPS * 4, COPIERS = COPIERS_, THREADS = (WARPS + COPIERS) * WARP;
  static const u32 CODES = 0, SCALES = CODES + WARPS * BLOCKS * 256, PIECES = SCALES + WARPS * BLOCKS * 16;
  static const u32 STAGE = PIECES + ITEMS * BLOCKS * 64;
  // Barriers, stages, the slots' first chunks.
  static const u32 START = RING_BARRIERS, CHUNKS = START + STAGES * STAGE;
};

typedef Ring<1, 1, 8, 6, 4> Ring8;
typedef Ring<1, 1, 16, 6, 4> Ring16;
typedef Ring<2, 1, 32, 6, 4> Ring32;
typedef Ring<3, 1, 64, 6, 5> Ring64;
typedef Ring<3, 4, 176, 2, 7> Ring176;

// Units -------------------------------------------------------------------------------------------------------------

// What one warp finds for the block: how many chunks of ITEMS items lower slots have, [slots + 1].
template <u32 ITEMS>
DEVICE void count_chunks(const ExpertArgs& a, u32* chunks) {
  u32 before = 0;
  for (u32 first = 0; first < a.slots_count; first += WARP) {
    u32 slot = first + lane_id();
    u32 own = slot < a.slots_count ? (a.starts[slot + 1] - a.starts[slot] + ITEMS - 1) / ITEMS : 0, sum = own;
    for (u32 step = 1; step < WARP; step *= 2) {
      u32 lower = __shfl_up_sync(FULL, sum, step);
      if (lane_id() >= step) sum += lower;
    }
    if (slot < a.slots_count) chunks[slot] = before + sum - own;
    before += __shfl_sync(FULL, sum, WARP - 1);
  }
  if (lane_id() == 0) chunks[a.slots_count] = before;
}

// A stretch of rows and a chunk of items of a slot.
struct Unit {
  u32 slot, tile;   // of the first row
  u32 first, end;   // items of the chunk, among all
  u32 item_tile;    // of the first item
};

template <class R>
DEVICE Unit find_unit(const ExpertArgs& a, const u32* chunks, u32 unit, u32 stretches) {
  u32 chunk = unit / stretches, low = 0, high = a.slots_count;
  // The last slot that begins at this chunk or before it: slots without items begin where the next one does.
  while (high - low > 1) {
    u32 middle = (low + high) / 2;
    if (chunks[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  // Chunks of a slot are of one length, a multiple of 8.
  u32 start = a.starts[low], end = a.starts[low + 1], count = chunks[low + 1] - chunks[low];
  u32 length = (end - start + 8 * count - 1) / (8 * count) * 8, first = start + (chunk - chunks[low]) * length;
  return {low, unit % stretches * R::WARPS, least(first, end), least(first + length, end),
          start / 8 + low + (first - start) / 8};
}

// Copying -----------------------------------------------------------------------------------------------------------

// A matrix as the block sees it.
struct Matrix {
  u32 tiles, blocks;    // of 16 rows, of 32 columns
  const u16* items;     // tiles of items
};

// A unit's codes, scales and items, a stage after the other. Each lane of the copying warps has one part, or none.
template <bool GATE_UP, class R>
DEVICE void copy_unit(const ExpertArgs& a, const Matrix& m, const Unit& unit, u8* smem, Turn<R::STAGES>& turn) {
  static_assert(2 * R::WARPS + R::ITEMS / 8 <= R::COPIERS * WARP, "a lane has one part at most");
  const Slot& slot = a.slots[unit.slot];
  u32 tiles = least(m.tiles - unit.tile, R::WARPS), item_tiles = (unit.end - unit.first + 7) / 8;
  u32 part = lane_id() * R::COPIERS + warp_id() - R::WARPS, tile = part % R::WARPS;
  // Where a part goes in a stage, where it comes from, and its bytes of a block of 32 columns.
  u32 to = 0, bytes = 0;
  const u8* from = nullptr;
  if (part < 2 * R::WARPS) {
    bool codes = part < R::WARPS;
    if (tile < tiles) bytes = codes ? 256 : 16;
    from = codes ? (const u8*)(GATE_UP ? slot.gate_up : slot.down) : GATE_UP ? slot.gate_up_scales : slot.down_scales;
    from += (u64)(unit.tile + tile) * m.blocks * bytes;
    to = codes ? R::CODES + tile * R::BLOCKS * 256 : R::SCALES + tile * R::BLOCKS * 16;
  } else if (part - 2 * R::WARPS < item_tiles) {
    bytes = 512;
    from = (const u8*)m.items + (u64)(unit.item_tile + part - 2 * R::WARPS) * m.blocks * bytes;
    to = R::PIECES + (part - 2 * R::WARPS) * R::BLOCKS * bytes;
  }
  u32 all = warp_sum(bytes);
  for (u32 block = 0; block < m.blocks; block += R::BLOCKS) {
    u32 count = least(m.blocks - block, R::BLOCKS);
    u64* full = turn.full(smem);
    barrier_wait(turn.empty(smem), turn.parity ^ 1);
    if (lane_id() == 0) barrier_arrive_expecting(full, count * all);
    __syncwarp();
    if (bytes != 0)
      bulk_copy(smem + R::START + turn.stage * R::STAGE + to, from + (u64)block * bytes, count * bytes, full);
    turn.advance();
  }
}

// Products ----------------------------------------------------------------------------------------------------------

#define BF16X2_ONE_OF_EXPONENT 0x00800080u
// Codes are 2^-126 of their value and scales 2^(scale - 127): so it is 2^(scale - 1), of exponent scale + 126.
#define FACTOR_OF_ZERO (126 * BF16X2_ONE_OF_EXPONENT)
#define FACTOR_MAX (254 * BF16X2_ONE_OF_EXPONENT)

// A lane's part of a block of 32 columns and 16 rows: wgmma's A twice. Its two scales are the bytes of a u16.
DEVICE void widen_block(uint2 codes, u32 scales, u32 (&left)[4], u32 (&right)[4]) {
  decode_small(codes, left, right);
  u32 low = (scales & 0xff) * BF16X2_ONE_OF_EXPONENT + FACTOR_OF_ZERO;
  u32 high = (scales >> 8) * BF16X2_ONE_OF_EXPONENT + FACTOR_OF_ZERO;
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    left[i] = multiply_bf16x2(left[i], i % 2 ? high : low);
    right[i] = multiply_bf16x2(right[i], i % 2 ? high : low);
  }
}

// The same where scales may exceed 2: by 2 at most, and then by what is left of them.
DEVICE void widen_large_block(uint2 codes, u32 scales, u32 (&left)[4], u32 (&right)[4]) {
  decode_small(codes, left, right);
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    u32 scale = i % 2 ? scales >> 8 : scales & 0xff;
    u32 factor = least(scale * BF16X2_ONE_OF_EXPONENT + FACTOR_OF_ZERO, FACTOR_MAX);
    u32 further = (most(scale, 128) - 1) * BF16X2_ONE_OF_EXPONENT;
    left[i] = multiply_bf16x2(multiply_bf16x2(left[i], factor), further);
    right[i] = multiply_bf16x2(multiply_bf16x2(right[i], factor), further);
  }
}

#undef BF16X2_ONE_OF_EXPONENT
#undef FACTOR_OF_ZERO
#undef FACTOR_MAX

// The first lane's number, as all of a warp have it: so it is computed once for the warp, not by each lane.
DEVICE u32 of_warp(u32 number) { return __shfl_sync(FULL, number, 0); }

// Where a warp is in a unit.
template <class R>
struct Walk {
  u8* smem;
  Turn<R::STAGES>& turn;
  u32 warp;
  u32 origin;     // where shared memory begins
  u64* left;      // the barrier of the stage before, until its products are done
  const u8* codes;
  const u8* scales;
  u64 pieces;     // wgmma's B of the stage's first 16 columns

  // Waits for the stage whose turn it is.
  DEVICE void enter() {
#ifdef PLANT_PHASE
    barrier_wait(turn.full(smem), turn.parity ^ 1);
#elif !defined(PLANT_WAIT)
    barrier_wait(turn.full(smem), turn.parity);
#endif
#ifdef PLANT_STAGE
    u32 stage = R::START + (turn.stage + 1) % R::STAGES * R::STAGE;
#else
    u32 stage = R::START + turn.stage * R::STAGE;
#endif
    codes = smem + stage + R::CODES + warp * R::BLOCKS * 256 + lane_id() * 8;
    scales = smem + stage + R::SCALES + warp * R::BLOCKS * 16 + lane_id() / 4 * 2;
#ifdef PLANT_STRIDE
    const u32 stride = (R::BLOCKS - 1) * 512;
#else
    const u32 stride = R::BLOCKS * 512;
#endif
    pieces = matrix_descriptor(of_warp(origin + stage + R::PIECES), 128, stride);
  }

  // Goes on to the next stage; this one is given back when its products are done.
  DEVICE void leave() {
    left = turn.empty(smem);
#ifdef PLANT_EARLY
    give_back();
#endif
    turn.advance();
  }

  DEVICE void give_back() {
    if (left != nullptr && lane_id() == 0) barrier_arrive(left);
    left = nullptr;
  }

  DEVICE u32 scales_of(u32 block) const { return *(const u16*)(scales + block * 16); }

  DEVICE void widen(u32 block, bool large, u32 (&a)[2][4]) {
    uint2 words = *(const uint2*)(codes + block * 256);
    if (large)
      widen_large_block(words, scales_of(block), a[0], a[1]);
    else
      widen_block(words, scales_of(block), a[0], a[1]);
  }

  // Begins the products of a block of the stage; its 16 columns are two pieces, 256 bytes.
  template <u32 N>
  DEVICE void multiply(u32 block, u32 (&a)[2][4], float (&sums)[N / 2]) {
#ifndef PLANT_FENCE
    wgmma_fence(a);
#endif
    wgmma<N>(sums, a[0], pieces + block * 32, true);
    wgmma<N>(sums, a[1], pieces + block * 32 + 16, true);
    wgmma_commit();
  }
};

// The sums of a unit: a warp has row tile unit.tile + warp.
template <class R, u32 N>
DEVICE void multiply_unit(u32 blocks, u32 warp, u8* smem, Turn<R::STAGES>& turn, float (&sums)[N / 2]) {
  static_assert(R::BLOCKS % 2 == 0, "registers of odd and of even blocks");
  u32 a[2][2][4];
  Walk<R> walk = {smem, turn, warp, shared_address(smem), nullptr, nullptr, nullptr, 0};
  for (u32 first = 0; first < blocks; first += R::BLOCKS) {
    u32 count = least(blocks - first, R::BLOCKS);
    walk.enter();
    u32 scales = 0;
    for (u32 i = 0; i < R::BLOCKS; i++) scales |= i < count ? walk.scales_of(i) : 0;
    bool large = __ballot_sync(FULL, (scales & 0x8080) != 0) != 0;
    if (count == R::BLOCKS) {
#pragma unroll
      for (u32 i = 0; i < R::BLOCKS; i++) {
#ifdef PLANT_REGISTERS
        u32 (&registers)[2][4] = a[0];
#else
        u32 (&registers)[2][4] = a[i % 2];
#endif
        walk.widen(i, large, registers);
        walk.template multiply<N>(i, registers, sums);
        // The block before is done, and with it the stage before.
        wgmma_wait<1>();
        if (i == 0) walk.give_back();
      }
    } else {
      for (u32 i = 0; i < count; i++) {
        walk.widen(i, large, a[0]);
        walk.template multiply<N>(i, a[0], sums);
        wgmma_wait<0>();
        if (i == 0) walk.give_back();
      }
    }
    walk.leave();
  }
  wgmma_wait_for(sums);
  walk.give_back();
}

// swiglu of experts.cuh by the instructions for 2^x and 1/x, whose errors bf16 does not show.
DEVICE float swiglu_fast(float gate, float up, float limit) {
  const float alpha = 1.702f * 1.44269504f;
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return gate * reciprocal(1.0f + power_of_two(-alpha * gate)) * (up + 1.0f);
}

// Bias and SwiGLU, or bias, and to memory: sums[4n + i] is row g (i < 2) or g + 8 of item 8n + 2t + i % 2. Transposed, a
// lane has rows 2t and 2t + 1 of item 8n + g.
template <bool GATE_UP, u32 N>
DEVICE void put_unit(const ExpertArgs& a, const Matrix& m, const Unit& unit, u32 warp, float (&sums)[N / 2]) {
  u32 t = lane_id() % 4, g = lane_id() / 4, tile = unit.tile + warp;
  if (tile >= m.tiles) return;
  const Slot& slot = a.slots[unit.slot];
  const float* bias = (GATE_UP ? slot.gate_up_bias : slot.down_bias) + tile * 16;
  float low = bias[g], high = bias[g + 8];
#pragma unroll
  for (u32 n = 0; n < N / 8; n++) {
    if (unit.first + n * 8 >= unit.end) break;
    u32 item = unit.first + n * 8 + g;
    bool inside = item < unit.end;
    float* sum = sums + 4 * n;
    if (GATE_UP) {
      u32 pair = round_pair(swiglu_fast(sum[0] + low, sum[2] + high, a.limit),
                            swiglu_fast(sum[1] + low, sum[3] + high, a.limit));
      pair = transpose_8x8(pair);
      u16* out = (u16*)a.activations + ((u64)(unit.item_tile + n) * (a.intermediate / 8) + tile) * 64 + lane_id() * 2;
      if (inside) *(u32*)out = pair;
    } else {
      u32 upper = transpose_8x8(round_pair(sum[0] + low, sum[1] + low));
      u32 lower = transpose_8x8(round_pair(sum[2] + high, sum[3] + high));
      u16* out = (u16*)a.results + (u64)a.order[inside ? item : unit.first] * a.hidden + tile * 16 + 2 * t;
      if (inside) {
        *(u32*)out = upper;
        *(u32*)(out + 8) = lower;
      }
    }
  }
}

template <bool GATE_UP, class R, u32 N>
DEVICE void do_unit(const ExpertArgs& a, const Matrix& m, const Unit& unit, u32 warp, u8* smem,
                    Turn<R::STAGES>& turn) {
  float sums[N / 2];
  wgmma_zero(sums);
  multiply_unit<R, N>(m.blocks, warp, smem, turn, sums);
  put_unit<GATE_UP, N>(a, m, unit, warp, sums);
}

template <bool GATE_UP, class R>
DEVICE void expert_wgmma(const ExpertArgs& a) {
  SHARED(smem);
  u32* chunks = (u32*)(smem + R::CHUNKS);
  Matrix m = {(GATE_UP ? 2 * a.intermediate : a.hidden) / 16, (GATE_UP ? a.hidden : a.intermediate) / 32,
              (const u16*)(GATE_UP ? a.rows : a.activations)};
  u32 stretches = (m.tiles + R::WARPS - 1) / R::WARPS;
  u32 warp = of_warp(warp_id());
  // Filled by the warps that copy, each announcing its part; emptied by all others.
  if (threadIdx.x == 0) make_ring<R::STAGES>(smem, R::COPIERS, R::WARPS);
  if (warp_id() == R::WARPS) count_chunks<R::ITEMS>(a, chunks);
  __syncthreads();
  u32 units = chunks[a.slots_count] * stretches;
  Turn<R::STAGES> turn = {0, 0};
  // The widest products need more registers than there are for each of so many threads.
  const bool wide = R::ITEMS == 176;
  if (warp >= R::WARPS) {
    if (wide) keep_registers<40>();
    for (u32 i = blockIdx.x; i < units; i += gridDim.x)
      copy_unit<GATE_UP, R>(a, m, find_unit<R>(a, chunks, i, stretches), smem, turn);
  } else {
    if (wide) take_registers<152>();
    for (u32 i = blockIdx.x; i < units; i += gridDim.x) {
      Unit unit = find_unit<R>(a, chunks, i, stretches);
      // No wider than it must be: columns take as long whether there are items in them or not.
      if (!wide)
        do_unit<GATE_UP, R, wide ? 8 : R::ITEMS>(a, m, unit, warp, smem, turn);
      else if (of_warp(unit.end - unit.first) <= 144)
        do_unit<GATE_UP, R, 144>(a, m, unit, warp, smem, turn);
      else
        do_unit<GATE_UP, R, 176>(a, m, unit, warp, smem, turn);
    }
  }
}

KERNEL(gate_up_wgmma_32, Ring32::THREADS, ExpertArgs) { expert_wgmma<true, Ring32>(a); }
KERNEL(down_wgmma_32, Ring32::THREADS, ExpertArgs) { expert_wgmma<false, Ring32>(a); }
#ifndef PLANTED
KERNEL(gate_up_wgmma_8, Ring8::THREADS, ExpertArgs) { expert_wgmma<true, Ring8>(a); }
KERNEL(down_wgmma_8, Ring8::THREADS, ExpertArgs) { expert_wgmma<false, Ring8>(a); }
KERNEL(gate_up_wgmma_16, Ring16::THREADS, ExpertArgs) { expert_wgmma<true, Ring16>(a); }
KERNEL(down_wgmma_16, Ring16::THREADS, ExpertArgs) { expert_wgmma<false, Ring16>(a); }
KERNEL(gate_up_wgmma_64, Ring64::THREADS, ExpertArgs) { expert_wgmma<true, Ring64>(a); }
KERNEL(down_wgmma_64, Ring64::THREADS, ExpertArgs) { expert_wgmma<false, Ring64>(a); }
KERNEL(gate_up_wgmma_176, Ring176::THREADS, ExpertArgs) { expert_wgmma<true, Ring176>(a); }
KERNEL(down_wgmma_176, Ring176::THREADS, ExpertArgs) { expert_wgmma<false, Ring176>(a); }
#endif
