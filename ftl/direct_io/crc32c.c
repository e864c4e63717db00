/* CRC32C (Castagnoli, reflected, initial and final value all ones) of many equal pieces of memory.
 *
 * The CRC instruction takes one cycle to issue and three to answer, so one piece alone runs at a third of
 * the possible speed. Pages are independent: four are computed side by side, which needs no combining of
 * partial values. A page of 4 KiB alone is four quarters side by side; a quarter's value goes over the next one's
 * bytes as a product of polynomials, which a table holds. Without the instruction a table of eight bytes a step is used.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <pthread.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define HARDWARE_CRC 1
#define CRC_TARGET __attribute__((target("sse4.2")))
#define CRC64(crc, word) _mm_crc32_u64((crc), (word))
static int hardware_crc_present(void) { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__)
#include <sys/auxv.h>
#define HARDWARE_CRC 1
#define CRC_TARGET __attribute__((target("+crc")))
#define CRC64(crc, word) ((uint64_t)__builtin_aarch64_crc32cx((uint32_t)(crc), (word)))
static int hardware_crc_present(void) { return (getauxval(AT_HWCAP) >> 7) & 1; /* HWCAP_CRC32 */ }
#endif

static uint32_t crc_table[8][256];
static pthread_once_t crc_table_once = PTHREAD_ONCE_INIT;

static void fill_crc_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1)));
        crc_table[0][i] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (uint32_t i = 0; i < 256; i++)
            crc_table[k][i] = (crc_table[k - 1][i] >> 8) ^ crc_table[0][crc_table[k - 1][i] & 255];
}

static inline uint64_t load64(const uint8_t *at)
{
    uint64_t word;
    memcpy(&word, at, 8);
    return word;
}

static inline uint32_t software_crc64(uint32_t crc, uint64_t word)
{
    word ^= crc;
    return crc_table[7][word & 255] ^ crc_table[6][(word >> 8) & 255] ^ crc_table[5][(word >> 16) & 255] ^
           crc_table[4][(word >> 24) & 255] ^ crc_table[3][(word >> 32) & 255] ^
           crc_table[2][(word >> 40) & 255] ^ crc_table[1][(word >> 48) & 255] ^ crc_table[0][word >> 56];
}

static void software_crc_pages(const uint64_t *addresses, size_t n, size_t size, uint32_t *out, size_t stride)
{
    pthread_once(&crc_table_once, fill_crc_table);
    for (size_t i = 0; i < n; i++) {
        const uint8_t *at = (const uint8_t *)(uintptr_t)addresses[i];
        uint32_t crc = ~0u;
        for (size_t k = 0; k < size; k += 8)
            crc = software_crc64(crc, load64(at + k));
        crc = ~crc;
        memcpy((uint8_t *)out + i * stride, &crc, 4);
    }
}

#ifdef HARDWARE_CRC
#define QUARTER_BYTES 1024

static uint32_t over_quarter[4][256]; /* byte k of a register, after QUARTER_BYTES more bytes of zeros */
static pthread_once_t over_quarter_once = PTHREAD_ONCE_INIT;

CRC_TARGET static void fill_over_quarter(void)
{
    uint32_t of_bit[32];
    for (int bit = 0; bit < 32; bit++) {
        uint64_t crc = 1u << bit;
        for (int k = 0; k < QUARTER_BYTES; k += 8)
            crc = CRC64(crc, 0);
        of_bit[bit] = (uint32_t)crc;
    }
    for (int k = 0; k < 4; k++)
        for (int byte = 0; byte < 256; byte++)
            for (int bit = 0; bit < 8; bit++)
                if (byte >> bit & 1)
                    over_quarter[k][byte] ^= of_bit[8 * k + bit];
}

static inline uint32_t shift_over_quarter(uint64_t crc)
{
    return over_quarter[0][crc & 255] ^ over_quarter[1][crc >> 8 & 255] ^ over_quarter[2][crc >> 16 & 255] ^
           over_quarter[3][crc >> 24 & 255];
}

CRC_TARGET static uint32_t hardware_crc_alone(const uint8_t *at, size_t size)
{
    uint64_t crc = 0xffffffffu;
    for (size_t k = 0; k < size; k += 8)
        crc = CRC64(crc, load64(at + k));
    return ~(uint32_t)crc;
}

CRC_TARGET static uint32_t hardware_crc_four_quarters(const uint8_t *at)
{
    pthread_once(&over_quarter_once, fill_over_quarter);
    uint64_t ca = 0xffffffffu, cb = 0, cc = 0, cd = 0;
    for (size_t k = 0; k < QUARTER_BYTES; k += 8) {
        ca = CRC64(ca, load64(at + k));
        cb = CRC64(cb, load64(at + QUARTER_BYTES + k));
        cc = CRC64(cc, load64(at + 2 * QUARTER_BYTES + k));
        cd = CRC64(cd, load64(at + 3 * QUARTER_BYTES + k));
    }
    cb ^= shift_over_quarter(ca);
    cc ^= shift_over_quarter(cb);
    return ~(uint32_t)(cd ^ shift_over_quarter(cc));
}

CRC_TARGET static void hardware_crc_pages(const uint64_t *addresses, size_t n, size_t size, uint32_t *out,
                                          size_t stride)
{
    size_t i = 0;
    uint8_t *to = (uint8_t *)out;
    for (; i + 4 <= n; i += 4) {
        const uint8_t *a = (const uint8_t *)(uintptr_t)addresses[i];
        const uint8_t *b = (const uint8_t *)(uintptr_t)addresses[i + 1];
        const uint8_t *c = (const uint8_t *)(uintptr_t)addresses[i + 2];
        const uint8_t *d = (const uint8_t *)(uintptr_t)addresses[i + 3];
        uint64_t ca = 0xffffffffu, cb = 0xffffffffu, cc = 0xffffffffu, cd = 0xffffffffu;
        for (size_t k = 0; k < size; k += 8) {
            ca = CRC64(ca, load64(a + k));
            cb = CRC64(cb, load64(b + k));
            cc = CRC64(cc, load64(c + k));
            cd = CRC64(cd, load64(d + k));
        }
        uint32_t crc[4] = {~(uint32_t)ca, ~(uint32_t)cb, ~(uint32_t)cc, ~(uint32_t)cd};
        for (int k = 0; k < 4; k++)
            memcpy(to + (i + k) * stride, &crc[k], 4);
    }
    for (; i < n; i++) {
        const uint8_t *at = (const uint8_t *)(uintptr_t)addresses[i];
        uint32_t crc = size == 4 * QUARTER_BYTES ? hardware_crc_four_quarters(at) : hardware_crc_alone(at, size);
        memcpy(to + i * stride, &crc, 4);
    }
}

CRC_TARGET static uint32_t hardware_crc_record(const uint8_t *at, size_t size, uint64_t first_mask)
{
    uint64_t crc = CRC64(0xffffffffu, load64(at) & first_mask);
    for (size_t k = 8; k < size; k += 8)
        crc = CRC64(crc, load64(at + k));
    return ~(uint32_t)crc;
}
#endif

static int force_software_crc;

static int use_hardware_crc(void)
{
#ifdef HARDWARE_CRC
    return !force_software_crc && hardware_crc_present();
#else
    return 0;
#endif
}

/* For tests: makes both ways comparable on one machine. Returns whether hardware is used from now on. */
static int dio_crc32c_force_software(int on)
{
    force_software_crc = on;
    return use_hardware_crc();
}

/* CRC of `size` bytes (a multiple of 8) at each address, stored every `stride` bytes from `out`. */
static void crc32c_strided(const uint64_t *addresses, size_t n, size_t size, void *out, size_t stride)
{
#ifdef HARDWARE_CRC
    if (use_hardware_crc()) {
        hardware_crc_pages(addresses, n, size, out, stride);
        return;
    }
#endif
    software_crc_pages(addresses, n, size, out, stride);
}

static void dio_crc32c_pages(const uint64_t *addresses, size_t n, size_t size, uint32_t *out)
{
    crc32c_strided(addresses, n, size, out, 4);
}

/* CRC of one record whose bytes 4..7 hold that CRC and count as zero. */
static uint32_t crc32c_record(const uint8_t *at, size_t size)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    const uint64_t first_mask = 0x00000000ffffffffull;
#else
#error "records are little-endian and this code takes them as they lie in memory"
#endif
#ifdef HARDWARE_CRC
    if (use_hardware_crc())
        return hardware_crc_record(at, size, first_mask);
#endif
    pthread_once(&crc_table_once, fill_crc_table);
    uint32_t crc = software_crc64(~0u, load64(at) & first_mask);
    for (size_t k = 8; k < size; k += 8)
        crc = software_crc64(crc, load64(at + k));
    return ~crc;
}

/* CRC of each of n consecutive records of `size` bytes (a multiple of 8), bytes 4..7 counted as zero. */
static void dio_crc32c_records(const uint8_t *records, size_t n, size_t size, uint32_t *out)
{
    for (size_t i = 0; i < n; i++)
        out[i] = crc32c_record(records + i * size, size);
}
