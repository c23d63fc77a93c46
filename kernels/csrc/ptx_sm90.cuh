// Hopper's own instructions (sm_90a), in small wrappers: barriers with transactions, bulk copies, products of warpgroups.
// Each wrapper has a twin for the emulation, in emu/sm90.h. Form and meaning are those of NVIDIA's PTX ISA 9.0.
#pragma once
#include "ptx.cuh"

#ifdef CUDA_EMU
#include "emu/sm90.h"
#else

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#error "these kernels are for sm_90a alone"
#endif

// Where a place of shared memory is within it.
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Barriers ----------------------------------------------------------------------------------------------------------

// A barrier whose phases end after this many arrivals, and when all bytes that were announced have come.
DEVICE void barrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes barriers known to bulk copies; a __syncthreads makes them known to the block.
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces bytes of bulk copies that belong to this phase.
DEVICE void barrier_arrive_expecting(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has ended; the one before the first counts as ended, and is odd.
DEVICE void barrier_wait(u64* barrier, u32 parity) {
  u32 ended;
  do {
    asm volatile(
        "{.reg .pred ended; mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2; selp.u32 %0, 1, 0, ended;}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// Copies to shared memory; the barrier's phase ends when the bytes are there. All are multiples of 16.
DEVICE void bulk_copy(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Asks for what will be copied: it is on its way to the device's cache. A multiple of 16 bytes.
DEVICE void bulk_prefetch(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
}

// Makes this thread's stores to shared memory visible to products and bulk copies that are ordered behind it.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Makes this thread's stores to the device's memory visible to bulk copies that are ordered behind it, and with the same
// after a wait the stores of others.
DEVICE void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Waits until other blocks have brought a counter there; what they stored before is seen then.
DEVICE void wait_for_blocks(const u32* counter, u32 value) {
  u32 now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(__cvta_generic_to_global(counter)) : "memory");
  } while (now < value);
}

// Waits for the other threads of a warpgroup; one warpgroup of a block may.
DEVICE void warpgroup_sync() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

// Numbers -----------------------------------------------------------------------------------------------------------

// 2^x and 1/x to about 22 bits; infinities and NaN as they should be.
DEVICE float power_of_two(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

DEVICE float reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// Two numbers as bf16, each rounded to the nearest, the first in the low half.
DEVICE u32 round_pair(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// The transpose of an 8x8 matrix of bf16: lane 4g + t has row g, columns 2t and 2t + 1, before and after.
DEVICE u32 transpose_8x8(u32 pair) {
  u32 out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// Registers ---------------------------------------------------------------------------------------------------------

// A warpgroup's threads have this many registers from here on, a multiple of 8: fewer than before, or more, for which it
// waits until others have given as many back.
template <u32 N>
DEVICE void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <u32 N>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Products ----------------------------------------------------------------------------------------------------------

// Orders what was done to registers before the products that follow; a is what they multiply, made before and not later.
template <u32 N>
DEVICE void wgmma_fence(u32 (&a)[N][4]) {
  // Lanes may have left a wait or a branch one by one; what follows wants all of a warp.
  __syncwarp();
#pragma unroll
  for (u32 n = 0; n < N; n++) asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Sums of products that have not begun. Zeros that the compiler knows it would keep in registers for all loops of a kernel.
template <u32 N>
DEVICE void wgmma_zero(float (&d)[N]) {
#pragma unroll
  for (u32 i = 0; i < N; i++) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i]));
}

// Ends a group of products.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most this many groups are under way.
template <u32 GROUPS>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// Waits for all, and keeps reads of their sums behind.
template <u32 N>
DEVICE void wgmma_wait_for(float (&d)[N]) {
  wgmma_wait<0>();
#pragma unroll
  for (u32 i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define EACH_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define EACH_16(d, i) EACH_4(d, i), EACH_4(d, i + 4), EACH_4(d, i + 8), EACH_4(d, i + 12)
#define EACH_64(d, i) EACH_16(d, i), EACH_16(d, i + 16), EACH_16(d, i + 32), EACH_16(d, i + 48)

// d = a b, or d += a b, begun and not waited for, by the 128 threads of a warpgroup: a [64, 16] bf16 in registers, warp w
// has rows 16w.. as mma_bf16 has its 16; b [16, N] bf16 in shared memory by its descriptor, d [64, N] f32: d[4n + i] is
// what mma_bf16 has in c[i] for columns 8n... Until it is waited for, d and a must be left alone.
template <u32 N>
DEVICE void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate);

template <>
DEVICE void wgmma<8>(float (&d)[4], const u32 (&a)[4], u64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %9, 0;"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3}, "
      "{%4,%5,%6,%7}, %8, accumulate, 1, 1, 0;}"
      : EACH_4(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)accumulate));
}

template <>
DEVICE void wgmma<16>(float (&d)[8], const u32 (&a)[4], u64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %13, 0;"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7}, "
      "{%8,%9,%10,%11}, %12, accumulate, 1, 1, 0;}"
      : EACH_4(d, 0), EACH_4(d, 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)accumulate));
}

template <>
DEVICE void wgmma<32>(float (&d)[16], const u32 (&a)[4], u64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %21, 0;"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "{%16,%17,%18,%19}, %20, accumulate, 1, 1, 0;}"
      : EACH_16(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)accumulate));
}

template <>
DEVICE void wgmma<48>(float (&d)[24], const u32 (&a)[4], u64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %29, 0;"
      "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, "
      "{%24,%25,%26,%27}, %28, accumulate, 1, 1, 0;}"
      : EACH_16(d, 0), EACH_4(d, 16), EACH_4(d, 20)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)accumulate));
}

template <>
DEVICE void wgmma<64>(float (&d)[32], const u32 (&a)[4], u64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %37, 0;"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
      "{%32,%33,%34,%35}, %36, accumulate, 1, 1, 0;}"
      : EACH_16(d, 0), EACH_16(d, 16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)accumulate));
}

template <>
DEVICE void wgmma<128>(float (&d)[64], const u32 (&a)[4], u64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %69, 0;"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "{%64,%65,%66,%67}, %68, accumulate, 1, 1, 0;}"
      : EACH_64(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)accumulate));
}

template <>
DEVICE void wgmma<144>(float (&d)[72], const u32 (&a)[4], u64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %77, 0;"
      "wgmma.mma_async.sync.aligned.m64n144k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71}, "
      "{%72,%73,%74,%75}, %76, accumulate, 1, 1, 0;}"
      : EACH_64(d, 0), EACH_4(d, 64), EACH_4(d, 68)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)accumulate));
}

template <>
DEVICE void wgmma<176>(float (&d)[88], const u32 (&a)[4], u64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %93, 0;"
      "wgmma.mma_async.sync.aligned.m64n176k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
      "%80,%81,%82,%83,%84,%85,%86,%87}, "
      "{%88,%89,%90,%91}, %92, accumulate, 1, 1, 0;}"
      : EACH_64(d, 0), EACH_16(d, 64), EACH_4(d, 80), EACH_4(d, 84)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)accumulate));
}

template <>
DEVICE void wgmma<256>(float (&d)[128], const u32 (&a)[4], u64 b, bool accumulate) {
  asm volatile(
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %133, 0;"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
      "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
      "{%128,%129,%130,%131}, %132, accumulate, 1, 1, 0;}"
      : EACH_64(d, 0), EACH_64(d, 64)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)accumulate));
}

#undef EACH_4
#undef EACH_16
#undef EACH_64

#endif

// Where b of wgmma lies: pieces of 8 columns by 8 k, 128 bytes each (a column's 8 k together); from one piece to the next
// in k leading bytes, in columns stride bytes. Nothing is swizzled: a piece is read in one turn of all banks as it is.
DEVICE u64 matrix_descriptor(u32 start, u32 leading, u32 stride) {
  return (u64)(stride >> 4) << 32 | ((start >> 4) | (leading >> 4) << 16);
}
