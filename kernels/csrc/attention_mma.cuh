// The fast half of attention.cu: mma over bf16 queries, keys and values, probabilities rounded to bf16.
//
// A block has a tile of rows of one sequence at consecutive positions, and up to 8 query heads of one kv head. Pairs of
// a row and a head are mma's M: what a row gives never depends on the rows beside it. Two kernels, with the same order:
// - few: a row, one warp; for decoding, where keys and values are read once and there is little else to do;
// - many: 16 rows (8 where D > 64), four warps; keys and values are read once for all of them.
//
// Order. Keys are taken in steps of SEGMENT positions and chunks of CHUNK, both aligned to absolute position.
// - A score is the sum over D ascending by 16, times log2(e) / sqrt(D) in f32; keys out of sight have -inf.
// - Within a chunk, steps follow each other. A row has a base, which becomes a step's maximum where that is higher by
//   more than RAISE; sums and outputs so far are then scaled by 2^(old - new). Weights are 2^(score - base), fused, and
//   are rounded to bf16; mma adds them, times ones and times values, by 16 keys ascending.
// - Chunks are joined ascending, each with its base as maximum, the sink last.
// What a row does not see adds zeros, if it is finite, and never raises a base. A block walks all chunks of its tile and joins
// as it goes or, for few tiles with long pasts, leaves those of its share in partials, and attention_join joins them.
//
// Keys and values come through a ring of stages by asynchronous copies; a stage has a step's keys, then its values.
// Piece p (8 numbers) of key k lies at place p ^ k % 8 of its line: eight keys' pieces are in different banks.
#define CHUNK 256  // as src/cuda/choose.rs
#define MANY_WARPS 4
#define RAISE 8.0f
#define LOWEST (-3.40282347e38f)  // the base before any: no score is below but those out of sight
#define ONES 0x3f803f80u
#define LOG2_E 1.44269504f

// Turns the steps of a walk into stages; DT: dimensions of a head, in sixty-fours.
template <u32 THREADS, u32 DT, u32 STAGES>
struct Stream {
  static const u32 LINE = 64 * DT, PIECES = 8 * DT, PART = SEGMENT * LINE;  // numbers, pieces, numbers
  static const u32 KEYS = THREADS / PIECES, TURNS = SEGMENT / KEYS;         // keys of a turn of all threads
  static_assert(BLOCK_SIZE % KEYS == 0, "a turn lies in one block");

  u16* ring;
  const u8* kv;        // of the kv head: this thread's piece of its key of a turn, in block 0
  const uint4* table;  // blocks of a step
  u32 block;           // bytes of a block
  u32 first, end;      // positions that some row sees
  u32 dim, last;
  uint4 ahead;         // blocks of the step that is loaded next

  DEVICE Stream(const AttentionArgs& a, u8* smem, const Tile& tile, u32 kv_head, u32 step, u32 last)
      : ring((u16*)smem), dim(a.dim), last(last) {
    table = (const uint4*)(a.tables + (u64)tile.sequence * a.stride);
    ahead = table[step];
    kv = (const u8*)a.kv +
         (((u64)kv_head * 2 * BLOCK_SIZE + threadIdx.x / PIECES) * dim + threadIdx.x % PIECES * 8) * sizeof(u16);
    block = a.kv_heads * 2 * BLOCK_SIZE * dim * sizeof(u16);
    first = first_visible(tile.position, a.window);
    end = tile.position + tile.count;
#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) load(step + i);
  }

  // Begins a step, if there is one.
  DEVICE void load(u32 step) {
    if (step < last) {
      uint4 blocks = ahead;
      if (step + 1 < last) ahead = table[step + 1];
      u32 start = step * SEGMENT;
      u16* stage = ring + step % STAGES * 2 * PART;
      if (dim != LINE)
        load_narrow(stage, start);
      else if (start >= first && start + SEGMENT <= end)
        load_lines<true>(stage, blocks, start);
      else
        load_lines<false>(stage, blocks, start);
    }
    copies_commit();
  }

  // Where this thread's piece of a turn's keys goes.
  DEVICE u16* place(u16* stage, u32 turn) {
    u32 key = threadIdx.x / PIECES, mine = key * LINE + (threadIdx.x % PIECES ^ key % 8) * 8;
    return stage + (mine ^ turn * KEYS % 8 * 8) + turn * KEYS * LINE;
  }

  // Zeros where no row of the tile looks, as in load_narrow; WHOLE: some row looks at every key.
  template <bool WHOLE>
  DEVICE void load_lines(u16* stage, uint4 blocks, u32 start) {
    u32 names[4] = {blocks.x, blocks.y, blocks.z, blocks.w};
#pragma unroll
    for (u32 turn = 0; turn < TURNS; turn++) {
      u32 position = start + turn * KEYS + threadIdx.x / PIECES;
      bool there = WHOLE || (position >= first && position < end);
      const u8* from = kv + (there ? (u64)names[turn * KEYS / BLOCK_SIZE] * block : 0);
#pragma unroll
      for (u32 part = 0; part < 2; part++) {
        u16* to = place(stage, turn) + part * PART;
        const u8* piece = from + (part * BLOCK_SIZE + turn * KEYS % BLOCK_SIZE) * LINE * sizeof(u16);
        copy_async(to, piece, there);
      }
    }
  }

  DEVICE void load_narrow(u16* stage, u32 start) {
    u32 d = threadIdx.x % PIECES * 8;
#pragma unroll 1
    for (u32 i = 0; i < 2 * TURNS; i++) {
      u32 part = i / TURNS, turn = i % TURNS, position = start + turn * KEYS + threadIdx.x / PIECES;
      bool there = position >= first && position < end;
      u64 name = there ? ((const u32*)table)[position / BLOCK_SIZE] : 0;
      const u16* from = (const u16*)(kv + name * block) + (part * BLOCK_SIZE + turn * KEYS % BLOCK_SIZE) * dim;
      u16* to = place(stage, turn) + part * PART;
      if (dim % 8 == 0) {
        there = there && d < dim;
        copy_async(to, there ? (const u8*)from : kv, there);
      } else {
        // Rows are not on borders of 16 bytes.
        for (u32 e = 0; e < 8; e++) to[e] = there && d + e < dim ? from[e] : 0;
      }
    }
  }

  // A step's stage; the one taken before is given back.
  DEVICE const u16* take(u32 step) {
#ifndef PLANT_BARRIER
    copies_wait<STAGES - 2>();
    __syncthreads();
#endif
    load(step + STAGES - 1);
    return ring + step % STAGES * 2 * PART;
  }
};

// Takes in a chunk; before and now are the weights of the outputs so far and of the chunk's.
DEVICE void join(Softmax& softmax, float maximum, float sum, float& before, float& now) {
  float joint = fmaxf(softmax.maximum, maximum);
  before = exp2_fast(softmax.maximum - joint);
  now = exp2_fast(maximum - joint);
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

// Four numbers that are moved at once.
struct alignas(16) Four {
  float of[4];
};

DEVICE void store_two(float* to, float low, float high) { *(uint2*)to = {bits_of(low), bits_of(high)}; }

// What a chunk left of a head of a row of a tile; the row's number is among the rows of all tiles.
DEVICE float* partial_of(const AttentionArgs& a, const Tile& tile, u32 chunk, u32 row, u32 rows, u32 head) {
  u32 first = first_visible(tile.position, a.window) / CHUNK;
  return a.partials + (((u64)(chunk - first) * rows + row) * a.heads + head) * (2 + a.dim);
}

// A block of WARPS warps, each with TILES times 16 pairs, of which HALVES times 8 are used: 8 heads of a row each.
template <u32 WARPS, u32 TILES, u32 HALVES, u32 DT, u32 STAGES>
DEVICE void attention_mma(const AttentionArgs& a) {
  const u32 THREADS = WARPS * WARP, ROWS = WARPS * TILES * HALVES, LINE = 64 * DT, PART = SEGMENT * LINE;
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
  Stream<THREADS, DT, STAGES> stream(a, smem, tile, heads.kv_head, step, last);

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
          uint2 two = d < a.dim ? *(const uint2*)(q + d) : uint2{0, 0};
          queries[i][k][half + 2 * high] = pack_bf16(float_of(two.x), float_of(two.y));
        }
    }

  float scale = a.scale * LOG2_E;
  // Outputs of the chunks joined so far, and their maxima and sums: [..][THREADS], each thread's own.
  const u32 FOURS = DIM_TILES / 2;
  Four* totals = (Four*)(smem + STAGES * 2 * PART * sizeof(u16)) + threadIdx.x;
  Softmax* joined = (Softmax*)(totals - threadIdx.x + TILES * HALVES * FOURS * THREADS) + threadIdx.x;
  if (a.share == 0) {
#pragma unroll
    for (u32 n = 0; n < TILES * HALVES; n++) joined[n * THREADS] = {LOWEST, 0.0f};
#pragma unroll
    for (u32 n = 0; n < TILES * HALVES * FOURS; n++) totals[n * THREADS] = {};
  }
  // So many positions up to its own a row sees.
  const u32 FAR = 0x7fffffffu;
  u32 reach = FAR + 1 - first_visible(FAR, a.window);
  // This lane's lines of the matrices of keys and of values, without the piece's number.
  u32 key_line = (matrix / 2 * 8 + line) * LINE + (matrix % 2 ^ line) * 8;
  u32 value_line = PART + (matrix % 2 * 8 + line) * LINE + (matrix / 2 ^ line) * 8;

  while (step < last) {
    u32 chunk = step / STEPS, end = least(last, (chunk + 1) * STEPS);
    float bases[TILES][HALVES], sums[TILES][4] = {}, outputs[TILES][DIM_TILES][4] = {};
#pragma unroll
    for (u32 i = 0; i < TILES; i++)
#pragma unroll
      for (u32 half = 0; half < HALVES; half++) bases[i][half] = LOWEST;
    for (; step < end; step++) {
      const u16* stage = stream.take(step);
      float scores[TILES][KEY_TILES][4];
#pragma unroll
      for (u32 k = 0; k < DIM_STEPS; k++) {
        const u16* keys = stage + (key_line ^ 2 * k * 8);
#pragma unroll
        for (u32 n = 0; n < KEY_TILES; n += 2) {
          u32 b[4];
          ldmatrix_x4(b, keys + n * 8 * LINE);
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
      }

      u32 start = step * SEGMENT;
      bool whole = start >= first_visible(tile.position + tile.count - 1, a.window) &&
                   start + SEGMENT <= tile.position + 1;
      if (!whole) {
#pragma unroll
        for (u32 i = 0; i < TILES; i++)
#pragma unroll
          for (u32 half = 0; half < HALVES; half++) {
            // From a row's first key in this lane on; those after the row wrap around.
            u32 age = tile.position + row_base + i * HALVES + half - start - 2 * t;
#pragma unroll
            for (u32 n = 0; n < KEY_TILES; n++)
#pragma unroll
              for (u32 e = 0; e < 2; e++)
                if (age - (n * 8 + e) >= reach) scores[i][n][2 * half + e] = -infinity();
          }
      }

      float before[TILES][HALVES];
      bool raised = false;
#pragma unroll
      for (u32 i = 0; i < TILES; i++)
#pragma unroll
        for (u32 half = 0; half < HALVES; half++) {
          float highest = -infinity();
#pragma unroll
          for (u32 n = 0; n < KEY_TILES; n++)
            highest = fmaxf(highest, fmaxf(scores[i][n][2 * half], scores[i][n][2 * half + 1]));
          highest = fmaxf(highest, __shfl_xor_sync(FULL, highest, 1));
          highest = fmaxf(highest, __shfl_xor_sync(FULL, highest, 2)) * scale;
          float& base = bases[i][half];
          before[i][half] = base;
          bool raise = highest > base + RAISE;
          base = raise ? highest : base;
          // Nothing was added yet without a base.
          raised = raised || (raise && before[i][half] != LOWEST);
        }
      // Seldom; times one is as it was.
      if (__ballot_sync(FULL, raised) != 0) {
#pragma unroll
        for (u32 i = 0; i < TILES; i++)
#pragma unroll
          for (u32 e = 0; e < 2 * HALVES; e++) {
            float scaled = exp2_fast(before[i][e / 2] - bases[i][e / 2]);
            sums[i][e] *= scaled;
#pragma unroll
            for (u32 n = 0; n < DIM_TILES; n++) outputs[i][n][e] *= scaled;
          }
      }

      // Weights are made where they are used: what makes them and mma take turns.
#pragma unroll
      for (u32 k = 0; k < SEGMENT / 16; k++) {
        u32 weights[TILES][4] = {};
#pragma unroll
        for (u32 i = 0; i < TILES; i++) {
#pragma unroll
          for (u32 half = 0; half < HALVES; half++)
#pragma unroll
            for (u32 high = 0; high < 2; high++) {
              const float(&of)[4] = scores[i][2 * k + high];
              weights[i][half + 2 * high] = pack_bf16(exp2_fast(fmaf(of[2 * half], scale, -bases[i][half])),
                                                      exp2_fast(fmaf(of[2 * half + 1], scale, -bases[i][half])));
            }
          mma_bf16(sums[i], weights[i], ONES, ONES);
        }
#pragma unroll
        for (u32 n = 0; n < DIM_TILES; n += 2) {
          u32 b[4];
          ldmatrix_x4_transposed(b, stage + (value_line ^ n * 8) + k * 16 * LINE);
#pragma unroll
          for (u32 i = 0; i < TILES; i++) {
            mma_bf16(outputs[i][n], weights[i], b[0], b[1]);
            mma_bf16(outputs[i][n + 1], weights[i], b[2], b[3]);
          }
        }
      }
    }
#pragma unroll
    for (u32 i = 0; i < TILES; i++)
#pragma unroll
      for (u32 half = 0; half < HALVES; half++) {
        float sum = sums[i][2 * half];
        u32 row = row_base + i * HALVES + half;
        if (a.share == 0) {
          float then, now;
          Softmax softmax = joined[(i * HALVES + half) * THREADS];
          join(softmax, bases[i][half], sum, then, now);
          joined[(i * HALVES + half) * THREADS] = softmax;
          Four* total = totals + (i * HALVES + half) * FOURS * THREADS;
#pragma unroll
          for (u32 n = 0; n < FOURS; n++) {
            Four four = total[n * THREADS];
#pragma unroll
            for (u32 e = 0; e < 4; e++)
              four.of[e] = fmaf(outputs[i][2 * n + e / 2][2 * half + e % 2], now, four.of[e] * then);
            total[n * THREADS] = four;
          }
        } else if (row < tile.count && g < heads.count) {
          // Chunks that the row does not see are not asked for.
          float* partial = partial_of(a, tile, chunk, index * ROWS + row, gridDim.x * ROWS, heads.first + g);
          if (t == 0) store_two(partial, bases[i][half], sum);
#pragma unroll
          for (u32 n = 0; n < DIM_TILES; n++) {
            u32 d = n * 8 + 2 * t;
            if (d < a.dim) store_two(partial + 2 + d, outputs[i][n][2 * half], outputs[i][n][2 * half + 1]);
          }
        }
      }
  }

  if (a.share != 0) return;
  // Read again: what is not kept until here leaves registers to the walk.
  tile = a.tiles[index];
#pragma unroll
  for (u32 i = 0; i < TILES; i++)
#pragma unroll
    for (u32 half = 0; half < HALVES; half++) {
      u32 row = row_base + i * HALVES + half;
      if (row >= tile.count || g >= heads.count) continue;
      u32 head = heads.first + g;
      float factor = join_sink(joined[(i * HALVES + half) * THREADS], a.sinks[head]);
      const Four* total = totals + (i * HALVES + half) * FOURS * THREADS;
      float* out = a.out + ((u64)(tile.first + row) * a.heads + head) * a.dim;
#pragma unroll
      for (u32 n = 0; n < DIM_TILES; n++) {
        u32 d = n * 8 + 2 * t;
        const float* two = total[n / 2 * THREADS].of + n % 2 * 2;
        // Which zero it is depends on what the row did not see: it is made positive.
        if (d < a.dim) store_two(out + d, fmaf(two[0], factor, 0.0f), fmaf(two[1], factor, 0.0f));
      }
    }
}

KERNEL(attention_many_64, MANY_WARPS * WARP, AttentionArgs) { attention_mma<MANY_WARPS, 2, 2, 1, 2>(a); }
KERNEL(attention_many_128, MANY_WARPS * WARP, AttentionArgs) { attention_mma<MANY_WARPS, 1, 2, 2, 2>(a); }
KERNEL(attention_few_64, WARP, AttentionArgs) { attention_mma<1, 1, 1, 1, 3>(a); }
KERNEL(attention_few_128, WARP, AttentionArgs) { attention_mma<1, 1, 1, 2, 2>(a); }

// Joins what a row's blocks left: a block a tile, some heads, and a row of the tile; a thread a dimension of a head.
KERNEL(attention_join, DIM_MAX, AttentionArgs) {
  Tile tile = a.tiles[blockIdx.x];
  u32 row = blockIdx.z, head = blockIdx.y * (DIM_MAX / a.dim) + threadIdx.x / a.dim, d = threadIdx.x % a.dim;
  if (row >= tile.count || threadIdx.x / a.dim >= DIM_MAX / a.dim || head >= a.heads) return;
  u32 position = tile.position + row, first = first_visible(position, a.window) / CHUNK;
  u32 rows = gridDim.x * gridDim.z, count = position / CHUNK - first + 1;
  const float* partial = partial_of(a, tile, first, blockIdx.x * gridDim.z + row, rows, head);
  u64 stride = (u64)rows * a.heads * (2 + a.dim);
  Softmax softmax = {LOWEST, 0.0f};
  float total = 0.0f;
#pragma unroll 8
  for (u32 s = 0; s < count; s++, partial += stride) {
    float before, now;
    join(softmax, partial[0], partial[1], before, now);
    total = fmaf(partial[2 + d], now, total * before);
  }
  float factor = join_sink(softmax, a.sinks[head]);
  a.out[((u64)(tile.first + row) * a.heads + head) * a.dim + d] = fmaf(total, factor, 0.0f);
}

#undef CHUNK
#undef MANY_WARPS
#undef RAISE
#undef LOWEST
#undef ONES
#undef LOG2_E
