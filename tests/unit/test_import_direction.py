"""The layers of the design, held to: what may import what."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"kvfs", "ftl", "spdk_glue", "accel", "kvfsctl", "kvfs_bench", "machine_model"}
FOLDERS = {"kvfs": "kvfs", "ftl": "ftl", "spdk_glue": "spdk_glue", "accel": "accel"}
FOLDERS |= {"tools/kvfsctl": "kvfsctl", "tools/bench": "kvfs_bench"}
FOLDERS |= {"tools/machine_model": "machine_model"}
MAY_IMPORT = {
    "spdk_glue": set(),
    "ftl": {"spdk_glue"},  # DMA memory, and flash on an NVMe namespace
    "accel": {"ftl", "spdk_glue"},
    "kvfs": {"spdk_glue", "accel"},  # of accel only what is named below
    "kvfs_bench": {"kvfs", "accel", "ftl", "spdk_glue"},  # a benchmark of a layer alone calls that layer
    "machine_model": {"kvfs", "kvfs_bench", "ftl", "spdk_glue"},  # the layouts and the FTL that it is driven by
    "kvfsctl": {"kvfs", "kvfs_bench", "machine_model"},
}
HOST_ARITHMETIC = {"accel.merge", "accel.page_plan", "accel.quantized_pages", "accel.workers"}


def imports(folder):
    """(file, imported module) of every import in a folder, those inside functions too."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield path, node.module


def test_layers():
    """An import that runs upward ties layers together that must be replaceable."""
    for folder, package in FOLDERS.items():
        for path, module in imports(folder):
            top = module.partition(".")[0]
            if top in PACKAGES - {package}:
                assert top in MAY_IMPORT[package], f"{path} imports {module}"


def test_host_reaches_the_drive_in_one_module():
    """The NVMe seam: a second way into the drive would make it irreplaceable."""
    for path, module in imports("kvfs"):
        if module.startswith("accel") and module not in HOST_ARITHMETIC:
            assert path.name == "embedded_drive.py", f"{path} imports {module}"


def test_nothing_imports_the_tests():
    """Product code that needs test code does not run where it is installed."""
    for folder in FOLDERS:
        for path, module in imports(folder):
            assert module.partition(".")[0] not in ("tests", "pytest", "hypothesis"), path
