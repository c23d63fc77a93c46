// Rotation of queries and keys in place, half-split pairs (j, j + D/2), and the write of keys and values to the KV
// memory. qkv: [T, Nq*D + 2*Nkv*D]. Blocks of a row in x, of its units in y; a thread owns the pairs it rotates, so
// nothing is shared.
//
// A unit is what a thread loads at once, before it stores any: four pairs where halves of heads are whole fours (16
// bytes of each half, of the cosines and of the sines), or four values; elsewhere one.
//
// a' = fma(a, cos, -(b sin)), b' = fma(b, cos, a sin), with cosines and sines made on the host.
// KV memory of a layer: [block][kv head], there keys [16][D] and then values [16][D].
#include "common.cuh"

#define ROPE_THREADS 128

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

// Where the row's keys of the first kv head go; its values are 16 rows further on.
template <class E>
DEVICE E* place_of(const RopeArgs& a, u32 row) {
  u32 position = a.positions[row];
  u32 block = a.tables[(u64)a.sequences[row] * a.stride + position / BLOCK_SIZE];
  return (E*)a.kv + (u64)block * a.kv_heads * 2 * BLOCK_SIZE * a.dim + (u64)(position % BLOCK_SIZE) * a.dim;
}

// Writes a unit to the KV memory.
template <class E, u32 N>
DEVICE void keep(E* to, Several<float, N> from) {
  Several<E, N> unit;
#pragma unroll
  for (u32 i = 0; i < N; i++) store(&unit.at[i], from.at[i]);
  *(Several<E, N>*)to = unit;
}

template <class E, u32 N>
DEVICE void rotate_and_store(const RopeArgs& a) {
  typedef Several<float, N> Unit;
  u32 row = blockIdx.x, half = a.dim / 2, units = half / N, rotated = (a.heads + a.kv_heads) * units;
  float* qkv = a.qkv + (u64)row * a.cols;
  u32 count = rotated + a.kv_heads * 2 * units;
  for (u32 i = blockIdx.y * ROPE_THREADS + threadIdx.x; i < count; i += gridDim.y * ROPE_THREADS) {
    if (i >= rotated) {
      u32 head = (i - rotated) / (2 * units), j = (i - rotated) % (2 * units) * N;
      Unit value = *(const Unit*)(qkv + (a.heads + a.kv_heads + head) * a.dim + j);
      keep<E, N>(place_of<E>(a, row) + (u64)(2 * head + 1) * BLOCK_SIZE * a.dim + j, value);
      continue;
    }
    u32 head = i / units, j = i % units * N;
    float* low = qkv + head * a.dim + j;
    float* high = low + half;
    Unit x = *(const Unit*)low, y = *(const Unit*)high;
    Unit cos = *(const Unit*)(a.cos + (u64)row * half + j), sin = *(const Unit*)(a.sin + (u64)row * half + j);
    // Looked up while the loads are under way.
    E* key = nullptr;
    if (head >= a.heads) key = place_of<E>(a, row) + (u64)(head - a.heads) * 2 * BLOCK_SIZE * a.dim + j;
#pragma unroll
    for (u32 k = 0; k < N; k++) {
      float left = x.at[k], right = y.at[k];
      x.at[k] = fmaf(left, cos.at[k], -(right * sin.at[k]));
      y.at[k] = fmaf(right, cos.at[k], left * sin.at[k]);
    }
    *(Unit*)low = x;
    *(Unit*)high = y;
    if (key) {
      keep<E, N>(key, x);
      keep<E, N>(key + half, y);
    }
  }
}

template <class E>
DEVICE void rope(const RopeArgs& a) {
  if (a.dim % 8 == 0) rotate_and_store<E, 4>(a);
  else rotate_and_store<E, 1>(a);
}

KERNEL(rope_f32, ROPE_THREADS, RopeArgs) { rope<float>(a); }
KERNEL(rope_bf16, ROPE_THREADS, RopeArgs) { rope<u16>(a); }
