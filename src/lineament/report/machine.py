"""What a measurement ran on, in words that name no host and no path."""

import os
import platform
import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("lineament", "torch", "transformers")


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that numbers depend on; nothing is imported."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Describe the machine: processor, cores for us, memory, system, versions; GPU and threads once torch is loaded.

    Example:
        >>> sorted(machine())[:4]
        ['cores', 'cpu', 'lineament', 'memory_gb']
    """
    found: dict[str, Any] = {"cpu": _cpu(), "cores": _cores(), "memory_gb": _memory_gb()}
    found["system"] = f"{platform.system()} {platform.machine()}"
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return {key: value for key, value in (found | versions()).items() if value is not None}


@cache
def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^(?:model name|Hardware|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None
