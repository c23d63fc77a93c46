// Dense matrices on Hopper (sm_90a), fast precision: x: [n, cols] -> [n, rows], x W^T + b, by products of warpgroups.
//
// Weights: as dense.cu says; a lane's 16 bytes are wgmma's A, so they go from a ring of bulk copies to registers as they
// are. Weights are wgmma's M, 64 rows a warpgroup; tokens its N.
// Tokens: x rounded to bf16, [tile of 8 tokens][column tile of 16][2][8 tokens][8 columns], as wgmma reads B (see
// experts_wgmma.cu). Columns beyond the last are zero, tokens beyond the last are whatever was there.
// - dense_wgmma_8 (up to 8 tokens): a block rounds them itself, all columns at once, while the first weights come.
// - dense_wgmma_128 (many): dense_pieces has rounded them before, and they come with the weights.
//
// Order: that of dense.cu: 8 segments of column tiles, each in one sum of the tensor core from zero; segments added
// ascending, then the bias. The same for both.
#include "ptx_sm90.cuh"

#include "ring.cuh"

#define DENSE_SEGMENTS 8

struct DenseArgs {
  const float* x;        // [n, cols]; of dense_wgmma_128 its pieces
  const uint4* weights;  // [row tiles, column tiles, 32]
  const float* bias;     // [row tiles * 16]
  float* out;            // [n, rows]
  u32 n, rows, cols;
  u32 add;  // 1: out += result
};

// Rounding ----------------------------------------------------------------------------------------------------------

// Eight columns of a token from `at` on.
DEVICE uint4 round_piece(const float* x, u32 at, u32 cols) {
  float values[8];
  if (cols % 4 == 0 && at + 8 <= cols) {
    uint4 low = *(const uint4*)(x + at), high = *(const uint4*)(x + at + 4);
    u32 bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (u32 i = 0; i < 8; i++) values[i] = float_of(bits[i]);
  } else {
#pragma unroll
    for (u32 i = 0; i < 8; i++) values[i] = at + i < cols ? x[at + i] : 0.0f;
  }
  return {narrow2(values[0], values[1]), narrow2(values[2], values[3]), narrow2(values[4], values[5]),
          narrow2(values[6], values[7])};
}

#define PIECES_THREADS 128

struct PiecesArgs {
  const float* x;  // [n, cols]
  uint4* pieces;   // [token tiles, column tiles, 2, 8]
  u32 n, cols;
};

// A thread eight columns of a token.
KERNEL(dense_pieces, PIECES_THREADS, PiecesArgs) {
  u32 across = (a.cols + 15) / 16 * 2;
  u64 i = (u64)blockIdx.x * PIECES_THREADS + threadIdx.x;
  u32 token = (u32)(i / across), piece = (u32)(i % across);
  if (token >= a.n) return;
  a.pieces[((u64)(token / 8) * across + piece) * 8 + token % 8] =
      round_piece(a.x + (u64)token * a.cols, piece * 8, a.cols);
}

// Shared memory -----------------------------------------------------------------------------------------------------

// As in src/cuda/choose.rs.
template <u32 WARPGROUPS, u32 COPIERS_, u32 TOKENS_, u32 TILES_, u32 STAGES_>
struct DenseRing {
  static const u32 TOKENS = TOKENS_, TILES = TILES_, STAGES = STAGES_;
  // Warps of products, a row tile each; warps that copy.
  static const u32 WARPS = WARPGROUPS * 4, COPIERS = COPIERS_, THREADS = (WARPS + COPIERS) * WARP;
  // Few tokens lie behind the stages, all columns of them; many come with the weights.
  static const bool RESIDENT = TOKENS == 8;
  static const u32 PIECES = WARPS * TILES * 512, STAGE = PIECES + (RESIDENT ? 0 : TOKENS * TILES * 32);
  static const u32 START = RING_BARRIERS, TOKENS_AT = START + STAGES * STAGE;
};

typedef DenseRing<1, 1, 8, 8, 6> DenseRing8;
typedef DenseRing<2, 4, 128, 8, 3> DenseRing128;

// Copying -----------------------------------------------------------------------------------------------------------

// The weights and tokens of a unit, a stage after the other. Each lane of the copying warps has one part, or none.
template <class R>
DEVICE void copy_unit(const DenseArgs& a, u32 across, u32 row_tile, u32 first, u8* smem, Turn<R::STAGES>& turn) {
  static_assert(R::WARPS + R::TOKENS / 8 <= R::COPIERS * WARP, "a lane has one part at most");
  u32 row_tiles = least((a.rows + 15) / 16 - row_tile, R::WARPS);
  u32 token_tiles = R::RESIDENT ? 0 : (least(a.n - first, R::TOKENS) + 7) / 8;
  u32 part = lane_id() * R::COPIERS + warp_id() - R::WARPS;
  // Where a part goes in a stage, where it comes from, and its bytes of a column tile.
  u32 to = 0, bytes = 0;
  const u8* from = nullptr;
  if (part < row_tiles) {
    bytes = 512;
    from = (const u8*)a.weights + (u64)(row_tile + part) * across * bytes;
    to = part * R::TILES * bytes;
  } else if (part >= R::WARPS && part - R::WARPS < token_tiles) {
    bytes = 256;
    from = (const u8*)a.x + (u64)(first / 8 + part - R::WARPS) * across * bytes;
    to = R::PIECES + (part - R::WARPS) * R::TILES * bytes;
  }
  u32 all = warp_sum(bytes);
  for (u32 tile = 0; tile < across; tile += R::TILES) {
    u32 count = least(across - tile, R::TILES);
    u64* full = turn.full(smem);
    barrier_wait(turn.empty(smem), turn.parity ^ 1);
    if (lane_id() == 0) barrier_arrive_expecting(full, count * all);
    __syncwarp();
    if (bytes != 0)
      bulk_copy(smem + R::START + turn.stage * R::STAGE + to, from + (u64)tile * bytes, count * bytes, full);
    turn.advance();
  }
}

// Products ----------------------------------------------------------------------------------------------------------

DEVICE u32 segment_start(u32 tiles, u32 segment) { return segment * tiles / DENSE_SEGMENTS; }

// COUNT column tiles from `tile` of the stage on, added to sums or, at a segment's beginning, in their place.
template <class R, u32 COUNT>
DEVICE void multiply_tiles(u8* smem, u32 stage, u32 tile, u32 pieces, bool begins, float (&sums)[R::TOKENS / 2]) {
  u32 left[COUNT][4];
#pragma unroll
  for (u32 i = 0; i < COUNT; i++) {
    uint4 words = ((const uint4*)(smem + stage + (warp_id() * R::TILES + tile + i) * 512))[lane_id()];
    left[i][0] = words.x, left[i][1] = words.y, left[i][2] = words.z, left[i][3] = words.w;
  }
  wgmma_fence(left);
#pragma unroll
  for (u32 i = 0; i < COUNT; i++)
    wgmma<R::TOKENS>(sums, left[i], matrix_descriptor(pieces + 256 * i, 128, R::TILES * 256), i > 0 || !begins);
  wgmma_commit();
  wgmma_wait_for(sums);
}

// The sums of a unit: a warp has row tile row_tile + warp.
template <class R>
DEVICE void multiply_unit(u32 across, u8* smem, Turn<R::STAGES>& turn, float (&total)[R::TOKENS / 2]) {
  float sums[R::TOKENS / 2];
#pragma unroll
  for (u32 i = 0; i < R::TOKENS / 2; i++) total[i] = 0.0f;
  u32 tile = 0, stage = 0;
  for (u32 segment = 0; segment < DENSE_SEGMENTS; segment++) {
    u32 begin = tile, end = segment_start(across, segment + 1);
    while (tile < end) {
      u32 within = tile % R::TILES;
      if (within == 0) {
#ifndef PLANT_WAIT
        barrier_wait(turn.full(smem), turn.parity);
#endif
        stage = R::START + turn.stage * R::STAGE;
      }
      u32 pieces = shared_address(smem) + (R::RESIDENT ? R::TOKENS_AT + tile * 256 : stage + R::PIECES + within * 256);
      bool four = least(end - tile, R::TILES - within) >= 4;
      if (four)
        multiply_tiles<R, 4>(smem, stage, within, pieces, tile == begin, sums);
      else
        multiply_tiles<R, 1>(smem, stage, within, pieces, tile == begin, sums);
      tile += four ? 4 : 1;
      if (tile % R::TILES == 0 || tile == across) {
        __syncwarp();
        if (lane_id() == 0) barrier_arrive(turn.empty(smem));
        turn.advance();
      }
    }
    if (begin == end) continue;
#pragma unroll
    for (u32 i = 0; i < R::TOKENS / 2; i++) total[i] += sums[i];
  }
}

// Bias, and to memory: sums[4n + i] is row g (i < 2) or g + 8 of token 8n + 2t + i % 2.
template <class R>
DEVICE void put_unit(const DenseArgs& a, u32 row_tile, u32 first, float (&sums)[R::TOKENS / 2]) {
  u32 t = lane_id() % 4, g = lane_id() / 4;
#pragma unroll
  for (u32 i = 0; i < R::TOKENS / 2; i++) {
    u32 row = (row_tile + warp_id()) * 16 + g + i % 4 / 2 * 8, token = first + i / 4 * 8 + 2 * t + i % 2;
    if (row >= a.rows || token >= a.n) continue;
    float* out = a.out + (u64)token * a.rows + row;
    float result = sums[i] + a.bias[row];
    *out = a.add ? *out + result : result;
  }
}

// Units are stretches of rows; with many tokens, all of a chunk of tokens and then all of the next.
template <class R>
DEVICE void dense_wgmma(const DenseArgs& a) {
  SHARED(smem);
  u32 across = (a.cols + 15) / 16, stretches = ((a.rows + 15) / 16 + R::WARPS - 1) / R::WARPS;
  u32 chunks = (a.n + R::TOKENS - 1) / R::TOKENS;  // one, where tokens are resident
  bool copies = warp_id() >= R::WARPS;
  Turn<R::STAGES> turn = {0, 0};
  if (threadIdx.x == 0) make_ring<R::STAGES>(smem, R::COPIERS, R::WARPS);
  __syncthreads();
  if (copies) {
    for (u32 i = blockIdx.x; i < stretches * chunks; i += gridDim.x)
      copy_unit<R>(a, across, i % stretches * R::WARPS, i / stretches * R::TOKENS, smem, turn);
    return;
  }
  if (R::RESIDENT) {
    for (u32 i = threadIdx.x; i < across * 2 * 8; i += R::WARPS * WARP) {
      u32 token = i % 8;
      if (token < a.n)
        ((uint4*)(smem + R::TOKENS_AT))[i] = round_piece(a.x + (u64)token * a.cols, i / 8 * 8, a.cols);
    }
    fence_async();
    warpgroup_sync();
  }
  float sums[R::TOKENS / 2];
  for (u32 i = blockIdx.x; i < stretches * chunks; i += gridDim.x) {
    multiply_unit<R>(across, smem, turn, sums);
    put_unit<R>(a, i % stretches * R::WARPS, i / stretches * R::TOKENS, sums);
  }
}

KERNEL(dense_wgmma_8, DenseRing8::THREADS, DenseArgs) { dense_wgmma<DenseRing8>(a); }
KERNEL(dense_wgmma_128, DenseRing128::THREADS, DenseArgs) { dense_wgmma<DenseRing128>(a); }

#undef DENSE_SEGMENTS
#undef PIECES_THREADS
