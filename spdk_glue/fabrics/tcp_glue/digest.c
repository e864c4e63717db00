/* CRC32C of any number of bytes: header and data digests. After ftl/direct_io/crc32c.c, which has the steps. */

static uint32_t digest_tail(uint32_t crc, const uint8_t *at, size_t size)
{
    for (size_t i = 0; i < size; i++)
        crc = crc_table[0][(crc ^ at[i]) & 255] ^ crc >> 8;
    return ~crc;
}

#ifdef HARDWARE_CRC
CRC_TARGET static uint32_t hardware_digest(const uint8_t *at, size_t size)
{
    uint64_t crc = 0xffffffffu;
    size_t words = size / 8;
    for (size_t i = 0; i < words; i++)
        crc = CRC64(crc, load64(at + 8 * i));
    return digest_tail((uint32_t)crc, at + 8 * words, size % 8);
}
#endif

static uint32_t tcp_digest(const uint8_t *at, size_t size)
{
    pthread_once(&crc_table_once, fill_crc_table);
#ifdef HARDWARE_CRC
    if (use_hardware_crc())
        return hardware_digest(at, size);
#endif
    uint32_t crc = 0xffffffffu;
    size_t words = size / 8;
    for (size_t i = 0; i < words; i++)
        crc = software_crc64(crc, load64(at + 8 * i));
    return digest_tail(crc, at + 8 * words, size % 8);
}
