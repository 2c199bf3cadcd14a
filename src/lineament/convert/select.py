"""What stays softmax: measured damage per layer and key-value head, and the rules that choose by it.

Damage is what a model loses when one head (or one layer) sees only its window and sinks while all else stays whole:
the rise of the loss on text, the KL to the whole model, and the rise of the loss on answers that lie far back.
"""

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from lineament import io
from lineament._base.errors import InputError
from lineament.convert.inspect import SHARE_CONTEXT, head_count, product_numbers
from lineament.convert.plan import Plan, parse_keep

SHIPPED = ("smollm2.json",)


@dataclass(frozen=True, kw_only=True)
class DamageTable:
    """Damage per layer and key-value head, in nats per token.

    Args:
        teacher: digest of the model it belongs to (`teacher_digest`).
        window, sinks: what a limited head still sees.
        perplexity: [L, Hk] rise of the next-token loss on calibration text, beyond the window.
        kl: [L, Hk] KL from the whole model to the limited one at the same positions.
        retrieval: [L, Hk] rise of the loss on the answers of retrieval prompts.
        slopes: {"0.5": {"kl", "retrieval": [L, Hk]}, "1.0": ...}: what one head is worth when all heads are half or
            wholly limited, by one backward; single damages don't see that heads stand in for one another.
        about: how it was made: text, tokens, prompts, seed, command; `layers`: those measured, when not all.
    """

    teacher: str
    window: int
    sinks: int
    perplexity: list[list[float]]
    kl: list[list[float]]
    retrieval: list[list[float]]
    slopes: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DamageTable":
        """Read a table back; raises InputError when fields are missing."""
        names = {one.name for one in fields(cls)}
        if missing := names - {"about", "slopes"} - set(values):
            raise InputError(f"a damage table lacks {', '.join(sorted(missing))}; make it again with convert")
        return cls(**{name: value for name, value in values.items() if name in names})

    def save(self, path: Path) -> None:
        """Write the table as JSON, atomically."""
        io.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "DamageTable":
        """Read a table saved by `save`."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))

    def scores(self) -> list[list[float]]:
        """Combine text and retrieval into one score per head, [L, Hk]; the scores of all heads sum to 2.

        Each kind of damage is divided by its own sum over all heads, so that text and retrieval choose with equal
        voice; negative values are noise and count as none. Text is scored by the KL, which is smoother than the
        loss on the same few tokens: the mean of the measured column and the slopes. Retrieval: half measured, half
        slopes, since a slope knows less of a head that finds.
        """
        text = _mean([_share(self.kl), *(_share(one["kl"]) for one in self.slopes.values())])
        found = _share(self.retrieval)
        if self.slopes:
            found = _mean([found, _mean([_share(one["retrieval"]) for one in self.slopes.values()])])
        return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(text, found, strict=True)]

    def figure(self, kept: "Heads | None" = None) -> bytes:
        """Draw the combined scores as a heat map (PNG); `kept` heads are marked, layers not measured stay blank."""
        from lineament.report.figures import heatmap

        scores = self.scores()
        measured = self.about.get("layers", range(len(scores)))
        rows = [row if layer in measured else [math.nan] * len(row) for layer, row in enumerate(scores)]
        return heatmap(
            [list(row) for row in zip(*rows, strict=True)],
            title="damage when one head is limited to window + sinks (share of all)",
            xlabel="layer",
            ylabel="key-value head",
            marked={(head, layer) for layer, heads in (kept or {}).items() for head in heads},
        )


def _mean(tables: list[list[list[float]]]) -> list[list[float]]:
    return [[sum(one) / len(tables) for one in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def _share(table: list[list[float]]) -> list[list[float]]:
    total = sum(max(x, 0.0) for row in table for x in row) or 1.0
    return [[max(x, 0.0) / total for x in row] for row in table]


Heads = dict[int, tuple[int, ...]]


def kept_heads(
    plan: Plan, layers: int, key_heads: int, table: DamageTable | None = None, *, sliding: Collection[int] = ()
) -> Heads:
    """Apply a plan's keep rule.

    Args:
        layers: L. key_heads: key-value heads per layer. table: needed by the auto rules.
        sliding: layers that a conversion never touches. They are neither ranked nor counted: a share is one of the
            heads that may be converted, and a share above 0 keeps at least one of them.

    Returns:
        {layer: key-value heads that stay softmax}, only layers that keep some.

    Raises:
        InputError: a layer outside the model, or more than may be converted.

    Example:
        >>> kept_heads(Plan(keep="every:4"), 8, 2)
        {3: (0, 1), 7: (0, 1)}
    """
    rule, numbers = parse_keep(plan.keep)
    whole = tuple(range(key_heads))
    free = [layer for layer in range(layers) if layer not in sliding]
    if rule == "none":
        return {}
    if rule == "all":
        return dict.fromkeys(free, whole)
    if rule == "every":
        return dict.fromkeys((i for i in free if (i + 1) % int(numbers[0]) == 0), whole)
    if rule == "layers":
        chosen = [int(n) for n in numbers]
        if outside := [n for n in chosen if n >= layers]:
            raise InputError(f"keep {plan.keep!r} names layer {outside[0]}; the model has layers 0 to {layers - 1}")
        return dict.fromkeys((i for i in chosen if i in free), whole)
    if rule == "auto" and numbers[0] > len(free):
        raise InputError(f"keep {plan.keep!r} asks for {int(numbers[0])} layers; the model has {len(free)} to convert")
    if table is None:
        raise InputError(f"keep {plan.keep!r} needs a damage table; measure one first")
    scores = table.scores()
    if rule == "auto":
        order = sorted(free, key=lambda i: (-sum(scores[i]), i))[: int(numbers[0])]
        return dict.fromkeys(sorted(order), whole)
    count = head_count(numbers[0], len(free) * key_heads)
    ranked = sorted(((i, h) for i in free for h in range(key_heads)), key=lambda p: (-scores[p[0]][p[1]], p))
    kept: dict[int, list[int]] = {}
    for layer, head in sorted(ranked[:count]):
        kept.setdefault(layer, []).append(head)
    return {layer: tuple(heads) for layer, heads in kept.items()}


CODES = (16, 32, 64, 128)  # of a head's codebooks, when codes are given out by damage


def allotted_codes(
    plan: Plan, shapes: dict[int, dict[str, int]], full: Heads, table: DamageTable
) -> dict[int, tuple[int, ...]]:
    """Give every converted head its codes, so that the whole cache stays within `plan.state_share`.

    A head's features grow with what it is worth, in steps of `CODES`: a searching head must tell
    many keys apart, most heads few.

    Args:
        shapes: {layer: key_heads, key_width, value_width, ...} of the layers that may be converted.

    Returns:
        {layer: codes of each key-value head}, the fewest for heads that stay softmax.

    Raises:
        InputError: the share has no room even for the fewest codes.

    Example:
        >>> shapes = {i: {"key_heads": 2, "key_width": 8, "value_width": 8} for i in (0, 1)}
        >>> worth = [[1.0, 1.0], [1.0, 9.0]]
        >>> table = DamageTable(teacher="", window=4, sinks=1, perplexity=worth, kl=worth, retrieval=worth)
        >>> plan = Plan(window=4, sinks=1, state_share=0.009, options={"map": "product"})
        >>> allotted_codes(plan, shapes, {}, table)
        {0: (16, 16), 1: (16, 32)}
    """
    scores, room = table.scores(), 0.0
    found = {layer: [CODES[0]] * shape["key_heads"] for layer, shape in shapes.items()}
    steps = []
    for layer, shape in shapes.items():
        kept = full.get(layer, ())
        room += SHARE_CONTEXT * (shape["key_width"] + shape["value_width"]) * (
            plan.state_share * shape["key_heads"] - len(kept)
        )  # fmt: skip
        for head in set(range(shape["key_heads"])) - set(kept):
            room -= sum(product_numbers(plan, shape, CODES[0]))
            worth = max(scores[layer][head], 1e-9)
            steps += [(codes * codes / worth, layer, head, codes) for codes in CODES[1:]]
    if room < 0:
        raise InputError(
            f"state_share {plan.state_share}: the softmax heads, windows and the smallest states need more of the "
            f"teacher's cache at {SHARE_CONTEXT} tokens; keep fewer heads or raise the share"
        )
    for _, layer, head, codes in sorted(steps):
        now, then = (sum(product_numbers(plan, shapes[layer], c)) for c in (found[layer][head], codes))
        if then - now <= room:
            found[layer][head], room = codes, room - (then - now)
    return {layer: tuple(codes) for layer, codes in found.items() if len(full.get(layer, ())) < len(codes)}


def exact_part(plan: Plan) -> tuple[int, int]:
    """Return (window, sinks) under which damage is measured: the plan's, or 128 and 4 for mixers without either."""
    return (plan.window, plan.sinks) if plan.window + plan.sinks else (128, 4)


def needs_table(plan: Plan) -> bool:
    """Say whether a plan's keep rule, or the giving out of its codes, asks for a damage table."""
    return parse_keep(plan.keep)[0].startswith("auto") or plan.state_share > 0


def shipped_table(digest: str, *, window: int, sinks: int) -> DamageTable | None:
    """Return the packaged table made for exactly this teacher, window and sinks; None if there is none."""
    for name in SHIPPED:
        path = files("lineament.convert").joinpath("damage").joinpath(name)
        if not path.is_file():
            continue
        table = DamageTable.from_json(json.loads(path.read_text(encoding="utf-8")))
        if table.teacher == digest and (table.window, table.sinks) == (window, sinks):
            return table
    return None


def correlation(one: DamageTable, other: DamageTable) -> dict[str, float]:
    """Compare two tables: Spearman's rank correlation per column, and the overlap of the worst quarter."""
    from scipy.stats import spearmanr

    def flat(rows: Iterable[Iterable[float]]) -> list[float]:
        return [x for row in rows for x in row]

    found = {}
    for name in ("kl", "retrieval"):
        found[name] = float(spearmanr(flat(getattr(one, name)), flat(getattr(other, name))).statistic)
    a, b = flat(one.scores()), flat(other.scores())
    count = max(1, len(a) // 4)
    worst = [set(sorted(range(len(x)), key=lambda i: -x[i])[:count]) for x in (a, b)]
    return found | {"worst_quarter_shared": len(worst[0] & worst[1]) / count}


@dataclass(frozen=True)
class Sample:
    """Rows to score: token ids and which predictions count, given as (row, position of the predicted token).

    Args:
        kind: "text" or "retrieval". ids: [B, T]. rows, positions: [N] the scored tokens.
    """

    kind: str
    ids: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


def text_sample(ids: torch.Tensor, *, first: int, every: int = 4) -> Sample:
    """Score every `every`-th token of [B, T] ids from `first` on."""
    first = min(first, ids.shape[1] // 2)
    at = torch.arange(max(first, 1), ids.shape[1], every)
    rows = torch.arange(ids.shape[0]).repeat_interleave(len(at))
    return Sample("text", ids, rows, at.repeat(ids.shape[0]))


def answer_samples(ids: torch.Tensor, answer: torch.Tensor, batch: int = 8) -> list[Sample]:
    """Score the answers of prompts: ids [N, T] and which tokens are answers, bool [N, T]."""
    samples = []
    for at in range(0, len(ids), batch):
        rows, positions = answer[at : at + batch].nonzero(as_tuple=True)
        samples.append(Sample("retrieval", ids[at : at + batch], rows, positions))
    return samples
