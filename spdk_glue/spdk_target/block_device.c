/* The drive as a block device of SPDK's, the only namespace of the target.
 *
 * Commands that SPDK's target knows come as reads, writes, flushes and deallocations; those that it does not know come
 * as they are. Of all but deallocations, whose ranges come one by one, what SPDK passes along as its own context is
 * the host's request. So Compare and Copy, which SPDK would make of reads and writes of its own, are masked
 * (configuration.py), and no other user of block devices is in the process.
 */
static struct spdk_nvmf_request *command_of(struct spdk_bdev_io *io)
{
    return io->internal.caller_ctx; /* see nvmf_bdev_ctrlr_read_cmd and its neighbours in SPDK */
}

static struct spdk_bdev device;
static uint32_t block_bytes;

static bool supports(void *context, enum spdk_bdev_io_type type)
{
    (void)context;
    switch (type) {
    case SPDK_BDEV_IO_TYPE_READ:
    case SPDK_BDEV_IO_TYPE_WRITE:
    case SPDK_BDEV_IO_TYPE_FLUSH:
    case SPDK_BDEV_IO_TYPE_UNMAP:
    case SPDK_BDEV_IO_TYPE_WRITE_ZEROES:
    case SPDK_BDEV_IO_TYPE_RESET:
    case SPDK_BDEV_IO_TYPE_NVME_IO:
    case SPDK_BDEV_IO_TYPE_NVME_IOV_MD:
        return true;
    default:
        return false;
    }
}

static void set_range(request_t *request, uint8_t opcode, uint64_t lba, uint64_t num_blocks)
{
    uint32_t *dwords = request->entry.dwords;
    dwords[0] = opcode | (uint32_t)spdk_nvmf_request_get_cmd(command_of(request->io))->cid << 16;
    dwords[10] = (uint32_t)lba;
    dwords[11] = (uint32_t)(lba >> 32);
    dwords[12] = (uint32_t)(num_blocks - 1) & 0xFFFF;
}

/* A read or write whose buffer is there, aligned. */
static void transfer(struct spdk_io_channel *channel, struct spdk_bdev_io *io, bool success)
{
    request_t *request = (request_t *)io->driver_ctx;
    if (!success) {
        spdk_bdev_io_complete(io, SPDK_BDEV_IO_STATUS_FAILED);
        return;
    }
    request->iovs = io->u.bdev.iovs;
    request->iovcnt = io->u.bdev.iovcnt;
    request->length = io->u.bdev.num_blocks * block_bytes;
    request->moves_blocks = true;
    bool is_read = io->type == SPDK_BDEV_IO_TYPE_READ;
    set_range(request, is_read ? SPDK_NVME_OPC_READ : SPDK_NVME_OPC_WRITE, io->u.bdev.offset_blocks,
              io->u.bdev.num_blocks);
    if (is_read) {
        start_read(spdk_io_channel_get_ctx(channel), request);
        return;
    }
    /* placement: directive type and identifier, as the host gave them */
    request->entry.dwords[12] |= io->u.bdev.nvme_cdw12.raw & 0x00F00000;
    request->entry.dwords[13] = io->u.bdev.nvme_cdw13.raw;
    set_host(request, command_of(io));
    hand_over(request, LANE_BLOCKS);
}

/* Zeros are what deallocated blocks read as. */
static void deallocate(request_t *request, uint64_t lba, uint64_t num_blocks)
{
    request->range = (struct spdk_nvme_dsm_range){.starting_lba = lba, .length = (uint32_t)num_blocks};
    request->entry.dwords[0] = SPDK_NVME_OPC_DATASET_MANAGEMENT;
    request->entry.dwords[11] = SPDK_NVME_DSM_ATTR_DEALLOCATE;
    request->length = sizeof request->range;
    request->own_iov = (struct iovec){&request->range, sizeof request->range};
    request->iovs = &request->own_iov;
    request->iovcnt = 1;
    hand_over(request, LANE_BLOCKS);
}

/* A command as the host sent it. */
static void pass_on(request_t *request)
{
    struct spdk_bdev_io *io = request->io;
    set_host(request, command_of(io));
    memcpy(&request->entry, &io->u.nvme_passthru.cmd, sizeof request->entry);
    request->iovs = io->u.nvme_passthru.iovs;
    request->iovcnt = io->u.nvme_passthru.iovcnt;
    request->length = io->u.nvme_passthru.nbytes;
    switch ((uint8_t)request->entry.dwords[0]) {
    case OPCODE_ATTENTION_FETCH:
    case OPCODE_SEAL_GROUPS:
    case OPCODE_VERIFY:
        hand_over(request, LANE_ATTENTION);
        break;
    default:
        hand_over(request, LANE_BLOCKS);
    }
}

static void submit(struct spdk_io_channel *channel, struct spdk_bdev_io *io)
{
    request_t *request = (request_t *)io->driver_ctx;
    memset(request, 0, sizeof *request);
    request->io = io;
    request->queue = 1;
    request->entry.dwords[1] = 1; /* the namespace */
    switch (io->type) {
    case SPDK_BDEV_IO_TYPE_READ:
    case SPDK_BDEV_IO_TYPE_WRITE:
        spdk_bdev_io_get_buf(io, transfer, io->u.bdev.num_blocks * block_bytes);
        break;
    case SPDK_BDEV_IO_TYPE_FLUSH:
        request->entry.dwords[0] = SPDK_NVME_OPC_FLUSH;
        set_host(request, command_of(io));
        hand_over(request, LANE_FLUSH);
        break;
    case SPDK_BDEV_IO_TYPE_UNMAP:
    case SPDK_BDEV_IO_TYPE_WRITE_ZEROES:
        deallocate(request, io->u.bdev.offset_blocks, io->u.bdev.num_blocks);
        break;
    case SPDK_BDEV_IO_TYPE_RESET: /* nothing of the drive's can be taken back: all ends by itself */
        spdk_bdev_io_complete(io, SPDK_BDEV_IO_STATUS_SUCCESS);
        break;
    case SPDK_BDEV_IO_TYPE_NVME_IOV_MD:
        pass_on(request);
        break;
    default:
        spdk_bdev_io_complete(io, SPDK_BDEV_IO_STATUS_FAILED);
    }
}

static struct spdk_io_channel *get_channel(void *context)
{
    return spdk_get_io_channel(context);
}

static int destruct(void *context)
{
    spdk_io_device_unregister(context, NULL);
    return 0;
}

static const struct spdk_bdev_fn_table functions = {
    .destruct = destruct,
    .submit_request = submit,
    .io_type_supported = supports,
    .get_io_channel = get_channel,
};

static int init_module(void);

static int context_size(void)
{
    return sizeof(request_t);
}

static struct spdk_bdev_module kvfs_module = {
    .name = "kvfs",
    .module_init = init_module,
    .get_ctx_size = context_size,
};
SPDK_BDEV_MODULE_REGISTER(kvfs, &kvfs_module)

static const kvfs_target_options *started_with;

static int init_module(void)
{
    if (!started_with)
        return 0; /* another target of this process */
    if (create_lanes())
        return -ENOMEM;
    block_bytes = started_with->block_bytes;
    device.name = (char *)started_with->bdev_name;
    device.product_name = "kvfs drive";
    device.blocklen = device.phys_blocklen = block_bytes;
    device.blockcnt = started_with->num_blocks;
    device.write_cache = 1; /* Flush makes writes durable */
    device.required_alignment = 12; /* direct I/O */
    memcpy(&device.uuid, started_with->uuid, sizeof device.uuid);
    device.ctxt = &device;
    device.fn_table = &functions;
    device.module = &kvfs_module;
    spdk_io_device_register(&device, create_channel, destroy_channel, sizeof(channel_t), "kvfs drive");
    int result = spdk_bdev_register(&device);
    if (result)
        spdk_io_device_unregister(&device, NULL);
    return result;
}
