"""Words for the bits of Identify and SMART: what a controller or namespace has, bit by bit.

Source: NVM Express Base Specification 2.0, figures 275 (Identify Controller) and 207 (SMART); NVM Command Set
Specification 1.0, figure 97 (Identify Namespace).
"""

OACS = {
    0: "Security Send and Receive",
    1: "Format NVM",
    2: "firmware download",
    3: "Namespace Management",
    4: "Device Self-test",
    5: "Directives",
    6: "NVMe-MI Send and Receive",
    7: "Virtualization Management",
    8: "Doorbell Buffer Config",
    9: "Get LBA Status",
    10: "lockdown",
}
ONCS = {
    0: "Compare",
    1: "Write Uncorrectable",
    2: "Dataset Management",
    3: "Write Zeroes",
    4: "saved features",
    5: "reservations",
    6: "timestamp",
    7: "Verify",
    8: "Copy",
}
CMIC = {0: "several ports", 1: "several controllers", 2: "a virtual function", 3: "asymmetric access"}
LPA = {
    0: "SMART per namespace",
    1: "commands and effects",
    2: "extended data",
    3: "telemetry",
    4: "persistent events",
}
FNA = {0: "Format takes all namespaces", 1: "erase takes all namespaces", 2: "cryptographic erase"}
FUSES = {0: "Compare and Write"}
NWPC = {0: "write protection", 1: "until power cycle", 2: "for good"}
SANICAP = {0: "cryptographic erase", 1: "block erase", 2: "overwrite"}
CTRATT = {
    0: "128-bit host identifier",
    1: "non-operational power state permissive",
    2: "NVM sets",
    3: "read recovery levels",
    4: "endurance groups",
    5: "predictable latency",
    6: "traffic based keep alive",
    7: "namespace granularity",
    9: "UUID list",
    11: "fixed capacity management",
    15: "extended LBA formats",
    19: "flexible data placement",
}
CONTROLLER_TYPES = {1: "I/O", 2: "discovery", 3: "administrative"}

NSFEAT = {
    0: "thin provisioning",
    1: "atomic sizes of its own",
    2: "deallocated blocks give errors",
    3: "identifiers are never used again",
    4: "preferred sizes are told",
}
MC = {0: "behind each block", 1: "in a buffer of their own"}
NMIC = {0: "shared by several controllers"}
DLFEAT_READ = {0: "not told", 1: "zeros", 2: "FFh"}  # what a deallocated block reads as: bits 2:0
LBA_PERFORMANCE = {0: "best", 1: "better", 2: "good", 3: "degraded"}

CRITICAL_WARNING = {
    0: "spare below its threshold",
    1: "temperature beyond a threshold",
    2: "reliability degraded",
    3: "read-only",
    4: "the backup of volatile memory failed",
    5: "persistent memory unreliable or read-only",
}


def words_of(bits: int, table: dict[int, str]) -> list[str]:
    """The words for the bits that are set; `bit n` for those without."""
    return [table.get(bit, f"bit {bit}") for bit in range(bits.bit_length()) if bits >> bit & 1]
