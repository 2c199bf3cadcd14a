"""The one training loop."""

import hashlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from lineament._base.errors import InputError, LineamentError
from lineament._base.seeds import seeded
from lineament.train import checkpoint
from lineament.train.config import FitConfig
from lineament.train.kar3 import Kar3
from lineament.train.several import Several
from lineament.train.sharded import full, is_sharded

Batches = Callable[[int], Any]
Loss = Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, float]]]
UNUSED = DistributedDataParallelKwargs(find_unused_parameters=True)  # a loss need not use all that may learn


@dataclass(frozen=True)
class Fitted:
    """What a call of `fit` did: steps in all, seconds of this call, the log, and its last step's numbers (if any)."""

    steps: int
    seconds: float
    metrics: Path | None
    last: Mapping[str, float]


class TrainingError(LineamentError):
    """The loss or the gradient is no longer a number."""


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    config: FitConfig,
    *,
    out: str | Path | None = None,
    resume: bool = True,
    accelerator: Accelerator | None = None,
    on_step: Callable[[int, Mapping[str, float]], bool | None] | None = None,
    description: str = "train",
) -> Fitted:
    """Train the parameters of a model that require a gradient, in place.

    Args:
        model: any module, in the mode it shall train in. Of a sharded one (`train.sharded`) a loss may only call the
            model itself, and the checkpoint holds whole tensors: it goes on with any number of processes.
        batches: index -> batch; `config.accumulate` consecutive indices make one step. A function of the index, so
            that a run goes on exactly where it was. Processes share a step's batches, or a batch's rows.
        loss: (model, batch) -> (scalar, named numbers); gets the bare model, also where several processes train it.
        out: folder for the checkpoint and metrics.jsonl; None keeps nothing.
        resume: go on from the checkpoint in `out`; the result is that of an uninterrupted run, to the bit (same
            machine and threads). False starts anew.
        accelerator: as made by the caller; by default as `accelerate launch` configures it.
        on_step: called with (step, numbers) after every step; where it returns True, the run ends there, and the
            same call again does nothing; without `on_step` it goes on.

    Raises:
        InputError: nothing can learn, or the checkpoint belongs to other settings. TrainingError: the loss is not a
        number. KeyboardInterrupt: after Ctrl-C, when the step is finished and saved.
    """
    accelerator = accelerator or Accelerator(kwargs_handlers=[UNUSED])
    run = _Run(model, loss, config, accelerator, None if out is None else Path(out))
    began, numbers = time.perf_counter(), {}
    with seeded(config.seed), _interrupts() as stop, _progress(description, config.steps, accelerator) as show:
        first, ended = run.start(resume)
        show(first, {})
        done = first if ended and on_step is not None else config.steps
        for step in range(first, done):
            numbers = run.step(step, batches)
            enough = run.any_of(on_step is not None and on_step(step, numbers) is True)
            show(step + 1, numbers)
            run.log(step, numbers)
            stopping = run.any_of(stop.is_set())
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps or stopping or enough:
                run.save(step + 1, enough)
            if stopping:
                raise KeyboardInterrupt
            if enough:
                done = step + 1
                break
    return Fitted(done, time.perf_counter() - began, run.metrics, numbers)


class _Lesson(nn.Module):
    """A model and its loss as one forward pass, for DDP to watch: the loss may call any method of the bare model."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.losses = model, [loss]  # in a list: a loss that is a module does not learn

    def forward(self, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        return self.losses[0](self.model, batch)


class _Run:
    """The parts of a run that belong together: what learns, its optimiser, its folder."""

    def __init__(
        self, model: nn.Module, loss: Loss, config: FitConfig, accelerator: Accelerator, out: Path | None
    ) -> None:
        self.config, self.accelerator, self.out = config, accelerator, out
        self.metrics = None if out is None else out / checkpoint.METRICS
        names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        groups = _groups(names, config)
        optimizer = _optimizer(groups, config)
        optimizer.zero_grad()  # what an earlier pass or an interrupted step left is not of this run
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.parameters = {names[p]: p for group in groups for p in group["params"]}
        self.buffers = checkpoint.persistent_buffers(model)
        sharded, kind = is_sharded(model), accelerator.distributed_type.value
        self.lesson, self.wrapped = _Lesson(model, loss), optimizer
        if not sharded:  # which averages its gradients by itself
            self.lesson, self.wrapped = accelerator.prepare(self.lesson, optimizer)
        self.optimizer, self.backward = optimizer, accelerator.backward
        scaled = accelerator.scaler is not None or accelerator.gradient_accumulation_steps != 1
        self.alone = sharded or (kind == "NO" and not scaled)
        if self.alone:  # then accelerate would only search, at every step, for packages that aren't there
            self.wrapped, self.backward = optimizer, Tensor.backward
        # what accelerate shards can't be saved by name; such a run is not resumable in the middle
        self.by_name = sharded or kind in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU")

    @property
    def digest(self) -> str:
        """Name everything that decides the course of a run; how often it is saved and logged does not."""
        values = {k: v for k, v in asdict(self.config).items() if k not in ("checkpoint_every", "log_every")}
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def start(self, resume: bool) -> tuple[int, bool]:
        """Go back to the checkpoint if there is one; return the first step to run, and whether the run has ended."""
        if self.out is None:
            return 0, False
        self.out.mkdir(parents=True, exist_ok=True)
        if not resume or not self.by_name or not (self.out / checkpoint.FILE).exists():
            if self.accelerator.is_main_process:
                (self.out / checkpoint.FILE).unlink(missing_ok=True)
                (self.out / checkpoint.METRICS).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
            return 0, False
        done, ended = checkpoint.load(self.out, self.parameters, self.buffers, self.optimizer, self.digest)
        if self.accelerator.is_main_process:
            checkpoint.log_up_to(self.out / checkpoint.METRICS, done)
        return done, ended

    def step(self, step: int, batches: Batches) -> dict[str, float]:
        """Run one optimiser step and return its numbers, averaged over batches and processes."""
        config = self.config
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * config.factor(step)
        mine = _share(step, batches, config.accumulate, self.accelerator)
        total: dict[str, float] = {}
        for index, batch in enumerate(mine):
            last = index + 1 == len(mine)
            with nullcontext() if last else self.accelerator.no_sync(self.lesson):
                value, numbers = self._forward(batch)
                self.backward(value / len(mine))
            for name, number in {"loss": float(value.detach()), **numbers}.items():
                total[name] = total.get(name, 0.0) + float(number) / len(mine)
        total = self._averaged(total)
        norm = self._clip()
        if not math.isfinite(total["loss"]) or not math.isfinite(norm):
            what = "loss" if not math.isfinite(total["loss"]) else "gradient"
            raise TrainingError(f"the {what} is not a number at step {step}; try a lower lr or precision fp32")
        self.wrapped.step()
        self.wrapped.zero_grad(set_to_none=True)
        return {**total, "grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}

    def _forward(self, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        device = self.accelerator.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.lesson(to_device(batch, self.accelerator.device))

    def _clip(self) -> float:
        limit, learning = math.inf if self.config.clip is None else self.config.clip, list(self.lesson.parameters())
        if not self.alone:
            return float(self.accelerator.clip_grad_norm_(learning, limit))  # pyright: ignore[reportArgumentType]
        if math.isinf(limit):
            return float(full(nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])))
        return float(full(nn.utils.clip_grad_norm_(learning, limit)))

    def _averaged(self, numbers: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return numbers
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.accelerator.device)
        mean: Any = self.accelerator.reduce(values, reduction="mean")
        return dict(zip(numbers, mean.tolist(), strict=True))

    def any_of(self, flag: bool) -> bool:
        """Say whether a flag is up in any process, so that all of them leave at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        total: Any = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device))
        return bool(total > 0)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append one JSON line to the log."""
        if self.metrics is None or not self.accelerator.is_main_process or step % self.config.log_every:
            return
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")

    def save(self, step: int, ended: bool = False) -> None:
        """Replace the checkpoint by one after `step` steps."""
        if self.out is not None and self.by_name:
            held = (self.parameters, self.buffers, self.optimizer, self.digest)
            checkpoint.save(self.out, step, *held, ended=ended, writes=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()


def _groups(names: Mapping[nn.Parameter, str], config: FitConfig) -> list[dict[str, Any]]:
    """Return the optimisers' groups: one per optimiser, learning rate and weight decay, in the model's order."""
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for p, name in names.items():
        rate, kind = config.rate(name), config.optimizer_of(name)
        if rate is None:
            raise InputError(f"no learning rate for {name}; the globs are {', '.join(config.lr)}")  # pyright: ignore
        if kind is None:
            raise InputError(f"no optimizer for {name}; the globs are {', '.join(config.optimizer)}")
        if kind == "muon" and p.dim() != 2:
            raise InputError(f"{name} is {list(p.shape)}; Muon is for matrices, give it another optimizer by a glob")
        groups.setdefault((kind, rate, config.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    if not groups:
        raise InputError("nothing can learn: no parameter of the model requires a gradient")
    return [
        {"params": ps, "lr": rate, "weight_decay": decay, "kind": kind} for (kind, rate, decay), ps in groups.items()
    ]


def _optimizer(groups: list[dict[str, Any]], config: FitConfig) -> torch.optim.Optimizer:
    made = [
        OPTIMIZER_OF[kind]([group for group in groups if group["kind"] == kind], config)
        for kind in dict.fromkeys(group["kind"] for group in groups)
    ]
    return made[0] if len(made) == 1 else Several(made)


def _muon(groups: list[dict[str, Any]], config: FitConfig) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"torch {torch.__version__} has no Muon; it came with 2.9")
    return torch.optim.Muon(groups, momentum=config.betas[0], nesterov=False)


OPTIMIZER_OF: dict[str, Callable[[list[dict[str, Any]], FitConfig], torch.optim.Optimizer]] = {
    "adamw": lambda groups, config: torch.optim.AdamW(groups, betas=config.betas, eps=config.eps),
    "sgd": lambda groups, config: torch.optim.SGD(groups, momentum=config.betas[0]),
    "kar3": lambda groups, config: Kar3(groups, betas=config.betas),
    "muon": _muon,
}


def _share(step: int, batches: Batches, accumulate: int, accelerator: Accelerator) -> list[Any]:
    """Return this process's part of a step: some of its batches, or else some rows of each."""
    world, rank = accelerator.num_processes, accelerator.process_index
    indices = range(step * accumulate, (step + 1) * accumulate)
    if accumulate % world == 0:
        return [batches(index) for index in indices[rank::world]]
    return [_rows(batches(index), rank, world) for index in indices]


def _rows(batch: Any, rank: int, world: int) -> Any:
    if isinstance(batch, Mapping):
        return {name: _rows(value, rank, world) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return _like(batch, [_rows(value, rank, world) for value in batch])
    if not isinstance(batch, Tensor):
        return batch
    if batch.dim() == 0 or batch.shape[0] % world:
        raise InputError(f"a batch of shape {list(batch.shape)} can't be shared by {world} processes; make accumulate "
                         f"or the rows a multiple of {world}")  # fmt: skip
    return batch.chunk(world)[rank]


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device: a tensor, or mappings, tuples and lists of any depth with tensors.

    Example:
        >>> to_device({"ids": torch.zeros(2), "name": "a"}, torch.device("meta"))["ids"].is_meta
        True
    """
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return _like(batch, [to_device(value, device) for value in batch])
    return batch


def _like(batch: Any, parts: list[Any]) -> Any:
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that the step can finish; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(description: str, steps: int, accelerator: Accelerator) -> Iterator[Callable[..., None]]:
    """Yield (steps done, numbers) -> None, which draws a bar on a terminal and nothing elsewhere."""
    if not (accelerator.is_main_process and sys.stderr.isatty()):
        yield lambda done, numbers: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=steps, loss="")

        def show(done: int, numbers: Mapping[str, float]) -> None:
            bar.update(task, completed=done, loss=f"loss {numbers['loss']:.4f}" if numbers else "")

        yield show
