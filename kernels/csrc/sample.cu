// Drawing a token from a row of logits: [V]. A block a row.
//
// At temperature 0 the largest logit wins, the lowest id among equals. Otherwise token i has the weight
// exp((logit_i - largest) / temperature) and only what the draw keeps has one (edits, allowed tokens, top_k, top_p,
// min_p, in that order); the token at which the running sum by ascending id exceeds uniform * whole is drawn. NaN never
// wins; where nothing can win, token 0 does. As src/cpu/sample.rs; uniform was made on the host.
//
// Nothing is sorted: the k-th largest weight, and the least weight of a nucleus, are found by bisecting the bits of f32,
// a pass over the row each. Sums are in f64: thread i sums the ids of stretch i of 256 ascending, a butterfly adds the
// lanes of a warp, the warps are added ascending; so they depend on V alone.
#include "common.cuh"

#define SAMPLE_THREADS 256
#define SAMPLE_NONE 0xffffffffu

struct DrawArgs {
  double uniform;
  u32 slot;  // NO_SLOT: the token is not kept
  float temperature, top_p, min_p;
  u32 top_k;                              // 0: all
  u32 edits, edits_count;                 // where they begin, and how many
  u32 allowed, allowed_words;             // where the bits begin; SAMPLE_NONE: all may be drawn
  u32 logprobs;                           // most likely tokens asked for; SAMPLE_NONE: nothing is reported
  u32 top;                                // where they begin
};

struct EditArgs {
  u32 token;
  float repetition, add;
};

struct TopArgs {
  u32 token;
  float logit;
};

// What a row gave; the host takes the logarithms.
struct DrawnArgs {
  u32 token, top_count;
  float logit, largest;  // of the row as it was
  double sum;            // of exp(logit - largest)
};

struct SampleArgs {
  const float* logits;  // [n, V]
  float* weights;       // [n, V]
  const DrawArgs* draws;
  const EditArgs* edits;
  const u64* allowed;
  DrawnArgs* drawn;
  TopArgs* top;  // by ascending id
  u32* slots;
  u32 vocab, unused;
};

static_assert(sizeof(DrawArgs) == 56 && sizeof(EditArgs) == 12, "as src/cuda/sample.rs packs them");
static_assert(sizeof(TopArgs) == 8 && sizeof(DrawnArgs) == 24, "as src/cuda/sample.rs reads them");

// The stretch of ids of a thread.
struct Stretch {
  u32 first, end;
};

DEVICE Stretch stretch_of(u32 vocab) {
  u32 length = (vocab + SAMPLE_THREADS - 1) / SAMPLE_THREADS, first = least(threadIdx.x * length, vocab);
  return {first, least(first + length, vocab)};
}

// Adds a number of each thread; the same in every thread.
template <class T>
DEVICE T sample_sum(T value, T* sums) {
  for (u32 step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL, value, step);
  __syncthreads();
  if (lane_id() == 0) sums[warp_id()] = value;
  __syncthreads();
  T sum = 0;
  for (u32 w = 0; w < SAMPLE_THREADS / WARP; w++) sum += sums[w];
  return sum;
}

// Numbers of all threads before this one, added ascending.
template <class T>
DEVICE T sample_before(T value, T* values) {
  __syncthreads();
  values[threadIdx.x] = value;
  __syncthreads();
  T sum = 0;
  for (u32 i = 0; i < threadIdx.x; i++) sum += values[i];
  return sum;
}

// The id of the largest number, the lowest among equals; 0 if nothing is above -inf.
DEVICE u32 largest_id(const float* row, u32 vocab, u32* words) {
  float best = -infinity();
  u32 id = SAMPLE_NONE;
  for (u32 i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) {
    if (row[i] > best) {
      best = row[i];
      id = i;
    }
  }
  for (u32 step = WARP / 2; step > 0; step /= 2) {
    float other = __shfl_xor_sync(FULL, best, step);
    u32 other_id = __shfl_xor_sync(FULL, id, step);
    if (other > best || (other == best && other_id < id)) {
      best = other;
      id = other_id;
    }
  }
  __syncthreads();
  if (lane_id() == 0) {
    words[2 * warp_id()] = bits_of(best);
    words[2 * warp_id() + 1] = id;
  }
  __syncthreads();
  for (u32 w = 0; w < SAMPLE_THREADS / WARP; w++) {
    float other = float_of(words[2 * w]);
    if (other > best || (other == best && words[2 * w + 1] < id)) {
      best = other;
      id = words[2 * w + 1];
    }
  }
  return id == SAMPLE_NONE ? 0 : id;
}

// Tokens heavier than least, and those as heavy up to id last.
struct Kept {
  float least;
  u32 last;
};

DEVICE bool keeps(Kept kept, u32 id, float weight) {
  return weight > kept.least || (weight == kept.least && id <= kept.last);
}

// The id of the n-th token (from 1) of this weight, or the last id there is.
DEVICE u32 nth_of_weight(const float* weights, Stretch stretch, float weight, u32 n, u32* words) {
  u32 own = 0;
  for (u32 i = stretch.first; i < stretch.end; i++) own += weights[i] == weight;
  u32 before = sample_before(own, words);
  __syncthreads();
  if (threadIdx.x == 0) words[0] = SAMPLE_NONE;
  __syncthreads();
  if (before < n && n <= before + own) {
    u32 i = stretch.first;
    for (u32 left = n - before; left > 0; i++) left -= weights[i] == weight;
    words[0] = i - 1;
  }
  __syncthreads();
  return words[0];
}

// The least bits x of a weight up to 1 for which `few(weight of x)` holds; it holds for 1 and above some weight.
template <class Few>
DEVICE u32 bisect(u32 low, u32 high, Few few) {
  while (low < high) {
    u32 middle = low + (high - low) / 2;
    if (few(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// What a draw keeps of tokens of these weights, of which the largest is 1; at least one.
DEVICE Kept kept_of(const float* weights, u32 vocab, const DrawArgs& draw, u8* smem) {
  Stretch stretch = stretch_of(vocab);
  u32* words = (u32*)smem;
  double* sums = (double*)smem;
  const u32 one = 0x3f800000u;
  Kept by_weight = {fminf(draw.min_p, 1.0f), SAMPLE_NONE};
  Kept kept = {-1.0f, SAMPLE_NONE};
  if (draw.top_k != 0 && draw.top_k < vocab) {
    auto heavier = [&](u32 bits) {
      u32 count = 0;
      for (u32 i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) count += weights[i] > float_of(bits);
      return sample_sum(count, words);
    };
    u32 bits = bisect(0, one, [&](u32 bits) { return heavier(bits) < draw.top_k; });
    kept.least = float_of(bits);
    kept.last = nth_of_weight(weights, stretch, kept.least, draw.top_k - heavier(bits), words);
  }
  if (draw.top_p < 1.0f) {
    auto heavier = [&](float least) {
      double sum = 0.0;
      for (u32 i = stretch.first; i < stretch.end; i++)
        if (weights[i] > least && keeps(kept, i, weights[i])) sum += (double)weights[i];
      return sample_sum(sum, sums);
    };
    double enough = (double)draw.top_p * heavier(-1.0f);
    float weight = 1.0f;
    double ties = 1.0;
    if (enough > 0.0) {
      weight = float_of(bisect(0, one, [&](u32 bits) { return heavier(float_of(bits)) < enough; }));
      double above = heavier(weight);
      if (weight > 0.0f) {
        ties = ceil((enough - above) / (double)weight);
        if (above + (ties - 1.0) * (double)weight >= enough) ties -= 1.0;
        if (!(ties >= 1.0)) ties = 1.0;
        if (!(ties <= (double)vocab)) ties = (double)vocab;
      }
    }
    kept.last = nth_of_weight(weights, stretch, weight, (u32)ties, words);
    kept.least = weight;
  }
  return kept.least < by_weight.least ? by_weight : kept;
}

// The token at which the running sum exceeds `uniform` of the whole; otherwise SAMPLE_NONE.
DEVICE u32 drawn_token(const float* weights, u32 vocab, double uniform, u8* smem) {
  Stretch stretch = stretch_of(vocab);
  double own = 0.0;
  for (u32 i = stretch.first; i < stretch.end; i++) own += (double)weights[i];
  double before = sample_before(own, (double*)smem);
  // The last thread has it all.
  double* whole = (double*)smem;
  __syncthreads();
  if (threadIdx.x == SAMPLE_THREADS - 1) *whole = before + own;
  __syncthreads();
  double target = uniform * *whole;
  u32* token = (u32*)(whole + 1);
  if (threadIdx.x == 0) *token = SAMPLE_NONE;
  __syncthreads();
  if (before <= target && before + own > target) {
    double sum = 0.0;
    u32 i = stretch.first;
    for (; i < stretch.end; i++) {
      sum += (double)weights[i];
      if (before + sum > target) break;
    }
    *token = i;
  }
  __syncthreads();
  return *token;
}

// A number whose order is that of the logit.
DEVICE u32 order_of(float logit) {
  u32 bits = bits_of(logit + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Writes the `count` largest logits, the lowest ids among equals, by ascending id; returns how many.
DEVICE u32 largest_logits(const float* logits, u32 vocab, u32 count, TopArgs* top, u8* smem) {
  u32* words = (u32*)smem;
  auto larger_than = [&](u32 order) {
    u32 found = 0;
    for (u32 i = threadIdx.x; i < vocab; i += SAMPLE_THREADS)
      found += logits[i] == logits[i] && order_of(logits[i]) > order;
    return sample_sum(found, words);
  };
  u32 numbers = 0;
  for (u32 i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) numbers += logits[i] == logits[i];
  numbers = sample_sum(numbers, words);
  count = least(count, numbers);
  if (count == 0) return 0;
  u32 border = bisect(0, FULL, [&](u32 order) { return larger_than(order) < count; });
  u32 ties = count - larger_than(border);
  Stretch stretch = stretch_of(vocab);
  u32 own_ties = 0, own_larger = 0;
  for (u32 i = stretch.first; i < stretch.end; i++) {
    if (logits[i] != logits[i]) continue;
    own_ties += order_of(logits[i]) == border;
    own_larger += order_of(logits[i]) > border;
  }
  u32 ties_before = sample_before(own_ties, words);
  u32 at = sample_before(own_larger, words) + least(ties_before, ties);
  for (u32 i = stretch.first; i < stretch.end; i++) {
    if (logits[i] != logits[i]) continue;
    u32 order = order_of(logits[i]);
    if (order > border || (order == border && ties_before++ < ties)) top[at++] = {i, logits[i]};
  }
  return count;
}

KERNEL(sample, SAMPLE_THREADS, SampleArgs) {
  SHARED(smem);
  const DrawArgs& draw = a.draws[blockIdx.x];
  const float* logits = a.logits + (u64)blockIdx.x * a.vocab;
  float* weights = a.weights + (u64)blockIdx.x * a.vocab;
  bool random = draw.temperature > 0.0f && draw.temperature < infinity();
  bool masked = draw.allowed_words != SAMPLE_NONE;
  const float* row = logits;
  if (random || masked || draw.edits_count != 0) {
    for (u32 i = threadIdx.x; i < a.vocab; i += SAMPLE_THREADS) weights[i] = logits[i];
    __syncthreads();
    for (u32 i = threadIdx.x; i < draw.edits_count; i += SAMPLE_THREADS) {
      EditArgs edit = a.edits[draw.edits + i];
      if (edit.token >= a.vocab) continue;
      float logit = weights[edit.token];
      weights[edit.token] = (logit > 0.0f ? logit / edit.repetition : logit * edit.repetition) + edit.add;
    }
    __syncthreads();
    if (masked) {
      for (u32 i = threadIdx.x; i < a.vocab; i += SAMPLE_THREADS) {
        u64 word = i / 64 < draw.allowed_words ? a.allowed[draw.allowed + i / 64] : 0;
        if ((word >> i % 64 & 1) == 0) weights[i] = -infinity();
      }
    }
    __syncthreads();
    row = weights;
  }
  u32 token = largest_id(row, a.vocab, (u32*)smem);
  float largest = row[token];
  // Greedy also where no softmax exists: an infinite or missing maximum.
  if (random && largest - largest == 0.0f) {
    __syncthreads();
    for (u32 i = threadIdx.x; i < a.vocab; i += SAMPLE_THREADS) {
      float weight = exp_own((weights[i] - largest) / draw.temperature);
      weights[i] = weight == weight ? weight : 0.0f;
    }
    __syncthreads();
    if (draw.top_k > 0 || draw.top_p < 1.0f || draw.min_p > 0.0f || draw.min_p != draw.min_p) {
      Kept kept = kept_of(weights, a.vocab, draw, smem);
      __syncthreads();
      for (u32 i = threadIdx.x; i < a.vocab; i += SAMPLE_THREADS)
        if (!keeps(kept, i, weights[i])) weights[i] = 0.0f;
      __syncthreads();
    }
    u32 drawn = drawn_token(weights, a.vocab, draw.uniform, smem);
    if (drawn != SAMPLE_NONE) token = drawn;
  }
  DrawnArgs drawn = {token, 0, 0.0f, 0.0f, 0.0};
  if (draw.logprobs != SAMPLE_NONE) {
    __syncthreads();
    drawn.logit = logits[token];
    drawn.largest = logits[largest_id(logits, a.vocab, (u32*)smem)];
    Stretch stretch = stretch_of(a.vocab);
    double sum = 0.0;
    for (u32 i = stretch.first; i < stretch.end; i++) {
      float weight = exp_own(logits[i] - drawn.largest);
      if (weight == weight) sum += (double)weight;
    }
    drawn.sum = sample_sum(sum, (double*)smem);
    drawn.top_count = largest_logits(logits, a.vocab, draw.logprobs, a.top + draw.top, smem);
  }
  if (threadIdx.x == 0) {
    a.drawn[blockIdx.x] = drawn;
    if (draw.slot != NO_SLOT) a.slots[draw.slot] = token;
  }
}
