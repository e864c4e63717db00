/* CRC32C of memory of any length, over the steps of eight bytes that ftl/direct_io/crc32c.c has. */

static uint32_t finish_crc(uint32_t crc, const uint8_t *at, size_t length)
{
    for (size_t i = 0; i < length; i++)
        crc = (crc >> 8) ^ crc_table[0][(crc ^ at[i]) & 255];
    return ~crc;
}

#ifdef HARDWARE_CRC
CRC_TARGET static uint32_t hardware_crc_words(const uint8_t *at, size_t num_words)
{
    uint64_t crc = 0xffffffffu;
    for (size_t i = 0; i < num_words; i++)
        crc = CRC64(crc, load64(at + 8 * i));
    return (uint32_t)crc;
}
#endif

static uint32_t tcp_crc32c(const uint8_t *at, size_t length)
{
    size_t words = length / 8;
    uint32_t crc = ~0u;
    pthread_once(&crc_table_once, fill_crc_table);
#ifdef HARDWARE_CRC
    if (use_hardware_crc())
        crc = hardware_crc_words(at, words);
    else
#endif
        for (size_t i = 0; i < words; i++)
            crc = software_crc64(crc, load64(at + 8 * i));
    return finish_crc(crc, at + 8 * words, length % 8);
}
