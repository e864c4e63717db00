"""Builds `spdk_glue.pyspdk._pyspdk` against an installed SPDK: for packaging, and tools/build_glue.py.

SPDK is found by pkg-config; without it there is nothing to build, which `find_spdk` says.
"""

import subprocess
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
PACKAGES = ["spdk_nvme", "spdk_env_dpdk", "spdk_syslibs"]

CDEF = """
typedef struct pyspdk_controller pyspdk_controller;
typedef struct pyspdk_queue_pair pyspdk_queue_pair;

const char *pyspdk_last_error(void);
int pyspdk_env_start(const pyspdk_env_options *options);
void *pyspdk_allocate(size_t size, size_t alignment);
void pyspdk_free(void *memory);

pyspdk_controller *pyspdk_connect(const char *transport_id, const pyspdk_controller_options *options,
                                  int *result);
void pyspdk_disconnect(pyspdk_controller *controller);
uint32_t pyspdk_max_transfer_bytes(const pyspdk_controller *controller);
int pyspdk_moves_by_dma(const pyspdk_controller *controller);
int pyspdk_state(pyspdk_controller *controller);
int pyspdk_wait_connected(pyspdk_controller *controller, uint64_t timeout_ms);
uint32_t pyspdk_next_namespace(pyspdk_controller *controller, uint32_t nsid);
int pyspdk_namespace(pyspdk_controller *controller, uint32_t nsid, uint64_t *num_sectors);
int pyspdk_admin(pyspdk_controller *controller, const pyspdk_entry *entry, uint8_t *data, uint32_t length,
                 uint64_t timeout_ms, pyspdk_completion *completion);

pyspdk_queue_pair *pyspdk_create_queue_pair(pyspdk_controller *controller, unsigned depth, uint32_t nsid,
                                            uint32_t block_bytes, int *result);
int pyspdk_destroy_queue_pair(pyspdk_queue_pair *queue_pair);
unsigned pyspdk_depth(const pyspdk_queue_pair *queue_pair);
int pyspdk_submit(pyspdk_queue_pair *queue_pair, const pyspdk_entry *entries, const uint64_t *addresses,
                  const uint64_t *lengths, size_t n, size_t *wrong);
int pyspdk_poll(pyspdk_queue_pair *queue_pair, pyspdk_completion *completions, unsigned max, int wait,
                uint64_t timeout_ms);
int pyspdk_transfer(pyspdk_queue_pair *queue_pair, const pyspdk_entry *entries, const uint64_t *addresses,
                    const uint64_t *lengths, size_t n, unsigned depth, pyspdk_completion *completions,
                    uint64_t timeout_ms, size_t *wrong);
"""


def find_spdk(packages: list[str] = PACKAGES) -> tuple[dict, str]:
    """(compiler and linker options, "") or ({}, why SPDK cannot be built against)."""
    try:
        found = subprocess.run(
            ["pkg-config", "--cflags", "--libs", *packages], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return {}, "pkg-config is not installed"
    if found.returncode:
        return {}, f"pkg-config finds no SPDK (packages {', '.join(packages)})"
    flags = found.stdout.split()
    folders = [flag[2:] for flag in flags if flag.startswith("-L")]
    options = {
        "include_dirs": [str(HERE), *(flag[2:] for flag in flags if flag.startswith("-I"))],
        "library_dirs": folders,
        "extra_compile_args": [
            "-O2",
            "-std=gnu11",
            *(f for f in flags if not f.startswith(("-I", "-L", "-l"))),
        ],
        # SPDK's parts register themselves in constructors: nobody calls them, and all are needed
        "extra_link_args": [
            "-Wl,--no-as-needed",
            *(flag for flag in flags if flag.startswith("-l")),
            *(f"-Wl,-rpath,{folder}" for folder in folders),
        ],
    }
    return options, ""


def make_ffibuilder() -> FFI:
    options, why = find_spdk()
    if why:
        raise RuntimeError(why)
    builder = FFI()
    builder.cdef((HERE / "records.h").read_text() + CDEF)
    builder.set_source("spdk_glue.pyspdk._pyspdk", '#include "pyspdk.c"\n', **options)
    return builder
