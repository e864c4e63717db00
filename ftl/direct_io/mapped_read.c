/* The short way to one run of pages: from the map to checked bytes, with no lock.
 *
 * The map, the checksums and the file may change at any moment. So nothing that is found here is an answer before
 * the map was looked at again and the checksums, which are mixed with the LBA, fit. Whatever does not is no error:
 * the caller goes the long way, which can tell why.
 */
#define MAX_RUN_PAGES 64
#define LBA_SPREAD 0x9E3779B97F4A7C15ull /* as in ftl/checksums.py */

static uint64_t entry_of(const dio_map *map, uint64_t lba)
{
    if (map->is_wide)
        return __atomic_load_n((const uint64_t *)map->entries + lba, __ATOMIC_ACQUIRE);
    return __atomic_load_n((const uint32_t *)map->entries + lba, __ATOMIC_ACQUIRE);
}

static int is_mapped_to(const dio_map *map, const dio_run *run)
{
    for (uint64_t i = 0; i < run->num_pages; i++)
        if (entry_of(map, run->first_lba + i) != run->page + 1 + i)
            return 0;
    return 1;
}

/* How many LBAs from the first on, at most `max`, are one run of pages in a superblock; *run is that run. */
static uint64_t dio_find_longest(const dio_map *map, uint64_t first_lba, uint64_t max, dio_run *run)
{
    uint64_t entry = entry_of(map, first_lba);
    if (entry == 0 || max == 0)
        return 0;
    *run = (dio_run){first_lba, 1, entry - 1};
    uint64_t left = map->pages_per_superblock - run->page % map->pages_per_superblock;
    if (max > left)
        max = left;
    if (max > MAX_RUN_PAGES)
        max = MAX_RUN_PAGES;
    while (run->num_pages < max && entry_of(map, first_lba + run->num_pages) == entry + run->num_pages)
        run->num_pages++;
    return run->num_pages;
}

/* Whether LBAs are one run of pages in a superblock. */
static int dio_find_run(const dio_map *map, uint64_t first_lba, uint64_t num_pages, dio_run *run)
{
    return num_pages != 0 && num_pages <= MAX_RUN_PAGES && first_lba < map->num_lbas &&
           num_pages <= map->num_lbas - first_lba && dio_find_longest(map, first_lba, num_pages, run) == num_pages;
}

/* Where the checksums of a run's pages are in memory; negative where they are not. */
static int32_t slot_of(const dio_map *map, const dio_run *run)
{
    return __atomic_load_n(map->slots + run->page / map->pages_per_superblock, __ATOMIC_ACQUIRE);
}

/* Whether what was read to `to` is the LBAs' content: they are still mapped there, and each page has its checksum. */
static int dio_is_content(const dio_map *map, const dio_run *run, int32_t slot, const uint8_t *to)
{
    if (!is_mapped_to(map, run) || slot_of(map, run) != slot)
        return 0;
    uint64_t at = (uint64_t)slot * map->pages_per_superblock + run->page % map->pages_per_superblock;
    const uint32_t *expected = map->columns + at;
    const uint8_t *known = map->known + at;
    uint64_t addresses[MAX_RUN_PAGES];
    uint32_t found[MAX_RUN_PAGES];
    for (uint64_t i = 0; i < run->num_pages; i++)
        addresses[i] = (uint64_t)(uintptr_t)(to + i * map->page_size);
    dio_crc32c_pages(addresses, run->num_pages, map->page_size, found);
    for (uint64_t i = 0; i < run->num_pages; i++)
        if (!known[i] || (found[i] ^ (uint32_t)((run->first_lba + i) * LBA_SPREAD >> 32)) != expected[i])
            return 0;
    __atomic_store_n(map->used + slot, 1, __ATOMIC_RELAXED);
    return 1;
}

/* Read a run; whether that is the LBAs' content. */
static int dio_read_run(const dio_map *map, const dio_run *run, uint8_t *to)
{
    int32_t slot = slot_of(map, run);
    size_t size = run->num_pages * map->page_size;
    return slot >= 0 &&
           pread(map->fd, to, size, (off_t)(map->data_start + run->page * map->page_size)) == (ssize_t)size &&
           dio_is_content(map, run, slot, to);
}
