"""Log lines: for people or as JSON, and one per request when asked for."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from aegaeon.core import logs
from aegaeon.core.errors import ConfigError
from aegaeon.server.exchange import Exchange
from aegaeon.server.request_log import RequestLog


@pytest.fixture
def written(monkeypatch) -> Iterator[io.StringIO]:
    """What is logged; the loggers are put back afterwards."""
    root, own = logging.getLogger(), logging.getLogger("aegaeon")
    before = list(root.handlers), root.level, own.level
    yield io.StringIO()
    root.handlers, level, own_level = before
    root.setLevel(level)
    own.setLevel(own_level)


def exchange(status: int | None = 200, **fields: object) -> Exchange:
    made = Exchange("job-7", "POST", "/v1/completions", 10.0, model="a", status=status)
    made.first_s, made.ended_s = 10.25, 11.5
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_json_lines_carry_the_fields_of_a_request(written, monkeypatch):
    monkeypatch.setenv("AEGAEON_LOG_FORMAT", "json")
    logs.configure(written)
    RequestLog(every=True).ended(exchange())
    line = json.loads(written.getvalue())
    assert line.pop("time").endswith("+00:00")
    assert line.pop("message").startswith("request_id=job-7 ")
    assert line == {
        "level": "INFO",
        "logger": "aegaeon.requests",
        "request_id": "job-7",
        "method": "POST",
        "route": "/v1/completions",
        "model": "a",
        "status": 200,
        "error_code": None,
        "first_byte_s": 0.25,
        "duration_s": 1.5,
    }


def test_lines_for_people_say_the_same(written, monkeypatch):
    monkeypatch.delenv("AEGAEON_LOG_FORMAT", raising=False)
    logs.configure(written)
    RequestLog(every=True).ended(exchange(None, first_s=None))
    assert written.getvalue() == (
        "INFO aegaeon.requests: request_id=job-7 method=POST route=/v1/completions model=a "
        "duration_s=1.5\n"
    )


def test_without_being_asked_only_faults_of_the_server_are_logged(written):
    logs.configure(written)
    log = RequestLog(every=False)
    log.ended(exchange(200))
    log.ended(exchange(404))
    assert written.getvalue() == ""
    log.ended(exchange(503, error_code="instance_down"))
    assert written.getvalue().startswith("WARNING aegaeon.requests: request_id=job-7")
    assert "error_code=instance_down" in written.getvalue()


def test_an_exception_is_one_line_of_json(written, monkeypatch):
    monkeypatch.setenv("AEGAEON_LOG_FORMAT", "json")
    logs.configure(written)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("aegaeon.x").exception("it failed")
    (line,) = written.getvalue().splitlines()
    assert "ValueError: two\nlines" in json.loads(line)["exception"]


def test_level_and_format_come_from_the_environment(written, monkeypatch):
    monkeypatch.setenv("AEGAEON_LOG_LEVEL", "ERROR")
    logs.configure(written)
    logging.getLogger("aegaeon.x").warning("no")
    logging.getLogger("other").info("no")
    assert written.getvalue() == ""
    monkeypatch.setenv("AEGAEON_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="AEGAEON_LOG_FORMAT: got 'xml'; expected human"):
        logs.configure(written)
