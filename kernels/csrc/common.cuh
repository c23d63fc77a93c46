// What every kernel shares: number types, bf16, exp, launches and shared memory. No CUDA header is included.
//
// A kernel is KERNEL(name, threads, Args): one block dimension, and one struct by value that src/cuda/ops.rs mirrors.
// Its blocks may start while the kernel before it still runs; before anything else they wait for its end. In an AHEAD_KERNEL
// each thread waits itself, or behind one of its block that has, before it touches what a step changes; and some thread of
// it does. So the end of one kernel is the end of all before it. The next one may start once all blocks of this one have
// waited, after a PASSING_KERNEL at once.
// Shared memory is one dynamic array, taken with SHARED and cut by constants at the head of a kernel.
// Products are fused only where fmaf says so: every build uses --fmad=false (-ffp-contract=off).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef CUDA_EMU
#include "emu/emu.h"
#define KERNEL(name, threads, Args)                                                            \
  static void name(const Args& a);                                                             \
  static const emu::Entry entry_##name(#name EMU_SUFFIX, sizeof(Args), threads,                \
                                       [](const void* args) { name(*(const Args*)args); });    \
  static void name(const Args& a)
#define RESIDENT_KERNEL(name, threads, blocks, Args) KERNEL(name, threads, Args)
#define PASSING_KERNEL(name, threads, Args) KERNEL(name, threads, Args)
#define AHEAD_KERNEL(name, threads, Args) KERNEL(name, threads, Args)
#define SHARED(smem) u8* smem = emu::shared()
#define DEVICE inline
#else
#define SHARED(smem) u8* smem = shared_memory()
#define DEVICE __device__ __forceinline__
#define KERNEL(name, threads, Args) RESIDENT_KERNEL(name, threads, 1, Args)
// The same with registers for so many blocks of a multiprocessor.
#define RESIDENT_KERNEL(name, threads, blocks, Args) \
  KERNEL_THAT(wait_for_before(); let_next_start(), name, threads, blocks, Args)
#define PASSING_KERNEL(name, threads, Args) KERNEL_THAT(let_next_start(); wait_for_before(), name, threads, 1, Args)
#define AHEAD_KERNEL(name, threads, Args) KERNEL_THAT(, name, threads, 1, Args)
#define KERNEL_THAT(begins, name, threads, blocks, Args)                                                       \
  DEVICE void name##_begun(const Args& a);                                                                     \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args a) {         \
    begins;                                                                                                    \
    name##_begun(a);                                                                                           \
  }                                                                                                            \
  DEVICE void name##_begun(const Args& a)
DEVICE u8* shared_memory() {
  extern __shared__ __align__(16) u8 dynamic[];
  return dynamic;
}
#endif
#include "ptx_grid.cuh"

// Types -------------------------------------------------------------------------------------------------------------

#define WARP 32
#define FULL 0xffffffffu
// As in src/backend.rs.
#define BLOCK_SIZE 16
#define SEGMENT 64
#define NO_SLOT 0xffffffffu

DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }
DEVICE float infinity() { return float_of(0x7f800000u); }
DEVICE u32 lane_id() { return threadIdx.x % WARP; }
DEVICE u32 warp_id() { return threadIdx.x / WARP; }
DEVICE u32 least(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 most(u32 a, u32 b) { return a > b ? a : b; }
// The larger number; b if either is NaN.
DEVICE float larger(float a, float b) { return a > b ? a : b; }

// Bytes to or from a rank, in a buffer with those of all.
struct Part {
  u64 start, bytes;
};

// Neighbouring numbers that one instruction moves: they lie at a multiple of their size.
template <class T, u32 N>
struct alignas(sizeof(T) * N) Several {
  T at[N];
};

// bf16 --------------------------------------------------------------------------------------------------------------

DEVICE float widen(u16 bits) { return float_of((u32)bits << 16); }

// The nearest bf16, the even one between two; NaN stays NaN.
DEVICE u16 narrow(float value) {
  u32 bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 0x40);
  return (u16)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Two numbers as bf16, the first in the low half.
DEVICE u32 narrow2(float low, float high) { return (u32)narrow(low) | (u32)narrow(high) << 16; }

// A stored number: f32 (exact) or bf16 (fast).
DEVICE float load(const float* p) { return *p; }
DEVICE float load(const u16* p) { return widen(*p); }
DEVICE void store(float* p, float value) { *p = value; }
DEVICE void store(u16* p, float value) { *p = narrow(value); }

// exp ---------------------------------------------------------------------------------------------------------------

// e^x with the bits of src/cpu/exp.rs: x = n ln 2 + r, the series of e^r up to r^7, n added to the exponent's bits.
DEVICE float exp_own(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
  float shifted = fmaf(x, float_of(0x3fb8aa3bu), magic);
  float n = shifted - magic;
  float r = fmaf(n, 1.9046543e-9f, fmaf(n, -float_of(0x3f317218u), x));
  float p = fmaf(1.0f / 5040.0f, r, 1.0f / 720.0f);
  p = fmaf(p, r, 1.0f / 120.0f);
  p = fmaf(p, r, 1.0f / 24.0f);
  p = fmaf(p, r, 1.0f / 6.0f);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  float value = float_of(bits_of(p) + (bits_of(shifted) << 23));
  if (x < -87.33654f) return 0.0f;
  return x <= 88.72283f ? value : x + infinity();
}

// Status ------------------------------------------------------------------------------------------------------------

// What went wrong first on the device since it was last read; src/cuda/status.rs reads it.
struct Status {
  u32 code;  // 0: nothing
  u32 what, index, len;
};
enum { STATUS_RECEIVED = 1, STATUS_TOKEN = 2 };
enum { PART_NOT_WHOLE = 0, SLOT_EMPTY = 1, TOO_MANY_ROWS = 2, FEWER_RESULTS = 3, MORE_RESULTS = 4 };
enum { SLOT_STALE = 5, SLOT_STRAY = 6, SLOT_TOO_SMALL = 7, NOTHING_WRONG = 8 };

// Called by one thread of the grid at a time; ops follow each other on one stream, so the first stays.
DEVICE void report(Status* status, u32 code, u32 what, u32 index, u32 len) {
  if (status->code == 0) {
    status->what = what;
    status->index = index;
    status->len = len;
    status->code = code;
  }
}

// Warps -------------------------------------------------------------------------------------------------------------

// The sum of a warp's numbers, the same in every lane, in the order of a butterfly.
DEVICE float warp_sum(float value) {
  for (u32 step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL, value, step);
  return value;
}

DEVICE u32 warp_sum(u32 value) {
  for (u32 step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL, value, step);
  return value;
}

// Lanes below this one whose predicate holds, given the ballot.
DEVICE u32 below(u32 ballot) { return __popc(ballot & ((1u << lane_id()) - 1)); }
