/* What Python hands to C: for the compiler, and for cffi, which reads this as it is. */

/* Memory to or from one place of the file. */
typedef struct {
    uint64_t address;
    uint64_t offset;
    uint64_t length;
} dio_extent;

/* OOB records go into the images of their superblocks, from which whole 4 KiB pieces are written. */
typedef struct {
    uint64_t first;         /* index of the first page of this piece of the batch */
    uint64_t num_pages;
    uint64_t image_address; /* where the record of that first page lies */
} dio_oob_piece;

/* columns, known: [slot][page of the superblock], see ftl/checksums.py; slots: by superblock, negative where there is
 * no column; used: by slot, set when it was. */
typedef struct {
    int fd, is_wide;
    size_t page_size;
    uint64_t data_start, num_lbas, pages_per_superblock;
    const void *entries; /* page + 1 by LBA, zero where unmapped; uint64 if is_wide, else uint32 */
    const int32_t *slots;
    const uint32_t *columns;
    const uint8_t *known;
    uint8_t *used;
} dio_map;

typedef struct {
    uint64_t first_lba, num_pages, page;
} dio_run;
