// Rows of the embedding, and rows of rows.
//
// embed:  out[t, :] = table[token of t, :], bf16 widened.
// gather: out[i, :] = x[rows[i], :].
// A block for every EMBED_COLS columns of a row, whose loads do not wait for each other.
#include "common.cuh"

#define EMBED_THREADS 128
#define EMBED_COLS (4 * EMBED_THREADS)

struct EmbedArgs {
  const u16* table;    // [V, H]
  const u32* tokens;   // [T]: the token, or the slot it was sampled into
  const u32* sampled;  // [T]: 1 where it is a slot
  const u32* slots;    // last sampled token of each slot
  float* out;          // [T, H]
  Status* status;
  u32 cols, vocab;
};

KERNEL(embed, EMBED_THREADS, EmbedArgs) {
  u32 row = blockIdx.x;
  u32 token = a.tokens[row];
  if (a.sampled[row]) token = a.slots[token];
  if (token >= a.vocab) {
    if (threadIdx.x == 0 && blockIdx.y == 0) report(a.status, STATUS_TOKEN, 0, token, a.vocab);
    return;
  }
  const u16* from = a.table + (u64)token * a.cols;
  float own[4];
  u32 first = blockIdx.y * EMBED_COLS + threadIdx.x;
#pragma unroll
  for (u32 i = 0; i < 4; i++) own[i] = first + i * EMBED_THREADS < a.cols ? widen(from[first + i * EMBED_THREADS]) : 0.0f;
#pragma unroll
  for (u32 i = 0; i < 4; i++)
    if (first + i * EMBED_THREADS < a.cols) a.out[(u64)row * a.cols + first + i * EMBED_THREADS] = own[i];
}

struct GatherArgs {
  const float* x;   // [T, cols]
  const u32* rows;  // [n]
  float* out;       // [n, cols]
  u32 cols, unused;
};

KERNEL(gather, EMBED_THREADS, GatherArgs) {
  const float* from = a.x + (u64)a.rows[blockIdx.x] * a.cols;
  float own[4];
  u32 first = blockIdx.y * EMBED_COLS + threadIdx.x;
#pragma unroll
  for (u32 i = 0; i < 4; i++) own[i] = first + i * EMBED_THREADS < a.cols ? from[first + i * EMBED_THREADS] : 0.0f;
#pragma unroll
  for (u32 i = 0; i < 4; i++)
    if (first + i * EMBED_THREADS < a.cols) a.out[(u64)blockIdx.x * a.cols + first + i * EMBED_THREADS] = own[i];
}
