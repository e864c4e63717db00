"""The counters of every layer, as plain values."""

import numpy as np

from kvfs.write_amplification import write_amplification
from spdk_glue.flash_admin import FlashAdmin
from spdk_glue.identify import ATTENTION_COUNTERS_LOG, FLASH_HEALTH_LOG, LogPage
from spdk_glue.namespace import Namespace


def drive_counters(namespace: Namespace) -> dict:
    """What the drive has counted since it was opened: nested plain dicts."""
    flash = namespace.log_page(LogPage.FLASH_HEALTH, FLASH_HEALTH_LOG)[0]
    attention = namespace.log_page(LogPage.ATTENTION_COUNTERS, ATTENTION_COUNTERS_LOG)[0]
    smart = FlashAdmin(namespace).smart()
    page_size = int(flash["page_size"])
    waf = write_amplification(flash)
    return {
        "waf": waf,
        "flash": {
            "bytes_read": int(flash["media_pages_read"]) * page_size,
            "bytes_written": int(flash["media_pages_programmed"]) * page_size,
            "host_bytes_written": int(flash["host_pages_written"]) * page_size,
            "waf": waf["total"],
            "available_spare_percent": int(smart["available_spare"]),
            "percentage_used": int(smart["percentage_used"]),
            **_plain(flash),
        },
        "attention": _plain(attention),
    }


def _plain(record: np.void) -> dict:
    """A log page's fields as plain Python values."""
    return {
        name: record[name].tolist() if isinstance(record[name], np.ndarray) else record[name].item()
        for name in record.dtype.names
    }
