// What all kernels of the experts share: how weights lie, how they are decoded, and SwiGLU.
//
// Weights: [row tile of 16][block of 32 columns][lane] of 8 bytes: for each half of 16 columns, a word of 8 codes for
// lane 4g + t. Its halves are elements 0 and 1 of mma's registers 0..3: rows g (even registers) and g + 8 (odd ones),
// columns 2t + h (0 and 1) and 2t + 8 + h. In a half, register 0 has sign and magnitude in bits 15 and 8..6, where a
// bf16 has its sign and its lowest exponent and highest fraction bits; register 1 three bits further down, 12 and 5..3;
// register 2 six, 9 and 2..0; register 3 has what is left: its sign in 14, its magnitude's upper bits in 11..10 and the
// lowest in 13. So a shift and a mask decode two codes, and the one multiplication by 2^126 is exact.
// In gate-up, rows 0..8 of a tile are gates and rows 8..16 the ups of the same activations: a lane has both.
// Scales: [row tile][block][16] bytes, E8M0.

#define SWIGLU_ALPHA 1.702f

// A loaded expert; all null where a slot is empty.
struct Slot {
  const uint2* gate_up;
  const u8* gate_up_scales;
  const float* gate_up_bias;  // in the order of the tiles' rows
  const uint2* down;
  const u8* down_scales;
  const float* down_bias;
};

static_assert(sizeof(Slot) == 48, "as src/cuda/exchange.rs writes it");

struct ExpertArgs {
  const Slot* slots;
  const u32* starts;    // [slots + 1]: first item of each slot
  const u32* order;     // [items]: an item's place in the order of arrival
  const u32* item_row;  // by order of arrival
  const void* rows;     // [rows, H] of the wire type; on Hopper the items' tiles of experts_wgmma.cu
  void* activations;    // [items, I] grouped by slot: f32 or bf16; on Hopper tiles as well
  u8* results;          // [items, H] of the wire type, in order of arrival
  u32 hidden, intermediate;
  float limit;
  u32 slots_count;
};

// Decoding ----------------------------------------------------------------------------------------------------------

DEVICE float scale_of(u8 scale) { return float_of(scale == 0 ? 0x00400000u : (u32)scale << 23); }

// The code of element h of register i.
DEVICE float code_value(u32 word, u32 i, u32 h) {
#ifdef PLANT_NIBBLES
  h = 1 - h;
#endif
  u32 half = word >> 16 * h & 0xffff;
  u32 sign = i < 3 ? half >> (15 - 3 * i) & 1 : half >> 14 & 1;
  u32 magnitude = i < 3 ? half >> (6 - 3 * i) & 7 : (half >> 9 & 6) | (half >> 13 & 1);
  // 0, 0.5, 1, 1.5, 2, 3, 4, 6
  float value = magnitude < 2 ? 0.5f * (float)magnitude
                              : (1.0f + 0.5f * (float)(magnitude & 1)) * (float)(1u << ((magnitude >> 1) - 1));
  return sign ? -value : value;
}

// Eight codes to mma's registers, as their bits lie: as bf16 that is 2^-126 of their value, also the denormal one of 0.5.
DEVICE void decode_small(u32 word, u32 (&a)[4]) {
  const u32 code = 0x81c081c0u;
#ifdef PLANT_NIBBLES
  word = word >> 16 | word << 16;
#endif
  a[0] = word & code;
  a[1] = word << 3 & code;
  a[2] = word << 6 & code;
  a[3] = (word << 1 & 0x80008000u) | (word >> 3 & 0x01800180u) | (word >> 7 & 0x00400040u);
}

// The same, as large as they are.
DEVICE void decode(u32 word, u32 (&a)[4]) {
  decode_small(word, a);
#pragma unroll
  for (u32 i = 0; i < 4; i++) a[i] = multiply_bf16x2(a[i], 0x7e807e80u);
}

// min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + 1); NaN stays NaN.
DEVICE float swiglu(float gate, float up, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return gate / (1.0f + exp_own(-SWIGLU_ALPHA * gate)) * (up + 1.0f);
}

#undef SWIGLU_ALPHA
