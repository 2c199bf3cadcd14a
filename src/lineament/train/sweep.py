"""Many small runs, each a value: on this machine's processes, or on a Ray cluster; resumable."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lineament import io
from lineament._base import extras
from lineament._base.errors import InputError, LineamentError

RESULT = "result.json"


class SweepError(LineamentError):
    """Some runs of a sweep failed; the others are kept."""


def sweep(
    work: str,
    values: Mapping[str, Mapping[str, Any]],
    out: str | Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    on_done: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run a function on every value and return its results by name; what is finished already is read, not run.

    Args:
        work: "module:function", called as `function(value, folder)`; returns a mapping of JSON
            values. It may keep what it goes on from in `folder`.
        values: name -> value, of JSON values.
        out: folder; every run has a folder of its name in it, with result.json when it is finished.
        workers: processes at a time; 1 stays in this one. The machine's threads are shared among them.
        ray: address of a Ray cluster ("auto", "ray://host:10001"), or "local" for one on this machine; Ray then decides
            where and when a run runs, one CPU each. Runs go on after a kill where their workers see `out`.
        on_done: called with a name and its result, finished ones included.

    Raises:
        InputError: a finished run had another value, or ray is missing. SweepError: runs failed; the first error is
        named and the results of the others are kept.
    """
    out = Path(out)
    if workers < 1:
        raise InputError(f"workers={workers}; expected at least 1")
    results = finished(values, out)
    open_ = {name: value for name, value in values.items() if name not in results}
    for name, result in results.items():
        if on_done:
            on_done(name, result)
    failed: dict[str, str] = {}
    runner = _on_ray(work, open_, out, ray) if ray and open_ else _on_processes(work, open_, out, workers)
    for name, result in runner:
        if isinstance(result, BaseException):
            failed[name] = f"{type(result).__name__}: {result}"
            continue
        io.write_json(out / name / RESULT, {"value": values[name], "result": result})
        results[name] = io.read_json(out / name / RESULT)["result"]
        if on_done:
            on_done(name, results[name])
    if failed:
        name, why = next(iter(failed.items()))
        raise SweepError(f"{len(failed)} of {len(values)} runs failed, e.g. {name}: {why}; the others are in {out}")
    return {name: results[name] for name in values}


def finished(values: Mapping[str, Mapping[str, Any]], out: str | Path) -> dict[str, dict[str, Any]]:
    """Return the results of a sweep's runs that are there already, by name.

    Raises:
        InputError: a finished run had another value.
    """
    found = {name: _finished(Path(out) / name, value) for name, value in values.items()}
    return {name: result for name, result in found.items() if result is not None}


def _finished(folder: Path, value: Mapping[str, Any]) -> dict[str, Any] | None:
    file = folder / RESULT
    if not file.exists():
        return None
    kept: Any = io.read_json(file)
    if kept.get("value") != json.loads(json.dumps(value)):
        raise InputError(f"{file} is of another value than this sweep's; remove {folder} or choose another folder")
    return kept["result"]


def _call(work: str, value: Mapping[str, Any], folder: str) -> Mapping[str, Any]:
    module, _, function = work.partition(":")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return getattr(import_module(module), function)(value, folder)


Finished = Iterator[tuple[str, Mapping[str, Any] | BaseException]]


def _on_processes(work: str, values: Mapping[str, Mapping[str, Any]], out: Path, workers: int) -> Finished:
    if workers == 1:
        for name, value in values.items():
            yield name, _caught(lambda value=value, name=name: _call(work, value, str(out / name)))
        return
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        jobs = {pool.submit(_call, work, value, str(out / name)): name for name, value in values.items()}
        for job in as_completed(jobs):
            yield jobs[job], _caught(job.result)


def _on_ray(work: str, values: Mapping[str, Mapping[str, Any]], out: Path, address: str) -> Finished:
    cluster: Any = extras.require("ray", extra="ray")
    if not cluster.is_initialized():
        try:
            cluster.init(address=None if address == "local" else address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from error
    task = cluster.remote(num_cpus=1)(_call)
    jobs = {task.remote(work, value, str(out.absolute() / name)): name for name, value in values.items()}
    waiting = list(jobs)
    while waiting:
        (done,), waiting = cluster.wait(waiting, num_returns=1)
        yield jobs[done], _caught(lambda done=done: cluster.get(done))


def _caught(run: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any] | BaseException:
    """Return what a run returns or raises: one that fails must not take the others with it."""
    try:
        return run()
    except Exception as error:
        return error
