/* A host's queue on a socket: batches to their end, and submitted commands, without the interpreter's lock. One thread
 * at a time; another may shut the socket down, which ends whatever waits here. */

#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <time.h>

#define MAX_PIECES 96
/* Of looking without result before sleep: always, and while what came last came so soon. To be woken costs as much. */
#define HOST_SPIN_NS 20000
#define HOST_LONG_SPIN_NS 200000
#define WAIT_MS 100         /* between two looks at the clock */
/* Of one transfer: more than this leaves the processor's caches between the kernel's copy and the target's. */
#define BYTES_UNDER_WAY (1 << 20)

static uint64_t host_now_ns(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000 + (uint64_t)at.tv_nsec;
}

/* Sends what the socket takes: 1 if anything went, 0, or -1: a fault. */
static int host_send(host_queue *queue, int fd)
{
    int progress = 0;
    while (queue->num_out) {
        struct iovec pieces[MAX_PIECES];
        struct msghdr message = {.msg_iov = pieces};
        message.msg_iovlen = (size_t)host_output(queue, pieces, MAX_PIECES);
        ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
            return progress;
        if (sent < 0)
            return host_fail(queue, HOST_FAULT_SOCKET, (uint32_t)errno);
        host_sent(queue, (size_t)sent);
        progress = 1;
    }
    return progress;
}

/* Receives what is there: 1 if anything came, 0, or -1: a fault. */
static int host_receive(host_queue *queue, int fd)
{
    struct iovec pieces[2];
    struct msghdr message = {.msg_iov = pieces};
    message.msg_iovlen = (size_t)host_input(queue, pieces);
    ssize_t came = recvmsg(fd, &message, MSG_DONTWAIT);
    if (came > 0)
        return host_received(queue, (size_t)came) ? -1 : 1;
    if (!came)
        return host_fail(queue, HOST_FAULT_CLOSED, 0);
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)
        return 0;
    return host_fail(queue, HOST_FAULT_SOCKET, (uint32_t)errno);
}

/* A terminate request, where the connection still takes one: it says to the target's log what it did. */
static void send_terminate(host_queue *queue, int fd)
{
    static const uint8_t FES[] = {
        [HOST_FAULT_TYPE] = 1, [HOST_FAULT_HEADER_LENGTH] = 1, [HOST_FAULT_FLAGS] = 1,
        [HOST_FAULT_DATA_OFFSET] = 1, [HOST_FAULT_LENGTH] = 1, [HOST_FAULT_HEADER_DIGEST] = 3,
        [HOST_FAULT_NO_SUCH_COMMAND] = 1, [HOST_FAULT_OUT_OF_ORDER] = 2, [HOST_FAULT_DATA_RANGE] = 4,
        [HOST_FAULT_GRANT_RANGE] = 4, [HOST_FAULT_INCOMPLETE] = 2,
    };
    uint8_t pdu[SHORT_BYTES + SHORT_BYTES] = {PDU_H2C_TERMINATE, 0, SHORT_BYTES, 0, sizeof pdu};
    if (queue->fault >= (int)sizeof FES || !FES[queue->fault] || queue->head_sent)
        return;
    pdu[8] = FES[queue->fault];
    memcpy(pdu + SHORT_BYTES, queue->header, SHORT_BYTES);
    (void)!send(fd, pdu, sizeof pdu, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Sends and receives once; where nothing moves, waits for the socket. `quiet_since`: when bytes moved last.
 * 0, or -1 with everything under way aborted. */
static int host_advance(host_queue *queue, int fd, uint64_t *quiet_since, uint32_t timeout_ms)
{
    int sent = host_send(queue, fd);
    int came = sent < 0 ? -1 : host_receive(queue, fd);
    if (came > 0 || (sent > 0 && !came)) {
        uint64_t now = host_now_ns();
        if (came > 0 && *quiet_since)
            queue->last_wait_ns = now - *quiet_since;
        *quiet_since = came > 0 || !*quiet_since ? now : *quiet_since;
        return 0;
    }
    if (!queue->fault) {
        uint64_t now = host_now_ns();
        if (!*quiet_since)
            *quiet_since = now;
        uint64_t quiet = now - *quiet_since;
        if (quiet < (queue->last_wait_ns < HOST_LONG_SPIN_NS ? HOST_LONG_SPIN_NS : HOST_SPIN_NS)) {
            if (quiet >= HOST_SPIN_NS)
                sched_yield();
            return 0;
        }
        if (now - *quiet_since > (uint64_t)timeout_ms * 1000000)
            host_fail(queue, HOST_FAULT_SILENT, timeout_ms);
    }
    if (queue->fault) {
        send_terminate(queue, fd);
        shutdown(fd, SHUT_RDWR);
        host_abort(queue);
        return -1;
    }
    struct pollfd waiting = {fd, (short)(POLLIN | (queue->num_out ? POLLOUT : 0)), 0};
    poll(&waiting, 1, (int)(timeout_ms < WAIT_MS ? timeout_ms : WAIT_MS));
    return 0;
}

static int host_has_room(const host_queue *queue, const host_batch *batch, size_t next, uint32_t depth)
{
    return queue->num_free && queue->num_transferred < depth &&
           (!queue->num_transferred || queue->bytes_under_way + batch->lengths[next] <= BYTES_UNDER_WAY);
}

/* Runs a batch of any size to its end, at most `depth` commands under way; completions in the order of the commands.
 * 0; -EINVAL, -EMSGSIZE, -EPROTOTYPE with nothing sent, and *wrong the command at fault; -EBUSY: a CID under way;
 * -ENXIO: the connection is lost, and what was not done has STATUS_ABORTED. */
static int host_transfer(host_queue *queue, int fd, const host_batch *batch, uint32_t depth,
                         host_completion *completions, uint32_t timeout_ms, size_t *wrong)
{
    size_t next = 0;
    uint64_t quiet_since = 0;
    int result = host_check(queue, batch, wrong);
    if (result)
        return result;
    while (!queue->fault) {
        while (!result && next < batch->num_commands && host_has_room(queue, batch, next, depth)) {
            result = host_start(queue, &batch->entries[next], batch->addresses[next], batch->lengths[next],
                                &completions[next]);
            next += !result;
        }
        if (!queue->num_transferred && (result || next == batch->num_commands))
            return result;
        host_advance(queue, fd, &quiet_since, timeout_ms);
    }
    for (; next < batch->num_commands; next++)
        completions[next] = (host_completion){
            .status = STATUS_ABORTED, .cid = batch->entries[next].cid, .sqid = queue->options.queue_id};
    return -ENXIO;
}

/* Starts a batch; 0, or as host_transfer with nothing started. A lost connection shows in host_poll. */
static int host_submit(host_queue *queue, int fd, const host_batch *batch, size_t *wrong)
{
    int result = host_check(queue, batch, wrong);
    if (result)
        return result;
    if (queue->fault)
        return -ENXIO;
    if (batch->num_commands > queue->num_free ||
        batch->num_commands + queue->num_submitted + queue->num_arrived > queue->options.depth)
        return -EBUSY;
    for (size_t i = 0; i < batch->num_commands; i++)
        if (queue->by_cid[batch->entries[i].cid] != NO_SLOT)
            return -EBUSY;
    for (size_t i = 0; !result && i < batch->num_commands; i++)
        result = host_start(queue, &batch->entries[i], batch->addresses[i], batch->lengths[i], NULL);
    if (host_send(queue, fd) < 0) {
        shutdown(fd, SHUT_RDWR);
        host_abort(queue);
    }
    return result;
}

/* Completions of submitted commands: their number. With wait_ms 0 what is there; else at least one where any is under
 * way and `wait_ms` suffice. `timeout_ms` of silence, and whatever breaks the connection, abort all that is under way;
 * `quiet_since` belongs to the caller, 0 at first and after each completion. */
static int host_poll(host_queue *queue, int fd, host_completion *completions, uint32_t max, uint32_t wait_ms,
                     uint32_t timeout_ms, uint64_t *quiet_since)
{
    uint64_t give_up = host_now_ns() + (uint64_t)wait_ms * 1000000;
    if (!queue->fault && (queue->num_submitted || queue->num_out) && !queue->num_arrived) {
        do {
            if (!wait_ms) {
                if (host_send(queue, fd) >= 0)
                    host_receive(queue, fd);
                if (queue->fault) {
                    send_terminate(queue, fd);
                    shutdown(fd, SHUT_RDWR);
                    host_abort(queue);
                }
                break;
            }
            host_advance(queue, fd, quiet_since, timeout_ms);
        } while (!queue->fault && queue->num_submitted && !queue->num_arrived && host_now_ns() < give_up);
    }
    return (int)host_take_arrived(queue, completions, max);
}
