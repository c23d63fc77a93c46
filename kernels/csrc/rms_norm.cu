// RMSNorm: x: [n, H] -> [n, H], x * (1 / sqrt(mean(x^2) + eps)) * weight in f32. A block a row.
//
// Order of the sum of squares: thread i of 128 sums columns i, i + 128, .. ascending, fused; a butterfly adds the lanes
// of a warp; the four warps are added ascending. It depends on H alone.
// What is read of a row and of the weights is asked for at once, and kept: few rows wait for memory only once.
#include "common.cuh"

#define NORM_THREADS 128
#define NORM_HELD 24  // columns of a thread that are kept

struct RmsNormArgs {
  const float* x;
  const float* weight;  // [H]
  float* out;
  u32 hidden;
  float eps;
};

KERNEL(rms_norm, NORM_THREADS, RmsNormArgs) {
  SHARED(smem);
  float* sums = (float*)smem;  // [4]
  const u32 part = NORM_THREADS * NORM_HELD;
  const float* x = a.x + (u64)blockIdx.x * a.hidden;
  float held[NORM_HELD], weights[NORM_HELD], squares = 0.0f;
  for (u32 from = threadIdx.x; from < a.hidden; from += part) {
#pragma unroll
    for (u32 i = 0; i < NORM_HELD; i++) {
      u32 c = from + i * NORM_THREADS;
      held[i] = c < a.hidden ? x[c] : 0.0f;
      weights[i] = c < a.hidden ? a.weight[c] : 0.0f;
    }
#pragma unroll
    for (u32 i = 0; i < NORM_HELD; i++) squares = fmaf(held[i], held[i], squares);
  }
  squares = warp_sum(squares);
  if (lane_id() == 0) sums[warp_id()] = squares;
  __syncthreads();
  float sum = ((sums[0] + sums[1]) + sums[2]) + sums[3];
  float scale = 1.0f / sqrtf(sum / (float)a.hidden + a.eps);
  float* out = a.out + (u64)blockIdx.x * a.hidden;
  for (u32 from = threadIdx.x; from < a.hidden; from += part) {
#pragma unroll
    for (u32 i = 0; i < NORM_HELD; i++) {
      u32 c = from + i * NORM_THREADS;
      if (c >= a.hidden) break;
      bool kept = a.hidden <= part;
      out[c] = (kept ? held[i] : x[c]) * scale * (kept ? weights[i] : a.weight[c]);
    }
  }
}

#undef NORM_THREADS
#undef NORM_HELD
