// Dense matrices: x: [n, cols] -> [n, rows], x W^T + b, bf16 weights on mma's M side, tokens on its N side.
//
// Weights are packed as mma wants them: [row tile of 16][column tile of 16][lane] of 16 bytes, so that a warp reads a
// tile in one access and nothing passes through shared memory. Lane 4g + t holds, for rows g and g + 8, columns 2t,
// 2t + 1 (words 0 and 1) and 2t + 8, 2t + 9 (words 2 and 3). Rows and columns are padded with zeros.
//
// Order: nothing depends on which warp or which kernel computes a number, or on how many tokens there are.
// - dense_f32 (exact precision, and the router in both): the column tiles are cut into 8 segments fixed by the number of
//   columns; a lane sums its columns of a segment ascending from zero, by fused multiply-adds, the four lanes of a row are
//   added ascending, then the segments, then the bias. A warp a segment, up to 8 tokens a block.
// - dense_mma_8, dense_mma_64 (fast, x rounded to bf16): columns ascending by 16, in one sum of the tensor core from zero;
//   bias last. A warp a row tile; up to 8 tokens a block, or 64 that are staged in shared memory.
#include "ptx.cuh"

#define DENSE_WARPS 8
#define DENSE_SEGMENTS 8
#define DENSE_TOKENS 8    // of dense_f32 and dense_mma_8
#define DENSE_WIDE 64     // of dense_mma_64
#define DENSE_AHEAD 8     // column tiles of dense_f32 that are read at once
#define DENSE_HELD (92 << 10)  // bytes of tokens that a block of dense_f32 holds, at most; as in src/cuda/choose.rs
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

// Two columns of x.
DEVICE void columns(const float* x, u32 c, u32 cols, float (&values)[2]) {
  if (cols % 2 == 0) {
    uint2 both = c < cols ? *(const uint2*)(x + c) : uint2{0, 0};
    values[0] = float_of(both.x), values[1] = float_of(both.y);
  } else {
    values[0] = column(x, c, cols), values[1] = column(x, c + 1, cols);
  }
}

// So many numbers to shared memory, all at once as far as they are aligned.
DEVICE void hold(const float* from, u32 count, float* to) {
  u32 wide = (u64)from % 16 == 0 ? count / 4 : 0;
#pragma unroll 8
  for (u32 i = threadIdx.x; i < wide; i += DENSE_WARPS * WARP) ((uint4*)to)[i] = ((const uint4*)from)[i];
  for (u32 i = wide * 4 + threadIdx.x; i < count; i += DENSE_WARPS * WARP) to[i] = from[i];
}

KERNEL(dense_f32, DENSE_WARPS * WARP, DenseArgs) {
  SHARED(smem);
  float *partials = (float*)smem, *held = partials + DENSE_SEGMENTS * 16 * DENSE_TOKENS;
  // Tokens of a block, DENSE_TOKENS at most.
  u32 each = (a.n + gridDim.y - 1) / gridDim.y, first = blockIdx.y * each, count = least(a.n - first, each);
  u32 tiles = (a.cols + 15) / 16, tile = blockIdx.x, t = lane_id() % 4, g = lane_id() / 4;
  u32 begin = segment_start(tiles, warp_id()), end = segment_start(tiles, warp_id() + 1);
  const uint4* weights = a.weights + (u64)tile * tiles * WARP + lane_id();
  const float* x = a.x + (u64)first * a.cols;
  // Of several column tiles all is asked for before it is multiplied, and the first before tokens are.
  uint4 w[DENSE_AHEAD];
#pragma unroll
  for (u32 i = 0; i < DENSE_AHEAD; i++) w[i] = begin + i < end ? weights[(begin + i) * WARP] : uint4{0, 0, 0, 0};
  if ((u64)each * a.cols * 4 <= DENSE_HELD) {
    hold(x, count * a.cols, held);
    x = held;
    __syncthreads();
  }
  float sums[2][DENSE_TOKENS] = {};
  for (u32 k = begin; k < end; k += DENSE_AHEAD) {
    uint4 next[DENSE_AHEAD];
#pragma unroll
    for (u32 i = 0; i < DENSE_AHEAD; i++) {
      u32 at = k + DENSE_AHEAD + i;
      next[i] = at < end ? weights[at * WARP] : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (u32 i = 0; i < DENSE_AHEAD; i++) {
      if (k + i >= end) break;
      u32 words[4] = {w[i].x, w[i].y, w[i].z, w[i].w};
#pragma unroll
      for (u32 token = 0; token < DENSE_TOKENS; token++) {
        if (token >= count) break;
        float values[2][2];
        columns(x + token * a.cols, (k + i) * 16 + 2 * t, a.cols, values[0]);
        columns(x + token * a.cols, (k + i) * 16 + 2 * t + 8, a.cols, values[1]);
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
          u32 low = words[j / 2 * 2], high = words[j / 2 * 2 + 1];
          sums[0][token] = fmaf(widen((u16)(j % 2 ? low >> 16 : low)), values[j / 2][j % 2], sums[0][token]);
          sums[1][token] = fmaf(widen((u16)(j % 2 ? high >> 16 : high)), values[j / 2][j % 2], sums[1][token]);
        }
      }
    }
#pragma unroll
    for (u32 i = 0; i < DENSE_AHEAD; i++) w[i] = next[i];
  }
#pragma unroll
  for (u32 token = 0; token < DENSE_TOKENS; token++) {
    if (token >= count) break;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      float sum = 0.0f;
      for (u32 i = 0; i < 4; i++) sum += __shfl_sync(FULL, sums[half][token], lane_id() / 4 * 4 + i);
      if (t == 0) partials[(warp_id() * 16 + g + 8 * half) * DENSE_TOKENS + token] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x % DENSE_TOKENS < count) put_segments(a, partials, tile, first);
}

KERNEL(dense_mma_8, DENSE_WARPS * WARP, DenseArgs) {
  u32 tiles = (a.cols + 15) / 16, row_tiles = (a.rows + 15) / 16;
  u32 tile = blockIdx.x * DENSE_WARPS + warp_id(), first = blockIdx.y * DENSE_TOKENS;
  u32 t = lane_id() % 4, g = lane_id() / 4;
  if (tile >= row_tiles) return;
  // A token beyond the last reads the last one's numbers; its results are dropped.
  const float* x = a.x + (u64)least(first + g, a.n - 1) * a.cols;
  const uint4* weights = a.weights + (u64)tile * tiles * WARP + lane_id();
  float c[4] = {};
  // Of several column tiles all is asked for before it is multiplied. Columns beyond the last are zero.
  for (u32 k = 0; k < tiles; k += DENSE_AHEAD) {
    uint4 w[DENSE_AHEAD];
    float values[DENSE_AHEAD][2][2];
#pragma unroll
    for (u32 i = 0; i < DENSE_AHEAD; i++) {
      w[i] = k + i < tiles ? weights[(k + i) * WARP] : uint4{0, 0, 0, 0};
      columns(x, (k + i) * 16 + 2 * t, a.cols, values[i][0]);
      columns(x, (k + i) * 16 + 2 * t + 8, a.cols, values[i][1]);
    }
#pragma unroll
    for (u32 i = 0; i < DENSE_AHEAD; i++) {
      if (k + i >= tiles) break;
      u32 words[4] = {w[i].x, w[i].y, w[i].z, w[i].w};
      mma_bf16(c, words, narrow2(values[i][0][0], values[i][0][1]), narrow2(values[i][1][0], values[i][1][1]));
    }
  }
  // c holds rows g (0, 1) and g + 8 (2, 3) of tokens 2t and 2t + 1.
  for (u32 i = 0; i < 4; i++) {
    u32 row = tile * 16 + g + i / 2 * 8, token = first + 2 * t + i % 2;
    if (row < a.rows && token < a.n) put(a, token, row, c[i]);
  }
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
  float c[n_tiles][4] = {};
  for (u32 from = 0; from < tiles; from += DENSE_STAGED / 16) {
    u32 count = least(tiles - from, DENSE_STAGED / 16);
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
  if (!inside) return;
#pragma unroll
  for (u32 n = 0; n < n_tiles; n++)
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      u32 row = tile * 16 + g + i / 2 * 8, token = first + n * 8 + 2 * t + i % 2;
      if (row < a.rows && token < a.n) put(a, token, row, c[n][i]);
    }
}
