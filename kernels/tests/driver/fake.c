// A driver and a compiler that compute nothing: copies are done at once, or never while the device hangs. Calls need a
// context that is current on their thread, as the true driver's do. Where that one would wait for ever, or take away what
// the device still uses, this one ends the process and says which call it was.

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NO_MEMORY = 2, NO_CONTEXT = 201, NOT_READY = 600, LAUNCH_FAILED = 719, TAKEN_MAX = 1024, STAGED_MAX = 64 << 10, PINNED_MAX = 256 };

typedef void *handle;
typedef unsigned long long device_address;

static int hangs, no_events, given;
static long contexts, modules, pinned_count, streams, graphs, edges_ahead;
static struct { char *memory; size_t bytes; } pinned[PINNED_MAX];
static _Thread_local handle current;

// What tests call.
void fake_set(int device_hangs, int events_fail) {
    hangs = device_hangs;
    no_events = events_fail;
    if (!hangs) given = 0;
}
long fake_contexts(void) { return contexts; }
long fake_modules(void) { return modules; }
long fake_pinned(void) { return pinned_count; }
long fake_streams(void) { return streams; }
long fake_graphs(void) { return graphs; }
long fake_edges_ahead(void) { return edges_ahead; }

#define IN_CONTEXT if (!current) return NO_CONTEXT

static int query(void) { return hangs && given ? NOT_READY : 0; }
static void waits(const char *call) {
    if (query()) {
        fprintf(stderr, "%s waits for a device that hangs\n", call);
        abort();
    }
}
static int take(const char *call) {
    if (hangs && ++given > TAKEN_MAX) waits(call);
    return 0;
}
static int is_pinned(const void *memory) {
    for (int i = 0; i < PINNED_MAX; i++) {
        const char *at = memory, *begin = pinned[i].memory;
        if (begin && at >= begin && at < begin + pinned[i].bytes) return 1;
    }
    return 0;
}
static int copy(const char *call, void *to, const void *from, size_t bytes) {
    if (!hangs) memcpy(to, from, bytes);
    return take(call);
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    // Capability 9.0, shared memory of a block, memory pools, and some of everything else.
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 97 ? 166912 : attribute == 115 ? 1 : 4;
    return 0;
}
int cuDevicePrimaryCtxRetain(handle *context, int device) { contexts++; *context = &contexts; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { waits("cuDevicePrimaryCtxRelease"); contexts--; return 0; }
int cuCtxGetCurrent(handle *context) { *context = current; return 0; }
int cuCtxSetCurrent(handle context) { current = context; return 0; }
int cuCtxSynchronize(void) { IN_CONTEXT; waits("cuCtxSynchronize"); return 0; }
int cuDeviceGetDefaultMemPool(handle *pool, int device) { *pool = &pinned; return 0; }
int cuMemPoolSetAttribute(handle pool, int attribute, void *value) { return 0; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *all) { IN_CONTEXT; *free_bytes = *all = (size_t)1 << 30; return 0; }

// Nodes are done in the order in which they were added. What runs is a copy of a graph, by which a node is known from the
// one it was copied from.
// Chains alone are made: a node waits for the one that was added before it, and for no other.
struct node { struct node *next, *copy_of, *before; enum { KERNEL, COPY, SET, CHILD } kind; char *to; const char *from; size_t bytes; int value; struct graph *child; };
struct graph { struct node *first, **last; };
struct stream { struct graph *captured; };

static struct graph *new_graph(void) {
    struct graph *graph = calloc(1, sizeof *graph);
    graph->last = &graph->first;
    graphs++;
    return graph;
}
static struct node *add(struct graph *graph, struct node node) {
    struct node *added = malloc(sizeof node);
    *added = node;
    added->next = 0;
    *graph->last = added;
    graph->last = &added->next;
    return added;
}
static struct graph *copy_of(const struct graph *graph) {
    struct graph *copy = new_graph();
    for (struct node *node = graph->first; node; node = node->next) {
        struct node *added = add(copy, *node);
        added->copy_of = node;
        if (node->child) added->child = copy_of(node->child);
    }
    return copy;
}
static void destroy(struct graph *graph) {
    for (struct node *node = graph->first, *next; node; node = next) {
        next = node->next;
        if (node->child) destroy(node->child);
        free(node);
    }
    free(graph);
    graphs--;
}
static void run(const struct graph *graph) {
    for (struct node *node = graph->first; node; node = node->next) {
        if (node->kind == COPY) memcpy(node->to, node->from, node->bytes);
        if (node->kind == SET) memset(node->to, node->value, node->bytes);
        if (node->kind == CHILD) run(node->child);
    }
}
// Whether what a stream is given is kept instead of done.
static int keeps(handle stream, struct node node) {
    struct graph *captured = ((struct stream *)stream)->captured;
    if (captured) add(captured, node);
    return captured != 0;
}

int cuStreamCreate(handle *stream, unsigned flags) { IN_CONTEXT; streams++; *stream = calloc(1, sizeof(struct stream)); return 0; }
int cuStreamDestroy_v2(handle stream) { IN_CONTEXT; waits("cuStreamDestroy"); streams--; free(stream); return 0; }
int cuStreamBeginCapture_v2(handle stream, int mode) { IN_CONTEXT;
    // Relaxed: a library may allocate from a thread of its own.
    if (mode != 2) return LAUNCH_FAILED;
    ((struct stream *)stream)->captured = new_graph();
    return 0;
}
int cuStreamEndCapture(handle stream, handle *graph) { IN_CONTEXT;
    *graph = ((struct stream *)stream)->captured;
    ((struct stream *)stream)->captured = 0;
    return *graph ? 0 : LAUNCH_FAILED;
}

struct copy_params { size_t from_at[4]; int from_kind; const void *from_host; device_address from; handle a[2]; size_t b[2]; size_t to_at[4]; int to_kind; void *to_host; device_address to; handle c[2]; size_t d[2]; size_t bytes, height, depth; };
struct set_params { device_address to; size_t pitch; unsigned value, size; size_t bytes, height; };
static struct node copy_node(const struct copy_params *p) { return (struct node){.kind = COPY, .to = (char *)(uintptr_t)p->to, .from = (char *)(uintptr_t)p->from, .bytes = p->bytes}; }
static struct node set_node(const struct set_params *p) { return (struct node){.kind = SET, .to = (char *)(uintptr_t)p->to, .value = p->value, .bytes = p->bytes}; }

int cuGraphCreate(handle *graph, unsigned flags) { IN_CONTEXT; *graph = new_graph(); return 0; }
int cuGraphDestroy(handle graph) { IN_CONTEXT; destroy(graph); return 0; }
static int add_behind(handle *node, struct graph *graph, const handle *before, size_t count, struct node of) {
    if (count > 1) return LAUNCH_FAILED;
    of.before = count ? *before : 0;
    *node = add(graph, of);
    return 0;
}
int cuGraphAddKernelNode_v2(handle *node, handle graph, const handle *before, size_t count, const void *params) { IN_CONTEXT;
    return add_behind(node, graph, before, count, (struct node){.kind = KERNEL});
}
int cuGraphAddMemcpyNode(handle *node, handle graph, const handle *before, size_t count, const struct copy_params *params, handle context) { IN_CONTEXT;
    return add_behind(node, graph, before, count, copy_node(params));
}
int cuGraphAddMemsetNode(handle *node, handle graph, const handle *before, size_t count, const struct set_params *params, handle context) { IN_CONTEXT;
    return add_behind(node, graph, before, count, set_node(params));
}
int cuGraphAddChildGraphNode(handle *node, handle graph, const handle *before, size_t count, handle child) { IN_CONTEXT;
    return add_behind(node, graph, before, count, (struct node){.kind = CHILD, .child = copy_of(child)});
}
struct edge { unsigned char from_port, to_port, type, reserved[5]; };
int cuGraphAddDependencies_v2(handle graph, const handle *before, const handle *after, const struct edge *edges, size_t count) { IN_CONTEXT;
    struct node *from = *before, *to = *after;
    // Programmatic: only kernels wait themselves, and only for kernels.
    if (count != 1 || from->kind != KERNEL || to->kind != KERNEL || to->before) return LAUNCH_FAILED;
    if (edges->from_port != 1 || edges->to_port != 0 || edges->type != 1) return LAUNCH_FAILED;
    to->before = from;
    edges_ahead++;
    return 0;
}
int cuGraphInstantiateWithFlags(handle *exec, handle graph, unsigned long long flags) { IN_CONTEXT;
    struct node *before = 0;
    for (struct node *node = ((struct graph *)graph)->first; node; before = node, node = node->next)
        if (node->before != before) return LAUNCH_FAILED;
    *exec = copy_of(graph);
    return 0;
}
int cuGraphExecDestroy(handle exec) { IN_CONTEXT; destroy(exec); return 0; }
static int change(struct graph *exec, handle of, struct node to) {
    for (struct node *node = exec->first; node; node = node->next) {
        if (node->copy_of != of || node->kind != to.kind) continue;
        to.next = node->next;
        to.copy_of = of;
        *node = to;
        return 0;
    }
    return LAUNCH_FAILED;
}
int cuGraphExecKernelNodeSetParams_v2(handle exec, handle node, const void *params) { IN_CONTEXT;
    return change(exec, node, (struct node){.kind = KERNEL});
}
int cuGraphExecMemcpyNodeSetParams(handle exec, handle node, const struct copy_params *params, handle context) { IN_CONTEXT;
    return change(exec, node, copy_node(params));
}
int cuGraphExecMemsetNodeSetParams(handle exec, handle node, const struct set_params *params, handle context) { IN_CONTEXT;
    return change(exec, node, set_node(params));
}
int cuGraphLaunch(handle exec, handle stream) { IN_CONTEXT;
    if (!hangs) run(exec);
    return take("cuGraphLaunch");
}

int cuStreamQuery(handle stream) { IN_CONTEXT; return query(); }
int cuStreamSynchronize(handle stream) { IN_CONTEXT; waits("cuStreamSynchronize"); return 0; }
int cuEventCreate(handle *event, unsigned flags) { IN_CONTEXT; *event = &given; return 0; }
int cuEventRecord(handle event, handle stream) { IN_CONTEXT; return no_events ? LAUNCH_FAILED : 0; }
// An event that was never recorded is done.
int cuEventQuery(handle event) { IN_CONTEXT; return no_events ? 0 : query(); }
int cuEventSynchronize(handle event) { IN_CONTEXT; waits("cuEventSynchronize"); return 0; }
int cuEventDestroy_v2(handle event) { IN_CONTEXT; return 0; }

int cuModuleLoadData(handle *module, const void *image) { IN_CONTEXT; modules++; *module = &modules; return 0; }
int cuModuleUnload(handle module) { IN_CONTEXT; waits("cuModuleUnload"); modules--; return 0; }
int cuModuleGetFunction(handle *function, handle module, const char *name) { IN_CONTEXT; *function = &modules; return 0; }
int cuFuncSetAttribute(handle function, int attribute, int value) { IN_CONTEXT; return 0; }
int cuLaunchKernel(handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, handle stream, void **params, void **extra) { IN_CONTEXT;
    return keeps(stream, (struct node){.kind = KERNEL}) ? 0 : take("cuLaunchKernel");
}

int cuMemAllocAsync(device_address *at, size_t bytes, handle stream) { IN_CONTEXT;
    *at = (device_address)(uintptr_t)calloc(1, bytes);
    return *at ? 0 : NO_MEMORY;
}
int cuMemFreeAsync(device_address at, handle stream) { IN_CONTEXT;
    if (!query()) free((void *)(uintptr_t)at);
    return 0;
}
int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) { IN_CONTEXT;
    for (int i = 0; i < PINNED_MAX; i++) {
        if (pinned[i].memory) continue;
        pinned[i].memory = *memory = malloc(bytes);
        pinned[i].bytes = bytes;
        pinned_count++;
        return 0;
    }
    return NO_MEMORY;
}
int cuMemFreeHost(void *memory) { IN_CONTEXT;
    waits("cuMemFreeHost");
    for (int i = 0; i < PINNED_MAX; i++) {
        if (pinned[i].memory != memory) continue;
        free(memory);
        pinned[i].memory = 0;
        pinned_count--;
    }
    return 0;
}
int cuMemcpyHtoDAsync_v2(device_address to, const void *from, size_t bytes, handle stream) { IN_CONTEXT;
    if (!is_pinned(from) && bytes > STAGED_MAX) waits("cuMemcpyHtoDAsync");
    return copy("cuMemcpyHtoDAsync", (void *)(uintptr_t)to, from, bytes);
}
int cuMemcpyDtoHAsync_v2(void *to, device_address from, size_t bytes, handle stream) { IN_CONTEXT;
    if (!is_pinned(to)) waits("cuMemcpyDtoHAsync");
    return copy("cuMemcpyDtoHAsync", to, (void *)(uintptr_t)from, bytes);
}
int cuMemcpyDtoH_v2(void *to, device_address from, size_t bytes) { IN_CONTEXT;
    waits("cuMemcpyDtoH");
    memcpy(to, (void *)(uintptr_t)from, bytes);
    return 0;
}
int cuMemcpyDtoDAsync_v2(device_address to, device_address from, size_t bytes, handle stream) { IN_CONTEXT;
    if (keeps(stream, (struct node){.kind = COPY, .to = (char *)(uintptr_t)to, .from = (char *)(uintptr_t)from, .bytes = bytes})) return 0;
    return copy("cuMemcpyDtoDAsync", (void *)(uintptr_t)to, (void *)(uintptr_t)from, bytes);
}
int cuMemsetD8Async(device_address to, unsigned char value, size_t bytes, handle stream) { IN_CONTEXT;
    if (keeps(stream, (struct node){.kind = SET, .to = (char *)(uintptr_t)to, .value = value, .bytes = bytes})) return 0;
    if (!hangs) memset((void *)(uintptr_t)to, value, bytes);
    return take("cuMemsetD8Async");
}
int cuGetErrorName(int error, const char **text) { *text = "an error"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "planted"; return 0; }

// An ELF file for CUDA, of nothing.
static const char CUBIN[64] = {0x7f, 'E', 'L', 'F', [18] = (char)190};
int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
int nvrtcCreateProgram(handle *program, const char *source, const char *name, int headers, const char *const *texts,
                       const char *const *names) {
    *program = &contexts;
    return 0;
}
int nvrtcCompileProgram(handle program, int options, const char *const *texts) { return 0; }
int nvrtcGetCUBINSize(handle program, size_t *bytes) { *bytes = sizeof CUBIN; return 0; }
int nvrtcGetCUBIN(handle program, char *cubin) { memcpy(cubin, CUBIN, sizeof CUBIN); return 0; }
int nvrtcDestroyProgram(handle *program) { return 0; }
