/* What Python hands to C: for the compiler, and for cffi, which reads this as it is. */

/* SUBMISSION_ENTRY of spdk_glue/command.py. */
typedef struct {
    uint8_t opcode, flags;
    uint16_t cid;
    uint32_t nsid, cdw2, cdw3;
    uint64_t mptr, dptr[2];
    uint32_t cdw10, cdw11, cdw12, cdw13, cdw14, cdw15;
} tcp_entry;

/* COMPLETION_ENTRY of spdk_glue/command.py. */
typedef struct {
    uint32_t cdw0, cdw1;
    uint16_t sqhd, sqid, cid, status;
} tcp_completion;
