// RMSNorm: x: [n, H] -> [n, H], x * (1 / sqrt(mean(x^2) + eps)) * weight in f32. A block a row.
//
// Order of the sum of squares: thread i of 128 sums columns i, i + 128, .. ascending, fused; a butterfly adds the lanes
// of a warp; the four warps are added ascending. It depends on H alone.
#include "common.cuh"

struct RmsNormArgs {
  const float* x;
  const float* weight;  // [H]
  float* out;
  u32 hidden;
  float eps;
};

#define AT_ONCE 12  // columns of a thread

KERNEL(rms_norm, 128, RmsNormArgs) {
  SHARED(smem);
  float* sums = (float*)smem;  // [4]
  const float* x = a.x + (u64)blockIdx.x * a.hidden;
  float squares = 0.0f;
  // Many loads at once: with few rows the kernel is as long as they take one after another.
  for (u32 first = threadIdx.x; first < a.hidden; first += 128 * AT_ONCE) {
    float own[AT_ONCE];
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) own[i] = first + 128 * i < a.hidden ? x[first + 128 * i] : 0.0f;
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) squares = fmaf(own[i], own[i], squares);
  }
  squares = warp_sum(squares);
  if (lane_id() == 0) sums[warp_id()] = squares;
  __syncthreads();
  float sum = ((sums[0] + sums[1]) + sums[2]) + sums[3];
  float scale = 1.0f / sqrtf(sum / (float)a.hidden + a.eps);
  float* out = a.out + (u64)blockIdx.x * a.hidden;
  for (u32 first = threadIdx.x; first < a.hidden; first += 128 * AT_ONCE) {
    float own[AT_ONCE], weight[AT_ONCE];
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      u32 c = first + 128 * i;
      own[i] = c < a.hidden ? x[c] : 0.0f;
      weight[i] = c < a.hidden ? a.weight[c] : 0.0f;
    }
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++)
      if (first + 128 * i < a.hidden) out[first + 128 * i] = own[i] * scale * weight[i];
  }
}
