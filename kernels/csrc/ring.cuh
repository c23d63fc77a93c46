// A ring of stages in shared memory that some warps fill and others empty: kernels on Hopper begin with its barriers,
// a "full" one for each stage and then an "empty" one for each.

#define RING_BARRIERS 128  // bytes: eight stages at most

// The stage of the ring that is next, and the parity of its turn.
template <u32 STAGES>
struct Turn {
  u32 stage, parity;

  DEVICE void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }

  DEVICE u64* full(u8* smem) const { return (u64*)smem + stage; }
  DEVICE u64* empty(u8* smem) const { return (u64*)smem + STAGES + stage; }
};

// By one thread of the block, before its first barrier: how many warps fill a stage, and how many empty it.
template <u32 STAGES>
DEVICE void make_ring(u8* smem, u32 fill, u32 drain) {
  static_assert(2 * STAGES * 8 <= RING_BARRIERS, "barriers lie before the stages");
  for (u32 i = 0; i < STAGES; i++) {
    barrier_init((u64*)smem + i, fill);
    barrier_init((u64*)smem + STAGES + i, drain);
  }
  barrier_init_done();
}
