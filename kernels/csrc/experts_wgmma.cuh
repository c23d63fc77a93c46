// What the experts' kernels on Hopper share: how items lie, units of work, copying, widening, and what becomes of sums.
//
// gate_up: for each item (a received row in an expert's hands) [H] -> [I], with SwiGLU. down: [I] -> [H], one row of the
// wire type for each item. Weights are wgmma's M, 64 rows a warpgroup; items its N, 8 to 176.
//
// Weights: as experts.cuh says; codes are widened to bf16, times their scale: wgmma's A. So an element is what a
// checkpoint's weights are as bf16: exact, but for scales of 2^126 and 2^127, where codes from 4 and 2 on are infinite.
// Items: [tile of 8 items][columns / 8][8 items][8 columns] bf16, as wgmma reads B: such a piece is 128 contiguous bytes,
// so it needs no swizzle, and a tile's columns follow each other, so bulk copies need no tensor map. Slot s has the tiles
// from starts[s] / 8 + s on. receive.cu puts received rows there, gate_up its activations.
//
// A unit is a row stretch of WARPS row tiles and ITEMS items of a slot; slots without items have none.
//
// Order: columns ascending by 16, in one sum of the tensor core from zero; bias last. The same for every N and unit,
// wherever A lies.
#include "ptx_sm90.cuh"

#include "experts.cuh"
#include "ring.cuh"

// Units -------------------------------------------------------------------------------------------------------------

// What one warp finds for the block: how many chunks of ITEMS items lower slots have, [slots + 1]. Four times as many slots
// as lanes are asked for at once: the first units wait for them.
template <u32 ITEMS>
DEVICE void count_chunks(const ExpertArgs& a, u32* chunks) {
  const u32 AT_ONCE = 4;
  u32 before = 0;
  for (u32 first = 0; first < a.slots_count; first += AT_ONCE * WARP) {
    u32 own[AT_ONCE];
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      u32 slot = first + i * WARP + lane_id();
      own[i] = slot < a.slots_count ? (a.starts[slot + 1] - a.starts[slot] + ITEMS - 1) / ITEMS : 0;
    }
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      u32 slot = first + i * WARP + lane_id(), sum = own[i];
      for (u32 step = 1; step < WARP; step *= 2) {
        u32 lower = __shfl_up_sync(FULL, sum, step);
        if (lane_id() >= step) sum += lower;
      }
      if (slot < a.slots_count) chunks[slot] = before + sum - own[i];
      before += __shfl_sync(FULL, sum, WARP - 1);
    }
  }
  if (lane_id() == 0) chunks[a.slots_count] = before;
}

// A stretch of rows and a chunk of items of a slot.
struct Unit {
  u32 slot, tile;   // of the first row
  u32 first, end;   // items of the chunk, among all
  u32 item_tile;    // of the first item
  u32 matrix;       // where a launch does both
  u32 unused[2];
};
enum { GATE_UP_UNIT = 0, DOWN_UNIT = 1, NO_UNIT = 2 };
static_assert(sizeof(Unit) == 32, "as there is room for");

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
          start / 8 + low + (first - start) / 8, GATE_UP_UNIT, {0, 0}};
}

// Copying -----------------------------------------------------------------------------------------------------------

// A matrix as the block sees it.
struct Matrix {
  u32 tiles, blocks;    // of 16 rows, of 32 columns
  const u16* items;     // tiles of items
};

// What a lane of the copying warps copies of a unit: where it goes in a stage, where it comes from, and its bytes of a block
// of 32 columns, which may be none.
struct Copied {
  u32 to, bytes;
  const u8* from;
  bool of_items;

  template <class R>
  DEVICE void copy(const Matrix& m, u32 block, u8* smem, const Turn<R::STAGES>& turn) const {
    if (bytes == 0) return;
    u32 count = least(m.blocks - block, R::BLOCKS);
    bulk_copy(smem + R::START + turn.stage * R::STAGE + to, from + (u64)block * bytes, count * bytes, turn.full(smem));
  }
};

template <bool GATE_UP, class R>
DEVICE Copied copied_of(const ExpertArgs& a, const Matrix& m, const Unit& unit) {
  static_assert(2 * R::WARPS + R::ITEMS / 8 <= R::COPIERS * WARP, "a lane has one part at most");
  const Slot& slot = a.slots[unit.slot];
  u32 tiles = least(m.tiles - unit.tile, R::WARPS), item_tiles = (unit.end - unit.first + 7) / 8;
  u32 part = lane_id() * R::COPIERS + warp_id() - R::WARPS, tile = part % R::WARPS;
  if (part >= 2 * R::WARPS) {
    u32 item_tile = part - 2 * R::WARPS;
    return {R::PIECES + item_tile * R::BLOCKS * 512, item_tile < item_tiles ? 512u : 0,
            (const u8*)m.items + (u64)(unit.item_tile + item_tile) * m.blocks * 512, true};
  }
  bool codes = part < R::WARPS;
  u32 bytes = codes ? 256 : 16;
  const u8* from = codes ? (const u8*)(GATE_UP ? slot.gate_up : slot.down) : GATE_UP ? slot.gate_up_scales : slot.down_scales;
  return {codes ? R::CODES + tile * R::BLOCKS * 256 : R::SCALES + tile * R::BLOCKS * 16, tile < tiles ? bytes : 0,
          from + (u64)(unit.tile + tile) * m.blocks * bytes, false};
}

// Announces a stage's bytes, of all lanes of a warp, when it is empty.
template <class R>
DEVICE void begin_stage(const Matrix& m, u32 block, u32 all, u8* smem, const Turn<R::STAGES>& turn) {
  barrier_wait(turn.empty(smem), turn.parity ^ 1);
  if (lane_id() == 0) barrier_arrive_expecting(turn.full(smem), least(m.blocks - block, R::BLOCKS) * all);
  __syncwarp();
}

// The stages of a unit from a block on, one after the other.
template <class R>
DEVICE void copy_stages(const Matrix& m, const Copied& copied, u32 all, u32 block, u8* smem, Turn<R::STAGES>& turn) {
  for (; block < m.blocks; block += R::BLOCKS) {
    begin_stage<R>(m, block, all, smem, turn);
    copied.copy<R>(m, block, smem, turn);
    turn.advance();
  }
}

// A unit's codes, scales and items.
template <bool GATE_UP, class R>
DEVICE void copy_unit(const ExpertArgs& a, const Matrix& m, const Unit& unit, u8* smem, Turn<R::STAGES>& turn) {
  Copied copied = copied_of<GATE_UP, R>(a, m, unit);
  copy_stages<R>(m, copied, warp_sum(copied.bytes), 0, smem, turn);
}

// The same before there are items: they follow the first weights when `wait` has returned.
template <bool GATE_UP, class R, class F>
DEVICE void copy_unit_ahead(const ExpertArgs& a, const Matrix& m, const Unit& unit, u8* smem, Turn<R::STAGES>& turn,
                            const F& wait) {
  Copied copied = copied_of<GATE_UP, R>(a, m, unit);
  u32 all = warp_sum(copied.bytes), ahead = least(m.blocks, R::STAGES * R::BLOCKS);
  Turn<R::STAGES> begun = turn;
  for (u32 block = 0; block < ahead; block += R::BLOCKS) {
    begin_stage<R>(m, block, all, smem, turn);
    if (!copied.of_items) copied.copy<R>(m, block, smem, turn);
    turn.advance();
  }
  wait();
  __syncwarp();
  fence_async_global();
  for (u32 block = 0; block < ahead; block += R::BLOCKS) {
    if (copied.of_items) copied.copy<R>(m, block, smem, begun);
    begun.advance();
  }
  copy_stages<R>(m, copied, all, ahead, smem, turn);
}

// Widening ----------------------------------------------------------------------------------------------------------

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

// Sums --------------------------------------------------------------------------------------------------------------

// swiglu of experts.cuh by the instructions for 2^x and 1/x, whose errors bf16 does not show.
DEVICE float swiglu_fast(float gate, float up, float limit) {
  const float alpha = 1.702f * 1.44269504f;
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return gate * reciprocal(1.0f + power_of_two(-alpha * gate)) * (up + 1.0f);
}

// A lane's biases of a unit: of rows g and g + 8. They are asked for before its products.
struct Biases {
  float low, high;
};

template <bool GATE_UP>
DEVICE Biases biases_of(const ExpertArgs& a, const Matrix& m, const Unit& unit, u32 warp) {
  u32 tile = unit.tile + warp;
  if (tile >= m.tiles) return {0.0f, 0.0f};
  const Slot& slot = a.slots[unit.slot];
  const float* bias = (GATE_UP ? slot.gate_up_bias : slot.down_bias) + tile * 16 + lane_id() / 4;
  return {bias[0], bias[8]};
}

// Bias and SwiGLU, or bias, and to memory: sums[4n + i] is row g (i < 2) or g + 8 of item 8n + 2t + i % 2. Transposed, a
// lane has rows 2t and 2t + 1 of item 8n + g.
template <bool GATE_UP, u32 N>
DEVICE void put_unit(const ExpertArgs& a, const Matrix& m, const Unit& unit, u32 warp, const Biases& biases,
                     float (&sums)[N / 2]) {
  u32 t = lane_id() % 4, g = lane_id() / 4, tile = unit.tile + warp;
  if (tile >= m.tiles) return;
  float low = biases.low, high = biases.high;
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

DEVICE Matrix matrix_of(const ExpertArgs& a, bool gate_up) {
  return {(gate_up ? 2 * a.intermediate : a.hidden) / 16, (gate_up ? a.hidden : a.intermediate) / 32,
          (const u16*)(gate_up ? a.rows : a.activations)};
}

template <class R>
DEVICE u32 stretches_of(const Matrix& m) {
  return (m.tiles + R::WARPS - 1) / R::WARPS;
}
