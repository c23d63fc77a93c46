// Drawing a token from a row of logits: [V]. Blocks share the chunks of a row; the last one to be done joins what the
// others found.
//
// At temperature 0 the largest logit wins, the lowest id among equals. Otherwise token i has the weight
// exp((logit_i - largest) / temperature) and only what the draw keeps has one (edits, allowed tokens, top_k, top_p,
// min_p, in that order); the token at which the running sum by ascending id exceeds uniform * whole is drawn. NaN never
// wins; where nothing can win, token 0 does. As src/cpu/sample.rs; uniform was made on the host.
//
// Nothing is sorted. Numbers become keys of 32 bits of the same order, of which the n-th largest, or the one at which a
// sum by descending key is reached, is found by three digits: a histogram each. The weights' first histogram is made as
// they are; what of a row lies in the bins that it leaves open is listed, and the other digits look at the list alone.
//
// No number is added in floating point: weights count in units of 2^-40, so sums do not depend on any order. They hold
// up to 2^22 tokens.
#include "ptx.cuh"

#define SAMPLE_THREADS 512
#define EACH 8  // ids of a thread
#define SAMPLE_CHUNK (SAMPLE_THREADS * EACH)
#define SAMPLE_NONE 0xffffffffu
#define BINS 2048
#define LISTED 4096

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

// Weights of one digit: how many, and what they have below it, in units of their last place.
struct Bin {
  u64 low;
  u32 count, unused;
};

// What blocks of a row tell each other.
struct RowState {
  u64 best;  // largest_key of the row
  u32 listed, unused;
  u32 first_bin, last_bin;  // what is listed
  u32 least, last;          // bits of a weight: kept are heavier tokens, and those as heavy up to this id
  u32 token, unused_too[7];
  Bin bins[BINS];    // weights by their first digit
  u64 list[LISTED];  // (bits of a weight, id)
  u64 parts[1];      // the largest key of every block, then the sum of every chunk
};

struct SampleArgs {
  const float* logits;  // [n, V]
  float* weights;       // [n, stride]
  u8* states;           // [n] RowState, state_bytes from one to the next
  u32* done;            // [n] blocks that are done, 0 between kernels
  const DrawArgs* draws;
  const EditArgs* edits;
  const u64* allowed;
  DrawnArgs* drawn;
  TopArgs* top;  // in any order
  u32* slots;
  u32 vocab, stride, state_bytes, unused;
};

static_assert(sizeof(DrawArgs) == 56 && sizeof(EditArgs) == 12, "as src/cuda/sample.rs packs them");
static_assert(sizeof(TopArgs) == 8 && sizeof(DrawnArgs) == 24, "as src/cuda/sample.rs reads them");
static_assert(sizeof(RowState) == 64 + BINS * 16 + LISTED * 8 + 8, "as src/cuda/sample.rs makes room for them");

DEVICE RowState& state_of(const SampleArgs& a, u32 row) { return *(RowState*)(a.states + (u64)row * a.state_bytes); }
DEVICE float* weights_of(const SampleArgs& a, u32 row) { return a.weights + (u64)row * a.stride; }
DEVICE const float* logits_of(const SampleArgs& a, u32 row) { return a.logits + (u64)row * a.vocab; }

DEVICE bool is_masked(const DrawArgs& draw) { return draw.allowed_words != SAMPLE_NONE; }
DEVICE bool is_changed(const DrawArgs& draw) { return is_masked(draw) || draw.edits_count != 0; }
DEVICE bool is_cut(const DrawArgs& draw, u32 vocab) {
  return (draw.top_k != 0 && draw.top_k < vocab) || draw.top_p < 1.0f;
}

// Keys --------------------------------------------------------------------------------------------------------------

// A number whose order is that of the logit.
DEVICE u32 order_of(float logit) {
  u32 bits = bits_of(logit + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float logit_of(u32 order) { return float_of(order & 0x80000000u ? order & 0x7fffffffu : ~order); }

// Larger for a larger logit, and for a lower id among equals; 0 if it cannot win.
DEVICE u64 largest_key(float logit, u32 id) { return logit > -infinity() ? (u64)order_of(logit) << 32 | (u32)~id : 0; }

DEVICE u32 token_of(u64 key) { return key == 0 ? 0 : (u32)~key; }

// Whether a row is drawn from by weights; greedy also where no softmax exists: an infinite or missing maximum.
DEVICE bool is_random(const DrawArgs& draw, u64 best) {
  float largest = best == 0 ? infinity() : logit_of(best >> 32);
  return draw.temperature > 0.0f && draw.temperature < infinity() && largest < infinity();
}

// A weight's bits are at most those of 1: two more bits of a digit.
DEVICE u32 weight_key(u32 bits) { return bits << 2; }

// Units of 2^-40 in `count` weights of the bits `bits`, and `low` units of their last place.
DEVICE u64 units_of(u32 bits, u32 count, u64 low) {
  u32 exponent = bits >> 23;
  u64 last_places = (u64)count * ((bits & 0x7fffffu) | (exponent > 0 ? 1u << 23 : 0)) + low;
  int shift = (int)most(exponent, 1) - 110;
  if (shift >= 0) return last_places << shift;
  return shift > -64 ? (last_places + (1ull << (-shift - 1))) >> -shift : 0;
}

DEVICE u64 units_of(float weight) { return units_of(bits_of(weight), 1, 0); }

// Blocks ------------------------------------------------------------------------------------------------------------

// Shared memory: what a block adds up, what it found, and a histogram or a list.
struct Shared {
  u64 sums[SAMPLE_THREADS / WARP];
  u64 above;
  u32 index, word;
  u64 unused[2];
  union {
    Bin bins[BINS];
    u32 counts[3][BINS];  // how many, and what they have below: ten bits of it, and the others
    u64 list[SAMPLE_CHUNK];
  };
};

static_assert(sizeof(Shared) == 160 + BINS * 16, "as src/cuda/sample.rs asks for it");

// The largest number of all threads, the same in each.
DEVICE u64 block_most(u64 value, Shared& s) {
  for (u32 step = WARP / 2; step > 0; step /= 2) {
    u64 other = __shfl_xor_sync(FULL, value, step);
    value = value > other ? value : other;
  }
  __syncthreads();
  if (lane_id() == 0) s.sums[warp_id()] = value;
  __syncthreads();
  for (u32 w = 0; w < SAMPLE_THREADS / WARP; w++) value = value > s.sums[w] ? value : s.sums[w];
  return value;
}

// The sum of the threads before this one, and of all.
DEVICE u64 block_before(u64 value, u64& whole, Shared& s) {
  u64 sum = value;
  for (u32 step = 1; step < WARP; step *= 2) {
    u64 other = __shfl_up_sync(FULL, sum, step);
    if (lane_id() >= step) sum += other;
  }
  __syncthreads();
  if (lane_id() == WARP - 1) s.sums[warp_id()] = sum;
  __syncthreads();
  u64 before = sum - value;
  whole = 0;
  for (u32 w = 0; w < SAMPLE_THREADS / WARP; w++) {
    if (w < warp_id()) before += s.sums[w];
    whole += s.sums[w];
  }
  return before;
}

// Whether this block is the last one of its row: then it sees what the others wrote.
DEVICE bool is_last(const SampleArgs& a, Shared& s) {
  __syncthreads();
  if (threadIdx.x == 0) {
    u32* done = a.done + blockIdx.y;
    s.word = take_ticket(done) == gridDim.x - 1;
    if (s.word) *done = 0;
  }
  __syncthreads();
  return s.word;
}

// Where a running sum reaches what is needed: the index, and the sum before it.
struct Reached {
  u32 index;
  u64 before;
};

// The first of n amounts with which their sum reaches `need(whole)`; the first and the last but zeros are the limits.
template <class Amount, class Need>
DEVICE Reached reach(u32 n, Amount amount, Need need_of, Shared& s) {
  u32 length = (n + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
  u32 first = least(threadIdx.x * length, n), end = least(first + length, n);
  u64 own = 0, whole;
  for (u32 i = first; i < end; i++) own += amount(i);
  u64 sum = block_before(own, whole, s);
  u64 need = need_of(whole);
  if (need > whole) need = whole;
  if (need < 1) need = 1;
  if (threadIdx.x == 0) {
    s.index = 0;
    s.above = 0;
  }
  __syncthreads();
  if (sum < need && need <= sum + own) {
    for (u32 i = first; i < end; i++) {
      u64 more = amount(i);
      if (sum < need && need <= sum + more) {
        s.index = i;
        s.above = sum;
      }
      sum += more;
    }
  }
  __syncthreads();
  return {s.index, s.above};
}

// Cuts ----------------------------------------------------------------------------------------------------------------

// Tokens heavier than these bits, and those as heavy up to id last.
struct Kept {
  u32 least, last;
};

DEVICE bool keeps(Kept kept, u32 id, u32 bits) { return bits > kept.least || (bits == kept.least && id <= kept.last); }

// What a nucleus needs of the whole.
DEVICE u64 share_of(u64 whole, const DrawArgs& draw) {
  double share = (double)draw.top_p * (double)whole;
  return share > 0.0 ? (u64)ceil(share) : 1;
}

// Digits ------------------------------------------------------------------------------------------------------------

// By what is counted.
enum { BY_COUNT, BY_MASS };

// The digits of a key: of 11, 11 and 10 bits.
DEVICE u32 shift_of(u32 digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }
DEVICE u32 bins_of(u32 digit) { return digit == 2 ? 1024 : 2048; }

// What a weight's key has below a digit, in units of its last place.
DEVICE u32 low_of(u32 key, u32 digit) { return (key & ((1u << shift_of(digit)) - 1)) >> 2; }

// What a bin counts for, whose keys begin with `prefix` and it; what is there counts for something.
template <int BY>
DEVICE u64 amount_of(const Bin& bin, u32 key) {
  if (BY == BY_COUNT || bin.count == 0) return bin.count;
  u64 units = units_of(key >> 2, bin.count, bin.low);
  return units > 0 ? units : 1;
}

// The largest bin down to which bins reach what is needed.
template <int BY, class Need>
DEVICE Reached reach_bin(const Bin* bins, u32 digit, u32 prefix, Need need, Shared& s) {
  u32 n = bins_of(digit);
  auto amount = [&](u32 i) {
    u32 bin = n - 1 - i;
    return amount_of<BY>(bins[bin], (prefix * n + bin) << shift_of(digit));
  };
  Reached reached = reach(n, amount, need, s);
  return {n - 1 - reached.index, reached.before};
}

// Visits (i, item_of(i)) for all i below n, each in one thread. Items are loaded EACH at a time: what visits do to shared
// memory would have them come one after another.
template <class ItemOf, class Visit>
DEVICE void each_of(u32 n, ItemOf item_of, Visit visit) {
  for (u32 first = threadIdx.x; first < n; first += SAMPLE_THREADS * EACH) {
    u64 items[EACH];
#pragma unroll
    for (u32 i = 0; i < EACH; i++) items[i] = first + i * SAMPLE_THREADS < n ? item_of(first + i * SAMPLE_THREADS) : 0;
#pragma unroll
    for (u32 i = 0; i < EACH; i++)
      if (first + i * SAMPLE_THREADS < n) visit(first + i * SAMPLE_THREADS, items[i]);
  }
}

// A key, how many have it, and what is still needed of them.
struct Border {
  u32 key, count;
  u64 left;
};

// The key down to which keys reach what is needed, of `n` items: `key_of(item_of(i), key)` says whether there is one and
// which. `given` is the histogram of the first digit, where there is one.
template <int BY, class ItemOf, class KeyOf, class Need>
DEVICE Border border_of(u32 n, ItemOf item_of, KeyOf key_of, const Bin* given, Need need_of, Shared& s) {
  u32 prefix = 0, count = 0;
  u64 need = 0;
  for (u32 digit = 0; digit < 3; digit++) {
    const Bin* bins = s.bins;
    if (digit == 0 && given) {
      bins = given;
    } else {
      __syncthreads();
      for (u32 i = threadIdx.x; i < BINS; i += SAMPLE_THREADS) s.bins[i] = {0, 0, 0};
      __syncthreads();
      each_of(n, item_of, [&](u32, u64 item) {
        u32 key;
        if (!key_of(item, key) || (digit > 0 && key >> shift_of(digit - 1) != prefix)) return;
        Bin& bin = s.bins[key >> shift_of(digit) & (bins_of(digit) - 1)];
        atomicAdd(&bin.count, 1);
        if (BY == BY_MASS) atomicAdd(&bin.low, (u64)low_of(key, digit));
      });
      __syncthreads();
    }
    auto still = [&](u64 whole) { return need = digit == 0 ? need_of(whole) : need; };
    Reached reached = reach_bin<BY>(bins, digit, prefix, still, s);
    count = bins[reached.index].count;
    prefix = prefix * bins_of(digit) + reached.index;
    need = need > reached.before ? need - reached.before : 1;
  }
  __syncthreads();
  return {prefix, count, need};
}

// Numbers of a thread -------------------------------------------------------------------------------------------------

// A thread's numbers of a row; `none` beyond its end.
DEVICE void load_each(const float* row, u32 first, u32 vocab, float none, float (&out)[EACH]) {
  if (first + EACH <= vocab && ((u64)row & 15) == 0) {
#pragma unroll
    for (u32 i = 0; i < EACH; i += 4) {
      uint4 words = *(const uint4*)(row + first + i);
      out[i] = float_of(words.x);
      out[i + 1] = float_of(words.y);
      out[i + 2] = float_of(words.z);
      out[i + 3] = float_of(words.w);
    }
    return;
  }
#pragma unroll
  for (u32 i = 0; i < EACH; i++) out[i] = first + i < vocab ? row[first + i] : none;
}

DEVICE u32 chunks_of(u32 vocab) { return (vocab + SAMPLE_CHUNK - 1) / SAMPLE_CHUNK; }
DEVICE float not_a_number() { return float_of(0x7fc00000u); }

DEVICE void put_token(const SampleArgs& a, u32 row, u32 token) {
  a.drawn[row] = {token, 0, 0.0f, 0.0f, 0.0};
  if (a.draws[row].slot != NO_SLOT) a.slots[a.draws[row].slot] = token;
  state_of(a, row).token = token;
}

// Kernels: in this order, and those alone that a row of the launch needs ----------------------------------------------

// Logits that are edited, or not allowed.
KERNEL(sample_change, SAMPLE_THREADS, SampleArgs) {
  SHARED(smem);
  Shared& s = *(Shared*)smem;
  u32 row = blockIdx.y;
  const DrawArgs& draw = a.draws[row];
  if (!is_changed(draw)) return;
  const float* logits = logits_of(a, row);
  float* weights = weights_of(a, row);
  auto allowed = [&](u32 id) {
    if (!is_masked(draw)) return true;
    return id / 64 < draw.allowed_words && (a.allowed[draw.allowed + id / 64] >> id % 64 & 1) != 0;
  };
  for (u32 id = blockIdx.x * SAMPLE_THREADS + threadIdx.x; id < a.vocab; id += gridDim.x * SAMPLE_THREADS)
    weights[id] = allowed(id) ? logits[id] : -infinity();
  if (!is_last(a, s)) return;
  for (u32 i = threadIdx.x; i < draw.edits_count; i += SAMPLE_THREADS) {
    EditArgs edit = a.edits[draw.edits + i];
    if (edit.token >= a.vocab || !allowed(edit.token)) continue;
    float logit = logits[edit.token];
    weights[edit.token] = (logit > 0.0f ? logit / edit.repetition : logit * edit.repetition) + edit.add;
  }
}

// The largest logit; all that a greedy row needs.
KERNEL(sample_largest, SAMPLE_THREADS, SampleArgs) {
  SHARED(smem);
  Shared& s = *(Shared*)smem;
  u32 row = blockIdx.y;
  const DrawArgs& draw = a.draws[row];
  RowState& state = state_of(a, row);
  const float* logits = is_changed(draw) ? weights_of(a, row) : logits_of(a, row);
  // For the next kernels.
  if (blockIdx.x == 0 && is_cut(draw, a.vocab)) {
    for (u32 i = threadIdx.x; i < BINS; i += SAMPLE_THREADS) state.bins[i] = {0, 0, 0};
    if (threadIdx.x == 0) state.listed = 0;
  }
  u64 best = 0;
  for (u32 chunk = blockIdx.x; chunk < chunks_of(a.vocab); chunk += gridDim.x) {
    u32 first = chunk * SAMPLE_CHUNK + threadIdx.x * EACH;
    float own[EACH];
    load_each(logits, first, a.vocab, not_a_number(), own);
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
      u64 key = largest_key(own[i], first + i);
      best = best > key ? best : key;
    }
  }
  best = block_most(best, s);
  if (threadIdx.x == 0) state.parts[blockIdx.x] = best;
  if (!is_last(a, s)) return;
  best = 0;
  for (u32 i = threadIdx.x; i < gridDim.x; i += SAMPLE_THREADS) best = best > state.parts[i] ? best : state.parts[i];
  best = block_most(best, s);
  if (threadIdx.x == 0) {
    state.best = best;
    put_token(a, row, token_of(best));
  }
}

// Weights, and where rows are cut their first digits.
KERNEL(sample_weigh, SAMPLE_THREADS, SampleArgs) {
  SHARED(smem);
  Shared& s = *(Shared*)smem;
  u32 row = blockIdx.y;
  const DrawArgs& draw = a.draws[row];
  RowState& state = state_of(a, row);
  if (!is_random(draw, state.best)) return;
  bool cut = is_cut(draw, a.vocab);
  if (cut) {
    for (u32 i = threadIdx.x; i < 3 * BINS; i += SAMPLE_THREADS) s.counts[i / BINS][i % BINS] = 0;
    __syncthreads();
  }
  float* weights = weights_of(a, row);
  const float* logits = is_changed(draw) ? weights : logits_of(a, row);
  float largest = logit_of(state.best >> 32);
  for (u32 chunk = blockIdx.x; chunk < chunks_of(a.vocab); chunk += gridDim.x) {
    u32 first = chunk * SAMPLE_CHUNK + threadIdx.x * EACH;
    float own[EACH];
    load_each(logits, first, a.vocab, not_a_number(), own);
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
      float weight = exp_own((own[i] - largest) / draw.temperature);
      own[i] = weight > 0.0f ? weight : 0.0f;
      if (cut && own[i] > 0.0f) {
        u32 key = weight_key(bits_of(own[i])), bin = key >> shift_of(0), low = low_of(key, 0);
        atomicAdd(&s.counts[0][bin], 1);
        atomicAdd(&s.counts[1][bin], low % 1024);
        atomicAdd(&s.counts[2][bin], low / 1024);
      }
    }
    // Rows of weights are as long as a multiple of EACH.
    if (first >= a.vocab) continue;
#pragma unroll
    for (u32 i = 0; i < EACH; i += 4) {
      uint4 words = {bits_of(own[i]), bits_of(own[i + 1]), bits_of(own[i + 2]), bits_of(own[i + 3])};
      *(uint4*)(weights + first + i) = words;
    }
  }
  if (!cut) return;
  __syncthreads();
  for (u32 i = threadIdx.x; i < BINS; i += SAMPLE_THREADS) {
    if (s.counts[0][i] == 0) continue;
    atomicAdd(&state.bins[i].count, s.counts[0][i]);
    atomicAdd(&state.bins[i].low, (u64)s.counts[2][i] * 1024 + s.counts[1][i]);
  }
  if (!is_last(a, s)) return;
  bool counted = draw.top_k != 0 && draw.top_k < a.vocab;
  u32 border = counted ? reach_bin<BY_COUNT>(state.bins, 0, 0, [&](u64) -> u64 { return draw.top_k; }, s).index
                       : reach_bin<BY_MASS>(state.bins, 0, 0, [&](u64 whole) { return share_of(whole, draw); }, s).index;
  if (threadIdx.x == 0) {
    state.first_bin = border;
    // What top_p looks for is among what top_k keeps.
    state.last_bin = counted ? BINS - 1 : border;
  }
}

// What a cut keeps: at least one token.
KERNEL(sample_cut, SAMPLE_THREADS, SampleArgs) {
  SHARED(smem);
  Shared& s = *(Shared*)smem;
  u32 row = blockIdx.y;
  const DrawArgs& draw = a.draws[row];
  RowState& state = state_of(a, row);
  if (!is_random(draw, state.best) || !is_cut(draw, a.vocab)) return;
  const float* weights = weights_of(a, row);
  u32 first_bin = state.first_bin, last_bin = state.last_bin;
  for (u32 chunk = blockIdx.x; chunk < chunks_of(a.vocab); chunk += gridDim.x) {
    u32 first = chunk * SAMPLE_CHUNK + threadIdx.x * EACH;
    float own[EACH];
    load_each(weights, first, a.vocab, 0.0f, own);
    __syncthreads();
    if (threadIdx.x == 0) s.word = 0;
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
      u32 bits = bits_of(own[i]), bin = weight_key(bits) >> shift_of(0);
      if (bits != 0 && first_bin <= bin && bin <= last_bin)
        s.list[atomicAdd(&s.word, 1)] = (u64)bits << 32 | (first + i);
    }
    __syncthreads();
    u32 count = s.word;
    if (count == 0) continue;
    if (threadIdx.x == 0) s.index = atomicAdd(&state.listed, count);
    __syncthreads();
    // A list that is too long is none: `listed` says so.
    for (u32 i = threadIdx.x, at = s.index + i; i < count && at < LISTED; i += SAMPLE_THREADS, at += SAMPLE_THREADS)
      state.list[at] = s.list[i];
  }
  if (!is_last(a, s)) return;
  bool is_listed = state.listed <= LISTED;
  u32 n = is_listed ? state.listed : a.vocab;
  auto item_of = [&](u32 i) { return is_listed ? state.list[i] : (u64)bits_of(weights[i]) << 32 | i; };
  Kept kept = {0, SAMPLE_NONE};
  auto key_of = [&](u64 item, u32& key) {
    key = weight_key(item >> 32);
    return key != 0 && keeps(kept, item, item >> 32);
  };
  // The lowest ids among equals, `count` of which are kept so far.
  auto keep = [&](u32 bits, u64 ties, u32 count) {
    if (bits != kept.least) kept = {bits, SAMPLE_NONE};
    if (ties >= count) return;
    auto id_of = [&](u64 item, u32& key) {
      key = ~(u32)item;
      return item >> 32 == bits;
    };
    kept.last = ~border_of<BY_COUNT>(n, item_of, id_of, nullptr, [&](u64) { return ties; }, s).key;
  };
  const Bin* given = state.bins;
  if (draw.top_k != 0 && draw.top_k < a.vocab) {
    Border border = border_of<BY_COUNT>(n, item_of, key_of, given, [&](u64) -> u64 { return draw.top_k; }, s);
    keep(border.key >> 2, border.left, border.count);
    given = nullptr;
  }
  if (draw.top_p < 1.0f) {
    Border border = border_of<BY_MASS>(n, item_of, key_of, given, [&](u64 whole) { return share_of(whole, draw); }, s);
    u64 units = units_of(border.key >> 2, 1, 0);
    keep(border.key >> 2, units == 0 ? border.count : (border.left + units - 1) / units, border.count);
  }
  if (threadIdx.x == 0) {
    state.least = kept.least;
    state.last = kept.last;
  }
}

// The token at which the running sum exceeds `uniform` of the whole.
KERNEL(sample_draw, SAMPLE_THREADS, SampleArgs) {
  SHARED(smem);
  Shared& s = *(Shared*)smem;
  u32 row = blockIdx.y;
  const DrawArgs& draw = a.draws[row];
  RowState& state = state_of(a, row);
  if (!is_random(draw, state.best)) return;
  Kept kept = {0, SAMPLE_NONE};
  if (is_cut(draw, a.vocab)) kept = {state.least, state.last};
  float least_weight = fminf(draw.min_p, 1.0f);
  if (least_weight > float_of(kept.least)) kept = {bits_of(least_weight), SAMPLE_NONE};
  const float* weights = weights_of(a, row);
  for (u32 chunk = blockIdx.x; chunk < chunks_of(a.vocab); chunk += gridDim.x) {
    u32 first = chunk * SAMPLE_CHUNK + threadIdx.x * EACH;
    float own[EACH];
    load_each(weights, first, a.vocab, 0.0f, own);
    u64 sum = 0, whole;
#pragma unroll
    for (u32 i = 0; i < EACH; i++)
      if (keeps(kept, first + i, bits_of(own[i]))) sum += units_of(own[i]);
    block_before(sum, whole, s);
    if (threadIdx.x == 0) state.parts[chunk] = whole;
  }
  if (!is_last(a, s)) return;
  u64 need = 0;
  auto of_chunk = [&](u32 chunk) { return state.parts[chunk]; };
  auto needed = [&](u64 whole) { return need = (u64)(draw.uniform * (double)whole) + 1; };
  Reached chunk = reach(chunks_of(a.vocab), of_chunk, needed, s);
  auto of_id = [&](u32 i) {
    u32 id = chunk.index * SAMPLE_CHUNK + i;
    return id < a.vocab && keeps(kept, id, bits_of(weights[id])) ? units_of(weights[id]) : 0ull;
  };
  Reached token = reach(SAMPLE_CHUNK, of_id, [&](u64) { return need - chunk.before; }, s);
  if (threadIdx.x == 0) put_token(a, row, chunk.index * SAMPLE_CHUNK + token.index);
}

// How likely the token was, and the most likely tokens. A block a row.
KERNEL(sample_report, SAMPLE_THREADS, SampleArgs) {
  SHARED(smem);
  Shared& s = *(Shared*)smem;
  u32 row = blockIdx.y;
  const DrawArgs& draw = a.draws[row];
  if (draw.logprobs == SAMPLE_NONE) return;
  const float* logits = logits_of(a, row);
  auto bits = [&](u32 id) { return (u64)bits_of(logits[id]) << 32 | id; };
  u64 best = 0;
  each_of(a.vocab, bits, [&](u32 id, u64 item) {
    u64 key = largest_key(float_of(item >> 32), id);
    best = best > key ? best : key;
  });
  best = block_most(best, s);
  float largest = logits[token_of(best)];
  u64 units = 0, sum, numbers = 0, count;
  each_of(a.vocab, bits, [&](u32, u64 item) {
    float logit = float_of(item >> 32), weight = exp_own(logit - largest);
    if (weight > 0.0f) units += units_of(weight);
    numbers += logit == logit;
  });
  block_before(units, sum, s);
  block_before(numbers, count, s);
  if (count > draw.logprobs) count = draw.logprobs;
  if (count > 0) {
    auto order = [&](u64 item, u32& key) {
      float logit = float_of(item >> 32);
      key = order_of(logit);
      return logit == logit;
    };
    Border border = border_of<BY_COUNT>(a.vocab, bits, order, nullptr, [&](u64) { return count; }, s);
    u32 last = SAMPLE_NONE;
    if (border.left < border.count) {
      auto id_of = [&](u64 item, u32& key) {
        bool is = order(item, key) && key == border.key;
        key = ~(u32)item;
        return is;
      };
      last = ~border_of<BY_COUNT>(a.vocab, bits, id_of, nullptr, [&](u64) { return border.left; }, s).key;
    }
    if (threadIdx.x == 0) s.word = 0;
    __syncthreads();
    each_of(a.vocab, bits, [&](u32 id, u64 item) {
      u32 key;
      if (order(item, key) && (key > border.key || (key == border.key && id <= last)))
        a.top[draw.top + atomicAdd(&s.word, 1)] = {id, float_of(item >> 32)};
    });
  }
  if (threadIdx.x == 0) {
    u32 token = state_of(a, row).token;
    a.drawn[row] = {token, (u32)count, logits[token], largest, (double)sum / (double)(1ull << 40)};
  }
}
