// The experts on Hopper (sm_90a), fast precision: products of warpgroups behind a ring of bulk copies.
//
// gate_up: for each item (a received row in an expert's hands) [H] -> [I], with SwiGLU. down: [I] -> [H], one row of the
// wire type for each item. Weights are wgmma's M, 64 rows a warpgroup; items its N, 8 to 176.
//
// Weights: as experts.cuh says; a lane's codes are widened to bf16 in registers, times their scale: wgmma's A. So an
// element is what a checkpoint's weights are as bf16: exact, but for scales of 2^126 and 2^127, where codes from 4 and 2
// on are infinite.
// Items: [tile of 8 items][columns / 8][8 items][8 columns] bf16, as wgmma reads B: such a piece is 128 contiguous bytes,
// so it needs no swizzle, and a tile's columns follow each other, so bulk copies need no tensor map. Slot s has the tiles
// from starts[s] / 8 + s on. receive.cu puts received rows there, gate_up its activations.
//
// A unit is a row stretch of WARPGROUPS * 64 and ITEMS items of a slot; slots without items have none. One launch does both
// matrices: blocks take units as they come to them, first all of gate_up, then those of down, whose weights are on their way
// before the activations of their slot are there. Where units are so few that each of gate_up has a block of its own, and
// where items are many, there is a launch for each matrix, and a block goes through every so many of its units.
// A block's last warps copy, a stage of BLOCKS * 32 columns at a time, as far ahead as there are stages; each warpgroup
// decodes TOGETHER blocks of 32 columns while the products of those before are under way: what bounds few items is how long
// such a step takes, more than what is in it.
//
// Order: columns ascending by 16, in one sum of the tensor core from zero; bias last. The same for every N and unit.
#include "ptx_sm90.cuh"

#include "experts.cuh"
#include "ring.cuh"

// Shared memory -----------------------------------------------------------------------------------------------------

// As in src/cuda/choose.rs.
template <u32 WARPGROUPS, u32 COPIERS_, u32 ITEMS_, u32 BLOCKS_, u32 TOGETHER_, u32 STAGES_>
struct Ring {
  static const u32 ITEMS = ITEMS_, BLOCKS = BLOCKS_, TOGETHER = TOGETHER_, STAGES = STAGES_;
  // Warps of products, a row tile each; warps that copy.
  static const u32 WARPS = WARPGROUPS * 4, COPIERS = COPIERS_, THREADS = (WARPS + COPIERS) * WARP;
  static const u32 CODES = 0, SCALES = CODES + WARPS * BLOCKS * 256, PIECES = SCALES + WARPS * BLOCKS * 16;
  static const u32 STAGE = PIECES + ITEMS * BLOCKS * 64;
  // Barriers, units that begin with a stage, stages, the slots' first chunks.
  static const u32 UNITS = RING_BARRIERS, START = UNITS + STAGES * 32, CHUNKS = START + STAGES * STAGE;
};

typedef Ring<1, 1, 8, 6, 3, 5> Ring8;
typedef Ring<1, 1, 16, 6, 3, 4> Ring16;
typedef Ring<2, 1, 32, 6, 3, 4> Ring32;
typedef Ring<2, 1, 48, 6, 1, 3> Ring48;
typedef Ring<3, 4, 176, 2, 1, 7> Ring176;

// Units -------------------------------------------------------------------------------------------------------------

// What one warp finds for the block: how many chunks of ITEMS items lower slots have, [slots + 1]. Four times as many slots
// as lanes are asked for at once: the first units wait for them.
template <u32 ITEMS>
DEVICE void count_chunks(const ExpertArgs& a, u32* chunks) {
  const u32 AT_ONCE = 4;
  u32 before = 0;
  for (u32 first = 0; first < a.slots_count; first += AT_ONCE * WARP) {
    u32 own[AT_ONCE];
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      u32 slot = first + i * WARP + lane_id();
      own[i] = slot < a.slots_count ? (a.starts[slot + 1] - a.starts[slot] + ITEMS - 1) / ITEMS : 0;
    }
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      u32 slot = first + i * WARP + lane_id(), sum = own[i];
      for (u32 step = 1; step < WARP; step *= 2) {
        u32 lower = __shfl_up_sync(FULL, sum, step);
        if (lane_id() >= step) sum += lower;
      }
      if (slot < a.slots_count) chunks[slot] = before + sum - own[i];
      before += __shfl_sync(FULL, sum, WARP - 1);
    }
  }
  if (lane_id() == 0) chunks[a.slots_count] = before;
}

// A stretch of rows and a chunk of items of a slot.
struct Unit {
  u32 slot, tile;   // of the first row
  u32 first, end;   // items of the chunk, among all
  u32 item_tile;    // of the first item
  u32 matrix;       // where a launch does both
  u32 unused[2];
};
enum { GATE_UP_UNIT = 0, DOWN_UNIT = 1, NO_UNIT = 2 };
static_assert(sizeof(Unit) == 32, "as there is room for");

template <class R>
DEVICE Unit find_unit(const ExpertArgs& a, const u32* chunks, u32 unit, u32 stretches) {
  u32 chunk = unit / stretches, low = 0, high = a.slots_count;
  // The last slot that begins at this chunk or before it: slots without items begin where the next one does.
  while (high - low > 1) {
    u32 middle = (low + high) / 2;
    if (chunks[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  // Chunks of a slot are of one length, a multiple of 8.
  u32 start = a.starts[low], end = a.starts[low + 1], count = chunks[low + 1] - chunks[low];
  u32 length = (end - start + 8 * count - 1) / (8 * count) * 8, first = start + (chunk - chunks[low]) * length;
  return {low, unit % stretches * R::WARPS, least(first, end), least(first + length, end),
          start / 8 + low + (first - start) / 8, GATE_UP_UNIT, {0, 0}};
}

// Copying -----------------------------------------------------------------------------------------------------------

// A matrix as the block sees it.
struct Matrix {
  u32 tiles, blocks;    // of 16 rows, of 32 columns
  const u16* items;     // tiles of items
};

// What a lane of the copying warps copies of a unit: where it goes in a stage, where it comes from, and its bytes of a block
// of 32 columns, which may be none.
struct Copied {
  u32 to, bytes;
  const u8* from;
  bool of_items;

  template <class R>
  DEVICE void copy(const Matrix& m, u32 block, u8* smem, const Turn<R::STAGES>& turn) const {
    if (bytes == 0) return;
    u32 count = least(m.blocks - block, R::BLOCKS);
    bulk_copy(smem + R::START + turn.stage * R::STAGE + to, from + (u64)block * bytes, count * bytes, turn.full(smem));
  }
};

template <bool GATE_UP, class R>
DEVICE Copied copied_of(const ExpertArgs& a, const Matrix& m, const Unit& unit) {
  static_assert(2 * R::WARPS + R::ITEMS / 8 <= R::COPIERS * WARP, "a lane has one part at most");
  const Slot& slot = a.slots[unit.slot];
  u32 tiles = least(m.tiles - unit.tile, R::WARPS), item_tiles = (unit.end - unit.first + 7) / 8;
  u32 part = lane_id() * R::COPIERS + warp_id() - R::WARPS, tile = part % R::WARPS;
  if (part >= 2 * R::WARPS) {
    u32 item_tile = part - 2 * R::WARPS;
    return {R::PIECES + item_tile * R::BLOCKS * 512, item_tile < item_tiles ? 512u : 0,
            (const u8*)m.items + (u64)(unit.item_tile + item_tile) * m.blocks * 512, true};
  }
  bool codes = part < R::WARPS;
  u32 bytes = codes ? 256 : 16;
  const u8* from = codes ? (const u8*)(GATE_UP ? slot.gate_up : slot.down) : GATE_UP ? slot.gate_up_scales : slot.down_scales;
  return {codes ? R::CODES + tile * R::BLOCKS * 256 : R::SCALES + tile * R::BLOCKS * 16, tile < tiles ? bytes : 0,
          from + (u64)(unit.tile + tile) * m.blocks * bytes, false};
}

// Announces a stage's bytes, of all lanes of a warp, when it is empty.
template <class R>
DEVICE void begin_stage(const Matrix& m, u32 block, u32 all, u8* smem, const Turn<R::STAGES>& turn) {
  barrier_wait(turn.empty(smem), turn.parity ^ 1);
  if (lane_id() == 0) barrier_arrive_expecting(turn.full(smem), least(m.blocks - block, R::BLOCKS) * all);
  __syncwarp();
}

// The stages of a unit from a block on, one after the other.
template <class R>
DEVICE void copy_stages(const Matrix& m, const Copied& copied, u32 all, u32 block, u8* smem, Turn<R::STAGES>& turn) {
  for (; block < m.blocks; block += R::BLOCKS) {
    begin_stage<R>(m, block, all, smem, turn);
    copied.copy<R>(m, block, smem, turn);
    turn.advance();
  }
}

// A unit's codes, scales and items.
template <bool GATE_UP, class R>
DEVICE void copy_unit(const ExpertArgs& a, const Matrix& m, const Unit& unit, u8* smem, Turn<R::STAGES>& turn) {
  Copied copied = copied_of<GATE_UP, R>(a, m, unit);
  copy_stages<R>(m, copied, warp_sum(copied.bytes), 0, smem, turn);
}

// The same before there are items: they follow the first weights when `wait` has returned.
template <bool GATE_UP, class R, class F>
DEVICE void copy_unit_ahead(const ExpertArgs& a, const Matrix& m, const Unit& unit, u8* smem, Turn<R::STAGES>& turn,
                            const F& wait) {
  Copied copied = copied_of<GATE_UP, R>(a, m, unit);
  u32 all = warp_sum(copied.bytes), ahead = least(m.blocks, R::STAGES * R::BLOCKS);
  Turn<R::STAGES> begun = turn;
  for (u32 block = 0; block < ahead; block += R::BLOCKS) {
    begin_stage<R>(m, block, all, smem, turn);
    if (!copied.of_items) copied.copy<R>(m, block, smem, turn);
    turn.advance();
  }
  wait();
  __syncwarp();
  fence_async_global();
  for (u32 block = 0; block < ahead; block += R::BLOCKS) {
    if (copied.of_items) copied.copy<R>(m, block, smem, begun);
    begun.advance();
  }
  copy_stages<R>(m, copied, all, ahead, smem, turn);
}

// Products ----------------------------------------------------------------------------------------------------------

#define BF16X2_ONE_OF_EXPONENT 0x00800080u
// Codes are 2^-126 of their value and scales 2^(scale - 127): so it is 2^(scale - 1), of exponent scale + 126.
#define FACTOR_OF_ZERO (126 * BF16X2_ONE_OF_EXPONENT)
#define FACTOR_MAX (254 * BF16X2_ONE_OF_EXPONENT)

// A lane's part of a block of 32 columns and 16 rows: wgmma's A twice. Its two scales are the bytes of a u16.
DEVICE void widen_block(uint2 codes, u32 scales, u32 (&left)[4], u32 (&right)[4]) {
  decode_small(codes, left, right);
  u32 low = (scales & 0xff) * BF16X2_ONE_OF_EXPONENT + FACTOR_OF_ZERO;
  u32 high = (scales >> 8) * BF16X2_ONE_OF_EXPONENT + FACTOR_OF_ZERO;
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    left[i] = multiply_bf16x2(left[i], i % 2 ? high : low);
    right[i] = multiply_bf16x2(right[i], i % 2 ? high : low);
  }
}

// The same where scales may exceed 2: by 2 at most, and then by what is left of them.
DEVICE void widen_large_block(uint2 codes, u32 scales, u32 (&left)[4], u32 (&right)[4]) {
  decode_small(codes, left, right);
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    u32 scale = i % 2 ? scales >> 8 : scales & 0xff;
    u32 factor = least(scale * BF16X2_ONE_OF_EXPONENT + FACTOR_OF_ZERO, FACTOR_MAX);
    u32 further = (most(scale, 128) - 1) * BF16X2_ONE_OF_EXPONENT;
    left[i] = multiply_bf16x2(multiply_bf16x2(left[i], factor), further);
    right[i] = multiply_bf16x2(multiply_bf16x2(right[i], factor), further);
  }
}

#undef BF16X2_ONE_OF_EXPONENT
#undef FACTOR_OF_ZERO
#undef FACTOR_MAX

// The first lane's number, as all of a warp have it: so it is computed once for the warp, not by each lane.
DEVICE u32 of_warp(u32 number) { return __shfl_sync(FULL, number, 0); }

// Where a warp is in a unit.
template <class R>
struct Walk {
  u8* smem;
  Turn<R::STAGES>& turn;
  u32 warp;
  u32 origin;     // where shared memory begins
  u64* left;      // the barrier of the stage before, until its products are done
  const u8* codes;
  const u8* scales;
  u64 pieces;     // wgmma's B of the stage's first 16 columns

  // Waits for the stage whose turn it is.
  DEVICE void enter() {
#ifdef PLANT_PHASE
    barrier_wait(turn.full(smem), turn.parity ^ 1);
#elif !defined(PLANT_WAIT)
    barrier_wait(turn.full(smem), turn.parity);
#endif
#ifdef PLANT_STAGE
    u32 stage = R::START + (turn.stage + 1) % R::STAGES * R::STAGE;
#else
    u32 stage = R::START + turn.stage * R::STAGE;
#endif
    codes = smem + stage + R::CODES + warp * R::BLOCKS * 256 + lane_id() * 8;
    scales = smem + stage + R::SCALES + warp * R::BLOCKS * 16 + lane_id() / 4 * 2;
#ifdef PLANT_STRIDE
    const u32 stride = (R::BLOCKS - 1) * 512;
#else
    const u32 stride = R::BLOCKS * 512;
#endif
    pieces = matrix_descriptor(of_warp(origin + stage + R::PIECES), 128, stride);
  }

  // Goes on to the next stage; this one is given back when its products are done.
  DEVICE void leave() {
    left = turn.empty(smem);
#ifdef PLANT_EARLY
    give_back();
#endif
    turn.advance();
  }

  DEVICE void give_back() {
    if (left != nullptr && lane_id() == 0) barrier_arrive(left);
    left = nullptr;
  }

  // COUNT blocks from `block` on; each is wgmma's A twice.
  template <u32 COUNT>
  DEVICE void widen(u32 block, u32 (&a)[2 * COUNT][4]) {
    uint2 words[COUNT];
    u32 both[COUNT], any = 0;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
      words[i] = *(const uint2*)(codes + (block + i) * 256);
      both[i] = *(const u16*)(scales + (block + i) * 16);
      any |= both[i];
    }
    if (__ballot_sync(FULL, (any & 0x8080) != 0) == 0) {
#pragma unroll
      for (u32 i = 0; i < COUNT; i++) widen_block(words[i], both[i], a[2 * i], a[2 * i + 1]);
    } else {
#pragma unroll
      for (u32 i = 0; i < COUNT; i++) widen_large_block(words[i], both[i], a[2 * i], a[2 * i + 1]);
    }
  }

  // Begins their products; 16 columns are two pieces, 256 bytes.
  template <u32 N, u32 COUNT>
  DEVICE void multiply(u32 block, u32 (&a)[2 * COUNT][4], float (&sums)[N / 2]) {
#ifndef PLANT_FENCE
    wgmma_fence(a);
#endif
#pragma unroll
    for (u32 i = 0; i < 2 * COUNT; i++) wgmma<N>(sums, a[i], pieces + block * 32 + i * 16, true);
    wgmma_commit();
  }
};

// The sums of a unit: a warp has row tile unit.tile + warp.
template <class R, u32 N>
DEVICE void multiply_unit(u32 blocks, u32 warp, u8* smem, Turn<R::STAGES>& turn, float (&sums)[N / 2]) {
  static_assert(R::BLOCKS % (2 * R::TOGETHER) == 0, "two sets of registers, in turn");
  u32 a[2][2 * R::TOGETHER][4];
  Walk<R> walk = {smem, turn, warp, shared_address(smem), nullptr, nullptr, nullptr, 0};
  for (u32 first = 0; first < blocks; first += R::BLOCKS) {
    u32 count = least(blocks - first, R::BLOCKS);
    walk.enter();
    if (count == R::BLOCKS) {
#pragma unroll
      for (u32 i = 0; i < R::BLOCKS; i += R::TOGETHER) {
#ifdef PLANT_REGISTERS
        u32 (&registers)[2 * R::TOGETHER][4] = a[0];
#else
        u32 (&registers)[2 * R::TOGETHER][4] = a[i / R::TOGETHER % 2];
#endif
        walk.template widen<R::TOGETHER>(i, registers);
        walk.template multiply<N, R::TOGETHER>(i, registers, sums);
        // Those before are done, and with them the stage before.
        wgmma_wait<1>();
        if (i == 0) walk.give_back();
      }
    } else {
      u32 one[2][4];
      for (u32 i = 0; i < count; i++) {
        walk.template widen<1>(i, one);
        walk.template multiply<N, 1>(i, one, sums);
        wgmma_wait<0>();
        if (i == 0) walk.give_back();
      }
    }
    walk.leave();
  }
  wgmma_wait_for(sums);
  walk.give_back();
}

// swiglu of experts.cuh by the instructions for 2^x and 1/x, whose errors bf16 does not show.
DEVICE float swiglu_fast(float gate, float up, float limit) {
  const float alpha = 1.702f * 1.44269504f;
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return gate * reciprocal(1.0f + power_of_two(-alpha * gate)) * (up + 1.0f);
}

// A lane's biases of a unit: of rows g and g + 8. They are asked for before its products.
struct Biases {
  float low, high;
};

template <bool GATE_UP>
DEVICE Biases biases_of(const ExpertArgs& a, const Matrix& m, const Unit& unit, u32 warp) {
  u32 tile = unit.tile + warp;
  if (tile >= m.tiles) return {0.0f, 0.0f};
  const Slot& slot = a.slots[unit.slot];
  const float* bias = (GATE_UP ? slot.gate_up_bias : slot.down_bias) + tile * 16 + lane_id() / 4;
  return {bias[0], bias[8]};
}

// Bias and SwiGLU, or bias, and to memory: sums[4n + i] is row g (i < 2) or g + 8 of item 8n + 2t + i % 2. Transposed, a
// lane has rows 2t and 2t + 1 of item 8n + g.
template <bool GATE_UP, u32 N>
DEVICE void put_unit(const ExpertArgs& a, const Matrix& m, const Unit& unit, u32 warp, const Biases& biases,
                     float (&sums)[N / 2]) {
  u32 t = lane_id() % 4, g = lane_id() / 4, tile = unit.tile + warp;
  if (tile >= m.tiles) return;
  float low = biases.low, high = biases.high;
#pragma unroll
  for (u32 n = 0; n < N / 8; n++) {
    if (unit.first + n * 8 >= unit.end) break;
    u32 item = unit.first + n * 8 + g;
    bool inside = item < unit.end;
    float* sum = sums + 4 * n;
    if (GATE_UP) {
      u32 pair = round_pair(swiglu_fast(sum[0] + low, sum[2] + high, a.limit),
                            swiglu_fast(sum[1] + low, sum[3] + high, a.limit));
      pair = transpose_8x8(pair);
      u16* out = (u16*)a.activations + ((u64)(unit.item_tile + n) * (a.intermediate / 8) + tile) * 64 + lane_id() * 2;
      if (inside) *(u32*)out = pair;
    } else {
      u32 upper = transpose_8x8(round_pair(sum[0] + low, sum[1] + low));
      u32 lower = transpose_8x8(round_pair(sum[2] + high, sum[3] + high));
      u16* out = (u16*)a.results + (u64)a.order[inside ? item : unit.first] * a.hidden + tile * 16 + 2 * t;
      if (inside) {
        *(u32*)out = upper;
        *(u32*)(out + 8) = lower;
      }
    }
  }
}

template <bool GATE_UP, class R, u32 N>
DEVICE void do_unit(const ExpertArgs& a, const Matrix& m, const Unit& unit, u32 warp, u8* smem,
                    Turn<R::STAGES>& turn) {
  float sums[N / 2];
  wgmma_zero(sums);
  Biases biases = biases_of<GATE_UP>(a, m, unit, warp);
  multiply_unit<R, N>(m.blocks, warp, smem, turn, sums);
  put_unit<GATE_UP, N>(a, m, unit, warp, biases, sums);
}

DEVICE Matrix matrix_of(const ExpertArgs& a, bool gate_up) {
  return {(gate_up ? 2 * a.intermediate : a.hidden) / 16, (gate_up ? a.hidden : a.intermediate) / 32,
          (const u16*)(gate_up ? a.rows : a.activations)};
}

template <class R>
DEVICE u32 stretches_of(const Matrix& m) {
  return (m.tiles + R::WARPS - 1) / R::WARPS;
}

// The widest products need more registers than there are for each of so many threads. BEFORE_ITEMS: the kernel before may still
// run, and is that of gate_up; the one before that, which lists the items, has ended.
template <bool GATE_UP, bool BEFORE_ITEMS, class R>
DEVICE void one_matrix(const ExpertArgs& a) {
  SHARED(smem);
  u32* chunks = (u32*)(smem + R::CHUNKS);
  Matrix m = matrix_of(a, GATE_UP);
  u32 stretches = stretches_of<R>(m);
  u32 warp = of_warp(warp_id());
  // Filled by the warps that copy, each announcing its part; emptied by all others.
  if (threadIdx.x == 0) make_ring<R::STAGES>(smem, R::COPIERS, R::WARPS);
  if (warp_id() == R::WARPS) count_chunks<R::ITEMS>(a, chunks);
  __syncthreads();
  u32 units = chunks[a.slots_count] * stretches;
  Turn<R::STAGES> turn = {0, 0};
  const bool wide = R::ITEMS == 176;
  if (warp >= R::WARPS) {
    if (wide) keep_registers<40>();
    u32 i = blockIdx.x;
    if (BEFORE_ITEMS) {
      if (i < units)
        copy_unit_ahead<GATE_UP, R>(a, m, find_unit<R>(a, chunks, i, stretches), smem, turn, []() { wait_for_before(); });
      wait_for_before();
      let_next_start();
      i += gridDim.x;
    }
    for (; i < units; i += gridDim.x)
      copy_unit<GATE_UP, R>(a, m, find_unit<R>(a, chunks, i, stretches), smem, turn);
  } else {
    if (wide) take_registers<152>();
    for (u32 i = blockIdx.x; i < units; i += gridDim.x) {
      Unit unit = find_unit<R>(a, chunks, i, stretches);
      // No wider than it must be: columns take as long whether there are items in them or not.
      if (!wide)
        do_unit<GATE_UP, R, wide ? 8 : R::ITEMS>(a, m, unit, warp, smem, turn);
      else if (of_warp(unit.end - unit.first) <= 144)
        do_unit<GATE_UP, R, 144>(a, m, unit, warp, smem, turn);
      else
        do_unit<GATE_UP, R, 176>(a, m, unit, warp, smem, turn);
    }
  }
}

// Both matrices -----------------------------------------------------------------------------------------------------

struct Progress {
  u32 next;     // unit that no block has taken
  u32 through;  // blocks that have found none
  u32 warps[1]; // [slots]: those that have done a unit of gate_up
};

// Units are numbered over both matrices. Who takes one of down knows that all of gate_up were taken by blocks that run, and
// these wait for nobody: so it may wait for them, however many blocks run at once.
template <class R>
DEVICE void both_matrices(const ExpertArgs& a) {
  static_assert(R::COPIERS == 1, "one warp takes units");
  SHARED(smem);
  u32* chunks = (u32*)(smem + R::CHUNKS);
  Unit* unit_of = (Unit*)(smem + R::UNITS);  // by the stage that it begins with
  Progress* progress = (Progress*)a.progress;
  u32 first_stretches = stretches_of<R>(matrix_of(a, true)), second_stretches = stretches_of<R>(matrix_of(a, false));
  u32 warp = of_warp(warp_id());
  if (threadIdx.x == 0) make_ring<R::STAGES>(smem, R::COPIERS, R::WARPS);
  if (warp_id() == R::WARPS) count_chunks<R::ITEMS>(a, chunks);
  __syncthreads();
  u32 first_units = chunks[a.slots_count] * first_stretches;
  u32 units = first_units + chunks[a.slots_count] * second_stretches;
  Turn<R::STAGES> turn = {0, 0};
  if (warp >= R::WARPS) {
    u32 taken = lane_id() == 0 ? atomicAdd(&progress->next, 1u) : 0;
    while (true) {
      u32 i = of_warp(taken);
      // The next one is on its way while this one is copied.
      if (lane_id() == 0 && i < units) taken = atomicAdd(&progress->next, 1u);
      Unit unit = {};
      unit.matrix = NO_UNIT;
      if (i < first_units) {
        unit = find_unit<R>(a, chunks, i, first_stretches);
      } else if (i < units) {
        unit = find_unit<R>(a, chunks, i - first_units, second_stretches);
        unit.matrix = DOWN_UNIT;
      }
      barrier_wait(turn.empty(smem), turn.parity ^ 1);
      if (lane_id() == 0) unit_of[turn.stage] = unit;
      __syncwarp();
      if (unit.matrix == NO_UNIT) break;
      if (unit.matrix == GATE_UP_UNIT) {
        copy_unit<true, R>(a, matrix_of(a, true), unit, smem, turn);
      } else {
        u32 slot_units = (chunks[unit.slot + 1] - chunks[unit.slot]) * first_stretches;
#ifdef PLANT_MEET
        slot_units = 0;
#endif
        copy_unit_ahead<false, R>(a, matrix_of(a, false), unit, smem, turn, [&]() {
          if (lane_id() == 0) wait_for_blocks(&progress->warps[unit.slot], slot_units * R::WARPS);
        });
      }
    }
    if (lane_id() != 0) return;
    barrier_arrive_expecting(turn.full(smem), 0);
    // The last block leaves zeros: nobody counts any more, since all units of down were waited for.
    __threadfence();
    if (atomicAdd(&progress->through, 1u) + 1 != gridDim.x) return;
    for (u32 slot = 0; slot < a.slots_count; slot++) progress->warps[slot] = 0;
    progress->next = progress->through = 0;
  } else {
    while (true) {
      barrier_wait(turn.full(smem), turn.parity);
      Unit unit = unit_of[turn.stage];
      if (of_warp(unit.matrix) == NO_UNIT) break;
      bool of_first = of_warp(unit.matrix) == GATE_UP_UNIT;
      Matrix m = matrix_of(a, of_first);
      Biases biases = of_first ? biases_of<true>(a, m, unit, warp) : biases_of<false>(a, m, unit, warp);
      float sums[R::ITEMS / 2];
      wgmma_zero(sums);
      multiply_unit<R, R::ITEMS>(m.blocks, warp, smem, turn, sums);
      if (!of_first) {
        put_unit<false, R::ITEMS>(a, m, unit, warp, biases, sums);
        continue;
      }
      put_unit<true, R::ITEMS>(a, m, unit, warp, biases, sums);
      fence_async_global();
      __syncwarp();
      if (lane_id() == 0) {
        __threadfence();
        atomicAdd(&progress->warps[unit.slot], 1u);
      }
    }
  }
}

RESIDENT_KERNEL(experts_wgmma_32, Ring32::THREADS, 2, ExpertArgs) { both_matrices<Ring32>(a); }
#ifndef PLANTED
RESIDENT_KERNEL(experts_wgmma_8, Ring8::THREADS, 4, ExpertArgs) { both_matrices<Ring8>(a); }
RESIDENT_KERNEL(experts_wgmma_16, Ring16::THREADS, 4, ExpertArgs) { both_matrices<Ring16>(a); }
RESIDENT_KERNEL(experts_wgmma_48, Ring48::THREADS, 2, ExpertArgs) { both_matrices<Ring48>(a); }
KERNEL(gate_up_wgmma_8, Ring8::THREADS, ExpertArgs) { one_matrix<true, false, Ring8>(a); }
AHEAD_KERNEL(down_wgmma_8, Ring8::THREADS, ExpertArgs) { one_matrix<false, true, Ring8>(a); }
KERNEL(gate_up_wgmma_176, Ring176::THREADS, ExpertArgs) { one_matrix<true, false, Ring176>(a); }
KERNEL(down_wgmma_176, Ring176::THREADS, ExpertArgs) { one_matrix<false, false, Ring176>(a); }
#endif
