// Dense matrices on Hopper (sm_90a), fast precision: x: [n, cols] -> [n, rows], x W^T + b, x rounded to bf16.
//
// Weights: as dense.cu says; a lane's 16 bytes are the products' left side as they are. So weights are their M, tokens N.
// - dense_few_8, dense_few_16 (few tokens): memory bounds them. A warp streams a row tile through a ring of its own, as far
//   ahead as that has stages, and multiplies by mma; a block holds all tokens, rounded by itself. Row tiles go round the
//   blocks, so that no multiprocessor has two more than another.
// - dense_wgmma_32, _64, _128, _256 (more): warpgroups have 64 rows each, a block's ring has weights and tokens. What
//   reaches a multiprocessor in a second bounds them.
//   Tokens: dense_pieces has rounded them before, [group of as many tokens][column tile of 16][tile of 8 tokens][2]
//   [8 tokens][8 columns], as wgmma reads B (see experts_wgmma.cu). Columns beyond the last are zero, tokens beyond the
//   last are whatever was there.
//
// Order: columns ascending by 16, in one sum of the tensor core from zero; bias last. The same for all: a warp's mma adds
// as a warpgroup's does, which conformance sees on a GPU, where rows alone and together are compared.
#include "ptx_sm90.cuh"

#include "ring.cuh"

struct DenseArgs {
  const float* x;        // [n, cols]; of dense_wgmma its pieces
  const uint4* weights;  // [row tiles, column tiles, 32]
  const float* bias;     // [row tiles * 16]
  float* out;            // [n, rows]
  u32 n, rows, cols;
  u32 add;  // 1: out += result
};

// To memory: sums[4n + i] is row g (i < 2) or g + 8 of token 8n + 2t + i % 2.
template <u32 TOKENS>
DEVICE void put_tile(const DenseArgs& a, u32 tile, u32 first, const float (&sums)[TOKENS / 2]) {
  const u32 part = TOKENS < 32 ? TOKENS / 2 : 16;
  u32 t = lane_id() % 4, g = lane_id() / 4, row = tile * 16 + g;
  if (row >= a.rows) return;
  bool both = row + 8 < a.rows;
  float bias[2] = {a.bias[row], a.bias[row + 8]};
  float* out = a.out + row;
#pragma unroll
  for (u32 from = 0; from < TOKENS / 2; from += part) {
    // Of several numbers all that was there before is asked for at once.
    float before[part];
#pragma unroll
    for (u32 i = 0; i < part; i++) {
      u32 at = from + i, token = first + at / 4 * 8 + 2 * t + at % 2;
      bool asked = a.add && token < a.n && (at % 4 < 2 || both);
      before[i] = asked ? out[(u64)token * a.rows + at % 4 / 2 * 8] : 0.0f;
    }
#pragma unroll
    for (u32 i = 0; i < part; i++) {
      u32 at = from + i, token = first + at / 4 * 8 + 2 * t + at % 2;
      float result = sums[at] + bias[at % 4 / 2];
      if (token < a.n && (at % 4 < 2 || both))
        out[(u64)token * a.rows + at % 4 / 2 * 8] = a.add ? before[i] + result : result;
    }
  }
}

// Rounding ----------------------------------------------------------------------------------------------------------

// Eight numbers as bf16.
DEVICE uint4 round_eight(const uint4& low, const uint4& high) {
  return {narrow2(float_of(low.x), float_of(low.y)), narrow2(float_of(low.z), float_of(low.w)),
          narrow2(float_of(high.x), float_of(high.y)), narrow2(float_of(high.z), float_of(high.w))};
}

// Eight columns of a token from `at` on.
DEVICE uint4 round_piece(const float* x, u32 at, u32 cols) {
  if (cols % 4 == 0 && at + 8 <= cols) return round_eight(*(const uint4*)(x + at), *(const uint4*)(x + at + 4));
  u32 bits[8];
#pragma unroll
  for (u32 i = 0; i < 8; i++) bits[i] = at + i < cols ? bits_of(x[at + i]) : 0;
  return round_eight({bits[0], bits[1], bits[2], bits[3]}, {bits[4], bits[5], bits[6], bits[7]});
}

#define PIECES_THREADS 128

struct PiecesArgs {
  const float* x;  // [n, cols]
  uint4* pieces;   // [groups, column tiles, group / 8, 2, 8]
  u32 n, cols, group, unused;
};

// A block 8 tokens and 16 pieces of each; a thread a piece, so that a warp reads and writes 128 bytes together.
KERNEL(dense_pieces, PIECES_THREADS, PiecesArgs) {
  u32 across = (a.cols + 15) / 16;
  u32 token = blockIdx.y * 8 + threadIdx.x % 8, piece = blockIdx.x * (PIECES_THREADS / 8) + threadIdx.x / 8;
  if (token >= a.n || piece >= 2 * across) return;
  u64 tile = ((u64)(token / a.group) * across + piece / 2) * (a.group / 8) + token % a.group / 8;
  a.pieces[tile * 16 + piece % 2 * 8 + token % 8] = round_piece(a.x + (u64)token * a.cols, piece * 8, a.cols);
}

// Few tokens --------------------------------------------------------------------------------------------------------

#define FEW_TILES 8  // column tiles of a stage

// As in src/cuda/choose.rs.
template <u32 TOKENS_, u32 STAGES_>
struct Few {
  static const u32 TOKENS = TOKENS_, STAGES = STAGES_;
  // Warps of products, each with a ring, one that copies for them, and those that only round tokens.
  static const u32 STREAMS = 3, WARPS = 8;
  static const u32 STAGE = FEW_TILES * 512;
  // Barriers of the rings, a "full" one and an "empty" one for each stage; the rings; the tokens.
  static const u32 START = (2 * STREAMS * STAGES * 8 + 127) / 128 * 128, TOKENS_AT = START + STREAMS * STAGES * STAGE;
};

typedef Few<8, 12> Few8;
typedef Few<16, 7> Few16;

// 16-byte words from one token to the next in shared memory: whole stages, and as many more that eight lanes of two tokens
// meet no bank twice.
DEVICE u32 few_stride(u32 cols) { return (cols + FEW_TILES * 16 - 1) / (FEW_TILES * 16) * (FEW_TILES * 2) + 4; }

#define FEW_AT_ONCE 8  // pieces of a thread that are asked for at once

// All tokens to shared memory, by all warps but the one that copies: of 32 columns, which are 16 words of two, lane t of
// mma reads words t, t + 4, t + 8, t + 12.
template <class F>
DEVICE void hold_tokens(const DenseArgs& a, u32* held) {
  const u32 threads = (F::WARPS - 1) * WARP;
  u32 across = (a.cols + 31) / 32 * 4, stride = few_stride(a.cols) * 4, all = a.n * across;
  u32 thread = threadIdx.x - (warp_id() > F::STREAMS ? WARP : 0);
  auto put = [&](u32 i, const uint4& words) {
    u32 *to = held + i / across * stride + i % across / 4 * 16 + i % 4;
    to[0] = words.x, to[4] = words.y, to[8] = words.z, to[12] = words.w;
  };
  if (a.cols % 8 != 0) {
    for (u32 i = thread; i < all; i += threads)
      put(i, round_piece(a.x + (u64)(i / across) * a.cols, i % across * 8, a.cols));
    return;
  }
  for (u32 from = thread; from < all; from += FEW_AT_ONCE * threads) {
    uint4 low[FEW_AT_ONCE], high[FEW_AT_ONCE];
#pragma unroll
    for (u32 j = 0; j < FEW_AT_ONCE; j++) {
      u32 i = from + j * threads, at = i % across * 8;
      bool inside = i < all && at < a.cols;
      const uint4* x = (const uint4*)(a.x + (u64)(i / across) * a.cols + at);
      low[j] = inside ? x[0] : uint4{0, 0, 0, 0};
      high[j] = inside ? x[1] : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (u32 j = 0; j < FEW_AT_ONCE; j++)
      if (from + j * threads < all) put(from + j * threads, round_eight(low[j], high[j]));
  }
}

// The row tiles of a stream: from `first` on, `step` apart.
struct FewTiles {
  u32 first, step, count;

  DEVICE FewTiles(u32 stream, u32 streams, u32 row_tiles)
      : first(stream * gridDim.x + blockIdx.x),
        step(streams * gridDim.x),
        count(first < row_tiles ? (row_tiles - first + step - 1) / step : 0) {}
};

// What one warp does for all streams of the block: a lane a stream, a stage after the other.
template <class F>
DEVICE void copy_streams(const DenseArgs& a, u32 across, u32 chunks, u32 row_tiles, u8* smem) {
  if (lane_id() >= F::STREAMS) return;
  FewTiles tiles(lane_id(), F::STREAMS, row_tiles);
  u64 *full = (u64*)smem + lane_id() * F::STAGES, *empty = full + F::STREAMS * F::STAGES;
  u8* ring = smem + F::START + lane_id() * F::STAGES * F::STAGE;
  u32 stage = 0, parity = 1;
  for (u32 i = 0; i < tiles.count; i++) {
    const uint4* from = a.weights + (u64)(tiles.first + i * tiles.step) * across * WARP;
    for (u32 chunk = 0; chunk < chunks; chunk++) {
      u32 bytes = least(across - chunk * FEW_TILES, FEW_TILES) * 512;
      barrier_wait(empty + stage, parity);
      barrier_arrive_expecting(full + stage, bytes);
      bulk_copy(ring + stage * F::STAGE, from + chunk * FEW_TILES * WARP, bytes, full + stage);
      if (++stage == F::STAGES) stage = 0, parity ^= 1;
    }
  }
}

// A stage in registers: a lane's weights, and its part of the tokens.
template <class F>
struct FewChunk {
  uint4 weights[FEW_TILES], tokens[FEW_TILES / 2][F::TOKENS / 8];

  // What lies behind a last stage that is not full is old, and not multiplied.
  DEVICE void take(const u8* stage, const uint4* held, u32 stride, u32 last) {
#pragma unroll
    for (u32 i = 0; i < FEW_TILES; i++) weights[i] = ((const uint4*)stage)[i * WARP + lane_id()];
    // A token beyond the last reads the last one's numbers; its results are dropped.
#pragma unroll
    for (u32 n = 0; n < F::TOKENS / 8; n++) {
      u32 token = least(n * 8 + lane_id() / 4, last);
#pragma unroll
      for (u32 pair = 0; pair < FEW_TILES / 2; pair++) tokens[pair][n] = held[token * stride + pair * 4 + lane_id() % 4];
    }
  }

  DEVICE void multiply(u32 i, float (&sums)[F::TOKENS / 8][4]) const {
    u32 left[4] = {weights[i].x, weights[i].y, weights[i].z, weights[i].w};
#pragma unroll
    for (u32 n = 0; n < F::TOKENS / 8; n++) {
      const uint4& right = tokens[i / 2][n];
      mma_bf16(sums[n], left, i % 2 ? right.z : right.x, i % 2 ? right.w : right.y);
    }
  }

  DEVICE void multiply_some(u32 count, float (&sums)[F::TOKENS / 8][4]) const {
    if (count >= FEW_TILES) {
#pragma unroll
      for (u32 i = 0; i < FEW_TILES; i++) multiply(i, sums);
      return;
    }
#pragma unroll
    for (u32 i = 0; i < FEW_TILES - 1; i++)
      if (i < count) multiply(i, sums);
  }
};

template <class F>
DEVICE void dense_few(const DenseArgs& a) {
  SHARED(smem);
  u32 across = (a.cols + 15) / 16, row_tiles = (a.rows + 15) / 16, chunks = (across + FEW_TILES - 1) / FEW_TILES;
  if (threadIdx.x < 2 * F::STREAMS * F::STAGES) barrier_init((u64*)smem + threadIdx.x, 1);
  barrier_init_done();
  __syncthreads();
  if (warp_id() == F::STREAMS) copy_streams<F>(a, across, chunks, row_tiles, smem);
  if (warp_id() != F::STREAMS) hold_tokens<F>(a, (u32*)(smem + F::TOKENS_AT));
  // All but the warp that copies meet again when the tokens are there.
  if (warp_id() == F::STREAMS) return;
  some_sync<(F::WARPS - 1) * WARP>();
  FewTiles tiles(warp_id(), F::STREAMS, row_tiles);
  if (warp_id() >= F::STREAMS || tiles.count == 0) return;
  u64 *full = (u64*)smem + warp_id() * F::STAGES, *empty = full + F::STREAMS * F::STAGES;
  const u8* ring = smem + F::START + warp_id() * F::STAGES * F::STAGE;
  const uint4* held = (const uint4*)(smem + F::TOKENS_AT);
  FewChunk<F> now, next;
  float sums[F::TOKENS / 8][4] = {};
  u32 total = tiles.count * chunks, stride = few_stride(a.cols), last = a.n - 1;
  u32 tile = tiles.first, chunk = 0, stage = 0, parity = 0;
#ifndef PLANT_WAIT
  barrier_wait(full, 0);
#endif
  now.take(ring, held, stride, last);
  for (u32 i = 0; i < total; i++) {
    u32 done = stage, count = least(across - chunk * FEW_TILES, FEW_TILES);
    bool ends = chunk + 1 == chunks;
    if (++stage == F::STAGES) stage = 0, parity ^= 1;
    // While these are multiplied, the next ones are on their way to registers.
    if (i + 1 < total) {
#ifndef PLANT_WAIT
      barrier_wait(full + stage, parity);
#endif
      next.take(ring + stage * F::STAGE, held + (ends ? 0 : chunk + 1) * (FEW_TILES / 2 * 4), stride, last);
    }
    now.multiply_some(count, sums);
    // All lanes have multiplied what was in the stage.
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(empty + done);
    now = next;
    chunk++;
    if (!ends) continue;
#pragma unroll
    for (u32 n = 0; n < F::TOKENS / 8; n++) {
      put_tile<8>(a, tile, n * 8, sums[n]);
      sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    }
    chunk = 0;
    tile += tiles.step;
  }
}

KERNEL(dense_few_8, Few8::WARPS * WARP, DenseArgs) { dense_few<Few8>(a); }
KERNEL(dense_few_16, Few16::WARPS * WARP, DenseArgs) { dense_few<Few16>(a); }

// Many tokens -------------------------------------------------------------------------------------------------------

// As in src/cuda/choose.rs.
template <u32 WARPGROUPS, u32 TOKENS_, u32 TILES_, u32 STAGES_>
struct DenseRing {
  static const u32 TOKENS = TOKENS_, TILES = TILES_, STAGES = STAGES_;
  // Warps of products, a row tile each, and one that copies; among 256 tokens a warpgroup of which one copies, since
  // warpgroups alone hand registers over to others.
  static const bool HANDS_OVER = TOKENS == 256;
  static const u32 WARPS = WARPGROUPS * 4, THREADS = (WARPS + (HANDS_OVER ? 4 : 1)) * WARP;
  // Column tiles that are multiplied before they are waited for.
  static const u32 STEP = 4;
  static const u32 PIECES = WARPS * TILES * 512, STAGE = PIECES + TOKENS * TILES * 32;
};

typedef DenseRing<1, 32, 8, 8> DenseRing32;
typedef DenseRing<1, 64, 8, 6> DenseRing64;
typedef DenseRing<2, 128, 8, 3> DenseRing128;
typedef DenseRing<2, 256, 4, 4> DenseRing256;

// The weights and tokens of a unit, a stage after the other. Each lane of the copying warp has one part, or none.
template <class R>
DEVICE void copy_unit(const DenseArgs& a, u32 across, u32 row_tile, u32 group, u8* smem, Turn<R::STAGES>& turn) {
  static_assert(R::WARPS + R::TILES <= WARP, "a lane has one part at most");
  const u32 of_tile = R::TOKENS * 32;
  u32 row_tiles = least((a.rows + 15) / 16 - row_tile, R::WARPS), lane = lane_id(), column = lane - R::WARPS;
  bool weights = lane < R::WARPS;
  const u8* from = weights ? (const u8*)a.weights + (u64)(row_tile + lane) * across * 512
                           : (const u8*)a.x + ((u64)group * across + column) * of_tile;
  u32 to = weights ? lane * R::TILES * 512 : R::PIECES + column * of_tile;
  for (u32 tile = 0; tile < across; tile += R::TILES) {
    u32 count = least(across - tile, R::TILES);
    u64* full = turn.full(smem);
    u8* stage = smem + RING_BARRIERS + turn.stage * R::STAGE;
    barrier_wait(turn.empty(smem), turn.parity ^ 1);
    if (lane == 0) barrier_arrive_expecting(full, count * (row_tiles * 512 + of_tile));
    __syncwarp();
    if (weights && lane < row_tiles) bulk_copy(stage + to, from + (u64)tile * 512, count * 512, full);
    if (!weights && column < count) bulk_copy(stage + to, from + (u64)tile * of_tile, of_tile, full);
    turn.advance();
  }
}

// COUNT column tiles from `tile` of the stage on, added to sums or, at the beginning, in their place.
template <class R, u32 COUNT>
DEVICE void multiply_tiles(const u8* stage, u32 tile, bool begins, float (&sums)[R::TOKENS / 2]) {
  u32 left[COUNT][4], pieces = shared_address(stage) + R::PIECES + tile * R::TOKENS * 32;
#pragma unroll
  for (u32 i = 0; i < COUNT; i++) {
    uint4 words = ((const uint4*)(stage + (warp_id() * R::TILES + tile + i) * 512))[lane_id()];
    left[i][0] = words.x, left[i][1] = words.y, left[i][2] = words.z, left[i][3] = words.w;
  }
  wgmma_fence(left);
#pragma unroll
  for (u32 i = 0; i < COUNT; i++)
    wgmma<R::TOKENS>(sums, left[i], matrix_descriptor(pieces + i * R::TOKENS * 32, 128, 256), i > 0 || !begins);
  wgmma_commit();
  wgmma_wait_for(sums);
}

// The sums of a unit: a warp has row tile row_tile + warp.
template <class R>
DEVICE void multiply_unit(u32 across, u8* smem, Turn<R::STAGES>& turn, float (&sums)[R::TOKENS / 2]) {
  for (u32 tile = 0; tile < across; tile += R::TILES) {
#ifndef PLANT_WAIT
    barrier_wait(turn.full(smem), turn.parity);
#endif
    const u8* stage = smem + RING_BARRIERS + turn.stage * R::STAGE;
    u32 count = least(across - tile, R::TILES), i = 0;
    for (; i + R::STEP <= count; i += R::STEP) multiply_tiles<R, R::STEP>(stage, i, tile + i == 0, sums);
    for (; i < count; i++) multiply_tiles<R, 1>(stage, i, tile + i == 0, sums);
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(turn.empty(smem));
    turn.advance();
  }
}

// A block has a stretch of WARPS row tiles and TOKENS tokens, and goes on to the next such unit: stretches first, so that
// those who work at once read the same tokens.
template <class R>
DEVICE void dense_wgmma(const DenseArgs& a) {
  SHARED(smem);
  u32 across = (a.cols + 15) / 16, stretches = ((a.rows + 15) / 16 + R::WARPS - 1) / R::WARPS;
  u32 units = stretches * ((a.n + R::TOKENS - 1) / R::TOKENS);
  if (threadIdx.x == 0) make_ring<R::STAGES>(smem, 1, R::WARPS);
  __syncthreads();
  Turn<R::STAGES> turn = {0, 0};
  if (warp_id() >= R::WARPS) {
    if (R::HANDS_OVER) keep_registers<40>();
    if (warp_id() > R::WARPS) return;
    for (u32 i = blockIdx.x; i < units; i += gridDim.x)
      copy_unit<R>(a, across, i % stretches * R::WARPS, i / stretches, smem, turn);
    return;
  }
  if (R::HANDS_OVER) take_registers<232>();
  float sums[R::TOKENS / 2];
  for (u32 i = blockIdx.x; i < units; i += gridDim.x) {
    multiply_unit<R>(across, smem, turn, sums);
    put_tile<R::TOKENS>(a, i % stretches * R::WARPS + warp_id(), i / stretches * R::TOKENS, sums);
  }
}

KERNEL(dense_wgmma_32, DenseRing32::THREADS, DenseArgs) { dense_wgmma<DenseRing32>(a); }
KERNEL(dense_wgmma_64, DenseRing64::THREADS, DenseArgs) { dense_wgmma<DenseRing64>(a); }
KERNEL(dense_wgmma_128, DenseRing128::THREADS, DenseArgs) { dense_wgmma<DenseRing128>(a); }
KERNEL(dense_wgmma_256, DenseRing256::THREADS, DenseArgs) { dense_wgmma<DenseRing256>(a); }

#undef FEW_TILES
#undef FEW_AT_ONCE
#undef PIECES_THREADS
