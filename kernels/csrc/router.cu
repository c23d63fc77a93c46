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

KERNEL(top_k, WARP, TopKArgs) {
  const float* logits = a.logits + (u64)blockIdx.x * a.experts_count;
  u32* experts = a.experts + (u64)blockIdx.x * a.top_k;
  float* weights = a.weights + (u64)blockIdx.x * a.top_k;
  float last = infinity();
  u32 last_index = 0, first_index = 0;
  bool any = false;
  for (u32 k = 0; k < a.top_k; k++) {
    // The first of those that come after the last chosen.
    float best = -infinity();
    u32 index = FULL;
    for (u32 e = lane_id(); e < a.experts_count; e += WARP) {
      float rank = rank_of(logits[e]);
      if ((!any || before(last, last_index, rank, e)) && (index == FULL || before(rank, e, best, index))) {
        best = rank;
        index = e;
      }
    }
    for (u32 step = WARP / 2; step > 0; step /= 2) {
      float other = __shfl_xor_sync(FULL, best, step);
      u32 other_index = __shfl_xor_sync(FULL, index, step);
      if (other_index != FULL && (index == FULL || before(other, other_index, best, index))) {
        best = other;
        index = other_index;
      }
    }
    if (k == 0) first_index = index;
    if (lane_id() == 0) experts[k] = index;
    last = best;
    last_index = index;
    any = true;
  }
  if (lane_id() != 0) return;
  float largest = logits[first_index], sum = 0.0f;
  for (u32 k = 0; k < a.top_k; k++) {
    weights[k] = exp_own(logits[experts[k]] - largest);
    sum += weights[k];
  }
  for (u32 k = 0; k < a.top_k; k++) weights[k] /= sum;
}
