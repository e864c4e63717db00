"""Log lines as JSON, one object each: for whoever collects logs of many hosts."""

import json
import logging
from datetime import UTC, datetime

from spdk_glue.request_id import current, request_name


class JsonFormatter(logging.Formatter):
    """time (RFC 3339, UTC), level, logger, text, pid, thread; request where there is one; kind and facts of an
    event; traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "text": record.getMessage(),
            "pid": record.process,
            "thread": record.threadName,
        }
        request = request_name(current.request)  # a handler runs in the thread that logs
        if request is not None:
            line["request"] = request
        if hasattr(record, "kvfs_event"):
            line |= {"kind": record.kvfs_event, "facts": record.facts}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
