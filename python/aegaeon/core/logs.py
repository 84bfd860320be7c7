"""Log lines of all our processes: for people, or one JSON object a line.

No prompt, answer or key is ever logged; vLLM's own logging of requests stays off.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from aegaeon.core import envs

# The attribute of a record with what JSON lines show beside the message; given by `extra`.
FIELDS = "fields"


class HumanFormatter(logging.Formatter):
    """`LEVEL logger: message`, as it always was; fields are in the message already."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, exception, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({**line, **getattr(record, FIELDS, {})}, default=str)


def configure(stream: TextIO | None = None) -> None:
    """Send log lines to `stream` (None: standard error), in the form and from the level that the
    environment names. Other libraries' from WARNING on.

    Raises ConfigError for a malformed variable.
    """
    output = logging.StreamHandler(sys.stderr if stream is None else stream)
    output.setFormatter(JsonFormatter() if envs.log_format() == "json" else HumanFormatter())
    logging.basicConfig(level="WARNING", handlers=[output], force=True)
    logging.getLogger("aegaeon").setLevel(envs.log_level())
