// Dense matrices: x: [n, cols] -> [n, rows], x W^T + b, bf16 weights on mma's M side, tokens on its N side.
//
// Weights are packed as mma wants them: [row tile of 16][column tile of 16][lane] of 16 bytes, so that a warp reads a
// tile in one access and nothing passes through shared memory. Lane 4g + t holds, for rows g and g + 8, columns 2t,
// 2t + 1 (words 0 and 1) and 2t + 8, 2t + 9 (words 2 and 3). Rows and columns are padded with zeros.
//
// Order: the column tiles are cut into 8 segments fixed by the number of columns; a segment's sum is from zero, the
// segments are added ascending, then the bias. Which warp or which kernel computes a segment changes nothing:
// - dense_f32 (exact precision, and routers that router.cu does not take): fused multiply-adds of f32; a lane sums its
//   columns ascending, the four lanes of a row are added ascending. A warp a segment, up to 8 tokens a block.
// - dense_mma_8 (fast, few tokens): x rounded to bf16, a warp a segment of one row tile, up to 8 tokens a block.
// - dense_mma_64 (fast, many tokens): a warp a row tile, 64 tokens a block staged in shared memory, segments in turn.
#include "ptx.cuh"

#define DENSE_WARPS 8
#define DENSE_SEGMENTS 8
#define DENSE_TOKENS 8    // of dense_f32 and dense_mma_8
#define DENSE_WIDE 64     // of dense_mma_64
#define DENSE_STAGED 64   // columns staged at once
#define DENSE_STRIDE (DENSE_STAGED + 8)  // an odd number of 16 bytes: no bank conflicts

struct DenseArgs {
  const float* x;        // [n, cols]
  const uint4* weights;  // [row tiles, column tiles, 32]
  const float* bias;     // [row tiles * 16]
  float* out;            // [n, rows]
  u32 n, rows, cols;
  u32 add;  // 1: out += result
};

DEVICE u32 segment_start(u32 tiles, u32 segment) { return segment * tiles / DENSE_SEGMENTS; }

DEVICE float column(const float* x, u32 c, u32 cols) { return c < cols ? x[c] : 0.0f; }

DEVICE void put(const DenseArgs& a, u32 token, u32 row, float sum) {
  float* out = a.out + (u64)token * a.rows + row;
  float result = sum + a.bias[row];
  *out = a.add ? *out + result : result;
}

// Adds the segments' partial sums of a row tile, [segment][16][DENSE_TOKENS], and writes up to 8 tokens.
DEVICE void put_segments(const DenseArgs& a, const float* partials, u32 tile, u32 first) {
  u32 row = threadIdx.x / DENSE_TOKENS, token = threadIdx.x % DENSE_TOKENS;
  if (row >= 16 || tile * 16 + row >= a.rows || first + token >= a.n) return;
  float sum = 0.0f;
  for (u32 s = 0; s < DENSE_SEGMENTS; s++) sum += partials[(s * 16 + row) * DENSE_TOKENS + token];
  put(a, first + token, tile * 16 + row, sum);
}

KERNEL(dense_f32, DENSE_WARPS * WARP, DenseArgs) {
  SHARED(smem);
  float* partials = (float*)smem;
  u32 tiles = (a.cols + 15) / 16, tile = blockIdx.x, first = blockIdx.y * DENSE_TOKENS;
  u32 t = lane_id() % 4, g = lane_id() / 4;
  float sums[2][DENSE_TOKENS] = {};
  for (u32 k = segment_start(tiles, warp_id()); k < segment_start(tiles, warp_id() + 1); k++) {
    uint4 w = a.weights[((u64)tile * tiles + k) * WARP + lane_id()];
    u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (u32 token = 0; token < DENSE_TOKENS; token++) {
      if (first + token >= a.n) break;
      const float* x = a.x + (u64)(first + token) * a.cols;
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        float value = column(x, k * 16 + 2 * t + i % 2 + 8 * (i / 2), a.cols);
        u32 low = words[i / 2 * 2], high = words[i / 2 * 2 + 1];
        sums[0][token] = fmaf(widen((u16)(i % 2 ? low >> 16 : low)), value, sums[0][token]);
        sums[1][token] = fmaf(widen((u16)(i % 2 ? high >> 16 : high)), value, sums[1][token]);
      }
    }
  }
#pragma unroll
  for (u32 token = 0; token < DENSE_TOKENS; token++) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      float sum = 0.0f;
      for (u32 i = 0; i < 4; i++) sum += __shfl_sync(FULL, sums[half][token], lane_id() / 4 * 4 + i);
      if (t == 0) partials[(warp_id() * 16 + g + 8 * half) * DENSE_TOKENS + token] = sum;
    }
  }
  __syncthreads();
  put_segments(a, partials, tile, first);
}

KERNEL(dense_mma_8, DENSE_WARPS * WARP, DenseArgs) {
  SHARED(smem);
  float* partials = (float*)smem;
  u32 tiles = (a.cols + 15) / 16, tile = blockIdx.x, first = blockIdx.y * DENSE_TOKENS;
  u32 t = lane_id() % 4, g = lane_id() / 4;
  // A token beyond the last reads the last one's numbers; its results are dropped.
  const float* x = a.x + (u64)least(first + g, a.n - 1) * a.cols;
  float c[4] = {};
  for (u32 k = segment_start(tiles, warp_id()); k < segment_start(tiles, warp_id() + 1); k++) {
    uint4 w = a.weights[((u64)tile * tiles + k) * WARP + lane_id()];
    u32 words[4] = {w.x, w.y, w.z, w.w};
    u32 at = k * 16 + 2 * t;
    u32 b0 = narrow2(column(x, at, a.cols), column(x, at + 1, a.cols));
    u32 b1 = narrow2(column(x, at + 8, a.cols), column(x, at + 9, a.cols));
    mma_bf16(c, words, b0, b1);
  }
  // c holds rows g (0, 1) and g + 8 (2, 3) of tokens 2t and 2t + 1.
  for (u32 i = 0; i < 4; i++) partials[(warp_id() * 16 + g + i / 2 * 8) * DENSE_TOKENS + 2 * t + i % 2] = c[i];
  __syncthreads();
  put_segments(a, partials, tile, first);
}

KERNEL(dense_mma_64, DENSE_WARPS * WARP, DenseArgs) {
  SHARED(smem);
  u16* staged = (u16*)smem;  // [DENSE_WIDE][DENSE_STRIDE]
  const u32 n_tiles = DENSE_WIDE / 8;
  u32 tiles = (a.cols + 15) / 16, row_tiles = (a.rows + 15) / 16;
  u32 tile = blockIdx.x * DENSE_WARPS + warp_id(), first = blockIdx.y * DENSE_WIDE;
  u32 t = lane_id() % 4, g = lane_id() / 4;
  // Warps beyond the matrix keep the others company at the barriers.
  bool inside = tile < row_tiles;
  float total[n_tiles][4] = {};
  for (u32 s = 0; s < DENSE_SEGMENTS; s++) {
    float c[n_tiles][4] = {};
    u32 end = segment_start(tiles, s + 1);
    for (u32 from = segment_start(tiles, s); from < end; from += DENSE_STAGED / 16) {
      u32 count = least(end - from, DENSE_STAGED / 16);
      __syncthreads();
      for (u32 i = threadIdx.x; i < DENSE_WIDE * count * 8; i += DENSE_WARPS * WARP) {
        u32 token = i / (count * 8), pair = i % (count * 8), at = from * 16 + 2 * pair;
        const float* x = a.x + (u64)least(first + token, a.n - 1) * a.cols;
        *(u32*)(staged + token * DENSE_STRIDE + 2 * pair) = narrow2(column(x, at, a.cols), column(x, at + 1, a.cols));
      }
      __syncthreads();
      if (!inside) continue;
      for (u32 k = 0; k < count; k++) {
        uint4 w = a.weights[((u64)tile * tiles + from + k) * WARP + lane_id()];
        u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (u32 n = 0; n < n_tiles; n += 2) {
          // Matrices: columns 0..8 and 8..16 of tokens 8n.., then of the next eight.
          u32 matrix = lane_id() / 8, b[4];
          ldmatrix_x4(b, staged + ((n + matrix / 2) * 8 + lane_id() % 8) * DENSE_STRIDE + k * 16 + matrix % 2 * 8);
          mma_bf16(c[n], words, b[0], b[1]);
          mma_bf16(c[n + 1], words, b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (u32 n = 0; n < n_tiles; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) total[n][i] += c[n][i];
  }
  if (!inside) return;
#pragma unroll
  for (u32 n = 0; n < n_tiles; n++)
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      u32 row = tile * 16 + g + i / 2 * 8, token = first + n * 8 + 2 * t + i % 2;
      if (row < a.rows && token < a.n) put(a, token, row, total[n][i]);
    }
}
