/* Memory for the data of writes, used again: new memory costs a page fault per 4 KiB, which is as much as
 * reading the data into it. Several threads give back what one takes.
 */
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#define BUFFER_ALIGNMENT 4096 /* direct I/O takes such buffers as they are */
#define BUFFER_BYTES (1 << 20) /* the largest write that the kernel sends */
#define SLAB_BYTES (2 << 20)   /* one huge page */
#define MAX_BUFFERS 32         /* which stay; more than these are in use seldom, and come and go */
#define MIN_POOLED_BYTES (64 << 10)

static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static void *idle[MAX_BUFFERS];
static unsigned num_idle;
static char *slabs[MAX_BUFFERS * BUFFER_BYTES / SLAB_BYTES];
static unsigned num_slabs;

static void add_slab(void)
{
    void *slab;

    if (num_slabs == sizeof slabs / sizeof *slabs || posix_memalign(&slab, SLAB_BYTES, SLAB_BYTES))
        return;
    madvise(slab, SLAB_BYTES, MADV_HUGEPAGE);
    slabs[num_slabs++] = slab;
    for (char *at = (char *)slab + SLAB_BYTES; at > (char *)slab; at -= BUFFER_BYTES)
        idle[num_idle++] = at - BUFFER_BYTES;
}

static int is_pooled(const char *buffer)
{
    for (unsigned i = 0; i < num_slabs; i++)
        if (buffer >= slabs[i] && buffer < slabs[i] + SLAB_BYTES)
            return 1;
    return 0;
}

/* NULL when there is no memory. */
static void *take_buffer(size_t size)
{
    void *buffer = NULL;

    if (size >= MIN_POOLED_BYTES && size <= BUFFER_BYTES) {
        pthread_mutex_lock(&pool_lock);
        if (!num_idle)
            add_slab();
        if (num_idle)
            buffer = idle[--num_idle]; /* the one used last, which caches may still hold */
        pthread_mutex_unlock(&pool_lock);
    }
    if (!buffer && posix_memalign(&buffer, BUFFER_ALIGNMENT, size ? size : 1))
        return NULL;
    return buffer;
}

static void give_back_buffer(void *buffer)
{
    pthread_mutex_lock(&pool_lock);
    int pooled = is_pooled(buffer);
    if (pooled)
        idle[num_idle++] = buffer;
    pthread_mutex_unlock(&pool_lock);
    if (!pooled)
        free(buffer);
}
