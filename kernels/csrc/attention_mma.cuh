// The fast half of attention.cu: mma over bf16 queries, keys and values, probabilities rounded to bf16.
//
// A block has a tile of rows of one sequence at consecutive positions, and up to 8 query heads of one kv head. Pairs of
// a row and a head are mma's M: what a row gives never depends on the rows beside it. Two kernels, with the same order:
// - few: a row, one warp; for decoding, where keys and values are read once and there is little else to do;
// - many: 16 rows (8 where D > 64), four warps; keys and values are read once for all of them.
//
// Order. Keys are taken in steps of SEGMENT positions and chunks of CHUNK, both aligned to absolute position.
// - A score is the sum over D ascending by 16, times log2(e) / sqrt(D) in f32; keys out of sight have -inf.
// - Within a chunk, steps follow each other. A row has a base, which becomes a step's maximum where that is higher by more
//   than RAISE; sums and outputs so far are then scaled by 2^(old - new). Weights are 2^(score - base), rounded to bf16;
//   mma adds them, times ones and times values, by 16 keys ascending.
// - Chunks are joined ascending, the sink last.
// What a row does not see adds zeros, and never raises a base. A block walks all chunks of its tile and joins as it goes, or,
// for few tiles with long pasts, leaves those of its share in partials, and attention_join joins them.
//
// Keys and values come through a ring of stages by asynchronous copies, in turn the keys and the values of a step. In a
// stage, piece p (8 numbers) of key k lies at place p ^ k % 8: eight keys' pieces are in different banks.
#define CHUNK 256  // as src/cuda/choose.rs
#define RING 4
#define MANY_WARPS 4
#define RAISE 8.0f
#define ONES 0x3f803f80u
#define LOG2_E 1.44269504f

// Turns the parts of a walk, keys and values of each step, into stages; DT: dimensions of a head, in sixty-fours. ONCE: no
// other block reads the same.
template <u32 THREADS, u32 DT, bool ONCE>
struct Stream {
  static const u32 LINE = 64 * DT, PIECES = 8 * DT, STAGE = SEGMENT * LINE;
  static const u32 KEYS = THREADS / PIECES, TURNS = SEGMENT / KEYS;  // keys of a turn of all threads
  static_assert(BLOCK_SIZE % KEYS == 0, "a turn lies in one block");

  u16* ring;
  const u16* kv;       // of the kv head: this thread's piece of its key of a turn, in block 0
  const uint4* table;  // blocks of a step
  u64 policy;
  u32 block;       // numbers of a block
  u32 first, end;  // positions that some row sees
  u32 dim, step, parts, loaded;
  uint4 blocks, ahead;

  DEVICE Stream(const AttentionArgs& a, u8* smem, const Tile& tile, u32 kv_head, u32 from, u32 to)
      : ring((u16*)smem), policy(ONCE ? read_once() : 0), dim(a.dim), step(from), parts(2 * (to - from)), loaded(0) {
    table = (const uint4*)(a.tables + (u64)tile.sequence * a.stride);
    ahead = table[step];
    kv = (const u16*)a.kv + ((u64)kv_head * 2 * BLOCK_SIZE + threadIdx.x / PIECES) * dim + threadIdx.x % PIECES * 8;
    block = a.kv_heads * 2 * BLOCK_SIZE * dim;
    first = first_visible(tile.position, a.window);
    end = tile.position + tile.count;
#pragma unroll 1
    for (u32 i = 0; i < RING - 1; i++) load();
  }

  // Begins the next part, if there is one.
  DEVICE void load() {
    if (loaded < parts) {
      u32 part = loaded % 2, start = (step + loaded / 2) * SEGMENT;
      if (part == 0) {
        blocks = ahead;
        if (loaded + 2 < parts) ahead = table[step + loaded / 2 + 1];
      }
      u16* stage = ring + loaded % RING * STAGE;
      if (start >= first && start + SEGMENT <= end && dim == LINE)
        load_whole(stage, part);
      else
        load_some(stage, part, start);
    }
    loaded++;
    copies_commit();
  }

  DEVICE void load_whole(u16* stage, u32 part) {
    u32 names[4] = {blocks.x, blocks.y, blocks.z, blocks.w};
#pragma unroll
    for (u32 turn = 0; turn < TURNS; turn++) {
      u32 key = turn * KEYS + threadIdx.x / PIECES;
      const u16* from = kv + (u64)names[turn * KEYS / BLOCK_SIZE] * block + part * (BLOCK_SIZE * LINE);
      from += turn * KEYS % BLOCK_SIZE * LINE;
      u16* to = stage + threadIdx.x / PIECES * LINE + (threadIdx.x % PIECES ^ key % 8) * 8 + turn * KEYS * LINE;
      if (ONCE)
        copy_async_once(to, from, policy);
      else
        copy_async(to, from);
    }
  }

  // Zeros where no row of the tile looks.
  DEVICE void load_some(u16* stage, u32 part, u32 start) {
    u32 d = threadIdx.x % PIECES * 8;
#pragma unroll 1
    for (u32 turn = 0; turn < TURNS; turn++) {
      u32 key = turn * KEYS + threadIdx.x / PIECES, position = start + key;
      bool there = position >= first && position < end;
      u64 name = there ? ((const u32*)table)[position / BLOCK_SIZE] : 0;
      const u16* from = kv + name * block + (part * BLOCK_SIZE + turn * KEYS % BLOCK_SIZE) * dim;
      u16* to = stage + key * LINE + (threadIdx.x % PIECES ^ key % 8) * 8;
      if (dim % 8 == 0) {
        there = there && d < dim;
        copy_async_or_zeros(to, there ? from : kv, there);
      } else {
        // Rows are not on borders of 16 bytes.
        for (u32 i = 0; i < 8; i++) to[i] = there && d + i < dim ? from[i] : 0;
      }
    }
  }

  // The stage of the next part; the one taken before is given back.
  DEVICE const u16* take() {
#ifndef PLANT_BARRIER
    copies_wait<RING - 2>();
    __syncthreads();
#endif
    load();
    return ring + (loaded - RING) % RING * STAGE;
  }
};

// Takes in a chunk, whose base is its maximum; before and now are the weights of the outputs so far and of the chunk's.
DEVICE void join(Softmax& softmax, float maximum, float sum, float& before, float& now) {
  float joint = fmaxf(softmax.maximum, maximum), from = joint == -infinity() ? 0.0f : joint;
  before = exp2_fast(softmax.maximum - from);
  now = exp2_fast(maximum - from);
  softmax.sum = fmaf(sum, now, softmax.sum * before);
  softmax.maximum = joint;
}

// Takes in the sink; returns the outputs' factor.
DEVICE float join_sink(Softmax softmax, float sink) {
  sink *= LOG2_E;
  float joint = fmaxf(sink, softmax.maximum);
  float before = exp2_fast(softmax.maximum - joint);
  return before / fmaf(softmax.sum, before, exp2_fast(sink - joint));
}

// A block of WARPS warps, each with TILES times 16 pairs, of which HALVES times 8 are used: 8 heads of a row each.
template <u32 WARPS, u32 TILES, u32 HALVES, u32 DT>
DEVICE void attention_mma(const AttentionArgs& a) {
  const u32 THREADS = WARPS * WARP, ROWS = WARPS * TILES * HALVES;
  const u32 DIM_STEPS = 4 * DT, DIM_TILES = 8 * DT, KEY_TILES = SEGMENT / 8, STEPS = CHUNK / SEGMENT;
  SHARED(smem);
  // The last tiles see most, and begin first.
  u32 index = gridDim.x - 1 - blockIdx.x;
  Tile tile = a.tiles[index];
  Heads heads = heads_of(a);
  u32 step = first_visible(tile.position, a.window) / SEGMENT, last = (tile.position + tile.count - 1) / SEGMENT + 1;
  if (a.share != 0) {
    u32 begin = (step / STEPS + blockIdx.z * a.share) * STEPS;
    step = most(step, begin);
    last = least(last, begin + a.share * STEPS);
    if (step >= last) return;
  }
  Stream<THREADS, DT, HALVES == 1> stream(a, smem, tile, heads.kv_head, step, last);

  u32 t = lane_id() % 4, g = lane_id() / 4, matrix = lane_id() / 8, line = lane_id() % 8;
  // The tile's row of a warp's half of 16 pairs; this lane has its head g.
  u32 row_base = warp_id() * TILES * HALVES;
  u32 queries[TILES][DIM_STEPS][4] = {};
#pragma unroll
  for (u32 i = 0; i < TILES; i++)
#pragma unroll
    for (u32 half = 0; half < HALVES; half++) {
      u32 row = row_base + i * HALVES + half;
      if (row >= tile.count || g >= heads.count) continue;
      const float* q = a.qkv + (u64)(tile.first + row) * a.cols + (heads.first + g) * a.dim;
#pragma unroll
      for (u32 k = 0; k < DIM_STEPS; k++)
#pragma unroll
        for (u32 high = 0; high < 2; high++) {
          u32 d = k * 16 + high * 8 + 2 * t;
          float low = d < a.dim ? q[d] : 0.0f;
          queries[i][k][half + 2 * high] = pack_bf16(low, d + 1 < a.dim ? q[d + 1] : 0.0f);
        }
    }

  float scale = a.scale * LOG2_E;
  // Outputs of the chunks joined so far: [number][THREADS], each thread's own.
  float* totals = (float*)(smem + RING * SEGMENT * 64 * DT * 2) + threadIdx.x;
  Softmax joined[TILES][HALVES];
  float bases[TILES][HALVES], sums[TILES][4] = {}, outputs[TILES][DIM_TILES][4] = {};
#pragma unroll
  for (u32 i = 0; i < TILES; i++)
#pragma unroll
    for (u32 half = 0; half < HALVES; half++) {
      joined[i][half] = {-infinity(), 0.0f};
      bases[i][half] = -infinity();
    }
  if (a.share == 0) {
#pragma unroll
    for (u32 n = 0; n < TILES * DIM_TILES * 2 * HALVES; n++) totals[n * THREADS] = 0.0f;
  }

  for (; step < last; step++) {
    const u16* keys = stream.take();
    float scores[TILES][KEY_TILES][4];
#pragma unroll
    for (u32 k = 0; k < DIM_STEPS; k++)
#pragma unroll
      for (u32 n = 0; n < KEY_TILES; n += 2) {
        u32 b[4];
        ldmatrix_x4(b, keys + ((n + matrix / 2) * 8 + line) * (64 * DT) + ((2 * k + matrix % 2) ^ line) * 8);
#pragma unroll
        for (u32 i = 0; i < TILES; i++) {
          if (k == 0) {
            mma_bf16_first(scores[i][n], queries[i][k], b[0], b[1]);
            mma_bf16_first(scores[i][n + 1], queries[i][k], b[2], b[3]);
          } else {
            mma_bf16(scores[i][n], queries[i][k], b[0], b[1]);
            mma_bf16(scores[i][n + 1], queries[i][k], b[2], b[3]);
          }
        }
      }

    u32 start = step * SEGMENT;
    bool whole = start >= first_visible(tile.position + tile.count - 1, a.window) &&
                 start + SEGMENT <= tile.position + 1;
    if (!whole) {
#pragma unroll
      for (u32 i = 0; i < TILES; i++)
#pragma unroll
        for (u32 half = 0; half < HALVES; half++) {
          u32 position = tile.position + row_base + i * HALVES + half;
          u32 first = first_visible(position, a.window);
#pragma unroll
          for (u32 n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
              u32 key = start + n * 8 + 2 * t + e;
              if (key < first || key > position) scores[i][n][2 * half + e] = -infinity();
            }
        }
    }

    u32 weights[TILES][KEY_TILES][2] = {};
#pragma unroll
    for (u32 i = 0; i < TILES; i++) {
      float scaled[2] = {1.0f, 1.0f};
#pragma unroll
      for (u32 half = 0; half < HALVES; half++) {
        float highest = -infinity();
#pragma unroll
        for (u32 n = 0; n < KEY_TILES; n++)
          highest = fmaxf(highest, fmaxf(scores[i][n][2 * half], scores[i][n][2 * half + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(FULL, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(FULL, highest, 2)) * scale;
        float& base = bases[i][half];
        if (highest > base + RAISE) {
          // Nothing was added yet without a base.
          if (base != -infinity()) scaled[half] = exp2_fast(base - highest);
          base = highest;
        }
        float from = base == -infinity() ? 0.0f : base;
#pragma unroll
        for (u32 n = 0; n < KEY_TILES; n++)
          weights[i][n][half] = pack_bf16(exp2_fast(fmaf(scores[i][n][2 * half], scale, -from)),
                                          exp2_fast(fmaf(scores[i][n][2 * half + 1], scale, -from)));
      }
      // Seldom: times one is as it was.
      if (__ballot_sync(FULL, scaled[0] != 1.0f || scaled[1] != 1.0f) != 0) {
#pragma unroll
        for (u32 e = 0; e < 2 * HALVES; e++) {
          sums[i][e] *= scaled[e / 2];
#pragma unroll
          for (u32 n = 0; n < DIM_TILES; n++) outputs[i][n][e] *= scaled[e / 2];
        }
      }
    }

    const u16* values = stream.take();
#pragma unroll
    for (u32 k = 0; k < SEGMENT / 16; k++) {
      u32 left[TILES][4];
#pragma unroll
      for (u32 i = 0; i < TILES; i++) {
#pragma unroll
        for (u32 e = 0; e < 4; e++) left[i][e] = weights[i][2 * k + e / 2][e % 2];
        mma_bf16(sums[i], left[i], ONES, ONES);
      }
#pragma unroll
      for (u32 n = 0; n < DIM_TILES; n += 2) {
        u32 b[4];
        ldmatrix_x4_transposed(
            b, values + (k * 16 + matrix % 2 * 8 + line) * (64 * DT) + ((n + matrix / 2) ^ line) * 8);
#pragma unroll
        for (u32 i = 0; i < TILES; i++) {
          mma_bf16(outputs[i][n], left[i], b[0], b[1]);
          mma_bf16(outputs[i][n + 1], left[i], b[2], b[3]);
        }
      }
    }

    if ((step + 1) % STEPS != 0 && step + 1 != last) continue;
    // The end of a chunk.
#pragma unroll
    for (u32 i = 0; i < TILES; i++)
#pragma unroll
      for (u32 half = 0; half < HALVES; half++) {
        u32 row = row_base + i * HALVES + half;
        if (a.share == 0) {
          float before, now;
          join(joined[i][half], bases[i][half], sums[i][2 * half], before, now);
          float* total = totals + (i * HALVES + half) * DIM_TILES * 2 * THREADS;
#pragma unroll
          for (u32 n = 0; n < DIM_TILES * 2; n++)
            total[n * THREADS] = fmaf(outputs[i][n / 2][2 * half + n % 2], now, total[n * THREADS] * before);
        } else {
          u32 position = tile.position + row, chunk = step / STEPS;
          u32 first = first_visible(position, a.window) / CHUNK;
          bool seen = row < tile.count && chunk >= first && chunk <= position / CHUNK;
          if (seen && g < heads.count) {
            u64 pair = ((u64)index * ROWS + row) * a.heads + heads.first + g;
            float* partial = a.partials + (pair * a.segments + chunk - first) * (2 + a.dim);
            if (t == 0) {
              partial[0] = bases[i][half];
              partial[1] = sums[i][2 * half];
            }
#pragma unroll
            for (u32 n = 0; n < DIM_TILES * 2; n++) {
              u32 d = n / 2 * 8 + 2 * t + n % 2;
              if (d < a.dim) partial[2 + d] = outputs[i][n / 2][2 * half + n % 2];
            }
          }
        }
        bases[i][half] = -infinity();
        sums[i][2 * half] = sums[i][2 * half + 1] = 0.0f;
#pragma unroll
        for (u32 n = 0; n < DIM_TILES * 2; n++) outputs[i][n / 2][2 * half + n % 2] = 0.0f;
      }
  }

  if (a.share != 0) return;
#pragma unroll
  for (u32 i = 0; i < TILES; i++)
#pragma unroll
    for (u32 half = 0; half < HALVES; half++) {
      u32 row = row_base + i * HALVES + half;
      if (row >= tile.count || g >= heads.count) continue;
      u32 head = heads.first + g;
      float factor = join_sink(joined[i][half], a.sinks[head]);
      const float* total = totals + (i * HALVES + half) * DIM_TILES * 2 * THREADS;
      float* out = a.out + ((u64)(tile.first + row) * a.heads + head) * a.dim;
#pragma unroll
      for (u32 n = 0; n < DIM_TILES * 2; n++) {
        u32 d = n / 2 * 8 + 2 * t + n % 2;
        // Which zero it is depends on what the row did not see: it is made positive.
        if (d < a.dim) out[d] = fmaf(total[n * THREADS], factor, 0.0f);
      }
    }
}

KERNEL(attention_many_64, MANY_WARPS * WARP, AttentionArgs) { attention_mma<MANY_WARPS, 2, 2, 1>(a); }
KERNEL(attention_many_128, MANY_WARPS * WARP, AttentionArgs) { attention_mma<MANY_WARPS, 1, 2, 2>(a); }
KERNEL(attention_few_64, WARP, AttentionArgs) { attention_mma<1, 1, 1, 1>(a); }
KERNEL(attention_few_128, WARP, AttentionArgs) { attention_mma<1, 1, 1, 2>(a); }

// Joins what a row's blocks left: a block a tile, some heads, and a row of the tile; a thread a dimension of a head.
KERNEL(attention_join, DIM_MAX, AttentionArgs) {
  Tile tile = a.tiles[blockIdx.x];
  u32 row = blockIdx.z, head = blockIdx.y * (DIM_MAX / a.dim) + threadIdx.x / a.dim, d = threadIdx.x % a.dim;
  if (row >= tile.count || threadIdx.x / a.dim >= DIM_MAX / a.dim || head >= a.heads) return;
  u32 position = tile.position + row, count = position / CHUNK - first_visible(position, a.window) / CHUNK + 1;
  u64 pair = ((u64)blockIdx.x * gridDim.z + row) * a.heads + head;
  const float* partial = a.partials + pair * a.segments * (2 + a.dim);
  Softmax softmax = {-infinity(), 0.0f};
  float total = 0.0f;
#pragma unroll 8
  for (u32 s = 0; s < count; s++, partial += 2 + a.dim) {
    float before, now;
    join(softmax, partial[0], partial[1], before, now);
    total = fmaf(partial[2 + d], now, total * before);
  }
  float factor = join_sink(softmax, a.sinks[head]);
  a.out[((u64)(tile.first + row) * a.heads + head) * a.dim + d] = fmaf(total, factor, 0.0f);
}

#undef CHUNK
#undef RING
#undef MANY_WARPS
#undef RAISE
#undef ONES
#undef LOG2_E
