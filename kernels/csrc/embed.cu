// Rows of the embedding, and rows of rows.
//
// embed:  out[t, :] = table[token of t, :], bf16 widened. A block a row.
// gather: out[i, :] = x[rows[i], :].
#include "common.cuh"

struct EmbedArgs {
  const u16* table;    // [V, H]
  const u32* tokens;   // [T]: the token, or the slot it was sampled into
  const u32* sampled;  // [T]: 1 where it is a slot
  const u32* slots;    // last sampled token of each slot
  float* out;          // [T, H]
  Status* status;
  u32 cols, vocab;
};

KERNEL(embed, 128, EmbedArgs) {
  u32 row = blockIdx.x;
  u32 token = a.tokens[row];
  if (a.sampled[row]) token = a.slots[token];
  if (token >= a.vocab) {
    if (threadIdx.x == 0) report(a.status, STATUS_TOKEN, 0, token, a.vocab);
    return;
  }
  const u16* from = a.table + (u64)token * a.cols;
  for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) a.out[(u64)row * a.cols + c] = widen(from[c]);
}

struct GatherArgs {
  const float* x;   // [T, cols]
  const u32* rows;  // [n]
  float* out;       // [n, cols]
  u32 cols, unused;
};

KERNEL(gather, 128, GatherArgs) {
  const float* from = a.x + (u64)a.rows[blockIdx.x] * a.cols;
  for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) a.out[(u64)blockIdx.x * a.cols + c] = from[c];
}
