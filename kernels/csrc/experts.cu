// The experts: grouped MXFP4 matrices that stay packed and are decoded in registers.
//
// gate_up: for each item (a received row in an expert's hands) [H] -> [I], with SwiGLU. down: [I] -> [H], one row of the
// wire type for each item. Items are grouped by slot; a block has a slot and some row tiles, and loops over the slot's
// items, so the host need not know how many there are. An empty slot's blocks end at once.
//
// Weights: as experts.cuh says.
//
// Order: a block of 32 columns is summed from zero, then sum = fma(scale, block, sum), blocks ascending; bias last. So
// codes are exact in bf16 whatever the scale.
// - exact: f32 rows; within a block columns ascending, fused: the orders of src/cpu/mxfp4.rs.
// - fast: bf16 rows; a block is two mma. 8 items at once read straight into registers, 32 staged in shared memory.
#include "ptx.cuh"

#include "experts.cuh"

#define EXPERT_WARPS 4
#define EXPERT_FEW 1     // token tiles of 8 at once, read into registers
#define EXPERT_MANY 4    // token tiles of 8 at once, staged
#define EXPERT_COLUMNS 128  // staged at once
#define EXPERT_STRIDE (EXPERT_COLUMNS + 8)

// Exact -------------------------------------------------------------------------------------------------------------

// The product of a tile's row and x: [blocks * 32].
DEVICE float dot(const uint2* tile, const u8* scales, u32 row, u32 blocks, const float* x) {
  float sum = 0.0f;
  for (u32 b = 0; b < blocks; b++) {
    float product = 0.0f;
    for (u32 c = 0; c < 32; c++) {
      u32 k = c % 16;
      uint2 words = tile[b * WARP + row % 8 * 4 + k % 8 / 2];
      product = fmaf(code_value(words, c / 16, row / 8 + 2 * (k / 8), k % 2), x[b * 32 + c], product);
    }
    sum = fmaf(scale_of(scales[b * 16 + row % 8 * 2 + row / 8]), product, sum);
  }
  return sum;
}

// A block a tile of 8 activations and a slot; a thread an activation and every sixteenth item.
KERNEL(gate_up_f32, EXPERT_WARPS * WARP, ExpertArgs) {
  u32 tile = blockIdx.x, blocks = a.hidden / 32, i = threadIdx.x % 8;
  const Slot& slot = a.slots[blockIdx.y];
  u64 at = (u64)tile * blocks;
  for (u32 item = a.starts[blockIdx.y] + threadIdx.x / 8; item < a.starts[blockIdx.y + 1]; item += 16) {
    const float* x = (const float*)a.rows + (u64)a.item_row[a.order[item]] * a.hidden;
    const float* bias = slot.gate_up_bias + tile * 16;
    float gate = dot(slot.gate_up + at * WARP, slot.gate_up_scales + at * 16, i, blocks, x) + bias[i];
    float up = dot(slot.gate_up + at * WARP, slot.gate_up_scales + at * 16, i + 8, blocks, x) + bias[i + 8];
    ((float*)a.activations)[(u64)item * a.intermediate + tile * 8 + i] = swiglu(gate, up, a.limit);
  }
}

// A block a row tile and a slot; a thread a row and every eighth item.
KERNEL(down_f32, EXPERT_WARPS * WARP, ExpertArgs) {
  u32 tile = blockIdx.x, blocks = a.intermediate / 32, row = threadIdx.x % 16;
  const Slot& slot = a.slots[blockIdx.y];
  u64 at = (u64)tile * blocks;
  for (u32 item = a.starts[blockIdx.y] + threadIdx.x / 16; item < a.starts[blockIdx.y + 1]; item += 8) {
    const float* x = (const float*)a.activations + (u64)item * a.intermediate;
    float sum = dot(slot.down + at * WARP, slot.down_scales + at * 16, row, blocks, x);
    ((float*)a.results)[(u64)a.order[item] * a.hidden + tile * 16 + row] = sum + slot.down_bias[tile * 16 + row];
  }
}

// Fast --------------------------------------------------------------------------------------------------------------

// Where an item's row of bf16 begins.
template <bool GATE_UP>
DEVICE const u16* operand(const ExpertArgs& a, u32 item) {
  if (GATE_UP) return (const u16*)a.rows + (u64)a.item_row[a.order[item]] * a.hidden;
  return (const u16*)a.activations + (u64)item * a.intermediate;
}

// A warp's row tile times TILES * 8 items from first on; items beyond end repeat the last one.
template <bool GATE_UP, u32 TILES, bool STAGED>
DEVICE void multiply(const ExpertArgs& a, const uint2* weights, const u8* scales, bool inside, u32 blocks, u32 first,
                     u32 end, u16* staged, float (&sums)[TILES][4]) {
  u32 t = lane_id() % 4, g = lane_id() / 4;
  const u16* x[TILES];
  if (!STAGED)
    for (u32 n = 0; n < TILES; n++) x[n] = operand<GATE_UP>(a, least(first + n * 8 + g, end - 1));
  for (u32 chunk = 0; chunk < blocks; chunk += EXPERT_COLUMNS / 32) {
    u32 count = least(blocks - chunk, EXPERT_COLUMNS / 32);
    if (STAGED) {
      __syncthreads();
      // Pairs of columns.
      for (u32 i = threadIdx.x; i < TILES * 8 * count * 16; i += EXPERT_WARPS * WARP) {
        u32 token = i / (count * 16), pair = i % (count * 16);
        const u32* from = (const u32*)operand<GATE_UP>(a, least(first + token, end - 1));
        *(u32*)(staged + token * EXPERT_STRIDE + 2 * pair) = from[chunk * 16 + pair];
      }
      __syncthreads();
    }
    if (!inside) continue;
    for (u32 b = chunk; b < chunk + count; b++) {
      uint2 words = weights[(u64)b * WARP + lane_id()];
      float low = scale_of(scales[b * 16 + 2 * g]), high = scale_of(scales[b * 16 + 2 * g + 1]);
      u32 left[2][4];
      decode(words, left[0], left[1]);
#pragma unroll
      for (u32 n = 0; n < TILES; n++) {
        float c[4] = {};
        u32 right[4];
        if (STAGED) {
          // Matrices: the four groups of 8 columns of the block.
          ldmatrix_x4(right, staged + (n * 8 + lane_id() % 8) * EXPERT_STRIDE + (b - chunk) * 32 + lane_id() / 8 * 8);
        } else {
#pragma unroll
          for (u32 i = 0; i < 4; i++) right[i] = *(const u32*)(x[n] + b * 32 + i * 8 + 2 * t);
        }
        mma_bf16(c, left[0], right[0], right[1]);
        mma_bf16(c, left[1], right[2], right[3]);
        sums[n][0] = fmaf(low, c[0], sums[n][0]);
        sums[n][1] = fmaf(low, c[1], sums[n][1]);
        sums[n][2] = fmaf(high, c[2], sums[n][2]);
        sums[n][3] = fmaf(high, c[3], sums[n][3]);
      }
    }
  }
}

// Bias and SwiGLU, or bias, and to memory: sums of rows g (0, 1) and g + 8 (2, 3) for items 2t and 2t + 1 of each tile.
template <bool GATE_UP, u32 TILES>
DEVICE void put_items(const ExpertArgs& a, const Slot& slot, u32 tile, u32 first, u32 end, float (&sums)[TILES][4]) {
  u32 t = lane_id() % 4, g = lane_id() / 4;
  const float* bias = (GATE_UP ? slot.gate_up_bias : slot.down_bias) + tile * 16;
#pragma unroll
  for (u32 n = 0; n < TILES; n++) {
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
      u32 item = first + n * 8 + 2 * t + i;
      if (item >= end) continue;
      float low = sums[n][i] + bias[g], high = sums[n][2 + i] + bias[g + 8];
      if (GATE_UP) {
        ((u16*)a.activations)[(u64)item * a.intermediate + tile * 8 + g] = narrow(swiglu(low, high, a.limit));
      } else {
        u16* out = (u16*)a.results + (u64)a.order[item] * a.hidden + tile * 16;
        out[g] = narrow(low);
        out[g + 8] = narrow(high);
      }
    }
  }
}

template <bool GATE_UP>
DEVICE void expert_mma(const ExpertArgs& a) {
  SHARED(smem);
  u32 columns = GATE_UP ? a.hidden : a.intermediate, rows = GATE_UP ? 2 * a.intermediate : a.hidden;
  u32 tile = blockIdx.x * EXPERT_WARPS + warp_id(), blocks = columns / 32;
  // Warps beyond the matrix keep the others company at the barriers.
  bool inside = tile < rows / 16;
  const Slot& slot = a.slots[blockIdx.y];
  const uint2* weights = (GATE_UP ? slot.gate_up : slot.down) + (u64)tile * blocks * WARP;
  const u8* scales = (GATE_UP ? slot.gate_up_scales : slot.down_scales) + (u64)tile * blocks * 16;
  u32 first = a.starts[blockIdx.y], end = a.starts[blockIdx.y + 1];
  while (first < end) {
    if (end - first > EXPERT_FEW * 8) {
      float sums[EXPERT_MANY][4] = {};
      multiply<GATE_UP, EXPERT_MANY, true>(a, weights, scales, inside, blocks, first, end, (u16*)smem, sums);
      if (inside) put_items<GATE_UP, EXPERT_MANY>(a, slot, tile, first, end, sums);
      first += EXPERT_MANY * 8;
    } else {
      float sums[EXPERT_FEW][4] = {};
      multiply<GATE_UP, EXPERT_FEW, false>(a, weights, scales, inside, blocks, first, end, (u16*)smem, sums);
      if (inside) put_items<GATE_UP, EXPERT_FEW>(a, slot, tile, first, end, sums);
      first += EXPERT_FEW * 8;
    }
  }
}

KERNEL(gate_up_bf16, EXPERT_WARPS * WARP, ExpertArgs) { expert_mma<true>(a); }
KERNEL(down_bf16, EXPERT_WARPS * WARP, ExpertArgs) { expert_mma<false>(a); }

#undef EXPERT_WARPS
#undef EXPERT_FEW
#undef EXPERT_MANY
#undef EXPERT_COLUMNS
#undef EXPERT_STRIDE
