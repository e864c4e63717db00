"""Builds `spdk_glue.spdk_target._spdk_target` against an installed SPDK: for setup.py and tools/build_glue.py.

Besides SPDK's driver it needs the libraries of its target; without them there is nothing to build, which
`find_spdk` says.
"""

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
# Parts register themselves in constructors, so all are named that the target consists of.
PACKAGES = [
    *("spdk_event_nvmf", "spdk_event_bdev", "spdk_event_sock", "spdk_event_keyring", "spdk_event_iobuf"),
    *("spdk_keyring_file", "spdk_sock_posix", "spdk_nvme", "spdk_env_dpdk", "spdk_syslibs"),
]

CDEF = """
int kvfs_target_prepare(void);
int kvfs_target_run(const kvfs_target_options *options);
void kvfs_target_stop(void);
void kvfs_target_errors(char *text, size_t size);
uint64_t kvfs_target_silent_ms(uint16_t controller);
void kvfs_target_count(kvfs_target_counters *to);
int kvfs_target_take(int lane, uint32_t block_bytes, unsigned max_requests, unsigned max_pieces,
                     uint64_t *requests, unsigned *num_requests, kvfs_piece *pieces);
void kvfs_target_answer(const uint64_t *requests, unsigned num_requests, const kvfs_piece *pieces,
                        const kvfs_completion *completions, unsigned num_pieces);
"""


def find_spdk() -> tuple[dict, str]:
    """(compiler and linker options, "") or ({}, why SPDK's target cannot be built against)."""
    options, why_not = runpy.run_path(str(HERE.parent / "pyspdk" / "build.py"))["find_spdk"](PACKAGES)
    if why_not:
        return {}, why_not
    options["include_dirs"][0] = str(HERE)
    options["extra_compile_args"].append("-Wno-unused-function")  # not all of ftl/direct_io's C is used here
    # Block devices of SPDK's own would look at what hosts have written to ours, and might claim it.
    options["extra_link_args"] = [f for f in options["extra_link_args"] if not f.startswith("-lspdk_bdev_")]
    return options, ""


def make_ffibuilder() -> FFI:
    options, why = find_spdk()
    if why:
        raise RuntimeError(why)
    builder = FFI()
    builder.cdef((HERE / "records.h").read_text() + CDEF)
    builder.set_source("spdk_glue.spdk_target._spdk_target", '#include "target.c"\n', **options)
    return builder
