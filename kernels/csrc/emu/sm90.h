// Twins of ptx_sm90.cuh: Hopper's instructions among the fibers of a block, as late as they may take effect.
//
// - A bulk copy poisons its destination at once and lands when somebody waits for its barrier's phase and that is complete.
// - Products happen when they are waited for, from what registers and shared memory hold then; until then their sums are NaN.
//   A register changed too early, or a stage given back too early, so gives another result.
// - Rules that would be broken silently are errors: products without a fence, sums touched meanwhile, a warpgroup that does
//   not agree, descriptors and copies that leave shared memory or are not aligned, arrivals that no phase expects.
#pragma once

namespace emu {

// The 64 bits of a barrier.
struct Barrier {
  uint16_t arrivals, missing;
  // Bytes announced, and the parity of the phase that has not ended.
  uint32_t bytes : 31, parity : 1;
};

struct Product {
  float* d;
  const uint32_t* a;
  uint64_t b;
  unsigned columns;
  bool accumulate;
};

void barrier_init(void* barrier, unsigned arrivals);
void barrier_arrive(void* barrier, unsigned bytes);
void barrier_wait(void* barrier, unsigned parity);
void bulk_copy(void* to, const void* from, unsigned bytes, void* barrier);
void wait_for_blocks(const unsigned* counter, unsigned value);
void warpgroup_sync();
void products_fence();
void product(const Product& product);
void products_commit();
void products_wait(unsigned groups);
unsigned offset(const void* p);

}  // namespace emu

inline u32 shared_address(const void* p) { return emu::offset(p); }
inline void barrier_init(u64* barrier, u32 arrivals) { emu::barrier_init(barrier, arrivals); }
inline void barrier_init_done() {}
inline void barrier_arrive(u64* barrier) { emu::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expecting(u64* barrier, u32 bytes) { emu::barrier_arrive(barrier, bytes); }
inline void barrier_wait(u64* barrier, u32 parity) { emu::barrier_wait(barrier, parity); }
inline void bulk_prefetch(const void*, u32) {}
inline void bulk_copy(void* to, const void* from, u32 bytes, u64* barrier) { emu::bulk_copy(to, from, bytes, barrier); }
inline void fence_async() {}
inline void fence_async_global() {}
inline void wait_for_blocks(const u32* counter, u32 value) { emu::wait_for_blocks(counter, value); }
inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline u32 round_pair(float low, float high) { return narrow2(low, high); }
inline u32 transpose_8x8(u32 pair) {
  uint32_t words[6] = {pair}, present;
  const emu::Words& all = emu::warp_deposit(words, 1, present);
  unsigned lane = threadIdx.x & 31, row = lane % 4 * 2, column = lane / 4;
  auto element = [&](unsigned r) { return all[4 * r + column / 2][0] >> 16 * (column % 2) & 0xffff; };
  u32 out = element(row) | element(row + 1) << 16;
  emu::warp_release();
  return out;
}
template <u32 N>
inline void keep_registers() {}
template <u32 N>
inline void take_registers() {}
inline void warpgroup_sync() { emu::warpgroup_sync(); }
template <u32 N>
inline void wgmma_fence(u32 (&)[N][4]) {
  emu::products_fence();
}
template <u32 N>
inline void wgmma_zero(float (&d)[N]) {
  for (float& sum : d) sum = 0.0f;
}
inline void wgmma_commit() { emu::products_commit(); }
template <u32 GROUPS>
inline void wgmma_wait() {
  emu::products_wait(GROUPS);
}
template <u32 N>
inline void wgmma_wait_for(float (&)[N]) {
  emu::products_wait(0);
}
template <u32 N>
inline void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {
  emu::product({d, a, b, N, accumulate});
}
