/* One command as Linux takes it, what its end means, and whether its data are as long as it says. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define LENGTH_REFUSED 1 /* result of a batch: a command's data have another length than it says, or too much */

/* The kernel's interface, declared here because older headers lack it. The two ioctl forms and io_uring's share
 * their first 68 bytes: the form of 32 bits ends with result32, io_uring's with as many unused bytes. */
typedef struct {
    uint8_t opcode, flags;
    uint16_t reserved;
    uint32_t nsid, cdw2, cdw3;
    uint64_t metadata, address;
    uint32_t metadata_length, data_length;
    uint32_t cdw10, cdw11, cdw12, cdw13, cdw14, cdw15;
    uint32_t timeout_ms; /* 0: the kernel's own limit */
    uint32_t result32;
    uint64_t result64;
} linux_command;
#define SIZE_32 offsetof(linux_command, result64)

#define ADMIN_32 _IOC(_IOC_READ | _IOC_WRITE, 'N', 0x41, SIZE_32)
#define IO_32 _IOC(_IOC_READ | _IOC_WRITE, 'N', 0x43, SIZE_32)
#define ADMIN_64 _IOC(_IOC_READ | _IOC_WRITE, 'N', 0x47, sizeof(linux_command))
#define IO_64 _IOC(_IOC_READ | _IOC_WRITE, 'N', 0x48, sizeof(linux_command))
#define URING_IO _IOC(_IOC_READ | _IOC_WRITE, 'N', 0x80, SIZE_32)

enum { FLUSH = 0x00, WRITE = 0x01, READ = 0x02, COMPARE = 0x05, DATASET_MANAGEMENT = 0x09, VERIFY = 0x0C,
       ZONE_RECEIVE = 0x7A, ZONE_APPEND = 0x7D };
enum { GET_LOG_PAGE = 0x02, IDENTIFY = 0x06, GET_LBA_STATUS = 0x86 };

/* Status of a command that the host gave up: path related, "host path error" and "command aborted by host". */
#define PATH_ERROR 0x370
#define HOST_ABORTED 0x371
#define STATUS_CODE 0x7FF /* of a status field without phase: type and code */
#define UNKNOWN_QUEUE 0xFFFF /* the kernel chose queue and identifier: the drive's error log cannot be asked by them */

/* A drive that is being reset, or has no path just now, is asked again for so long. */
#define PATIENCE_SECONDS 30
#define PAUSE_US 10000

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static linux_command linux_form(const nvme_entry *entry, uint64_t address, uint64_t length)
{
    return (linux_command){.opcode = entry->opcode, .flags = entry->flags, .nsid = entry->nsid,
                           .cdw2 = entry->cdw2, .cdw3 = entry->cdw3, .address = length ? address : 0,
                           .data_length = (uint32_t)length, .cdw10 = entry->cdw10, .cdw11 = entry->cdw11,
                           .cdw12 = entry->cdw12, .cdw13 = entry->cdw13, .cdw14 = entry->cdw14,
                           .cdw15 = entry->cdw15};
}

/* The bytes that a command itself says it moves: that is what a drive moves, whatever the buffer. */
static int length_fits(const nvme_device *device, const nvme_entry *entry, uint64_t length)
{
    uint64_t blocks = (uint64_t)(entry->cdw12 & 0xFFFF) + 1;
    if (length > device->max_transfer_bytes || length > UINT32_MAX)
        return 0;
    if (!(entry->opcode & 3)) /* moves nothing */
        return !length;
    if (device->is_admin) {
        switch (entry->opcode) {
        case IDENTIFY:
            return length == 4096;
        case GET_LOG_PAGE:
            return length == 4 * (((uint64_t)(entry->cdw11 & 0xFFFF) << 16 | entry->cdw10 >> 16) + 1);
        case GET_LBA_STATUS:
            return length == 4 * ((uint64_t)entry->cdw12 + 1);
        }
        return 1;
    }
    switch (entry->opcode) {
    case WRITE:
    case READ:
    case COMPARE:
    case ZONE_APPEND:
        return length == blocks * device->block_bytes;
    case DATASET_MANAGEMENT:
        return length == 16 * ((uint64_t)(entry->cdw10 & 0xFF) + 1);
    case ZONE_RECEIVE:
        return length == 4 * ((uint64_t)entry->cdw12 + 1);
    }
    return 1; /* what a vendor's command says, its vendor knows */
}

/* 0, or LENGTH_REFUSED and in *failed_at the first command whose length is wrong. */
static int nvme_check_lengths(const nvme_device *device, const nvme_batch *batch, size_t *failed_at)
{
    for (*failed_at = 0; *failed_at < batch->num_commands; ++*failed_at)
        if (!length_fits(device, &batch->entries[*failed_at], batch->lengths[*failed_at]))
            return LENGTH_REFUSED;
    return 0;
}

/* Whether a command may run twice: then one that was cancelled may be sent again. */
static int is_repeatable(int is_admin, uint8_t opcode)
{
    if (is_admin)
        return opcode == IDENTIFY || opcode == GET_LOG_PAGE || opcode == GET_LBA_STATUS;
    return opcode == FLUSH || opcode == WRITE || opcode == READ || opcode == COMPARE ||
           opcode == DATASET_MANAGEMENT || opcode == VERIFY;
}

/* Whether to send a command again that ended with `result`: a negative errno or a status. `deadline` is zero until
 * the first time. Cancelled commands, as in a reset of the drive, end with EINTR. */
static int is_to_repeat(int is_admin, uint8_t opcode, int result, double *deadline)
{
    int never_ran = result == -EAGAIN || result == -EBUSY;
    int code = result < 0 ? 0 : result & STATUS_CODE;
    int cancelled = result == -EINTR || code == PATH_ERROR || code == HOST_ABORTED;
    if (!never_ran && !(cancelled && is_repeatable(is_admin, opcode)))
        return 0;
    if (*deadline == 0)
        *deadline = now() + PATIENCE_SECONDS;
    return now() < *deadline;
}

/* Fills a completion for the end of a command; 0, or a negative errno where there is none. */
static int complete(int result, uint64_t value, uint16_t cid, nvme_completion *completion)
{
    if (result == -EINTR)
        result = HOST_ABORTED;
    if (result < 0)
        return result;
    *completion = (nvme_completion){.cdw0 = (uint32_t)value, .cdw1 = (uint32_t)(value >> 32),
                                    .sqid = UNKNOWN_QUEUE, .cid = cid, .status = (uint16_t)(result << 1)};
    return 0;
}
