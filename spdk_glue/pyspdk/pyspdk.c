/* SPDK's NVMe driver for Python: batches of commands, one entry into C for each.
 *
 * Completions are gathered here, in arrays that Python reads when a call returns: a Python callback for each would
 * cost as much as a command. Every function that may wait is called without the interpreter's lock.
 *
 * A controller has a keeper: a thread that polls the admin queue, so that keep-alives go out however idle or busy
 * Python is, and that resets the controller after its connection was lost. Before that it frees SPDK's queue pairs,
 * whose identifiers a reset gives out anew; whoever uses one of ours next makes it another. Users of queue pairs hold
 * `gate` for reading, the keeper takes it for writing while it resets.
 *
 * Functions return 0 or more, or a negative errno; pyspdk_last_error() has SPDK's latest words in this thread.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#include <spdk/env.h>
#include <spdk/log.h>
#include <spdk/nvme.h>

#include "records.h"

_Static_assert(sizeof(pyspdk_entry) == sizeof(struct spdk_nvme_cmd), "submission entry");
_Static_assert(sizeof(pyspdk_completion) == sizeof(struct spdk_nvme_cpl), "completion entry");

#include "environment.c"
#include "controller.c"
#include "queue_pair.c"
