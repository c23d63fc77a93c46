// Choosing experts: logits x W^T + b, the K largest of a row's in descending order, the lowest expert among equals, and
// the softmax over those K. NaN comes last but is chosen if nothing else is left: it then spoils its row, no other.
//
// top_k chooses among logits that dense.cu has made; route_few and route_many make them too, in fast precision. W is
// packed as dense.cu has it, of whole column tiles. Their products are those of f32 rows: a number is the sum of three
// bf16 exactly, each the leading 8 bits of what those before leave, and a product of two bf16 is exact.
//
// Order: four column tiles are a stage, and the stages are cut into 32 segments fixed by the number of columns. In a
// segment each of the three parts has a sum from zero, column tiles ascending by mma; they are added as (third +
// second) + first. Eight segments are a group; a group's segments are added ascending from zero, then the groups, then
// the bias.
// Both kernels add so:
// - route_few: a block a group of one row tile, a warp a segment, up to 8 tokens; groups lie apart until the choice.
// - route_many: 64 tokens a block, split once and staged in shared memory for 8 row tiles; segments in turn.
// The last block of a chunk of tokens to be done, by a ticket, chooses for them, a warp a token.
#include "ptx.cuh"

#define ROUTE_GROUPS 4
#define ROUTE_SEGMENTS 8  // of a group
#define ROUTE_STAGE 4     // column tiles
#define ROUTE_BATCH 8     // column tiles that route_few loads at once
#define ROUTE_FEW 8       // tokens of a block of route_few
#define ROUTE_MANY 64     // of route_many
#define ROUTE_TILES 8     // row tiles of route_many
#define ROUTE_FEW_THREADS (ROUTE_SEGMENTS * WARP)
#define ROUTE_MANY_THREADS (2 * ROUTE_TILES * WARP)
#define ROUTE_STRIDE (ROUTE_STAGE * 16 + 8)  // an odd number of 16 bytes: no bank conflicts
#define ROUTE_KEPT 4      // logits that a lane keeps; further ones are read again for each choice

struct TopKArgs {
  const float* logits;
  u32* experts;    // [T, K]
  float* weights;  // [T, K]
  u32 experts_count, top_k;
};

struct RouteArgs {
  const float* x;        // [n, cols]
  const uint4* matrix;   // [row tiles, column tiles, 32]
  const float* bias;     // [row tiles * 16]
  float* logits;         // [groups, n, E] of route_few, [n, E] of route_many; without the bias
  u32* tickets;          // of each chunk of tokens; zero before and after
  u32* experts;          // [n, K]
  float* weights;        // [n, K]
  u32 n, cols, experts_count, top_k;
};

// Larger for what comes first, and never 0. NaN counts as the least; zeros of both signs are equal.
DEVICE u32 key_of(float logit) {
  u32 bits = bits_of(logit != logit ? -infinity() : logit + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Chooses among count logits, which logit_of(expert) gives; a warp's work.
template <class F>
DEVICE void choose(const F& logit_of, u32 count, u32 top_k, u32* experts, float* weights) {
  float kept[ROUTE_KEPT];
  // Those beyond the last are the last again: without a branch, all are under way at once.
#pragma unroll
  for (u32 i = 0; i < ROUTE_KEPT; i++) kept[i] = logit_of(least(lane_id() + i * WARP, count - 1));
  u32 last_key = FULL, last = 0;
  float largest = 0.0f, sum = 0.0f, own = 0.0f;
  for (u32 k = 0; k < top_k; k++) {
    // The first of those that come after the last chosen.
    u32 key = 0, expert = FULL;
    float logit = 0.0f;
    auto consider = [&](u32 e, float other) {
      u32 other_key = key_of(other);
      if (other_key > key && (other_key < last_key || (other_key == last_key && e > last))) {
        key = other_key;
        expert = e;
        logit = other;
      }
    };
#pragma unroll
    for (u32 i = 0; i < ROUTE_KEPT; i++)
      if (lane_id() + i * WARP < count) consider(lane_id() + i * WARP, kept[i]);
    for (u32 e = lane_id() + ROUTE_KEPT * WARP; e < count; e += WARP) consider(e, logit_of(e));
    last_key = __reduce_max_sync(FULL, key);
    last = __reduce_min_sync(FULL, key == last_key ? expert : FULL);
    logit = __shfl_sync(FULL, logit, last % WARP);
    if (k == 0) largest = logit;
    float weight = exp_own(logit - largest);
    sum += weight;
    if (lane_id() != k % WARP) continue;
    experts[k] = last;
    if (k < WARP) own = weight;
    else weights[k] = weight;
  }
  if (lane_id() < top_k) weights[lane_id()] = own / sum;
  for (u32 k = lane_id() + WARP; k < top_k; k += WARP) weights[k] /= sum;
}

KERNEL(top_k, WARP, TopKArgs) {
  u64 row = blockIdx.x;
  const float* logits = a.logits + row * a.experts_count;
  choose([&](u32 e) { return logits[e]; }, a.experts_count, a.top_k, a.experts + row * a.top_k,
         a.weights + row * a.top_k);
}

// The stage at which a segment starts.
DEVICE u32 route_start(u32 tiles, u32 segment) {
  return segment * ((tiles + ROUTE_STAGE - 1) / ROUTE_STAGE) / (ROUTE_GROUPS * ROUTE_SEGMENTS);
}

// Two numbers as three times two bf16.
DEVICE void split(float low, float high, u32 (&parts)[3]) {
#pragma unroll
  for (u32 part = 0; part < 3; part++) {
    u32 x = bits_of(low) & 0xffff0000u, y = bits_of(high) & 0xffff0000u;
    parts[part] = x >> 16 | y;
    low -= float_of(x);
    high -= float_of(y);
  }
}

// Where a logit's sum is; there is none for what pads tiles.
DEVICE float* sum_of(const RouteArgs& a, u32 group, u32 token, u32 row) {
  bool inside = token < a.n && row < a.experts_count;
  return inside ? a.logits + ((u64)group * a.n + token) * a.experts_count + row : nullptr;
}

// Chooses for a block's tokens, whose sums are in so many parts, if it is the last one of them: then it sees what the
// others wrote.
template <u32 PARTS>
DEVICE void choose_if_last(const RouteArgs& a, u32 first, u32 tokens, u32* is_last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    u32* ticket = a.tickets + blockIdx.y;
    *is_last = take_ticket(ticket) == gridDim.x * gridDim.z - 1;
    if (*is_last) *ticket = 0;
  }
  __syncthreads();
  if (!*is_last) return;
  for (u32 token = first + warp_id(); token < least(first + tokens, a.n); token += blockDim.x / WARP) {
    auto logit_of = [&](u32 expert) {
      float sum = 0.0f;
#pragma unroll
      for (u32 part = 0; part < PARTS; part++) sum += *sum_of(a, part, token, expert);
      return sum + a.bias[expert];
    };
    choose(logit_of, a.experts_count, a.top_k, a.experts + (u64)token * a.top_k, a.weights + (u64)token * a.top_k);
  }
}

AHEAD_KERNEL(route_few, ROUTE_FEW_THREADS, RouteArgs) {
  SHARED(smem);
  u32* is_last = (u32*)smem;
  float* partials = (float*)(smem + 16);  // [segment][ROUTE_FEW][16]
  u32 tiles = a.cols / 16, first = blockIdx.y * ROUTE_FEW;
  u32 t = lane_id() % 4, g = lane_id() / 4;
  // A token beyond the last reads the last one's numbers; its results are dropped.
  const float* x = a.x + (u64)least(first + g, a.n - 1) * a.cols + 2 * t;
  const uint4* matrix = a.matrix + (u64)blockIdx.x * tiles * WARP + lane_id();
  u32 segment = blockIdx.z * ROUTE_SEGMENTS + warp_id();
  u32 begin = route_start(tiles, segment) * ROUTE_STAGE, end = least(route_start(tiles, segment + 1) * ROUTE_STAGE, tiles);
  uint4 w[ROUTE_BATCH] = {};
  auto load_weights = [&](u32 from) {
#pragma unroll
    for (u32 k = 0; k < ROUTE_BATCH; k++)
      if (from + k < end) w[k] = matrix[(u64)(from + k) * WARP];
  };
  load_weights(begin);
  wait_for_before();
  let_next_start();
  float c[3][4] = {};
  for (u32 from = begin; from < end; from += ROUTE_BATCH) {
    if (from != begin) load_weights(from);
    Several<float, 2> left[ROUTE_BATCH] = {}, right[ROUTE_BATCH] = {};
    const float* columns = x + (u64)from * 16;
#pragma unroll
    for (u32 k = 0; k < ROUTE_BATCH; k++) {
      if (from + k >= end) continue;
      left[k] = *(const Several<float, 2>*)(columns + k * 16);
      right[k] = *(const Several<float, 2>*)(columns + k * 16 + 8);
    }
#pragma unroll
    for (u32 k = 0; k < ROUTE_BATCH; k++) {
      if (from + k >= end) continue;
      u32 words[4] = {w[k].x, w[k].y, w[k].z, w[k].w}, b0[3], b1[3];
      split(left[k].at[0], left[k].at[1], b0);
      split(right[k].at[0], right[k].at[1], b1);
#pragma unroll
      for (u32 part = 0; part < 3; part++) mma_bf16(c[part], words, b0[part], b1[part]);
    }
  }
  // c holds rows g (0, 1) and g + 8 (2, 3) of tokens 2t and 2t + 1.
#pragma unroll
  for (u32 i = 0; i < 4; i++)
    partials[(warp_id() * ROUTE_FEW + 2 * t + i % 2) * 16 + g + i / 2 * 8] = (c[2][i] + c[1][i]) + c[0][i];
  __syncthreads();
  u32 token = threadIdx.x / 16, row = threadIdx.x % 16;
  if (token < ROUTE_FEW) {
    float sum = 0.0f;
#pragma unroll
    for (u32 s = 0; s < ROUTE_SEGMENTS; s++) sum += partials[(s * ROUTE_FEW + token) * 16 + row];
    float* to = sum_of(a, blockIdx.z, first + token, blockIdx.x * 16 + row);
    if (to) *to = sum;
  }
  choose_if_last<ROUTE_GROUPS>(a, first, ROUTE_FEW, is_last);
}

// Numbers of a stage that a thread of route_many loads and splits.
struct Quarters {
  Several<float, 4> at[2];
};

// The token and the column, within a block's and a stage's, of one of a thread's four numbers in a row.
DEVICE u32 token_of(u32 i) { return (i * ROUTE_MANY_THREADS + threadIdx.x) / (ROUTE_STAGE * 4); }
DEVICE u32 column_of() { return threadIdx.x % (ROUTE_STAGE * 4) * 4; }

DEVICE Quarters load_stage(const RouteArgs& a, u32 first, u32 stage) {
  Quarters out = {};
  u32 c = stage * ROUTE_STAGE * 16 + column_of();
  if (c >= a.cols) return out;
#pragma unroll
  for (u32 i = 0; i < 2; i++)
    out.at[i] = *(const Several<float, 4>*)(a.x + (u64)least(first + token_of(i), a.n - 1) * a.cols + c);
  return out;
}

// Splits them to [part][ROUTE_MANY][ROUTE_STRIDE].
DEVICE void put_stage(u16* staged, const Quarters& x) {
#pragma unroll
  for (u32 i = 0; i < 2; i++) {
    u32 left[3], right[3];
    split(x.at[i].at[0], x.at[i].at[1], left);
    split(x.at[i].at[2], x.at[i].at[3], right);
#pragma unroll
    for (u32 part = 0; part < 3; part++)
      *(Several<u32, 2>*)(staged + (part * ROUTE_MANY + token_of(i)) * ROUTE_STRIDE + column_of()) = {left[part],
                                                                                                      right[part]};
  }
}

KERNEL(route_many, ROUTE_MANY_THREADS, RouteArgs) {
  SHARED(smem);
  u32* is_last = (u32*)smem;
  u16* staged = (u16*)(smem + 16);  // [2][3][ROUTE_MANY][ROUTE_STRIDE]
  const u32 buffer = 3 * ROUTE_MANY * ROUTE_STRIDE;
  // [n_tiles * 4][thread], each thread's own: what registers have no room for.
  float* totals = (float*)(staged + 2 * buffer) + threadIdx.x;
  // A warp has a row tile and half of the tokens; one beyond the matrix only stages.
  const u32 n_tiles = ROUTE_MANY / 2 / 8;
  u32 tiles = a.cols / 16, row_tiles = (a.experts_count + 15) / 16, first = blockIdx.y * ROUTE_MANY;
  u32 tile = blockIdx.x * ROUTE_TILES + warp_id() % ROUTE_TILES, half = warp_id() / ROUTE_TILES * (ROUTE_MANY / 2);
  u32 t = lane_id() % 4, g = lane_id() / 4, matrix = lane_id() / 8;
  bool inside = tile < row_tiles;
  const uint4* weights = a.matrix + (u64)tile * tiles * WARP + lane_id();
  uint4 w[ROUTE_STAGE] = {};
  auto load_weights = [&](u32 stage) {
#pragma unroll
    for (u32 k = 0; k < ROUTE_STAGE; k++)
      if (inside && stage * ROUTE_STAGE + k < tiles) w[k] = weights[(u64)(stage * ROUTE_STAGE + k) * WARP];
  };
  // While a stage is multiplied, the next one is split and the one after that is under way.
  load_weights(0);
  put_stage(staged, load_stage(a, first, 0));
  Quarters next = load_stage(a, first, 1);
  __syncthreads();
  u32 stage = 0;
#pragma unroll 1
  for (u32 group = 0; group < ROUTE_GROUPS; group++) {
    float sums[n_tiles][4] = {};
#pragma unroll 1
    for (u32 segment = 0; segment < ROUTE_SEGMENTS; segment++) {
      float c[3][n_tiles][4] = {};
      for (; stage < route_start(tiles, group * ROUTE_SEGMENTS + segment + 1); stage++) {
        put_stage(staged + (stage + 1) % 2 * buffer, next);
        next = load_stage(a, first, stage + 2);
        if (inside) {
#pragma unroll
          for (u32 k = 0; k < ROUTE_STAGE; k++) {
            if (stage * ROUTE_STAGE + k >= tiles) continue;
            u32 words[4] = {w[k].x, w[k].y, w[k].z, w[k].w};
#pragma unroll
            for (u32 n = 0; n < n_tiles; n += 2) {
#pragma unroll
              for (u32 part = 0; part < 3; part++) {
                // Matrices: columns 0..8 and 8..16 of tokens 8n.., then of the next eight.
                u32 token = half + (n + matrix / 2) * 8 + lane_id() % 8, b[4];
                ldmatrix_x4(b, staged + stage % 2 * buffer + (part * ROUTE_MANY + token) * ROUTE_STRIDE + k * 16 +
                                   matrix % 2 * 8);
                mma_bf16(c[part][n], words, b[0], b[1]);
                mma_bf16(c[part][n + 1], words, b[2], b[3]);
              }
            }
          }
          load_weights(stage + 1);
        }
        __syncthreads();
      }
#pragma unroll
      for (u32 n = 0; n < n_tiles; n++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) sums[n][i] += (c[2][n][i] + c[1][n][i]) + c[0][n][i];
    }
#pragma unroll
    for (u32 n = 0; n < n_tiles; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        float* total = totals + (n * 4 + i) * ROUTE_MANY_THREADS;
        *total = group == 0 ? sums[n][i] : *total + sums[n][i];
      }
  }
#pragma unroll
  for (u32 n = 0; n < n_tiles; n++)
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      float* to = sum_of(a, 0, first + half + n * 8 + 2 * t + i % 2, tile * 16 + g + i / 2 * 8);
      if (inside && to) *to = totals[(n * 4 + i) * ROUTE_MANY_THREADS];
    }
  choose_if_last<1>(a, first, ROUTE_MANY, is_last);
}
