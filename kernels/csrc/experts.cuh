// What all kernels of the experts share: how weights lie, how they are decoded, and SwiGLU.
//
// Weights: [row tile of 16][block of 32 columns][lane] of two words of 8 codes, one for each half of 16 columns. For lane
// 4g + t they are elements 0 and 1 of mma's registers 0..3: rows g (even registers) and g + 8 (odd ones), columns 2t + h
// (0 and 1) and 2t + 8 + h. A turn of a word by TURNS bits to the right brings a register's two codes to where a bf16 has
// its sign (bits 15 and 31) and its lowest exponent and highest fraction bits (8..6 and 24..22). Three registers of each
// word fill 24 of its bits so; the fourth ones share what is left in both, from which one selection makes a word. So 16
// instructions decode 16 codes, and the multiplication by a scale that follows is exact.
// In gate-up, rows 0..8 of a tile are gates and rows 8..16 the ups of the same activations: a lane has both.
// Scales: [row tile][block][g][rows g and g + 8] bytes, E8M0.

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
  u32* progress;        // of kernels that do both matrices, zeros before and after: Progress of experts_wgmma.cu
  u32 hidden, intermediate;
  float limit;
  u32 slots_count;
};

// Decoding ----------------------------------------------------------------------------------------------------------

DEVICE float scale_of(u8 scale) { return float_of(scale == 0 ? 0x00400000u : (u32)scale << 23); }

// Turns of registers 0..3 of the left half and of the right one, 4 bits each; and what is of the left word, for register 3.
#define TURNS_LEFT 0x8a40u
#define TURNS_RIGHT 0xec62u
#define LEFT_OF_BOTH 0x60306030u

DEVICE u32 turn_right(u32 word, u32 bits) { return bits == 0 ? word : word >> bits | word << (32 - bits); }

#ifdef PLANT_NIBBLES
#define ELEMENT(h) (1 - (h))
#define CODES(word) turn_right(word, 16)
#else
#define ELEMENT(h) (h)
#define CODES(word) (word)
#endif

// The code of element h of register i of a half.
DEVICE float code_value(uint2 words, u32 half, u32 i, u32 h) {
  u32 both = (words.x & LEFT_OF_BOTH) | (words.y & ~LEFT_OF_BOTH), word = i == 3 ? both : half ? words.y : words.x;
  u32 bits = turn_right(word, (half ? TURNS_RIGHT : TURNS_LEFT) >> 4 * i & 15) >> 16 * ELEMENT(h);
  u32 sign = bits >> 15 & 1, magnitude = bits >> 6 & 7;
  // 0, 0.5, 1, 1.5, 2, 3, 4, 6
  float value = magnitude < 2 ? 0.5f * (float)magnitude
                              : (1.0f + 0.5f * (float)(magnitude & 1)) * (float)(1u << ((magnitude >> 1) - 1));
  return sign ? -value : value;
}

// A lane's 16 codes to mma's registers for each half, as their bits lie: as bf16 that is 2^-126 of their value, also the
// denormal one of 0.5.
DEVICE void decode_small(uint2 words, u32 (&left)[4], u32 (&right)[4]) {
  const u32 code = 0x81c081c0u;
  u32 x = CODES(words.x), y = CODES(words.y), both = (x & LEFT_OF_BOTH) | (y & ~LEFT_OF_BOTH);
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    left[i] = turn_right(i == 3 ? both : x, TURNS_LEFT >> 4 * i & 15) & code;
    right[i] = turn_right(i == 3 ? both : y, TURNS_RIGHT >> 4 * i & 15) & code;
  }
}

#undef TURNS_LEFT
#undef TURNS_RIGHT
#undef LEFT_OF_BOTH
#undef ELEMENT
#undef CODES

// The same, as large as they are.
DEVICE void decode(uint2 words, u32 (&left)[4], u32 (&right)[4]) {
  decode_small(words, left, right);
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    left[i] = multiply_bf16x2(left[i], 0x7e807e80u);
    right[i] = multiply_bf16x2(right[i], 0x7e807e80u);
  }
}

// min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + 1); NaN stays NaN.
DEVICE float swiglu(float gate, float up, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return gate / (1.0f + exp_own(-SWIGLU_ALPHA * gate)) * (up + 1.0f);
}

#undef SWIGLU_ALPHA
