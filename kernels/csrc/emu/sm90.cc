// What takes effect later than it is said: asynchronous copies of a thread, and what emu/sm90.h declares, barriers with
// transactions, bulk copies and products of warpgroups.

namespace emu {

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  void* barrier;
};

// Sums of products under way: what they will be, while their registers are NaN.
struct Sums {
  float* d;
  std::vector<float> values;
};

struct Products {
  bool fenced;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::vector<Sums> sums;
};

struct Warpgroup {
  const std::vector<Product>* members[128];
  unsigned arrived, generation;
};

// Copies of a thread: those that no commit has ended, and groups.
struct Copies {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

// Of a block.
struct Async {
  std::vector<Copies> own_copies;
  std::vector<Copy> copies;
  std::vector<Products> products;
  std::vector<Warpgroup> warpgroups;
};

static void begin_async(unsigned threads) {
  block->async = std::make_shared<Async>();
  block->async->own_copies.assign(threads, {});
  block->async->products.assign(threads, {});
  block->async->warpgroups.assign((threads + 127) / 128, {});
}

unsigned offset(const void* p) { return (unsigned)((const unsigned char*)p - block->shared); }

static bool inside(const void* p, size_t bytes) {
  const unsigned char* at = (const unsigned char*)p;
  return at >= block->shared && at + bytes <= block->shared + block->shared_bytes;
}

// A thread's copies ------------------------------------------------------------------------------------------------

void copy_async(void* to, const void* from, bool there) {
  if (!inside(to, 16)) fail("a copy outside shared memory");
  if ((uintptr_t)to % 16 || (there && (uintptr_t)from % 16)) fail("a copy that is not aligned");
  memset(to, 0xff, 16);
  block->async->own_copies[block->current].open.push_back({to, there ? from : nullptr, 16, nullptr});
}

void copies_commit() {
  Copies& own = block->async->own_copies[block->current];
  own.groups.push_back(own.open);
  own.open.clear();
}

void copies_wait(unsigned groups) {
  std::vector<std::vector<Copy>>& own = block->async->own_copies[block->current].groups;
  while (own.size() > groups) {
    for (const Copy& copy : own.front()) {
      if (copy.from)
        memcpy(copy.to, copy.from, copy.bytes);
      else
        memset(copy.to, 0, copy.bytes);
    }
    own.erase(own.begin());
  }
}

// Barriers and copies -----------------------------------------------------------------------------------------------

static Barrier& barrier_at(void* p) {
  if (!inside(p, sizeof(Barrier)) || (uintptr_t)p % 8) fail("a barrier outside shared memory or not aligned");
  return *(Barrier*)p;
}

void barrier_init(void* p, unsigned arrivals) {
  Barrier& barrier = barrier_at(p);
  barrier.arrivals = barrier.missing = (uint16_t)arrivals;
  barrier.bytes = barrier.parity = 0;
}

// Ends the phase if nothing is missing any more; its copies land then.
static bool end_phase(Barrier& barrier) {
  unsigned bytes = 0;
  for (const Copy& copy : block->async->copies)
    if (copy.barrier == &barrier) bytes += copy.bytes;
  if (barrier.missing != 0 || barrier.bytes != bytes) return false;
  std::vector<Copy> others;
  for (const Copy& copy : block->async->copies) {
    if (copy.barrier == &barrier)
      memcpy(copy.to, copy.from, copy.bytes);
    else
      others.push_back(copy);
  }
  block->async->copies.swap(others);
  barrier.missing = barrier.arrivals;
  barrier.bytes = 0;
  barrier.parity ^= 1;
  block->progress++;
  return true;
}

void barrier_arrive(void* p, unsigned bytes) {
  Barrier& barrier = barrier_at(p);
  // A phase that nobody has waited for yet may be complete.
  if (barrier.missing == 0 && !end_phase(barrier)) fail("an arrival that no phase of its barrier expects");
  barrier.missing--;
  barrier.bytes += bytes;
  block->progress++;
}

void barrier_wait(void* p, unsigned parity) {
  Barrier& barrier = barrier_at(p);
  while (barrier.parity == parity)
    if (!end_phase(barrier)) yield();
}

void bulk_copy(void* to, const void* from, unsigned bytes, void* barrier) {
  if (!inside(to, bytes)) fail("a bulk copy outside shared memory");
  if (bytes == 0 || bytes % 16 || (uintptr_t)to % 16 || (uintptr_t)from % 16) fail("a bulk copy that is not aligned");
  memset(to, 0xff, bytes);
  block->async->copies.push_back({to, from, bytes, &barrier_at(barrier)});
}

// What is not there yet is made by blocks that run at once, or by none.
void wait_for_blocks(const unsigned* counter, unsigned value) {
  while (*(const volatile unsigned*)counter < value) yield();
}

// Products ----------------------------------------------------------------------------------------------------------

static const uint32_t UNDER_WAY = 0x7fc0dead;

static bool is_under_way(const float* d, unsigned n) {
  for (unsigned i = 0; i < n; i++)
    if (__float_as_uint(d[i]) != UNDER_WAY) return false;
  return true;
}

void products_fence() { block->async->products[block->current].fenced = true; }

void product(const Product& product) {
  Products& own = block->async->products[block->current];
  if (!own.fenced) fail("a product without a fence before it");
  unsigned n = product.columns / 2;
  Sums* sums = nullptr;
  for (Sums& each : own.sums)
    if (each.d == product.d) sums = &each;
  if (!sums)
    own.sums.push_back({product.d, std::vector<float>(product.d, product.d + n)});
  else if (!is_under_way(product.d, n))
    fail("sums that were touched while products were under way");
  for (unsigned i = 0; i < n; i++) product.d[i] = __uint_as_float(UNDER_WAY);
  own.open.push_back(product);
}

void products_commit() {
  Products& own = block->async->products[block->current];
  own.groups.push_back(own.open);
  own.open.clear();
  // What is done to registers from here on needs another fence.
  own.fenced = false;
}

static void warpgroup_barrier(Warpgroup& warpgroup) {
  unsigned generation = warpgroup.generation;
  if (++warpgroup.arrived == 128) {
    warpgroup.arrived = 0;
    warpgroup.generation++;
    block->progress++;
    return;
  }
  while (warpgroup.generation == generation) yield();
}

void warpgroup_sync() { warpgroup_barrier(block->async->warpgroups[block->current / 128]); }

// Lets others do what they wrongly may while products are under way: such as copy to a stage that is still read.
static void linger() {
  for (int round = 0; round < 3; round++) {
    block->progress++;
    yield();
  }
}

// An element of b, by the descriptor: k of 16 and a column.
static float element(uint64_t descriptor, unsigned k, unsigned column) {
  unsigned start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  unsigned stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 46) fail("a descriptor that swizzles, which the emulation does not know");
  const unsigned char* at = block->shared + start + k / 8 * leading + column / 8 * stride + column % 8 * 16 + k % 8 * 2;
  if (!inside(at, 2)) fail("a descriptor that leaves shared memory");
  uint16_t bits;
  memcpy(&bits, at, 2);
  return __uint_as_float((uint32_t)bits << 16);
}

static void complete(const Product& product, unsigned which, const Warpgroup& warpgroup, std::vector<float>& sums) {
  unsigned thread = block->current % 128, lane = thread % 32;
  for (unsigned i = 0; i < product.columns / 2; i++) {
    unsigned row = lane / 4 + 8 * (i % 4 / 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    float sum = product.accumulate ? sums[i] : 0.0f;
    for (unsigned k = 0; k < 16; k++) {
      unsigned member = thread - lane + row % 8 * 4 + k % 8 / 2;
      uint32_t left = (*warpgroup.members[member])[which].a[row / 8 + 2 * (k / 8)];
      sum = fmaf(bf16_half(left, k % 2), element(product.b, k, column), sum);
    }
    sums[i] = sum;
  }
}

void products_wait(unsigned groups) {
  Products& own = block->async->products[block->current];
  Warpgroup& warpgroup = block->async->warpgroups[block->current / 128];
  while (own.groups.size() > groups) {
    const std::vector<Product>& group = own.groups.front();
    warpgroup.members[block->current % 128] = &group;
    warpgroup_barrier(warpgroup);
    linger();
    const std::vector<Product>& first = *warpgroup.members[0];
    bool agree = first.size() == group.size();
    for (size_t i = 0; agree && i < group.size(); i++)
      agree = first[i].b == group[i].b && first[i].columns == group[i].columns &&
              first[i].accumulate == group[i].accumulate;
    if (!agree) fail("a warpgroup that does not agree on its products");
    for (size_t i = 0; i < group.size(); i++)
      for (Sums& sums : own.sums)
        if (sums.d == group[i].d) {
          if (!is_under_way(sums.d, group[i].columns / 2)) fail("sums that were touched while products were under way");
          complete(group[i], (unsigned)i, warpgroup, sums.values);
        }
    warpgroup_barrier(warpgroup);
    own.groups.erase(own.groups.begin());
    std::vector<Sums> left;
    for (Sums& sums : own.sums) {
      bool more = false;
      for (const Product& product : own.open) more |= product.d == sums.d;
      for (const auto& later : own.groups)
        for (const Product& product : later) more |= product.d == sums.d;
      if (more)
        left.push_back(sums);
      else
        memcpy(sums.d, sums.values.data(), sums.values.size() * sizeof(float));
    }
    own.sums.swap(left);
  }
  if (groups == 0 && !own.open.empty()) fail("a wait for products that no commit has ended");
}

}  // namespace emu
