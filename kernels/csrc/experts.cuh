// What all kernels of the experts share: how weights lie, how they are decoded, and SwiGLU.
//
// Weights: [row tile of 16][block of 32 columns][lane] of 8 bytes: for each half of 16 columns, a word of 8 codes for
// lane 4g + t. Nibble 2i + h has the magnitude of element h of mma's register i: rows g (even i) and g + 8 (odd i),
// columns 2t + h (i < 2) and 2t + 8 + h. Bit 3 of nibble i is the sign of register i's element 0, that of nibble 4 + i
// the sign of its element 1: so one shift moves both signs of a register into place.
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
  u32 magnitude = word >> 4 * (2 * i + h) & 7;
  // 0, 0.5, 1, 1.5, 2, 3, 4, 6
  float value = magnitude < 2 ? 0.5f * (float)magnitude
                              : (1.0f + 0.5f * (float)(magnitude & 1)) * (float)(1u << ((magnitude >> 1) - 1));
  return word >> (4 * i + 3 + 16 * h) & 1 ? -value : value;
}

// Eight codes to mma's registers: both bytes of a bf16 are looked up by permutes of bytes.
DEVICE void decode(u32 word, u32 (&a)[4]) {
  u32 low = word & 0x7777u, high = word >> 16 & 0x7777u;
  // 0, 0.5, 1, 1.5 | 2, 3, 4, 6 in bf16: 0000 3f00 3f80 3fc0 | 4000 4040 4080 40c0
  u32 upper0 = __byte_perm(0x3f3f3f00u, 0x40404040u, low), lower0 = __byte_perm(0xc0800000u, 0xc0804000u, low);
  u32 upper1 = __byte_perm(0x3f3f3f00u, 0x40404040u, high), lower1 = __byte_perm(0xc0800000u, 0xc0804000u, high);
#ifdef PLANT_NIBBLES
  const u32 first = 0x4051u, second = 0x6273u;
#else
  const u32 first = 0x5140u, second = 0x7362u;
#endif
  a[0] = __byte_perm(lower0, upper0, first) | (word << 12 & 0x80008000u);
  a[1] = __byte_perm(lower0, upper0, second) | (word << 8 & 0x80008000u);
  a[2] = __byte_perm(lower1, upper1, first) | (word << 4 & 0x80008000u);
  a[3] = __byte_perm(lower1, upper1, second) | (word & 0x80008000u);
}

// min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + 1); NaN stays NaN.
DEVICE float swiglu(float gate, float up, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return gate / (1.0f + exp_own(-SWIGLU_ALPHA * gate)) * (up + 1.0f);
}

#undef SWIGLU_ALPHA
