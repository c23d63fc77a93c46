// CUDA's words on a CPU: threads of a block, or of a few blocks at once, are fibers of one CPU thread, which meet at barriers.
//
// What it finds: values read before a barrier made them (shared memory starts as NaN, and every second block runs its
// threads backwards), threads that wait for each other for ever, accesses beyond a buffer (with -fsanitize=address).
// What it cannot find: errors of PTX itself, memory orders weaker than a CPU's, speed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emu {

struct Dim3 {
  unsigned x, y, z;
};

// A kernel that was compiled in; entries register themselves before main.
struct Entry {
  Entry(const char* name, size_t args, unsigned threads, void (*body)(const void*));
  const char* name;
  size_t args;
  unsigned threads;
  void (*body)(const void*);
  const Entry* next;
};

// The block that runs on this CPU thread.
struct Place {
  Dim3 grid, block_index, block_size, thread;
};
Place& place();
unsigned char* shared();

// Lets other threads, and other blocks, go on.
void take_turns();
// Waits for all threads of the block that have not ended.
void block_barrier();
// Every lane deposits six words, then all may read those of any lane, until warp_release.
typedef uint32_t Words[32][6];
const Words& warp_deposit(const uint32_t (&words)[6], unsigned count, uint32_t& present);
void warp_release();

// Copies of this thread to shared memory, as late as they may land, and NaN until then.
void copy_async(void* to, const void* from, bool there);
void copies_commit();
void copies_wait(unsigned groups);

template <class T>
T shuffle(T value, unsigned source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint32_t words[6] = {}, present;
  memcpy(words, &value, sizeof value);
  const Words& all = warp_deposit(words, 2, present);
  memcpy(&value, all[source & 31], sizeof value);
  warp_release();
  return value;
}

inline uint32_t ballot(bool predicate) {
  uint32_t words[6] = {predicate}, present;
  const Words& all = warp_deposit(words, 1, present);
  uint32_t bits = 0;
  for (unsigned lane = 0; lane < 32; lane++)
    if (present >> lane & 1) bits |= (all[lane][0] & 1) << lane;
  warp_release();
  return bits;
}

}  // namespace emu

#define threadIdx (emu::place().thread)
#define blockIdx (emu::place().block_index)
#define blockDim (emu::place().block_size)
#define gridDim (emu::place().grid)
#define __syncthreads() emu::block_barrier()
#define __syncwarp() ((void)emu::ballot(true))

struct uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};

template <class T>
inline T __shfl_sync(unsigned, T value, unsigned source) {
  return emu::shuffle(value, source);
}
template <class T>
inline T __shfl_xor_sync(unsigned, T value, unsigned step) {
  return emu::shuffle(value, (threadIdx.x & 31) ^ step);
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, unsigned step) {
  unsigned lane = threadIdx.x & 31;
  return emu::shuffle(value, lane < step ? lane : lane - step);
}
inline u32 __reduce_max_sync(unsigned, u32 value) {
  for (unsigned step = 16; step > 0; step /= 2) {
    u32 other = emu::shuffle(value, (threadIdx.x & 31) ^ step);
    value = other > value ? other : value;
  }
  return value;
}
inline u32 __reduce_min_sync(unsigned mask, u32 value) { return ~__reduce_max_sync(mask, ~value); }
inline u32 __ballot_sync(unsigned, bool predicate) { return emu::ballot(predicate); }
inline u32 __match_any_sync(unsigned, u32 value) {
  uint32_t words[6] = {value}, present, alike = 0;
  const emu::Words& all = emu::warp_deposit(words, 1, present);
  for (unsigned lane = 0; lane < 32; lane++)
    if (present >> lane & 1) alike |= (u32)(all[lane][0] == value) << lane;
  emu::warp_release();
  return alike;
}
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline u32 __float_as_uint(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
// Others have their turn before and after it.
template <class T>
inline T emu_add(T* p, T value) {
  emu::take_turns();
  value = __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
  emu::take_turns();
  return value;
}
inline u32 atomicAdd(u32* p, u32 value) { return emu_add(p, value); }
inline u64 atomicAdd(u64* p, u64 value) { return emu_add(p, value); }
inline u64 atomicExch(u64* p, u64 value) {
  emu::take_turns();
  value = __atomic_exchange_n(p, value, __ATOMIC_RELAXED);
  emu::take_turns();
  return value;
}
// Blocks take turns on one CPU thread.
inline void __threadfence() {}
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
  u64 bytes = (u64)y << 32 | x;
  u32 out = 0;
  for (int i = 0; i < 4; i++) out |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}

// Twins of ptx.cuh --------------------------------------------------------------------------------------------------

inline float bf16_half(u32 word, unsigned half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); }

inline void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1}, present;
  const emu::Words& all = emu::warp_deposit(words, 6, present);
  unsigned lane = threadIdx.x & 31;
  for (unsigned i = 0; i < 4; i++) {
    unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    float sum = c[i];
    for (unsigned k = 0; k < 16; k++) {
      u32 left = all[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
      u32 right = all[column * 4 + k % 8 / 2][4 + k / 8];
      sum = fmaf(bf16_half(left, k % 2), bf16_half(right, k % 2), sum);
    }
    c[i] = sum;
  }
  emu::warp_release();
}

inline void mma_bf16_first(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  c[0] = c[1] = c[2] = c[3] = 0.0f;
  mma_bf16(c, a, b0, b1);
}

inline u32 narrow2(float low, float high);
inline u32 multiply_bf16x2(u32 a, u32 b) {
  return narrow2(bf16_half(a, 0) * bf16_half(b, 0), bf16_half(a, 1) * bf16_half(b, 1));
}

inline u32 take_ticket(u32* counter) { return atomicAdd(counter, 1); }

inline u32 pack_bf16(float low, float high) { return narrow2(low, high); }

inline float exp2_fast(float x) {
  float out = exp2f(x);
  return out < 1.17549435e-38f ? 0.0f : out;
}

inline void copy_async(void* to, const void* from, bool there) { emu::copy_async(to, from, there); }
inline void copies_commit() { emu::copies_commit(); }
template <u32 GROUPS>
inline void copies_wait() {
  emu::copies_wait(GROUPS);
}

inline void ldmatrix_x4(u32 (&out)[4], const u16* row) {
  uint32_t words[6] = {}, present;
  memcpy(words, &row, sizeof row);
  const emu::Words& all = emu::warp_deposit(words, 2, present);
  unsigned lane = threadIdx.x & 31;
  for (unsigned matrix = 0; matrix < 4; matrix++) {
    const u16* from;
    memcpy(&from, all[8 * matrix + lane / 4], sizeof from);
    memcpy(&out[matrix], from + 2 * (lane % 4), 4);
  }
  emu::warp_release();
}

inline void ldmatrix_x4_transposed(u32 (&out)[4], const u16* row) {
  uint32_t words[6] = {}, present;
  memcpy(words, &row, sizeof row);
  const emu::Words& all = emu::warp_deposit(words, 2, present);
  unsigned lane = threadIdx.x & 31;
  for (unsigned matrix = 0; matrix < 4; matrix++) {
    const u16 *even, *odd;
    memcpy(&even, all[8 * matrix + 2 * (lane % 4)], sizeof even);
    memcpy(&odd, all[8 * matrix + 2 * (lane % 4) + 1], sizeof odd);
    out[matrix] = (u32)even[lane / 4] | (u32)odd[lane / 4] << 16;
  }
  emu::warp_release();
}
