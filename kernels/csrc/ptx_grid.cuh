// Starting ahead of the kernel before (programmatic dependent launch): Hopper's and later. Elsewhere, as in the emulation,
// a kernel starts when the one before it has ended. Form and meaning are those of NVIDIA's PTX ISA 9.0.
#pragma once

// Waits until the kernel before has ended and its writes are seen.
DEVICE void wait_for_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start once a thread of every block of this one has said so.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
