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

KERNEL(rms_norm, 128, RmsNormArgs) {
  SHARED(smem);
  float* sums = (float*)smem;  // [4]
  const float* x = a.x + (u64)blockIdx.x * a.hidden;
  float squares = 0.0f;
  for (u32 c = threadIdx.x; c < a.hidden; c += blockDim.x) squares = fmaf(x[c], x[c], squares);
  squares = warp_sum(squares);
  if (lane_id() == 0) sums[warp_id()] = squares;
  __syncthreads();
  float sum = ((sums[0] + sums[1]) + sums[2]) + sums[3];
  float scale = 1.0f / sqrtf(sum / (float)a.hidden + a.eps);
  float* out = a.out + (u64)blockIdx.x * a.hidden;
  for (u32 c = threadIdx.x; c < a.hidden; c += blockDim.x) out[c] = x[c] * scale * a.weight[c];
}
