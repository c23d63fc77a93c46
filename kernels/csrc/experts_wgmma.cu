// The experts on Hopper (sm_90a), fast precision: products of warpgroups behind a ring of bulk copies; see experts_wgmma.cuh.
//
// A lane's codes are widened in registers. One launch does both matrices: blocks take units as they come to them, first all
// of gate_up, then those of down, whose weights are on their way before the activations of their slot are there. Where units
// are so few that each of gate_up has a block of its own, and where items are many, there is a launch for each matrix, and a
// block goes through every so many of its units.
// A block's last warps copy, a stage of BLOCKS * 32 columns at a time, as far ahead as there are stages; each warpgroup
// decodes TOGETHER blocks of 32 columns while the products of those before are under way: what bounds few items is how long
// such a step takes, more than what is in it.
#include "experts_wgmma.cuh"

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

// Products ----------------------------------------------------------------------------------------------------------

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

template <bool GATE_UP, class R, u32 N>
DEVICE void do_unit(const ExpertArgs& a, const Matrix& m, const Unit& unit, u32 warp, u8* smem,
                    Turn<R::STAGES>& turn) {
  float sums[N / 2];
  wgmma_zero(sums);
  Biases biases = biases_of<GATE_UP>(a, m, unit, warp);
  multiply_unit<R, N>(m.blocks, warp, smem, turn, sums);
  put_unit<GATE_UP, N>(a, m, unit, warp, biases, sums);
}

// The widest products need more registers than there are for each of so many threads.
template <bool GATE_UP, class R>
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
    for (u32 i = blockIdx.x; i < units; i += gridDim.x)
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
KERNEL(gate_up_wgmma_8, Ring8::THREADS, ExpertArgs) { one_matrix<true, Ring8>(a); }
KERNEL(down_wgmma_8, Ring8::THREADS, ExpertArgs) { one_matrix<false, Ring8>(a); }
KERNEL(gate_up_wgmma_176, Ring176::THREADS, ExpertArgs) { one_matrix<true, Ring176>(a); }
KERNEL(down_wgmma_176, Ring176::THREADS, ExpertArgs) { one_matrix<false, Ring176>(a); }
#endif
