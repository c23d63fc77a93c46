// How fast memory can be read: membw THREADS MIB REPEATS prints GB/s of each repeat.
// Built with -O3 -march=native, so the sum is as wide as the processor's registers.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static uint64_t *words;
static size_t per_thread;
static pthread_barrier_t barrier;
static volatile uint64_t sink; // keeps the sums from being optimised away

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void *read_share(void *index) {
    const uint64_t *p = words + (uintptr_t)index * per_thread;
    uint64_t sums[32] = {0};
    pthread_barrier_wait(&barrier);
    for (size_t i = 0; i < per_thread; i += 32)
        for (int j = 0; j < 32; j++)
            sums[j] += p[i + j];
    for (int j = 0; j < 32; j++)
        sink += sums[j];
    pthread_barrier_wait(&barrier);
    return NULL;
}

int main(int count, char **arguments) {
    if (count != 4) {
        fprintf(stderr, "usage: membw THREADS MIB REPEATS\n");
        return 2;
    }
    long threads = atol(arguments[1]), mib = atol(arguments[2]), repeats = atol(arguments[3]);
    if (threads < 1 || threads > 256 || mib < 1 || mib > 65536 || repeats < 1 || repeats > 1000)
        return 2;
    size_t bytes = (size_t)mib << 20;
    per_thread = bytes / 8 / (size_t)threads / 32 * 32;
    words = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (words == MAP_FAILED) {
        perror("membw: no memory");
        return 1;
    }
    madvise(words, bytes, MADV_HUGEPAGE);
    memset(words, 1, bytes);
    pthread_barrier_init(&barrier, NULL, (unsigned)threads + 1);
    for (long repeat = 0; repeat < repeats; repeat++) {
        pthread_t running[256];
        for (long i = 0; i < threads; i++)
            if (pthread_create(&running[i], NULL, read_share, (void *)i))
                return 1;
        pthread_barrier_wait(&barrier);
        double begun = now();
        pthread_barrier_wait(&barrier);
        printf("%.3f\n", (double)(per_thread * 8 * (size_t)threads) / 1e9 / (now() - begun));
        for (long i = 0; i < threads; i++)
            pthread_join(running[i], NULL);
    }
    return 0;
}
