"""End-to-end distillation: the student's predictions are pulled to the teacher's, on text and on far-back answers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from lineament import io
from lineament._base.errors import InputError
from lineament._base.extras import require
from lineament._base.seeds import generator, seeded
from lineament.convert.divergence import distil_loss
from lineament.convert.plan import Plan
from lineament.convert.positions import jumped_positions, model_inputs
from lineament.convert.precision import autocast
from lineament.convert.processes import any_process
from lineament.convert.prompts import MakePrompts
from lineament.convert.text import Corpus
from lineament.convert.transfer import GATES
from lineament.train import FitConfig, fit
from lineament.train.loop import to_device
from lineament.train.sharded import is_sharded

Batch = dict[str, Tensor]
Batches = Callable[[int], Batch]
ANSWER_WEIGHT = 32.0  # an answer's token counts as this many tokens of text: prompts are long, answers short


def batches(
    plan: Plan,
    corpus: Corpus,
    prompts: MakePrompts | None,
    lengths: Sequence[int],
    *,
    offset: int = 0,
    reach: int = 0,
) -> Batches:
    """Return the batch of a step: text or, for the plan's share of steps, retrieval prompts. Lengths take turns.

    Args:
        reach: how far positions go, see `positions.jumped_positions`.
    """

    def batch(step: int) -> Batch:
        step += offset
        length = lengths[step % len(lengths)]
        rows = max(1, plan.distil_tokens // length)
        lot = torch.rand(1, generator=generator(plan.seed * 7919 + step)).item()
        if prompts is not None and lot < plan.distil_retrieval:
            ids, answer = prompts(length, rows, step)
            weight = torch.where(answer[:, 1:], ANSWER_WEIGHT, 1.0)
        else:
            ids, weight = corpus.batch(step, length, rows), torch.ones(rows, length - 1)
        positions = jumped_positions(ids, reach, plan.seed * 5003 + step)
        return {"ids": ids, "weight": weight} | ({} if positions is None else {"positions": positions})

    return batch


def scored_positions(plan: Plan, length: int, weight: Tensor, step_seed: int) -> Tensor:
    """Return the predictions that are scored: all, or a draw of `distil_positions` that keeps every answer.

    Drawn ones lie beyond the window where the text is long enough: before it, student and teacher are the same.
    """
    if not plan.distil_positions or plan.distil_positions >= length - 1:
        return torch.arange(length - 1)
    lots = torch.rand(length - 1, generator=generator(step_seed))
    if plan.window + plan.distil_positions < length:
        lots[: plan.window] -= 1
    must = (weight > 1).any(0).cpu()
    lots[must] += 2
    return lots.topk(max(plan.distil_positions, int(must.sum()))).indices.sort().values


def make_loss(teacher: "Teacher", plan: Plan) -> Callable[[nn.Module, Batch], tuple[Tensor, dict[str, float]]]:
    """Return the loss (student, batch) -> (scalar, named numbers): the plan's KL and next-token weights."""

    def loss(student: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        ids, weight = batch["ids"], batch["weight"]
        keep = scored_positions(plan, ids.shape[1], weight, int(ids[0, :64].sum())).to(ids.device)
        ours = student(**model_inputs(ids, batch.get("positions")), use_cache=False, logits_to_keep=keep).logits
        wanted = teacher.logits(batch, keep) if plan.distil_kl else ours.detach()
        share = weight.to(ids.device)[:, keep].reshape(-1)
        share = share / share.sum().clamp_min(1e-6)
        targets = ids[:, 1:][:, keep].reshape(-1)
        ours, wanted = (one.reshape(-1, one.shape[-1]) for one in (ours, wanted))
        return distil_loss(ours, wanted, targets, kl=plan.distil_kl * share, following=plan.distil_next * share)

    return loss


class Teacher:
    """The teacher's logits for a batch: run on the spot, or read from a cache of its k best per prediction."""

    def __init__(self, model: Any, precision: str, folder: Path | None = None, top: int = 0) -> None:
        self.model, self.precision, self.folder, self.top = model.eval().requires_grad_(False), precision, folder, top

    @torch.no_grad()
    def logits(self, batch: Batch, keep: Tensor) -> Tensor:
        """Return [B, N, vocabulary] logits of the predictions `keep`."""
        if self.folder is None or not self.top:
            return self._run(batch, keep)
        path = self.folder / f"{_name(batch)}.safetensors"
        missing = not path.exists()
        if any_process(missing) if is_sharded(self.model) else missing:  # a sharded model runs in all or in none
            full = self._run(batch, torch.arange(batch["ids"].shape[1] - 1, device=batch["ids"].device))
            logs = full.float().log_softmax(-1)
            best = logs.topk(min(self.top, logs.shape[-1]), dim=-1)
            held = {"values": best.values.half(), "indices": best.indices.int()}
            if missing:
                io.save_tensors({name: one.cpu().contiguous() for name, one in held.items()}, path)
        found = io.open_weights(path)
        values, indices = found.load("values").float(), found.load("indices").long()
        return _spread(values[:, keep.cpu()], indices[:, keep.cpu()], self.vocabulary).to(batch["ids"].device)

    @property
    def vocabulary(self) -> int:
        """Size of the teacher's vocabulary."""
        return self.model.get_output_embeddings().weight.shape[0]

    def nbytes(self) -> int:
        """Return the bytes of the cache on disk."""
        if self.folder is None or not self.folder.exists():
            return 0
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _run(self, batch: Batch, keep: Tensor) -> Tensor:
        home = next(self.model.parameters()).device
        inputs = to_device(model_inputs(batch["ids"], batch.get("positions")), home)
        with autocast(self.precision, home):
            logits = self.model(**inputs, use_cache=False, logits_to_keep=keep.to(home)).logits
        return logits.to(batch["ids"].device)


def _spread(values: Tensor, indices: Tensor, vocabulary: int) -> Tensor:
    """Put the k best log probabilities back in place; the rest share what is left evenly."""
    left = (1 - values.exp().sum(-1, keepdim=True)).clamp_min(1e-6) / max(1, vocabulary - values.shape[-1])
    full = left.log().expand(*values.shape[:-1], vocabulary).clone()
    return full.scatter_(-1, indices, values)


def _name(batch: Batch) -> str:
    import hashlib

    named = hashlib.sha256(batch["ids"].cpu().numpy().tobytes())
    if "positions" in batch:
        named.update(batch["positions"].cpu().numpy().tobytes())
    return named.hexdigest()[:24]


def learners(student: nn.Module, plan: Plan, targets: Sequence[str]) -> nn.Module:
    """Freeze the student, free what the plan lets learn, and wrap it for LoRA when asked.

    Args:
        targets: names of the projections that LoRA joins.

    Returns:
        The module to train: the student itself, or peft's wrapper around it.
    """
    student.requires_grad_(plan.distil == "full")
    model: nn.Module = student
    if plan.distil == "lora":
        peft = require("peft", extra="lora")
        config = peft.LoraConfig(
            r=plan.lora_rank, lora_alpha=2 * plan.lora_rank, target_modules=list(targets), bias="none"
        )
        with seeded(plan.seed):
            model = peft.get_peft_model(student, config)
    for name, parameter in model.named_parameters():
        # norms are a handful of numbers beside LoRA's, and re-scale what a changed attention writes
        if (".mixer." in name and "lora_" not in name) or (plan.distil == "lora" and "norm" in name):
            parameter.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"distil {plan.distil!r}: nothing can learn, the mixer {plan.mixer} has no parameters")
    return model


def merged(model: Any) -> nn.Module:
    """Fold LoRA into the weights and return the plain student; a student without LoRA comes back as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def fit_config(plan: Plan, steps: int, precision: str) -> FitConfig:
    """Return the training set-up of distillation."""
    return FitConfig(
        steps=steps,
        lr={f"*.mixer.{gate}": plan.distil_gate_lr for gate in GATES}
        | {"*.mixer.*": plan.distil_mixer_lr, "*": plan.distil_lr},
        schedule="linear",
        warmup=min(8, steps // 5),
        accumulate=PartialState().num_processes,
        clip=1.0,
        precision=precision,
        seed=plan.seed,
        checkpoint_every=plan.checkpoint_every,
    )


def distil(
    model: nn.Module,
    teacher: Teacher,
    plan: Plan,
    draw: Batches,
    steps: int,
    folder: Path,
    *,
    precision: str,
    on_step: Callable[..., Any] | None = None,
) -> None:
    """Train `model` (from `learners`) in place for `steps`, going on from a checkpoint in `folder`."""
    model.train()
    fit(model, draw, make_loss(teacher, plan), fit_config(plan, steps, precision), out=folder, on_step=on_step)
    model.eval()


def unwrapped(model: Any) -> nn.Module:
    """Take LoRA off again without merging it."""
    return model.unload() if hasattr(model, "unload") else model
