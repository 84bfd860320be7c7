"""What a seam is: one place where we touch vLLM, with its record and what it relies on.

Every file in `seams/` has one `SEAM`. Before anything is applied all of them are checked against
the sources of the installed vLLM, without importing it; when one does not hold, nothing is applied
and the message lists every mismatch.
"""

import ast
import enum
import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aegaeon.core.errors import AegaeonError


class SeamMismatch(AegaeonError):
    """The installed vLLM is not what a seam relies on; handled by the launcher, which refuses."""


class Tier(enum.Enum):
    """How firm the ground is: a documented extension point, a configuration knob, or private."""

    DOCUMENTED = "documented"
    KNOB = "knob"
    PRIVATE = "private"


@dataclass(frozen=True)
class Upstream:
    """One vLLM symbol that a seam relies on.

    symbol: dotted name inside the module; empty when only the module must exist.
    params: parameters that we pass or receive; any other upstream parameter must have a default.
    digest: of the symbol's source without docstrings, for code that we replace: when upstream
    edits it, our replacement must be read again.
    """

    module: str
    symbol: str = ""
    params: tuple[str, ...] = ()
    digest: str | None = None


@dataclass(frozen=True)
class Seam:
    """The record of one seam; `docs/vllm.md` is generated from these fields."""

    name: str
    tier: Tier
    why: str
    how: str
    upstream_link: str
    remove_when: str
    relies_on: tuple[Upstream, ...]
    # Applied once per process; None for a seam that works by subclassing and needs no patch.
    apply: Callable[[], None] | None = None


def verify(seams: Iterable[Seam], root: Path | None = None) -> None:
    """Check every symbol that `seams` rely on; raises SeamMismatch naming all that differ.

    root: the folder that contains the `vllm` package; None: the installed one.
    """
    root = root or _installed_root()
    problems = [
        f"{seam.name}: {problem}"
        for seam in seams
        for upstream in seam.relies_on
        if (problem := mismatch(upstream, root)) is not None
    ]
    if problems:
        listing = "\n  ".join(problems)
        raise SeamMismatch(f"the installed vLLM differs from what is supported:\n  {listing}")


def mismatch(upstream: Upstream, root: Path) -> str | None:
    """What differs between `upstream` and the sources below `root`; None when nothing does."""
    where = f"{upstream.module}.{upstream.symbol}".rstrip(".")
    node: ast.AST | None = _module_source(upstream.module, root)
    if node is None:
        return f"{upstream.module}: the module is gone"
    for part in upstream.symbol.split(".") if upstream.symbol else ():
        node = _child(node, part)
        if node is None:
            return f"{where}: the symbol is gone"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and upstream.params:
        problem = _parameter_mismatch(node.args, upstream.params)
        if problem is not None:
            return f"{where}: {problem}"
    if upstream.digest is not None and (found := digest(node)) != upstream.digest:
        return f"{where}: the body changed ({upstream.digest} -> {found}); re-read the seam"
    return None


def digest(node: ast.AST) -> str:
    """Of the code without comments, formatting and docstrings; 16 hex digits of sha256."""
    without_docstrings = ast.parse(ast.unparse(node))
    for inner in ast.walk(without_docstrings):
        body = getattr(inner, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            inner.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.unparse(without_docstrings).encode()).hexdigest()[:16]


def _installed_root() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SeamMismatch("vLLM is not installed: pip install 'aegaeon-kernels[cpu]' or [vllm]")
    return Path(spec.origin).parent.parent


def _module_source(module: str, root: Path) -> ast.Module | None:
    path = root / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return ast.parse(candidate.read_text())
    return None


def _child(node: ast.AST, name: str) -> ast.AST | None:
    for child in _statements(getattr(node, "body", [])):
        if getattr(child, "name", None) == name:
            return child
        targets = (
            child.targets
            if isinstance(child, ast.Assign)
            else [child.target]
            if isinstance(child, ast.AnnAssign)
            else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and target.id == name:
                return child
        if isinstance(child, ast.ImportFrom | ast.Import) and any(
            (alias.asname or alias.name) == name for alias in child.names
        ):
            return child
    if isinstance(node, ast.ClassDef):  # an attribute that the constructor sets
        for child in ast.walk(node):
            if isinstance(child, ast.Attribute) and child.attr == name:
                return child
    return None


def _statements(body: Sequence[ast.AST]) -> Iterable[ast.AST]:
    """The statements of a body, those under `if` and `try` included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements(statement.body)
            yield from _statements(statement.orelse)


def _parameter_mismatch(arguments: ast.arguments, params: Sequence[str]) -> str | None:
    positional = arguments.posonlyargs + arguments.args
    names = [argument.arg for argument in positional + arguments.kwonlyargs]
    missing = [param for param in params if param not in names]
    if missing:
        return f"lost the parameters {', '.join(missing)}"
    required = [
        argument.arg for argument in positional[: len(positional) - len(arguments.defaults)]
    ]
    required += [
        argument.arg
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    ]
    new = [name for name in required if name not in ("self", "cls") and name not in params]
    if new:
        return f"has new required parameters {', '.join(new)}"
    return None
