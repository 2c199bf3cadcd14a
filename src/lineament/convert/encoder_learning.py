"""What an encoder's student learns: attention transfer into its maps, then its teacher's hidden states."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament._base.seeds import generator, seeded
from lineament.convert.encoder_plan import EncoderPlan
from lineament.convert.precision import resolve
from lineament.convert.probe import Call, probing
from lineament.models import find_device, head_shape
from lineament.models.encoder import build_encoder, encoder_mixers, self_attentions
from lineament.nn import MixerConfig
from lineament.train import FitConfig, fit, to_device

SPREAD = 0.5  # length of the starting directions, in units of those that would make unbiased random features
SHORTEST = 80  # characters of a paragraph that counts as text
SIMILARITY = 0.1  # weight of the pairwise similarities: few pairs fit into a batch, so their gradient is noisy
WARMUP = 10


def paragraphs(documents: Sequence[str], limit: int | None = None, *, seed: int = 0) -> list[str]:
    """Return the paragraphs of documents (at least 80 characters each) in a drawn order, `limit` of them at most."""
    found = [part.strip() for text in documents for part in text.split("\n\n") if len(part.strip()) >= SHORTEST]
    order = torch.randperm(len(found), generator=generator(seed)).tolist()
    return [found[i] for i in order[:limit]]


def encoded(tokenizer: Any, texts: Sequence[str], length: int) -> dict[str, Tensor]:
    """Return the model's inputs for a batch of texts, cut to `length` tokens and padded."""
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"))


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the sentence embedding [B, D]: the mean over real tokens, of length 1."""
    weight = mask[..., None].to(hidden.dtype)
    return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1).clamp_min(1.0), dim=-1)


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, length: int = 128, rows: int = 32) -> Tensor:
    """Return the embeddings [N, D] of texts: mean pooling, length 1."""
    found = []
    for at in range(0, len(texts), rows):
        batch = _beside(model, encoded(tokenizer, texts[at : at + rows], length))
        found.append(mean_pool(_base(model)(**batch).last_hidden_state.float(), batch["attention_mask"]))
    return torch.cat(found).cpu()


def rank_correlation(ours: Tensor, theirs: Tensor) -> float:
    """Return Spearman's correlation between the pairwise similarities of two sets of embeddings [N, D].

    Example:
        >>> x = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
        >>> round(rank_correlation(x, x), 6)
        1.0
    """
    from scipy.stats import spearmanr

    i, j = torch.triu_indices(len(ours), len(ours), offset=1)
    pairs = [((x[i] * x[j]).sum(-1)).double().numpy() for x in (ours, theirs)]
    return float(spearmanr(pairs[0], pairs[1]).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def _base(model: nn.Module) -> nn.Module:
    """Return the encoder without its head."""
    return getattr(model, "base_model", model)


def _beside(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch on the model's device: training may run on an accelerator while the teacher stays where it is."""
    return to_device(batch, next(model.parameters()).device)


def text_batches(
    tokenizer: Any, texts: Sequence[str], plan: EncoderPlan, rows: int, first: int = 0
) -> Callable[[int], dict[str, Tensor]]:
    """Return the batch of a step, beginning with text `first`: in a new drawn order whenever all have been seen."""

    @cache
    def order(turn: int) -> list[int]:
        return torch.randperm(len(texts), generator=generator(plan.seed * 100_003 + turn)).tolist()

    def batch(step: int) -> dict[str, Tensor]:
        places = (divmod(first + step * rows + row, len(texts)) for row in range(rows))
        return encoded(tokenizer, [texts[order(turn)[at]] for turn, at in places], plan.length)

    return batch


def attention_divergence(weights: Tensor, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Return the mean KL in nats from softmax rows to the given weights [B, H, T, T], over real queries.

    `mean_i sum_j a_ij (log a_ij - log weights_ij)`: the soft-target cross-entropy less the teacher's entropy.

    Args:
        q, k: [B, T, H, K], q scaled. mask: [B, T], nonzero for real tokens.
    """
    logits = torch.einsum("bihk,bjhk->bhij", q.float(), k.float())
    log_teacher = logits.masked_fill(~mask.bool()[:, None, None], -torch.inf).log_softmax(-1)
    teacher = log_teacher.exp()
    rows = (teacher * (log_teacher.clamp_min(-60.0) - weights.float().clamp_min(1e-9).log())).sum(-1)
    real = mask[:, None].to(rows.dtype).expand_as(rows)
    return (rows * real).sum() / real.sum()


def output_error(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return `|output - target|^2 / |target|^2` over real tokens: one number that layers of any scale share."""
    real = mask.to(torch.float32).view(*mask.shape, *[1] * (output.dim() - 2))
    gap = ((output.float() - target.float()).square() * real).sum()
    return gap / (target.float().square() * real).sum().clamp_min(1e-12)


def transfer_loss(teacher: nn.Module, kind: str) -> Callable[[nn.Module, Mapping[str, Tensor]], Any]:
    """Return the loss (mixers, batch) -> (scalar, named numbers) of the first step.

    The teacher runs on the batch; each mixer ({layer number as text: mixer}) sees its own layer's queries, keys and
    values there, so layers learn independently of one another in one pass.
    """
    attentions = [module for _, module in self_attentions(teacher).values()]

    def loss(mixers: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        calls: dict[int, tuple[Tensor, ...]] = {}

        def handle(call: Call) -> Tensor:
            target = call.ordinary()
            calls[call.layer] = tuple(x.float() for x in (call.scaled_query(), call.key, call.value, target))
            return target

        with torch.no_grad(), probing(attentions, handle):
            _base(teacher)(**_beside(teacher, batch))
        mask, numbers = batch["attention_mask"], {}
        total = torch.zeros((), device=mask.device)
        with torch.autocast(mask.device.type, enabled=False):
            for name, mixer in mixers.items():
                q, k, v, target = (x.to(mask.device) for x in calls[int(name)])
                weights = mixer.weights(q, k, mask=mask) if kind != "output-mse" else None
                parts = {}
                if weights is not None:
                    parts["kl"] = attention_divergence(weights, q, k, mask)
                if kind != "attention-kl":
                    output = mixer(q, k, v, mask=mask)
                    parts["error"] = output_error(output, target, mask)
                total = total + sum(parts.values()) / len(mixers)
                numbers |= {f"{part}_{name}": float(x.detach()) for part, x in parts.items()}
        return total, numbers

    return loss


def distil_loss(teacher: nn.Module) -> Callable[[nn.Module, Mapping[str, Tensor]], Any]:
    """Return the loss (student, batch) -> (scalar, named numbers) of the second step.

    Relative error of the hidden states, mean over layers; distance of the embeddings, `1 - cos`; and squared error of
    the pairwise similarities inside the batch, relative to their variance (times `SIMILARITY`).
    """

    def loss(student: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        mask = batch["attention_mask"]
        with torch.no_grad():
            found = _base(teacher)(**_beside(teacher, batch), output_hidden_states=True).hidden_states
            theirs = [x.to(mask.device) for x in found]
        ours = _base(student)(**batch, output_hidden_states=True).hidden_states
        gaps = [output_error(x, y, mask) for x, y in zip(ours[1:], theirs[1:], strict=True)]
        e, f = (mean_pool(x[-1].float(), mask) for x in (ours, theirs))
        i, j = torch.triu_indices(len(e), len(e), offset=1, device=e.device)
        s, t = ((x[i] * x[j]).sum(-1) for x in (e, f))
        parts = {
            "hidden": torch.stack(gaps).mean(),
            "embedding": (1 - (e * f).sum(-1)).mean(),
            "similarity": (s - t).square().mean() / t.var(unbiased=False).clamp_min(1e-4),
        }
        total = parts["hidden"] + parts["embedding"] + SIMILARITY * parts["similarity"]
        return total, {name: float(x.detach()) for name, x in parts.items()}

    return loss


def fresh_student(teacher: nn.Module, plan: EncoderPlan) -> nn.Module:
    """Return the teacher with untrained maps in every layer that is not kept."""
    layers = self_attentions(teacher)
    if wrong := [layer for layer in plan.keep if layer not in layers]:
        raise InputError(f"plan field keep has layer {wrong[0]}; the model has layers 0 to {len(layers) - 1}")
    shape: dict[str, Any] = {**head_shape(teacher.config), "window": 0, "sinks": 0, "options": plan.options}
    config = MixerConfig(kind=plan.map, **shape)
    with seeded(plan.seed):
        student = build_encoder(teacher, {layer: config for layer in layers if layer not in plan.keep}).eval()
    if plan.map == "hedgehog" and plan.start == "orthogonal":
        draw = generator(plan.seed)
        for mixer in encoder_mixers(student).values():
            spread_(mixer, draw)
    return student


@torch.no_grad()
def spread_(mixer: Any, draw: torch.Generator) -> None:
    """Start Hedgehog's maps from orthogonal directions, the same for queries and keys of a head.

    A softmax over random directions w is a positive random feature `e^(w.x) / sum_w e^(w.x)` whose denominator is
    close to the factor `e^(|x|^2/2)` that makes `phi(q).phi(k)` an estimate of `e^(q.k)`: a start near the goal.
    """
    heads, width, features = mixer.map_k.weight.shape
    groups = mixer.map_q.weight.shape[0] // heads
    blocks = [torch.linalg.qr(torch.randn(heads, width, width, generator=draw)).Q for _ in range(-(-features // width))]
    directions = torch.cat(blocks, dim=-1)[..., :features] * (SPREAD * math.sqrt(width))
    mixer.map_k.weight.copy_(directions)
    mixer.map_q.weight.copy_(directions.repeat_interleave(groups, dim=0))


def convert_encoder(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    plan: EncoderPlan | None = None,
    folder: str | Path | None = None,
    on_stage: Callable[[str, nn.Module], None] | None = None,
) -> nn.Module:
    """Convert an encoder: attention transfer into the maps, then end-to-end finetuning on the teacher.

    Args:
        model: a BERT-type teacher; not changed. texts: what to learn from, one sentence or paragraph each.
        plan: default: `EncoderPlan()`. folder: takes checkpoints, so that the same call goes on after a kill.
        on_stage: called with ("swap", "transfer" or "distil", student) after each stage.

    Returns:
        The student, in eval mode, on the teacher's device.

    Raises:
        InputError: the model is no encoder of a known family, the plan does not fit it, or there are too few texts.
    """
    plan = plan or EncoderPlan()
    most = max(plan.transfer_rows, plan.distil_rows)
    if len(texts) < most:
        raise InputError(f"there are {len(texts)} texts and one batch needs {most}; give more text or fewer rows")
    teacher = model.eval().requires_grad_(False)
    student, seen = fresh_student(teacher, plan), plan.transfer_steps * plan.transfer_rows
    batches = text_batches(tokenizer, texts, plan, plan.transfer_rows)
    mixers = nn.ModuleDict({str(layer): mixer for layer, mixer in encoder_mixers(student).items()})
    home = next(teacher.parameters()).device

    def tell(stage: str) -> None:
        student.to(home)  # training may have moved what it trained to an accelerator
        if on_stage:
            on_stage(stage, student)

    tell("swap")
    learn(mixers.requires_grad_(True), batches, transfer_loss(teacher, plan.transfer_loss), plan, folder, "transfer")
    tell("transfer")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".layer." in name)
    batches = text_batches(tokenizer, texts, plan, plan.distil_rows, seen)
    learn(student, batches, distil_loss(teacher), plan, folder, "distil")
    tell("distil")
    return student.requires_grad_(True).eval()


def learn(model: nn.Module, batches: Any, loss: Any, plan: EncoderPlan, folder: str | Path | None, stage: str) -> None:
    """Run one stage of training; a stage without steps, or without anything to learn, is left out."""
    steps = getattr(plan, f"{stage}_steps")
    if not steps or not any(p.requires_grad for p in model.parameters()):
        return
    rates = {"*.mixer.*": plan.distil_map_lr, "*": plan.distil_lr} if stage == "distil" else plan.transfer_lr
    config = FitConfig(
        steps=steps, lr=rates, warmup=min(WARMUP, steps // 4), precision=resolve(plan.precision, find_device()),
        seed=plan.seed, checkpoint_every=plan.checkpoint_every, betas=(0.9, 0.99),
    )  # fmt: skip
    fit(model, batches, loss, config, out=Path(folder) / stage if folder else None, description=stage)
