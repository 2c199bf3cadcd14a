"""What a call allocates on the CPU, as torch's profiler sees it."""

from collections.abc import Callable

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def allocations(call: Callable[[], object]) -> list[int]:
    """Return the bytes of every allocation of a call, in order; what is freed again is negative."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    results = trace.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = [e for e in results.events() if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
