"""The contract with vLLM: every seam holds on the installed one, and is checked before use."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aegaeon.core import envs
from aegaeon.vllm_plugin import seam_table, versions
from aegaeon.vllm_plugin.seam import Seam, SeamMismatch, Tier, Upstream, digest, mismatch, verify

SEAM_FILES = Path(seam_table.__file__).parent / "seams"
ROOT = Path(__file__).parent.parent.parent

SOURCE = '''
"""A module."""
LIMIT: int = 3
_cache = {}
if True:
    def conditional(a, *, b=1): ...

class Worker(Base):
    size: int
    def load(self, path, *, strict=True):
        """Load."""
        self.loaded = True
        return path
'''


@pytest.fixture
def upstream_root(tmp_path) -> Path:
    package = tmp_path / "vllm" / "v1"
    package.mkdir(parents=True)
    (package / "worker.py").write_text(SOURCE)
    (package / "__init__.py").write_text("TOP = 1\n")
    return tmp_path


@pytest.mark.parametrize(
    "symbol",
    ["", "LIMIT", "_cache", "conditional", "Worker", "Worker.load", "Worker.size", "Worker.loaded"],
)
def test_what_is_there_is_found(symbol, upstream_root):
    assert mismatch(Upstream("vllm.v1.worker", symbol), upstream_root) is None


@pytest.mark.parametrize(
    ("upstream", "says"),
    [
        (Upstream("vllm.v2.worker"), "module is gone"),
        (Upstream("vllm.v1.worker", "Executor"), "symbol is gone"),
        (Upstream("vllm.v1.worker", "Worker.unload"), "symbol is gone"),
        (
            Upstream("vllm.v1.worker", "Worker.load", ("path", "device")),
            "lost the parameters device",
        ),
        (Upstream("vllm.v1.worker", "Worker.load", ("strict",)), "new required parameters path"),
        (Upstream("vllm.v1.worker", "Worker.load", digest="0" * 16), "body changed"),
    ],
)
def test_what_differs_is_named(upstream, says, upstream_root):
    problem = mismatch(upstream, upstream_root)
    assert problem is not None
    assert says in problem


def function(source: str) -> ast.AST:
    return ast.parse(textwrap.dedent(source)).body[0]


def test_a_digest_ignores_comments_formatting_and_docstrings_but_no_code():
    plain = digest(function("def f(a):\n    return a + 1\n"))
    commented = digest(function('def f( a ):\n    """Doc."""\n    # why\n    return a+1\n'))
    changed = digest(function("def f(a):\n    return a + 2\n"))
    assert plain == commented
    assert plain != changed


def test_all_mismatches_are_listed_at_once(upstream_root):
    def seam(name: str, upstream: Upstream) -> Seam:
        return Seam(name, Tier.PRIVATE, "w", "h", "l", "r", (upstream,))

    with pytest.raises(SeamMismatch) as caught:
        verify(
            [
                seam("first", Upstream("vllm.v1.worker", "gone")),
                seam("sound", Upstream("vllm.v1.worker", "Worker")),
                seam("second", Upstream("vllm.v1.elsewhere")),
            ],
            upstream_root,
        )
    message = str(caught.value)
    assert "first:" in message
    assert "second:" in message
    assert "sound" not in message


def test_a_version_outside_the_range_is_refused(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda distribution: "0.99.0")
    with pytest.raises(SeamMismatch, match=r"vLLM 0\.99\.0 is installed; supported: ~=0\.32\.0"):
        versions.check_version()


# -- on the installed vLLM -----------------------------------------------------------------------


def run(code: str, **environment: str | None) -> str:
    """The output of `code` in a process of its own: it imports vLLM, and patches it."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=envs.child_environment(environment),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.vllm
def test_every_seam_holds_and_every_file_has_its_record():
    output = run(
        """
        from aegaeon.vllm_plugin.seam import verify
        from aegaeon.vllm_plugin.seams import SEAMS
        from aegaeon.vllm_plugin.versions import check_version
        check_version()
        verify(SEAMS)
        for seam in SEAMS:
            assert all((seam.why, seam.how, seam.remove_when)), seam
            assert seam.upstream_link.startswith("https://github.com/vllm-project/vllm/"), seam
            assert seam.relies_on, seam
        print(*sorted(seam.name for seam in SEAMS))
        """
    )
    files = {file.stem for file in SEAM_FILES.glob("*.py")} - {"__init__"}
    assert set(output.split()) == files


@pytest.mark.vllm
def test_the_page_about_the_seams_is_current():
    page = run(
        """
        from aegaeon.vllm_plugin.seam_table import render
        from aegaeon.vllm_plugin.seams import SEAMS
        print(render(SEAMS), end="")
        """
    )
    assert (ROOT / "docs" / "vllm.md").read_text() == page


PATCHED = """
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.model_executor.layers import utils
    from vllm.v1.metrics import loggers
    def attributes():
        return [
            KVCacheConfig.__dict__["needs_kv_cache_zeroing"],
            utils.dispatch_cpu_unquantized_gemm,
            loggers.unregister_vllm_metrics,
            loggers.PrometheusStatLogger._gauge_cls,
        ]
    before = attributes()
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    print([old is new for old, new in zip(before, attributes())])
"""


@pytest.mark.vllm
def test_installed_but_not_enabled_the_plugin_changes_nothing():
    assert run(PATCHED, AEGAEON_ENABLE=None).splitlines()[-1] == str([True] * 4)


@pytest.mark.vllm
def test_enabled_the_plugin_acts_in_every_process_of_vllm():
    assert run(PATCHED, AEGAEON_ENABLE="1").splitlines()[-1] == str([False] * 4)


@pytest.mark.vllm
def test_our_worker_outside_of_an_instance_says_what_to_do():
    output = run(
        """
        from aegaeon.core.errors import AegaeonError
        from aegaeon.vllm_plugin.cpu_worker import ArenaCPUWorker
        try:
            ArenaCPUWorker(None, 0, 0, "")
        except AegaeonError as error:
            print(error)
        """
    )
    assert "aegaeon serve" in output
