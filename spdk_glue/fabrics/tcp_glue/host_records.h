/* The host's side: for the compiler, and for cffi. */

/* SUBMISSION_ENTRY of spdk_glue/command.py. */
typedef struct {
    uint8_t opcode, flags;
    uint16_t cid;
    uint32_t nsid, cdw2, cdw3;
    uint64_t mptr, dptr[2];
    uint32_t cdw10, cdw11, cdw12, cdw13, cdw14, cdw15;
} host_entry;

/* COMPLETION_ENTRY of spdk_glue/command.py. */
typedef struct {
    uint32_t cdw0, cdw1;
    uint16_t sqhd, sqid, cid, status;
} host_completion;

/* Why a queue's connection is of no use any more; `fault_detail` says more of some. The texts are in
 * initiator/faults.py. */
enum host_fault {
    HOST_FAULT_NONE,
    HOST_FAULT_CLOSED,
    HOST_FAULT_SOCKET, /* detail: errno */
    HOST_FAULT_SILENT,
    HOST_FAULT_TERMINATED, /* detail: the FES that the target gives */
    HOST_FAULT_TYPE,       /* detail: the PDU's type, here and below */
    HOST_FAULT_HEADER_LENGTH,
    HOST_FAULT_FLAGS,
    HOST_FAULT_DATA_OFFSET,
    HOST_FAULT_LENGTH,
    HOST_FAULT_HEADER_DIGEST,
    HOST_FAULT_DATA_DIGEST,
    HOST_FAULT_NO_SUCH_COMMAND, /* detail: the CID, here and below */
    HOST_FAULT_OUT_OF_ORDER,
    HOST_FAULT_DATA_RANGE,
    HOST_FAULT_GRANT_RANGE,
    HOST_FAULT_INCOMPLETE,
};

/* Of all queues of a controller together. written, flushed: writes that completed, and those of them that a Flush made
 * durable; bytes: on the wire. */
typedef struct {
    uint64_t written, flushed;
    uint64_t commands, bytes_to_target, bytes_from_target;
} host_account;

typedef struct {
    uint16_t queue_id; /* 0: admin */
    uint32_t depth;
    int header_digest, data_digest;
    uint32_t data_alignment;     /* of data that the host sends, in their PDU */
    uint32_t max_h2c_data_bytes; /* in one H2CData */
    uint32_t in_capsule_bytes;
    uint32_t block_bytes; /* of the namespace whose Reads and Writes are checked; 0: not checked */
    uint32_t nsid;
    uint64_t max_transfer_bytes; /* of one command */
    host_account *account;
} host_options;

/* Commands with memory for each. */
typedef struct {
    const host_entry *entries;
    const uint64_t *addresses, *lengths;
    size_t num_commands;
} host_batch;
