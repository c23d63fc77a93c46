// Inline PTX is here, in ptx_grid.cuh and in ptx_sm90.cuh alone. Each wrapper has a twin for the emulation, in emu/emu.h.
#pragma once
#include "common.cuh"

#ifndef CUDA_EMU

// c += a b for a: [16, 16] (rows g and g + 8 of lane 4g + t), b: [16, 8], c: [16, 8] in f32.
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c = a b, the same from zero.
DEVICE void mma_bf16_first(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// Two products of bf16, each rounded to the nearest; denormal numbers count.
DEVICE u32 multiply_bf16x2(u32 a, u32 b) {
  u32 out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
  return out;
}

// Two numbers rounded to the nearest bf16, the first in the low half; NaN becomes the canonical one.
DEVICE u32 pack_bf16(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// 2^x to within two units of the last place; exactly 1 of 0, and 0 of -inf and where the result is denormal.
DEVICE float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// Adds one to a counter in global memory, and gives what it was. What this thread has written, and what a barrier put before
// it, is seen by a thread that counts later, and by those that a barrier puts after that one.
DEVICE u32 take_ticket(u32* counter) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
}

// Copies 16 bytes to shared memory, or zeros; both are aligned to 16. Done when this thread has waited for its group.
DEVICE void copy_async(void* to, const void* from, bool there) {
  u32 address = (u32)__cvta_generic_to_shared(to), bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(__cvta_generic_to_global(from)),
               "r"(bytes)
               : "memory");
}

// Ends a group of copies, which may be empty.
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most this many of this thread's groups are under way.
template <u32 GROUPS>
DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Four 8x8 matrices of bf16 from shared memory; lane 8m + r gives the address of row r of matrix m.
DEVICE void ldmatrix_x4(u32 (&out)[4], const u16* row) {
  u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address));
}

// The same, each matrix transposed.
DEVICE void ldmatrix_x4_transposed(u32 (&out)[4], const u16* row) {
  u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address));
}

#endif
