// Paged attention with sinks and a sliding window: q: [T, Nq, D] -> [T, Nq, D], D even, up to 128, any group of heads.
//
// Fast precision is in attention_mma.cuh. Exact, with the orders of src/cpu/attention.rs: keys are taken in segments of 64
// positions aligned to absolute position; segments are merged ascending, the sink joins once, last.
// - a score is the sum over d ascending, fused, from zero, times 1/sqrt(D); keys out of sight have -inf;
// - p = exp(score - maximum); their sum has one order: lane i of 16 sums keys i, i + 16, .. ascending, then the lanes
//   are added ascending;
// - each dimension's output is the sum over visible keys ascending of p * v, fused, from zero.
//
// A block is a row and up to 8 query heads of one kv head. Two ways to walk the segments, with the same bits:
// - attention: the block takes all of its row's segments, and merges as it goes;
// - attention_segments: a block a segment; attention_merge then merges what they left. For few rows with long pasts.
#include "ptx.cuh"

#define HEADS 8
#define DIM_MAX 128
#define ATTENTION_THREADS 128
// Outputs of a thread: HEADS * DIM_MAX / ATTENTION_THREADS.
#define OUTPUTS 8

// Rows of one sequence at consecutive positions, as src/cuda/inputs.rs has them.
struct Tile {
  u32 first, count, position, sequence;
};

struct AttentionArgs {
  const float* qkv;      // [T, cols], queries first
  const void* kv;        // of the layer: [block][kv head], keys [16][D] and values [16][D]
  const u32* tables;     // [sequences, stride]
  const u32* positions;  // [T]
  const u32* sequences;  // [T]
  const Tile* tiles;     // of some of the step's rows; fast only
  const float* sinks;    // [Nq]
  float* out;            // [T, Nq * D]
  float* partials;       // [T, Nq, segments, 2 + D]: maximum, sum, outputs; fast: [chunks, rows of tiles, Nq, 2 + D]
  u32 cols, heads, kv_heads, dim, stride;
  u32 window;    // 0: none
  u32 segments;  // of a row at most; exact only
  float scale;   // 1/sqrt(D)
  u32 share;     // chunks of a block; 0: all of a tile's; fast only
  u32 unused;
};

// Shared memory, in floats.
#define Q_AT 0                                     // [HEADS][D]
#define P_AT (HEADS * DIM_MAX)                     // [HEADS][SEGMENT]
#define WEIGHTS_AT (P_AT + HEADS * SEGMENT)        // [HEADS][2]
#define TILE_AT (WEIGHTS_AT + 2 * HEADS)           // [SEGMENT][D + 1]: keys, then values

// What a row sees: position - window < j <= position.
DEVICE u32 first_visible(u32 position, u32 window) {
#ifdef PLANT_WINDOW
  window += window != 0;
#endif
  return window == 0 || position + 1 < window ? 0 : position + 1 - window;
}

// The query heads of a block.
struct Heads {
  u32 kv_head, first, count;
};

DEVICE Heads heads_of(const AttentionArgs& a) {
  u32 group = a.heads / a.kv_heads, chunks = (group + HEADS - 1) / HEADS;
  u32 kv_head = blockIdx.y / chunks, first = blockIdx.y % chunks * HEADS;
  return {kv_head, kv_head * group + first, least(HEADS, group - first)};
}

// Copies the keys (part 0) or values (part 1) of positions start + low .. start + high.
DEVICE void load_tile(const AttentionArgs& a, float* smem, u32 kv_head, u32 part, u32 start, u32 low, u32 high) {
  const u32* table = a.tables + (u64)a.sequences[blockIdx.x] * a.stride;
  for (u32 i = threadIdx.x; i < (high - low) * a.dim; i += ATTENTION_THREADS) {
    u32 key = low + i / a.dim, d = i % a.dim, position = start + key;
    u64 slab = ((u64)table[position / BLOCK_SIZE] * a.kv_heads + kv_head) * 2 + part;
    const float* from = (const float*)a.kv + (slab * BLOCK_SIZE + position % BLOCK_SIZE) * a.dim;
    smem[TILE_AT + key * (a.dim + 1) + d] = from[d];
  }
}

DEVICE void load_queries(const AttentionArgs& a, float* smem, Heads heads) {
  const float* q = a.qkv + (u64)blockIdx.x * a.cols + heads.first * a.dim;
  for (u32 i = threadIdx.x; i < heads.count * a.dim; i += ATTENTION_THREADS) smem[Q_AT + i] = q[i];
}

// One segment. Thread 16h + i of head h (h < count) returns the head's maximum and sum; outputs are those of dimension
// o % D of head o / D with o = threadIdx.x + 128 k.
DEVICE void segment(const AttentionArgs& a, float* smem, Heads heads, u32 start, u32 low, u32 high, float& maximum,
                    float& sum, float (&outputs)[OUTPUTS]) {
  u32 dim = a.dim;
  __syncthreads();  // queries are there, and nobody reads the tile and the scores of the segment before
  load_tile(a, smem, heads.kv_head, 0, start, low, high);
#ifndef PLANT_BARRIER
  __syncthreads();
#endif
  // Scores: a thread has a key and every second head.
  u32 key = threadIdx.x % SEGMENT;
  for (u32 h = threadIdx.x / SEGMENT; h < heads.count; h += ATTENTION_THREADS / SEGMENT) {
    float score = -infinity();
    if (key >= low && key < high) {
      score = 0.0f;
      const float* k = smem + TILE_AT + key * (dim + 1);
      const float* q = smem + Q_AT + h * dim;
      for (u32 d = 0; d < dim; d++) score = fmaf(k[d], q[d], score);
      score *= a.scale;
    }
    smem[P_AT + h * SEGMENT + key] = score;
  }
  __syncthreads();
  load_tile(a, smem, heads.kv_head, 1, start, low, high);
  // Probabilities: a thread has a head and a lane of 16.
  u32 h = threadIdx.x / 16, lane = threadIdx.x % 16;
  float* p = smem + P_AT + h * SEGMENT;
  float highest = -infinity();
  if (h < heads.count)
    for (u32 i = lane; i < SEGMENT; i += 16) highest = larger(p[i], highest);
  maximum = -infinity();
  for (u32 i = 0; i < 16; i++) maximum = larger(__shfl_sync(FULL, highest, threadIdx.x / 16 * 16 + i), maximum);
  float mine = 0.0f;
  if (h < heads.count) {
    for (u32 i = lane; i < SEGMENT; i += 16) {
      p[i] = exp_own(p[i] - maximum);
      mine += p[i];
    }
  }
  sum = 0.0f;
  for (u32 i = 0; i < 16; i++) sum += __shfl_sync(FULL, mine, threadIdx.x / 16 * 16 + i);
  __syncthreads();
#pragma unroll
  for (u32 k = 0; k < OUTPUTS; k++) {
    u32 o = threadIdx.x + k * ATTENTION_THREADS;
    outputs[k] = 0.0f;
    if (o < heads.count * dim) {
      const float* v = smem + TILE_AT + o % dim;
      const float* weights = smem + P_AT + o / dim * SEGMENT;
      for (u32 j = low; j < high; j++) outputs[k] = fmaf(v[j * (dim + 1)], weights[j], outputs[k]);
    }
  }
}

// Maximum and sum of the segments so far.
struct alignas(8) Softmax {
  float maximum, sum;
};

// Takes in a segment; before and now are the weights of the outputs so far and of the segment's.
DEVICE void merge(Softmax& softmax, float maximum, float sum, float& before, float& now) {
  float joint = larger(maximum, softmax.maximum);
  before = exp_own(softmax.maximum - joint);
  now = exp_own(maximum - joint);
  softmax.sum = fmaf(sum, now, softmax.sum * before);
  softmax.maximum = joint;
}

// Takes in the sink; returns the outputs' factor.
DEVICE float finish(Softmax softmax, float sink) {
  float joint = larger(sink, softmax.maximum);
  float before = exp_own(softmax.maximum - joint);
  return before / fmaf(softmax.sum, before, exp_own(sink - joint));
}

DEVICE void attention(const AttentionArgs& a) {
  SHARED(bytes);
  float* smem = (float*)bytes;
  Heads heads = heads_of(a);
  u32 position = a.positions[blockIdx.x], first = first_visible(position, a.window), end = position + 1;
  load_queries(a, smem, heads);
  Softmax softmax = {-infinity(), 0.0f};
  float total[OUTPUTS] = {};
  u32 h = threadIdx.x / 16;
  for (u32 start = first / SEGMENT * SEGMENT; start < end; start += SEGMENT) {
    u32 low = most(first, start) - start, high = least(end - start, SEGMENT);
    float maximum, sum, outputs[OUTPUTS], before, now;
    segment(a, smem, heads, start, low, high, maximum, sum, outputs);
    merge(softmax, maximum, sum, before, now);
    if (threadIdx.x % 16 == 0) {
      smem[WEIGHTS_AT + 2 * h] = before;
      smem[WEIGHTS_AT + 2 * h + 1] = now;
    }
    __syncthreads();
#pragma unroll
    for (u32 k = 0; k < OUTPUTS; k++) {
      u32 o = threadIdx.x + k * ATTENTION_THREADS;
      if (o < heads.count * a.dim) {
        const float* weights = smem + WEIGHTS_AT + o / a.dim * 2;
        total[k] = fmaf(outputs[k], weights[1], total[k] * weights[0]);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x % 16 == 0 && h < heads.count) smem[WEIGHTS_AT + h] = finish(softmax, a.sinks[heads.first + h]);
  __syncthreads();
  float* out = a.out + ((u64)blockIdx.x * a.heads + heads.first) * a.dim;
#pragma unroll
  for (u32 k = 0; k < OUTPUTS; k++) {
    u32 o = threadIdx.x + k * ATTENTION_THREADS;
    if (o < heads.count * a.dim) out[o] = total[k] * smem[WEIGHTS_AT + o / a.dim];
  }
}

DEVICE void attention_segments(const AttentionArgs& a) {
  SHARED(bytes);
  float* smem = (float*)bytes;
  Heads heads = heads_of(a);
  u32 position = a.positions[blockIdx.x], first = first_visible(position, a.window), end = position + 1;
  u32 start = (first / SEGMENT + blockIdx.z) * SEGMENT;
  if (start >= end) return;
  load_queries(a, smem, heads);
  u32 low = most(first, start) - start, high = least(end - start, SEGMENT);
  float maximum, sum, outputs[OUTPUTS];
  segment(a, smem, heads, start, low, high, maximum, sum, outputs);
  u64 width = 2 + a.dim;
  float* partials = a.partials + (((u64)blockIdx.x * a.heads + heads.first) * a.segments + blockIdx.z) * width;
  u32 h = threadIdx.x / 16;
  if (threadIdx.x % 16 == 0 && h < heads.count) {
    partials[h * a.segments * width] = maximum;
    partials[h * a.segments * width + 1] = sum;
  }
#pragma unroll
  for (u32 k = 0; k < OUTPUTS; k++) {
    u32 o = threadIdx.x + k * ATTENTION_THREADS;
    if (o < heads.count * a.dim) partials[o / a.dim * a.segments * width + 2 + o % a.dim] = outputs[k];
  }
}

KERNEL(attention_f32, ATTENTION_THREADS, AttentionArgs) { attention(a); }
KERNEL(attention_segments_f32, ATTENTION_THREADS, AttentionArgs) { attention_segments(a); }

// A block a row and a head; a thread a dimension.
KERNEL(attention_merge, DIM_MAX, AttentionArgs) {
  u32 position = a.positions[blockIdx.x], first = first_visible(position, a.window);
  u32 count = position / SEGMENT - first / SEGMENT + 1, d = threadIdx.x;
  if (d >= a.dim) return;
  const float* partials = a.partials + ((u64)blockIdx.x * a.heads + blockIdx.y) * a.segments * (2 + a.dim);
  Softmax softmax = {-infinity(), 0.0f};
  float total = 0.0f;
  for (u32 s = 0; s < count; s++, partials += 2 + a.dim) {
    float before, now;
    merge(softmax, partials[0], partials[1], before, now);
    total = fmaf(partials[2 + d], now, total * before);
  }
  a.out[((u64)blockIdx.x * a.heads + blockIdx.y) * a.dim + d] = total * finish(softmax, a.sinks[blockIdx.y]);
}

#include "attention_mma.cuh"

#undef HEADS
#undef DIM_MAX
#undef OUTPUTS
#undef ATTENTION_THREADS
#undef Q_AT
#undef P_AT
#undef WEIGHTS_AT
#undef TILE_AT
