/* Admin commands that SPDK's target would answer without the drive: Identify Controller, and what goes to the drive as
 * it is: its log pages and its maintenance. The drive's threads answer all but Identify.
 */
#define IDENTITY_BYTES 4096
#define CNS_CONTROLLER 1
#define DEFAULT_HANDLER (-1)

static uint8_t identity[IDENTITY_BYTES], identity_mask[IDENTITY_BYTES];
static uint32_t max_transfer_at;

static bool is_discovery(struct spdk_nvmf_request *command)
{
    return spdk_nvmf_subsystem_is_discovery(spdk_nvmf_request_get_subsystem(command));
}

/* What SPDK says, and in the bits of the mask what the drive says: its abilities. No vendor command moves more than
 * the wire's longest transfer, which SPDK counts in pages of 4 KiB. */
static int identify(struct spdk_nvmf_request *command)
{
    if ((spdk_nvmf_request_get_cmd(command)->cdw10 & 0xFF) != CNS_CONTROLLER || is_discovery(command) ||
        command->length < IDENTITY_BYTES)
        return DEFAULT_HANDLER;
    struct spdk_nvme_ctrlr_data found;
    memset(&found, 0, sizeof found);
    int result = spdk_nvmf_ctrlr_identify_ctrlr(spdk_nvmf_request_get_ctrlr(command), &found);
    uint8_t *bytes = (uint8_t *)&found;
    for (unsigned i = 0; i < IDENTITY_BYTES; i++)
        bytes[i] = (bytes[i] & ~identity_mask[i]) | (identity[i] & identity_mask[i]);
    /* SPDK's vfio-user moves no data of admin commands that it does not know: on it there is no Get LBA Status */
    if (spdk_nvmf_get_transport_type(command->qpair->transport) == SPDK_NVME_TRANSPORT_VFIOUSER)
        found.oacs.glss = 0;
    uint32_t drives_limit, wires_limit = IDENTITY_BYTES << found.mdts;
    memcpy(&drives_limit, bytes + max_transfer_at, sizeof drives_limit);
    if (found.mdts && drives_limit > wires_limit)
        memcpy(bytes + max_transfer_at, &wires_limit, sizeof wires_limit);
    spdk_iov_memset(command->iov, command->iovcnt, 0);
    spdk_nvmf_request_copy_from_buf(command, bytes, IDENTITY_BYTES);
    return result;
}

static int ask_the_drive(struct spdk_nvmf_request *command)
{
    request_t *request = calloc(1, sizeof *request);
    if (!request || is_discovery(command)) {
        free(request);
        return DEFAULT_HANDLER;
    }
    memcpy(&request->entry, spdk_nvmf_request_get_cmd(command), sizeof request->entry);
    set_host(request, command);
    request->iovs = command->iov;
    request->iovcnt = command->iovcnt;
    request->length = command->iovcnt ? command->length : 0;
    hand_over(request, LANE_ADMIN);
    return SPDK_NVMF_REQUEST_EXEC_STATUS_ASYNCHRONOUS;
}

static int get_log_page(struct spdk_nvmf_request *command)
{
    switch (spdk_nvmf_request_get_cmd(command)->cdw10 & 0xFF) {
    case SPDK_NVME_LOG_ERROR:
    case SPDK_NVME_LOG_HEALTH_INFORMATION:
    case FIRST_VENDOR_LOG ... 0xFF:
        return command->iovcnt ? ask_the_drive(command) : DEFAULT_HANDLER;
    default:
        return DEFAULT_HANDLER;
    }
}

static int note_keep_alive(struct spdk_nvmf_request *command)
{
    alive_at_ms[spdk_nvmf_ctrlr_get_id(spdk_nvmf_request_get_ctrlr(command))] = now_ms();
    return DEFAULT_HANDLER;
}

static void hook_admin_commands(const kvfs_target_options *options)
{
    memcpy(identity, options->identity, IDENTITY_BYTES);
    memcpy(identity_mask, options->identity_mask, IDENTITY_BYTES);
    max_transfer_at = options->max_transfer_at;
    spdk_nvmf_set_custom_admin_cmd_hdlr(SPDK_NVME_OPC_IDENTIFY, identify);
    spdk_nvmf_set_custom_admin_cmd_hdlr(SPDK_NVME_OPC_GET_LOG_PAGE, get_log_page);
    spdk_nvmf_set_custom_admin_cmd_hdlr(SPDK_NVME_OPC_GET_LBA_STATUS, ask_the_drive);
    spdk_nvmf_set_custom_admin_cmd_hdlr(SPDK_NVME_OPC_KEEP_ALIVE, note_keep_alive);
    spdk_nvmf_set_custom_admin_cmd_hdlr(OPCODE_FLASH_MAINTENANCE, ask_the_drive);
}
