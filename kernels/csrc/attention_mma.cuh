// The fast half of attention.cu: mma over bf16 keys, values and queries, probabilities rounded to bf16.
//
// A block has a tile: up to 8 rows (4 where D > 64) of one sequence at consecutive positions, and up to 8 query heads of
// one kv head; so keys and values are read once for all of them. The 8 query heads of a row are mma's N, whatever the
// number of rows: a row's result is the same alone or in a tile.
// - scores: warp w has keys 16w..16w + 16 of a segment, D ascending by 16; times 1/sqrt(D) in f32.
// - a head's maximum and sum of a segment: lane i of 16 has keys i, i + 16, ..; a butterfly adds the lanes. What is summed
//   is what is multiplied, the rounded probabilities.
// - outputs: warp w has dimensions 16w..16w + 16 (and 64 more), keys ascending by 16, from zero.
// A key that a row does not see has probability zero; a segment of which a row sees nothing is left out for it.

#define MMA_WARPS 4
#define MMA_PAIRS 8       // query heads of a row
#define P_STRIDE (SEGMENT + 8)
#define S_STRIDE (SEGMENT + 4)

// A tile's place in shared memory; DT: dimensions of a warp, in sixteens.
template <u32 DT>
struct MmaShared {
  static const u32 ROWS = 8 / DT, PAIRS = ROWS * MMA_PAIRS;
  u32 dims, stride;  // D rounded up to 16, and 8 more: no bank conflicts
  u16 *q, *keys, *p;
  float *scores, *weights;

  DEVICE MmaShared(u8* smem, u32 dim) {
    dims = (dim + 15) / 16 * 16;
    stride = dims + 8;
    q = (u16*)smem;                             // [PAIRS][stride]
    keys = q + PAIRS * stride;                  // [SEGMENT][stride]: keys, then values
    p = keys + SEGMENT * stride;                // [PAIRS][P_STRIDE]
    scores = (float*)(p + PAIRS * P_STRIDE);    // [PAIRS][S_STRIDE]
    weights = scores + PAIRS * S_STRIDE;        // [PAIRS][2]
  }
};

// The keys of a segment that a row sees, relative to its start; none if low >= high.
struct Sight {
  u32 low, high;
};

DEVICE Sight sight_of(const AttentionArgs& a, u32 position, u32 start) {
  u32 first = first_visible(position, a.window);
  if (position < start || first >= start + SEGMENT) return {0, 0};
  return {most(first, start) - start, least(position + 1 - start, SEGMENT)};
}

template <u32 DT>
DEVICE void load_tile_queries(const AttentionArgs& a, MmaShared<DT>& s, Tile tile, Heads heads) {
  for (u32 i = threadIdx.x; i < MmaShared<DT>::PAIRS * s.dims; i += ATTENTION_THREADS) {
    u32 pair = i / s.dims, d = i % s.dims, row = pair / MMA_PAIRS, head = pair % MMA_PAIRS;
    bool there = row < tile.count && head < heads.count && d < a.dim;
    const float* q = a.qkv + (u64)(tile.first + row) * a.cols + (heads.first + head) * a.dim;
    s.q[pair * s.stride + d] = there ? narrow(q[d]) : 0;
  }
}

// Keys (part 0) or values (part 1) of a segment; zeros where no row of the tile looks.
template <u32 DT>
DEVICE void load_tile_keys(const AttentionArgs& a, MmaShared<DT>& s, Tile tile, u32 kv_head, u32 part, u32 start,
                           Sight sight) {
  const u32* table = a.tables + (u64)a.sequences[tile.first] * a.stride;
  // Eight numbers at once where rows are on borders of 16 bytes.
  u32 width = a.dim % 8 == 0 ? 8 : 1;
  for (u32 i = threadIdx.x; i < SEGMENT * (s.dims / width); i += ATTENTION_THREADS) {
    u32 key = i / (s.dims / width), d = i % (s.dims / width) * width, position = start + key;
    u16* to = s.keys + key * s.stride + d;
    bool there = key >= sight.low && key < sight.high && d < a.dim;
    const u16* from = nullptr;
    if (there) {
      u64 slab = ((u64)table[position / BLOCK_SIZE] * a.kv_heads + kv_head) * 2 + part;
      from = (const u16*)a.kv + (slab * BLOCK_SIZE + position % BLOCK_SIZE) * a.dim + d;
    }
    if (width == 8) {
      *(uint4*)to = there ? *(const uint4*)from : uint4{0, 0, 0, 0};
    } else {
      *to = there ? *from : 0;
    }
  }
}

// One segment. outputs[r * DT + j] are row r's, for dimensions 16 (w + 4j) + g and g + 8 and heads 2t, 2t + 1. A thread
// returns maximum and sum of pairs (row r, head threadIdx.x / 16).
template <u32 DT>
DEVICE void segment_mma(const AttentionArgs& a, MmaShared<DT>& s, Tile tile, Heads heads, u32 position, u32 start,
                        float (&maximum)[8 / DT], float (&sum)[8 / DT], float (&outputs)[8][4]) {
  const u32 ROWS = 8 / DT, STEPS = 4 * DT;
  u32 t = lane_id() % 4, g = lane_id() / 4, w = warp_id(), matrix = lane_id() / 8, line = lane_id() % 8;
  // What any row of the tile sees: the first row sees furthest back, the last one furthest on.
  Sight all = {most(first_visible(position, a.window), start) - start, least(position + tile.count - start, SEGMENT)};
  __syncthreads();  // queries are there, and nobody reads the segment before
  load_tile_keys<DT>(a, s, tile, heads.kv_head, 0, start, all);
#ifndef PLANT_BARRIER
  __syncthreads();
#endif
  u32 steps = s.dims / 16, left[STEPS][4];
#pragma unroll
  for (u32 k = 0; k < STEPS; k++)
    if (k < steps) ldmatrix_x4(left[k], s.keys + (w * 16 + matrix % 2 * 8 + line) * s.stride + k * 16 + matrix / 2 * 8);
#pragma unroll
  for (u32 r = 0; r < ROWS; r++) {
    Sight sight = sight_of(a, position + r, start);
    if (r >= tile.count || sight.low >= sight.high) continue;
    float c[4] = {};
    const u16* q = s.q + (r * MMA_PAIRS + g) * s.stride + 2 * t;
#pragma unroll
    for (u32 k = 0; k < STEPS; k++)
      if (k < steps) mma_bf16(c, left[k], *(const u32*)(q + k * 16), *(const u32*)(q + k * 16 + 8));
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      u32 key = w * 16 + g + i / 2 * 8, head = 2 * t + i % 2;
      bool seen = key >= sight.low && key < sight.high;
      s.scores[(r * MMA_PAIRS + head) * S_STRIDE + key] = seen ? c[i] * a.scale : -infinity();
    }
  }
  __syncthreads();
  load_tile_keys<DT>(a, s, tile, heads.kv_head, 1, start, all);
#pragma unroll
  for (u32 r = 0; r < ROWS; r++) {
    Sight sight = sight_of(a, position + r, start);
    maximum[r] = -infinity();
    sum[r] = 0.0f;
    if (r >= tile.count || sight.low >= sight.high) continue;
    u32 pair = r * MMA_PAIRS + threadIdx.x / 16, lane = threadIdx.x % 16;
    const float* scores = s.scores + pair * S_STRIDE;
    for (u32 i = lane; i < SEGMENT; i += 16) maximum[r] = larger(scores[i], maximum[r]);
    for (u32 step = 8; step > 0; step /= 2) {
      float other = __shfl_xor_sync(FULL, maximum[r], step);
      maximum[r] = larger(other, maximum[r]);
    }
    for (u32 i = lane; i < SEGMENT; i += 16) {
      u16 p = narrow(exp_own(scores[i] - maximum[r]));
      s.p[pair * P_STRIDE + i] = p;
      sum[r] += widen(p);
    }
    for (u32 step = 8; step > 0; step /= 2) sum[r] += __shfl_xor_sync(FULL, sum[r], step);
  }
  __syncthreads();
#pragma unroll
  for (u32 j = 0; j < DT; j++) {
    u32 tile_of_dims = w + MMA_WARPS * j;
    if (tile_of_dims * 16 >= s.dims) continue;
    u32 values[SEGMENT / 16][4];
#pragma unroll
    for (u32 k = 0; k < SEGMENT / 16; k++)
      ldmatrix_x4_transposed(values[k], s.keys + (k * 16 + matrix / 2 * 8 + line) * s.stride + tile_of_dims * 16 +
                                            matrix % 2 * 8);
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
      Sight sight = sight_of(a, position + r, start);
      float(&c)[4] = outputs[r * DT + j];
      c[0] = c[1] = c[2] = c[3] = 0.0f;
      if (r >= tile.count || sight.low >= sight.high) continue;
      const u16* p = s.p + (r * MMA_PAIRS + g) * P_STRIDE + 2 * t;
#pragma unroll
      for (u32 k = 0; k < SEGMENT / 16; k++)
        mma_bf16(c, values[k], *(const u32*)(p + k * 16), *(const u32*)(p + k * 16 + 8));
    }
  }
}

template <u32 DT>
DEVICE void attention_mma(const AttentionArgs& a) {
  const u32 ROWS = 8 / DT;
  SHARED(smem);
  MmaShared<DT> s(smem, a.dim);
  Tile tile = a.tiles[blockIdx.x];
  Heads heads = heads_of(a);
  u32 position = a.positions[tile.first], end = position + tile.count;
  u32 t = lane_id() % 4, g = lane_id() / 4, lead = threadIdx.x / 16;
  load_tile_queries<DT>(a, s, tile, heads);
  Softmax softmax[ROWS];
#pragma unroll
  for (u32 r = 0; r < ROWS; r++) softmax[r] = {-infinity(), 0.0f};
  float total[8][4] = {};
  for (u32 start = first_visible(position, a.window) / SEGMENT * SEGMENT; start < end; start += SEGMENT) {
    float maximum[ROWS], sum[ROWS], outputs[8][4];
    segment_mma<DT>(a, s, tile, heads, position, start, maximum, sum, outputs);
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
      Sight sight = sight_of(a, position + r, start);
      if (r >= tile.count || sight.low >= sight.high) continue;
      float before, now;
      merge(softmax[r], maximum[r], sum[r], before, now);
      if (threadIdx.x % 16 == 0) {
        s.weights[2 * (r * MMA_PAIRS + lead)] = before;
        s.weights[2 * (r * MMA_PAIRS + lead) + 1] = now;
      }
    }
    __syncthreads();
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
      Sight sight = sight_of(a, position + r, start);
      if (r >= tile.count || sight.low >= sight.high) continue;
#pragma unroll
      for (u32 j = 0; j < DT; j++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          const float* weights = s.weights + 2 * (r * MMA_PAIRS + 2 * t + i % 2);
          total[r * DT + j][i] = fmaf(outputs[r * DT + j][i], weights[1], total[r * DT + j][i] * weights[0]);
        }
    }
  }
  __syncthreads();
#pragma unroll
  for (u32 r = 0; r < ROWS; r++)
    if (threadIdx.x % 16 == 0 && lead < heads.count)
      s.weights[r * MMA_PAIRS + lead] = finish(softmax[r], a.sinks[heads.first + lead]);
  __syncthreads();
#pragma unroll
  for (u32 r = 0; r < ROWS; r++) {
    if (r >= tile.count) continue;
#pragma unroll
    for (u32 j = 0; j < DT; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        u32 d = (warp_id() + MMA_WARPS * j) * 16 + g + i / 2 * 8, head = 2 * t + i % 2;
        if (d >= a.dim || head >= heads.count) continue;
        a.out[((u64)(tile.first + r) * a.heads + heads.first + head) * a.dim + d] =
            total[r * DT + j][i] * s.weights[r * MMA_PAIRS + head];
      }
  }
}

// A block a segment of the tile's; attention_merge does the rest.
template <u32 DT>
DEVICE void attention_segments_mma(const AttentionArgs& a) {
  const u32 ROWS = 8 / DT;
  SHARED(smem);
  MmaShared<DT> s(smem, a.dim);
  Tile tile = a.tiles[blockIdx.x];
  Heads heads = heads_of(a);
  u32 position = a.positions[tile.first];
  u32 start = (first_visible(position, a.window) / SEGMENT + blockIdx.z) * SEGMENT;
  if (start >= position + tile.count) return;
  u32 t = lane_id() % 4, g = lane_id() / 4, lead = threadIdx.x / 16;
  load_tile_queries<DT>(a, s, tile, heads);
  float maximum[ROWS], sum[ROWS], outputs[8][4];
  segment_mma<DT>(a, s, tile, heads, position, start, maximum, sum, outputs);
#pragma unroll
  for (u32 r = 0; r < ROWS; r++) {
    Sight sight = sight_of(a, position + r, start);
    if (r >= tile.count || sight.low >= sight.high) continue;
    u64 width = 2 + a.dim, index = start / SEGMENT - first_visible(position + r, a.window) / SEGMENT;
    float* partials = a.partials + (((u64)(tile.first + r) * a.heads + heads.first) * a.segments + index) * width;
    if (threadIdx.x % 16 == 0 && lead < heads.count) {
      partials[lead * a.segments * width] = maximum[r];
      partials[lead * a.segments * width + 1] = sum[r];
    }
#pragma unroll
    for (u32 j = 0; j < DT; j++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        u32 d = (warp_id() + MMA_WARPS * j) * 16 + g + i / 2 * 8, head = 2 * t + i % 2;
        if (d < a.dim && head < heads.count) partials[head * a.segments * width + 2 + d] = outputs[r * DT + j][i];
      }
  }
}

KERNEL(attention_bf16_64, ATTENTION_THREADS, AttentionArgs) { attention_mma<1>(a); }
KERNEL(attention_bf16_128, ATTENTION_THREADS, AttentionArgs) { attention_mma<2>(a); }
KERNEL(attention_segments_bf16_64, ATTENTION_THREADS, AttentionArgs) { attention_segments_mma<1>(a); }
KERNEL(attention_segments_bf16_128, ATTENTION_THREADS, AttentionArgs) { attention_segments_mma<2>(a); }

#undef MMA_WARPS
#undef MMA_PAIRS
#undef P_STRIDE
#undef S_STRIDE
