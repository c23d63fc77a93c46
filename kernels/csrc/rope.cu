// Rotation of queries and keys in place, half-split pairs (j, j + D/2), and the write of keys and values to the KV
// memory. qkv: [T, Nq*D + 2*Nkv*D]. A row has as many blocks as it has pairs for: a thread owns the one that it rotates or
// stores, so nothing is shared and memory is waited for once.
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

#define ROPE_THREADS 128

template <class E>
DEVICE void rotate_and_store(const RopeArgs& a) {
  u32 row = blockIdx.y, half = a.dim / 2;
  u32 pair = blockIdx.x * ROPE_THREADS + threadIdx.x, head = pair / half, j = pair % half;
  if (head >= a.heads + 2 * a.kv_heads) return;
  bool rotates = head < a.heads + a.kv_heads, stores = head >= a.heads;
  float* low = a.qkv + (u64)row * a.cols + head * a.dim + j;
  float* high = low + half;
  float x = *low, y = *high;
  u32 position = a.positions[row], sequence = a.sequences[row];
  if (rotates) {
    float cos = a.cos[(u64)row * half + j], sin = a.sin[(u64)row * half + j];
    float rotated = fmaf(x, cos, -(y * sin));
    y = fmaf(y, cos, x * sin);
    x = rotated;
    *low = x;
    *high = y;
  }
  if (!stores) return;
  u32 block = a.tables[(u64)sequence * a.stride + position / BLOCK_SIZE], kv_head = (head - a.heads) % a.kv_heads;
  // Keys of a head, then its values.
  u64 at = ((u64)block * a.kv_heads + kv_head) * 2 + (rotates ? 0 : 1);
  E* to = (E*)a.kv + (at * BLOCK_SIZE + position % BLOCK_SIZE) * a.dim + j;
  store(to, x);
  store(to + half, y);
}

KERNEL(rope_f32, ROPE_THREADS, RopeArgs) { rotate_and_store<float>(a); }
KERNEL(rope_bf16, ROPE_THREADS, RopeArgs) { rotate_and_store<u16>(a); }

#undef ROPE_THREADS
