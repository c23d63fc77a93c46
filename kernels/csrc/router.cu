// Choosing experts: the K largest of logits: [T, E] in descending order, the lowest expert among equals, and the softmax
// over those K. A warp a row. NaN comes last but is chosen if nothing else is left: it then spoils its row, no other.
#include "common.cuh"

struct TopKArgs {
  const float* logits;
  u32* experts;    // [T, K]
  float* weights;  // [T, K]
  u32 experts_count, top_k;
};

// What a logit counts as when it is compared.
DEVICE float rank_of(float logit) { return logit != logit ? -infinity() : logit; }

// Whether (x, i) comes before (y, j).
DEVICE bool before(float x, u32 i, float y, u32 j) { return x > y || (x == y && i < j); }

#define TOP_K_HELD 8  // logits of a lane that are kept

KERNEL(top_k, WARP, TopKArgs) {
  const float* logits = a.logits + (u64)blockIdx.x * a.experts_count;
  u32* experts = a.experts + (u64)blockIdx.x * a.top_k;
  float* weights = a.weights + (u64)blockIdx.x * a.top_k;
  float held[TOP_K_HELD];
#pragma unroll
  for (u32 i = 0; i < TOP_K_HELD; i++) {
    u32 e = lane_id() + i * WARP;
    held[i] = e < a.experts_count ? logits[e] : 0.0f;
  }
  float last = infinity(), largest = 0.0f;
  u32 last_index = 0;
  for (u32 k = 0; k < a.top_k; k++) {
    // The first of those that come after the last chosen.
    float best = -infinity(), logit = 0.0f;
    u32 index = FULL;
    auto consider = [&](u32 e, float own) {
      float rank = rank_of(own);
      if (e >= a.experts_count || (k > 0 && !before(last, last_index, rank, e))) return;
      if (index != FULL && !before(rank, e, best, index)) return;
      best = rank;
      logit = own;
      index = e;
    };
#pragma unroll
    for (u32 i = 0; i < TOP_K_HELD; i++) consider(lane_id() + i * WARP, held[i]);
    for (u32 e = lane_id() + TOP_K_HELD * WARP; e < a.experts_count; e += WARP) consider(e, logits[e]);
    for (u32 step = WARP / 2; step > 0; step /= 2) {
      float other = __shfl_xor_sync(FULL, best, step), other_logit = __shfl_xor_sync(FULL, logit, step);
      u32 other_index = __shfl_xor_sync(FULL, index, step);
      if (other_index != FULL && (index == FULL || before(other, other_index, best, index))) {
        best = other;
        logit = other_logit;
        index = other_index;
      }
    }
    if (k == 0) largest = logit;
    if (lane_id() == 0) {
      experts[k] = index;
      weights[k] = exp_own(logit - largest);
    }
    last = best;
    last_index = index;
  }
  // The sum ascending by choice, the same in every lane.
  __syncwarp();
  float sum = 0.0f;
  for (u32 from = 0; from < a.top_k; from += WARP) {
    float own = from + lane_id() < a.top_k ? weights[from + lane_id()] : 0.0f;
    for (u32 i = 0; i < least(a.top_k - from, WARP); i++) sum += __shfl_sync(FULL, own, i);
  }
  __syncwarp();
  for (u32 k = lane_id(); k < a.top_k; k += WARP) weights[k] /= sum;
}

#undef TOP_K_HELD
