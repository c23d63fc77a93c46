// Rotation of queries and keys in place, half-split pairs (j, j + D/2), and the write of keys and values to the KV
// memory. qkv: [T, Nq*D + 2*Nkv*D]. A block a row; a thread owns the pairs it rotates, so nothing is shared.
//
// a' = fma(a, cos, -(b sin)), b' = fma(b, cos, a sin), with cosines and sines made on the host.
// KV memory of a layer: [block][kv head], there keys [16][D] and then values [16][D].
#include "common.cuh"

struct RopeArgs {
  float* qkv;
  const float* cos;  // [T, D/2]
  const float* sin;
  void* kv;  // of the layer
  const u32* tables;     // [sequences, stride]
  const u32* positions;  // [T]
  const u32* sequences;  // [T]
  u32 cols, heads, kv_heads, dim, stride, unused;
};

template <class E>
DEVICE void rotate_and_store(const RopeArgs& a) {
  u32 row = blockIdx.x, half = a.dim / 2;
  float* qkv = a.qkv + (u64)row * a.cols;
  u32 position = a.positions[row];
  u32 block = a.tables[(u64)a.sequences[row] * a.stride + position / BLOCK_SIZE];
  E* kv = (E*)a.kv + (u64)block * a.kv_heads * 2 * BLOCK_SIZE * a.dim + (u64)(position % BLOCK_SIZE) * a.dim;
  for (u32 i = threadIdx.x; i < (a.heads + a.kv_heads) * half; i += blockDim.x) {
    u32 head = i / half, j = i % half;
    float cos = a.cos[(u64)row * half + j], sin = a.sin[(u64)row * half + j];
    float* low = qkv + head * a.dim + j;
    float* high = low + half;
    float x = *low, y = *high;
    *low = fmaf(x, cos, -(y * sin));
    *high = fmaf(y, cos, x * sin);
    if (head >= a.heads) {
      E* key = kv + (u64)(head - a.heads) * 2 * BLOCK_SIZE * a.dim;
      store(key + j, *low);
      store(key + j + half, *high);
    }
  }
  const float* values = qkv + (a.heads + a.kv_heads) * a.dim;
  for (u32 i = threadIdx.x; i < a.kv_heads * a.dim; i += blockDim.x)
    store(kv + (u64)(i / a.dim * 2 + 1) * BLOCK_SIZE * a.dim + i % a.dim, values[i]);
}

KERNEL(rope_f32, 128, RopeArgs) { rotate_and_store<float>(a); }
KERNEL(rope_bf16, 128, RopeArgs) { rotate_and_store<u16>(a); }
