// Dense matrices on Hopper (sm_90a), fast precision: x: [n, cols] -> [n, rows], x W^T + b, by products of warpgroups.
//
// Weights: as dense.cu says; a lane's 16 bytes are wgmma's A, so they go from a ring of bulk copies to registers as
// they are. Weights are wgmma's M, 64 rows a warpgroup; tokens its N.
// Tokens: x rounded to bf16, [group of tokens][column tile of 16][tile of 8 tokens][2][8 tokens][8 columns], as wgmma
// reads B (see experts_wgmma.cu). Columns beyond the last are zero, tokens beyond the last are whatever was there.
// - dense_wgmma_8 (up to 8 tokens): a block rounds them itself while the first weights come.
// - dense_wgmma_32, _64, _128, _256 (more): dense_pieces has rounded them before, in groups of as many, and they come
//   with the weights. What reaches a multiprocessor bounds them: src/cuda/choose.rs takes the one that reads least.
//
// Order: two halves of the column tiles, each in one sum of the tensor core from zero; the halves added, then the bias.
// The same for all. Two numbers add to the same either way, so a half's sums wait for those of the other: in shared
// memory if a block has both, in global memory if two blocks share a unit of work, whichever is done first. There
// they are exchanged for what lies there, nothing or the other half's: so blocks meet in one round trip.
//
// What bounds few tokens is how long a step of a block takes, more than what is in it: so a multiprocessor has two
// blocks of up to 8 tokens, where both fit, and the weights of a step go to registers while the products before are under way.
#include "ptx_sm90.cuh"

#include "ring.cuh"

struct DenseArgs {
  const float* x;        // [n, cols]; of more than 8 tokens their pieces
  const uint4* weights;  // [row tiles, column tiles, 32]
  const float* bias;     // [row tiles * 16]
  float* out;            // [n, rows]
  u64* halves;           // where two blocks meet, zero before and after: [row tile of a unit][TOKENS / 4][32]
  u32 n, rows, cols;
  u32 add;    // 1: out += result
  u32 parts;  // 2: a block has one half of one unit's columns
  u32 unused;
};

// Rounding ----------------------------------------------------------------------------------------------------------

// Eight numbers as bf16.
DEVICE uint4 round_eight(const uint4& low, const uint4& high) {
  return {round_pair(float_of(low.x), float_of(low.y)), round_pair(float_of(low.z), float_of(low.w)),
          round_pair(float_of(high.x), float_of(high.y)), round_pair(float_of(high.z), float_of(high.w))};
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

// A block 8 tokens and 16 pieces of each, a thread a piece: so that a warp reads and writes 128 bytes together.
KERNEL(dense_pieces, PIECES_THREADS, PiecesArgs) {
  u32 across = (a.cols + 15) / 16;
  u32 token = blockIdx.y * 8 + threadIdx.x % 8, piece = blockIdx.x * (PIECES_THREADS / 8) + threadIdx.x / 8;
  if (token >= a.n || piece >= 2 * across) return;
  u64 tile = ((u64)(token / a.group) * across + piece / 2) * (a.group / 8) + token % a.group / 8;
  a.pieces[tile * 16 + piece % 2 * 8 + token % 8] = round_piece(a.x + (u64)token * a.cols, piece * 8, a.cols);
}

// Shared memory -----------------------------------------------------------------------------------------------------

// As in src/cuda/choose.rs.
template <u32 WARPGROUPS, u32 TOKENS_, u32 TILES_, u32 STAGES_>
struct DenseRing {
  // Column tiles of a stage are TILES, of a step a half of them.
  static const u32 TOKENS = TOKENS_, TILES = TILES_, TOGETHER = TILES / 2, STAGES = STAGES_;
  // Few tokens lie behind all else, all columns of them; many come with the weights.
  static const bool RESIDENT = TOKENS == 8;
  // Among many a stage is one step, done before the next begins: warpgroups take turns at the tensor cores.
  static const bool STEPWISE = TOKENS >= 128;
  // Warps of products, a row tile each, and one that copies; among 256 tokens a warpgroup of which one copies, since
  // warpgroups alone hand registers over to others.
  static const bool HANDS_OVER = TOKENS == 256;
  static const u32 WARPS = WARPGROUPS * 4, THREADS = (WARPS + (HANDS_OVER ? 4 : 1)) * WARP;
  // Bytes of a column tile's tokens, and where a stage has them.
  static const u32 COLUMN = RESIDENT ? 0 : TOKENS * 32, PIECES = WARPS * TILES * 512, STAGE = PIECES + TILES * COLUMN;
  // A half's sums while the other's are made.
  static const u32 SUMS_AT = RING_BARRIERS + STAGES * STAGE, TOKENS_AT = SUMS_AT + WARPS * TOKENS * 64;
};

typedef DenseRing<1, 8, 8, 5> DenseRing8;
typedef DenseRing<1, 32, 8, 8> DenseRing32;
typedef DenseRing<1, 64, 8, 6> DenseRing64;
typedef DenseRing<2, 128, 4, 5> DenseRing128;
typedef DenseRing<2, 256, 2, 4> DenseRing256;

// Units -------------------------------------------------------------------------------------------------------------

// A unit is a stretch of WARPS row tiles and a group of TOKENS tokens, or a half of its columns. Stretches first, so
// that those who work at once read the same tokens.
template <class R>
struct Unit {
  u32 tile, group;
  // The halves that the block has of it.
  u32 half, end;

  DEVICE Unit(const DenseArgs& a, u32 i, u32 stretches)
      : tile((i >> (a.parts - 1)) % stretches * R::WARPS),
        group((i >> (a.parts - 1)) / stretches),
        half(i & (a.parts - 1)),
        end(a.parts == 1 ? 2 : half + 1) {}
};

// Where a half of the column tiles begins, and the one before ends.
DEVICE u32 half_start(u32 across, u32 half) { return least(half * ((across + 1) / 2), across); }

// Copying -----------------------------------------------------------------------------------------------------------

// The weights and tokens of a half of a unit, a stage after the other. A lane of the warp has one part, or none. ahead:
// the kernel before may still run, and the memory have nothing to do.
template <class R>
DEVICE void copy_half(const DenseArgs& a, const Unit<R>& unit, u32 half, bool ahead, u8* smem, Turn<R::STAGES>& turn) {
  static_assert(R::WARPS < WARP, "a lane has one part at most");
  u32 across = (a.cols + 15) / 16, row_tiles = least((a.rows + 15) / 16 - unit.tile, R::WARPS), lane = lane_id();
  // Where a part goes in a stage, where it comes from, and its bytes of a column tile.
  u32 to = 0, bytes = 0;
  const u8* from = nullptr;
  if (lane < row_tiles) {
    bytes = 512;
    from = (const u8*)a.weights + (u64)(unit.tile + lane) * across * bytes;
    to = lane * R::TILES * bytes;
  } else if (lane == R::WARPS) {
    bytes = R::COLUMN;
    from = (const u8*)a.x + (u64)unit.group * across * bytes;
    to = R::PIECES;
  }
  u32 begin = half_start(across, half), end = half_start(across, half + 1);
  for (u32 tile = begin; tile < end; tile += R::TILES) {
    u32 count = least(end - tile, R::TILES);
    u64* full = turn.full(smem);
    barrier_wait(turn.empty(smem), turn.parity ^ 1);
    if (lane == 0) barrier_arrive_expecting(full, count * (row_tiles * 512 + R::COLUMN));
    __syncwarp();
    if (bytes != 0)
      bulk_copy(smem + RING_BARRIERS + turn.stage * R::STAGE + to, from + (u64)tile * bytes, count * bytes, full);
    turn.advance();
    if (ahead && tile == begin + (R::STAGES - 1) * R::TILES) {
      // What the ring has no room for, of all that the block has of the unit.
      u32 rest = half_start(across, unit.end) - tile - count;
      if (bytes != 0 && rest != 0) bulk_prefetch(from + (u64)(tile + count) * bytes, rest * bytes);
    }
  }
}

#define HOLD_AT_ONCE 8  // pieces of a thread that are asked for at once

// Rounds the tokens' column tiles from `begin` to `end`, by the threads of a warpgroup: each has one token, and every
// so many of its pieces.
template <class R>
DEVICE void hold_tokens(const DenseArgs& a, u32 begin, u32 end, u8* smem) {
  u32 shift = a.n > 4 ? 3 : a.n > 2 ? 2 : a.n - 1;
  u32 token = threadIdx.x % (1 << shift), piece = threadIdx.x >> shift, every = R::WARPS * WARP >> shift;
  u32 pieces = token < a.n ? 2 * (end - begin) : 0;
  uint4* held = (uint4*)(smem + R::TOKENS_AT) + token;
  const float* x = a.x + (u64)token * a.cols;
  if (a.cols % 16 != 0) {
    for (; piece < pieces; piece += every) held[piece * 8] = round_piece(x, begin * 16 + piece * 8, a.cols);
  } else {
    x += begin * 16;
    for (; piece < pieces; piece += HOLD_AT_ONCE * every) {
      // Loads that depend on nothing are under way together.
      uint4 low[HOLD_AT_ONCE], high[HOLD_AT_ONCE];
#pragma unroll
      for (u32 j = 0; j < HOLD_AT_ONCE; j++) {
        const uint4* from = (const uint4*)(x + (piece + j * every) * 8);
        if (piece + j * every < pieces) low[j] = from[0], high[j] = from[1];
      }
#pragma unroll
      for (u32 j = 0; j < HOLD_AT_ONCE; j++)
        if (piece + j * every < pieces) held[(piece + j * every) * 8] = round_eight(low[j], high[j]);
    }
  }
  fence_async();
  warpgroup_sync();
}

// Products ----------------------------------------------------------------------------------------------------------

// Begins the products of COUNT column tiles from `tile` of the stage on, whose tokens begin at `pieces`.
template <class R, u32 COUNT>
DEVICE void multiply_tiles(const u8* stage, u32 tile, u64 pieces, u32 (&left)[COUNT][4], float (&sums)[R::TOKENS / 2]) {
#pragma unroll
  for (u32 i = 0; i < COUNT; i++) {
    uint4 words = ((const uint4*)(stage + (warp_id() * R::TILES + tile + i) * 512))[lane_id()];
    left[i][0] = words.x, left[i][1] = words.y, left[i][2] = words.z, left[i][3] = words.w;
  }
#ifndef PLANT_FENCE
  wgmma_fence(left);
#endif
#pragma unroll
  for (u32 i = 0; i < COUNT; i++) wgmma<R::TOKENS>(sums, left[i], pieces + (tile + i) * (R::TOKENS * 32 / 16), true);
  wgmma_commit();
}

DEVICE void give_back(u64* stage) {
  if (stage != nullptr && lane_id() == 0) barrier_arrive(stage);
}

// The sums of column tiles from `begin` to `end`; a warp has a row tile. Resident tokens begin at `held`.
template <class R>
DEVICE void multiply_half(u32 begin, u32 end, u32 held, u8* smem, Turn<R::STAGES>& turn,
                          float (&sums)[R::TOKENS / 2]) {
  // Two sets of registers, in turn: one is loaded while products under way read the other.
  u32 left[2][R::TOGETHER][4];
  u64* before = nullptr;  // of the stage before, which products under way may read
  wgmma_zero(sums);
  for (u32 tile = begin; tile < end; tile += R::TILES) {
#ifndef PLANT_WAIT
    barrier_wait(turn.full(smem), turn.parity);
#endif
    const u8* stage = smem + RING_BARRIERS + turn.stage * R::STAGE;
    u32 count = least(end - tile, R::TILES);
    u32 tokens = R::RESIDENT ? held + (tile - begin) * R::TOKENS * 32 : shared_address(stage) + R::PIECES;
    u64 pieces = matrix_descriptor(tokens, 128, 256);
    // Of resident tokens nothing of a stage is read when its weights are in registers.
    u64* empty = turn.empty(smem);
    const bool at_once = R::RESIDENT || R::STEPWISE;
    u64* read = at_once ? empty : before;
    if (R::STEPWISE && count == R::TILES) {
      u32 all[R::TILES][4];
      multiply_tiles<R, R::TILES>(stage, 0, pieces, all, sums);
      wgmma_wait_for(sums);
      give_back(read);
    } else if (count == R::TILES) {
#pragma unroll
      for (u32 i = 0; i < 2; i++) {
#ifdef PLANT_REGISTERS
        u32 (&registers)[R::TOGETHER][4] = left[0];
#else
        u32 (&registers)[R::TOGETHER][4] = left[i];
#endif
        multiply_tiles<R, R::TOGETHER>(stage, i * R::TOGETHER, pieces, registers, sums);
        // Those before are done, and with them the stage before.
        wgmma_wait<1>();
        if (i == (R::RESIDENT ? 1 : 0)) give_back(read);
      }
    } else {
      u32 one[1][4];
      for (u32 i = 0; i < count; i++) {
        multiply_tiles<R, 1>(stage, i, pieces, one, sums);
        wgmma_wait<0>();
      }
      give_back(read);
    }
    before = at_once ? nullptr : empty;
#ifdef PLANT_EARLY
    give_back(before);
    before = nullptr;
#endif
    turn.advance();
  }
  wgmma_wait_for(sums);
  give_back(before);
}

// Halves meet by pairs of sums, 2n and 2n + 1. Nothing is zero; a pair is its complement, but for one pair of NaN.
DEVICE u64 pair_of(float first, float second) {
  u64 pair = ~((u64)bits_of(second) << 32 | bits_of(first));
  return pair != 0 ? pair : 1;
}

// The other half's sums, which are waiting or to be met, bias, and to memory: sums[4n + i] is row g (i < 2) or g + 8 of
// token 8n + 2t + i % 2.
template <class R>
DEVICE void put_unit(const DenseArgs& a, const Unit<R>& unit, const u64* waiting, u64* meeting,
                     const float (&sums)[R::TOKENS / 2]) {
  const u32 part = R::TOKENS < 32 ? R::TOKENS / 4 : 8;
  u32 t = lane_id() % 4, g = lane_id() / 4, row = (unit.tile + warp_id()) * 16 + g;
  if (row >= a.rows) return;
  bool both = row + 8 < a.rows;
  float bias[2] = {a.bias[row], a.bias[row + 8]};
#pragma unroll
  for (u32 from = 0; from < R::TOKENS / 4; from += part) {
    u32 first = unit.group * R::TOKENS + from * 4 + 2 * t;
    float* out = a.out + (u64)first * a.rows + row;
    // All that is added is asked for at once, not number by number behind the writes.
    u64 other[part];
    float before[part][2];
#pragma unroll
    for (u32 i = 0; i < part; i++) {
      u32 token = i / 2 * 8, at = (from + i) * WARP;
      bool inside = first + token < a.n && (i % 2 == 0 || both);
      other[i] = 0;
      if (inside)
        other[i] = a.parts == 1 ? waiting[at]
                                : atomicExch(meeting + at, pair_of(sums[2 * (from + i)], sums[2 * (from + i) + 1]));
#pragma unroll
      for (u32 j = 0; j < 2; j++)
        before[i][j] = a.add && inside && first + token + j < a.n ? out[(u64)(token + j) * a.rows + i % 2 * 8] : 0.0f;
    }
#pragma unroll
    for (u32 i = 0; i < part; i++) {
      // Who comes first leaves it to the other.
      if (other[i] == 0) continue;
#ifndef PLANT_MEET
      if (a.parts == 2) meeting[(from + i) * WARP] = 0;
#endif
      u32 token = i / 2 * 8;
#pragma unroll
      for (u32 j = 0; j < 2; j++) {
        float result = sums[2 * (from + i) + j] + float_of(~(u32)(other[i] >> 32 * j)) + bias[i % 2];
        if (first + token + j < a.n)
          out[(u64)(token + j) * a.rows + i % 2 * 8] = a.add ? before[i][j] + result : result;
      }
    }
  }
}

// What the warps of products do.
template <class R>
DEVICE void multiply_units(const DenseArgs& a, u32 stretches, u32 units, u8* smem, Turn<R::STAGES>& turn) {
  const u32 pairs = R::TOKENS / 4;
  u32 across = (a.cols + 15) / 16, held = shared_address(smem) + R::TOKENS_AT;
  float sums[2 * pairs];
  for (u32 i = blockIdx.x; i < units; i += gridDim.x) {
    Unit<R> unit(a, i, stretches);
    if (R::RESIDENT && i == blockIdx.x)
      hold_tokens<R>(a, half_start(across, unit.half), half_start(across, unit.end), smem);
    u32 own = warp_id() * pairs * WARP + lane_id();
    u64 *waiting = (u64*)(smem + R::SUMS_AT) + own, *meeting = a.halves + (u64)(i / 2) * R::WARPS * pairs * WARP + own;
    for (u32 half = unit.half; half < unit.end; half++) {
      u32 begin = half_start(across, half), from = half == unit.half ? 0 : begin;
      multiply_half<R>(begin, half_start(across, half + 1), held + from * R::TOKENS * 32, smem, turn, sums);
      if (half + 1 == unit.end) break;
#pragma unroll
      for (u32 pair = 0; pair < pairs; pair++)
        waiting[pair * WARP] = pair_of(sums[2 * pair], sums[2 * pair + 1]);
    }
    put_unit<R>(a, unit, waiting, meeting, sums);
  }
}

template <class R>
DEVICE void dense_wgmma(const DenseArgs& a) {
  SHARED(smem);
  u32 stretches = ((a.rows + 15) / 16 + R::WARPS - 1) / R::WARPS;
  u32 units = stretches * ((a.n + R::TOKENS - 1) / R::TOKENS) * a.parts;
  Turn<R::STAGES> turn = {0, 0};
  if (threadIdx.x == 0) make_ring<R::STAGES>(smem, 1, R::WARPS);
  __syncthreads();
  // Of few tokens the weights alone are copied: nobody writes these.
  if (!R::RESIDENT || warp_id() < R::WARPS) {
    wait_for_before();
    let_next_start();
  }
  if (warp_id() < R::WARPS) {
    if (R::HANDS_OVER) take_registers<232>();
    multiply_units<R>(a, stretches, units, smem, turn);
    return;
  }
  if (R::HANDS_OVER) keep_registers<40>();
  if (warp_id() > R::WARPS) return;
  for (u32 i = blockIdx.x; i < units; i += gridDim.x) {
    Unit<R> unit(a, i, stretches);
    for (u32 half = unit.half; half < unit.end; half++)
      copy_half<R>(a, unit, half, R::RESIDENT && i == blockIdx.x && half == unit.half, smem, turn);
  }
}

AHEAD_KERNEL(dense_wgmma_8, DenseRing8::THREADS, DenseArgs) { dense_wgmma<DenseRing8>(a); }
AHEAD_KERNEL(dense_wgmma_32, DenseRing32::THREADS, DenseArgs) { dense_wgmma<DenseRing32>(a); }
#ifndef PLANTED
AHEAD_KERNEL(dense_wgmma_64, DenseRing64::THREADS, DenseArgs) { dense_wgmma<DenseRing64>(a); }
AHEAD_KERNEL(dense_wgmma_128, DenseRing128::THREADS, DenseArgs) { dense_wgmma<DenseRing128>(a); }
AHEAD_KERNEL(dense_wgmma_256, DenseRing256::THREADS, DenseArgs) { dense_wgmma<DenseRing256>(a); }
#endif

#undef PIECES_THREADS
#undef HOLD_AT_ONCE
