// RMSNorm: x: [n, H] -> [n, H], x * (1 / sqrt(mean(x^2) + eps)) * weight in f32. A block a row.
//
// Order of the sum of squares: thread i of 128 sums columns i, i + 128, .. ascending, fused; a butterfly adds the lanes
// of a warp; the four warps are added ascending. It depends on H alone.
#include "common.cuh"

#define NORM_THREADS 128
// Columns that a thread keeps, with their weights, all loaded before the first is used; more are read twice.
#define NORM_KEPT 24

struct RmsNormArgs {
  const float* x;
  const float* weight;  // [H]
  float* out;
  u32 hidden;
  float eps;
};

PASSING_KERNEL(rms_norm, NORM_THREADS, RmsNormArgs) {
  SHARED(smem);
  float* sums = (float*)smem;  // [4]
  const float* x = a.x + (u64)blockIdx.x * a.hidden;
  float* out = a.out + (u64)blockIdx.x * a.hidden;
  float kept[NORM_KEPT], weights[NORM_KEPT];
#pragma unroll
  for (u32 i = 0; i < NORM_KEPT; i++) {
    u32 c = threadIdx.x + i * NORM_THREADS;
    kept[i] = c < a.hidden ? x[c] : 0.0f;
    weights[i] = c < a.hidden ? a.weight[c] : 0.0f;
  }
  float squares = 0.0f;
#pragma unroll
  for (u32 i = 0; i < NORM_KEPT; i++) squares = fmaf(kept[i], kept[i], squares);
  const u32 rest = NORM_KEPT * NORM_THREADS;
  for (u32 c = rest + threadIdx.x; c < a.hidden; c += NORM_THREADS) squares = fmaf(x[c], x[c], squares);
  squares = warp_sum(squares);
  if (lane_id() == 0) sums[warp_id()] = squares;
  __syncthreads();
  float sum = ((sums[0] + sums[1]) + sums[2]) + sums[3];
  float scale = 1.0f / sqrtf(sum / (float)a.hidden + a.eps);
#pragma unroll
  for (u32 i = 0; i < NORM_KEPT; i++) {
    u32 c = threadIdx.x + i * NORM_THREADS;
    if (c < a.hidden) out[c] = kept[i] * scale * weights[i];
  }
  for (u32 c = rest + threadIdx.x; c < a.hidden; c += NORM_THREADS) out[c] = x[c] * scale * a.weight[c];
}
