"""Every wait is there for a reason: without any one of them a test fails.

A wait is dropped in the text of csrc, the file is compiled anew and linked with the rest of the
native tests, and those that stand behind it must not pass. That the table speaks of the code as it
is, is part of every run; the mutants themselves are compiled under soak.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from native_support import BUILD, CSRC


@dataclass(frozen=True)
class Wait:
    """`text` occurs once in `file`; `without` is the same without waiting."""

    what: str
    file: str
    text: str
    without: str
    tests: tuple[str, ...]


ON_SIMULATED = ("transfers_on_simulated=20000",)
FAULTS = ("transfer_faults=100",)
HANDOVERS = ("handovers=20000",)

WAITS = [
    Wait(
        "for the copies of a chunk",
        "transfer/prefetcher.cpp",
        "drained = driver_->event_synchronize(lane.events[*chunk.event_idx]->id());",
        "drained = kSuccess;",
        ON_SIMULATED,
    ),
    Wait(
        "for the stream, when a chunk's event cannot tell",
        "transfer/prefetcher.cpp",
        "drained = driver_->stream_synchronize(lane.stream->id());\n  }",
        "drained = kSuccess;\n  }",
        (*ON_SIMULATED, *FAULTS),
    ),
    Wait(
        "for what a transfer comes after",
        "transfer/prefetcher.cpp",
        "poll.result = driver_->event_query(poll.gate->id());",
        "poll.result = kSuccess;",
        ON_SIMULATED,
    ),
    Wait(
        "for what was on the stream, by recording it",
        "transfer/prefetcher.cpp",
        'check(*driver_, driver_->event_record(gate->id(), *options.after), "event_record");',
        "",
        ON_SIMULATED,
    ),
    Wait(
        "with what copies touch, while nobody knows whether they are over",
        "transfer/prefetcher.cpp",
        "if (limbo != nullptr) {",
        "if (limbo != nullptr && false) {",
        FAULTS,
    ),
    Wait(
        "for copies that nobody could wait for, when asked again",
        "transfer/prefetcher.cpp",
        "Result result = driver_->stream_synchronize(lane.stream->id());\n    std::vector",
        "Result result = kSuccess;\n    std::vector",
        FAULTS,
    ),
    Wait(
        "of a stream for a part of a transfer",
        "transfer/ticket.cpp",
        "Result result = driver.stream_wait_event(stream, event);",
        "Result result = kSuccess;\n  static_cast<void>(event);",
        ON_SIMULATED,
    ),
    Wait(
        "of a caller for bytes",
        "transfer/ticket.cpp",
        "return wait_changed(deadline, [&] { return bytes_done_ >= bytes || finished(); });",
        "static_cast<void>(deadline);\n  return true;",
        ON_SIMULATED,
    ),
    Wait(
        "of a caller for the end",
        "transfer/ticket.cpp",
        "return wait_changed(deadline, [&] { return finished(); });",
        "static_cast<void>(deadline);\n  return true;",
        ON_SIMULATED,
    ),
    Wait(
        "for recorded work, before memory is unmapped or given",
        "vmm/region.cpp",
        "check(*arena.driver_, arena.driver_->event_synchronize(recorded.event->id()),\n"
        '          "event_synchronize");',
        "",
        HANDOVERS,
    ),
    Wait(
        "for the fill of new memory",
        "vmm/carry_out.cpp",
        "Result drained = driver.stream_synchronize(stream);",
        "Result drained = kSuccess;",
        HANDOVERS,
    ),
    Wait(
        "for the fill of a slot that is given",
        "vmm/alias_set.cpp",
        "    result = driver.stream_synchronize(stream);\n    drained",
        "    result = kSuccess;\n    drained",
        HANDOVERS,
    ),
]


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.what)
def test_the_table_of_waits_speaks_of_the_code_as_it_is(wait: Wait) -> None:
    assert (CSRC / wait.file).read_text().count(wait.text) == 1


def compiled_without(wait: Wait, folder: Path) -> Path:
    """The native test program without that wait."""
    source = folder / Path(wait.file).name
    text = (CSRC / wait.file).read_text()
    assert text.count(wait.text) == 1
    source.write_text(text.replace(wait.text, wait.without))
    entries = json.loads((BUILD / "compile_commands.json").read_text())
    (entry,) = [e for e in entries if e["file"] == str(CSRC / wait.file)]
    command = shlex.split(entry["command"])
    changed, program = folder / "changed.o", folder / "program"
    command[command.index("-o") + 1] = str(changed)
    command[command.index("-c") + 1] = str(source)
    subprocess.run(command, cwd=entry["directory"], check=True)
    objects = sorted((BUILD / "csrc" / "tests").rglob("*.o"))
    # What the changed object defines, the library is not asked for.
    link = [command[0], "-o", program, *objects, changed, BUILD / "libaegaeon_core.a"]
    subprocess.run([*link, "-pthread", "-ldl"], check=True)
    return program


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.what)
def test_without_the_wait_a_test_fails(native_program: Path, tmp_path: Path, wait: Wait) -> None:
    program = compiled_without(wait, tmp_path)
    verdicts = {}
    for test in wait.tests:
        try:
            done = subprocess.run([program, test], capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            verdicts[test] = "hangs"
            continue
        verdicts[test] = "passes" if done.returncode == 0 else done.stdout[-300:] or "crashes"
    print(wait.what, verdicts)
    assert any(verdict != "passes" for verdict in verdicts.values())
