"""What to predict and how it is scored: perplexity, retrieval, agreement with a teacher, and what a model costs."""

from lineament.tasks.agreement import Agreement, agreement
from lineament.tasks.characters import Characters, character_model, characters, learn_characters, score_characters
from lineament.tasks.contrast import (
    LinearFeatures,
    feature_weights,
    info_nce,
    pair_loss,
    population_loss,
    shifted_views,
    spectral_loss,
    spurious_corner,
    supervised_contrastive,
)
from lineament.tasks.cost import (
    Speed,
    cache_bytes,
    decode_speed,
    filled_cache,
    in_turn,
    is_student,
    peak_memory,
    prefill_speed,
)
from lineament.tasks.haystack import Haystack
from lineament.tasks.match3 import match3, match3_batch, match3_by_hand
from lineament.tasks.mixing import mixing_weights, near_share
from lineament.tasks.perplexity import (
    ContextGain,
    Perplexity,
    bootstrap_ratio,
    context_gain,
    gain_kept,
    perplexity,
    perplexity_by_length,
)
from lineament.tasks.predictions import next_token_loss, token_nll
from lineament.tasks.probes import PROBES, effective_rank, knn_probe, probe_depths, ridge_probe, sensitivity
from lineament.tasks.recall import RECALLS, Recall, recall_loss, score_recall
from lineament.tasks.restore import class_means, lowered, nearest_prototype, noisy, psnr, restoration_loss
from lineament.tasks.retrieval import (
    FACTS,
    Prompt,
    Prompts,
    Retrieval,
    make_prompts,
    paired_points,
    score,
    train_examples,
)
from lineament.tasks.shared_haystack import Body, make_bodies, score_bodies
from lineament.tasks.templates import KINDS, SETS

__all__ = [
    "FACTS",
    "KINDS",
    "PROBES",
    "RECALLS",
    "SETS",
    "Agreement",
    "Body",
    "Characters",
    "ContextGain",
    "Haystack",
    "LinearFeatures",
    "Perplexity",
    "Prompt",
    "Prompts",
    "Recall",
    "Retrieval",
    "Speed",
    "agreement",
    "bootstrap_ratio",
    "cache_bytes",
    "character_model",
    "characters",
    "class_means",
    "context_gain",
    "decode_speed",
    "effective_rank",
    "feature_weights",
    "filled_cache",
    "gain_kept",
    "in_turn",
    "info_nce",
    "is_student",
    "knn_probe",
    "learn_characters",
    "lowered",
    "make_bodies",
    "make_prompts",
    "match3",
    "match3_batch",
    "match3_by_hand",
    "mixing_weights",
    "near_share",
    "nearest_prototype",
    "next_token_loss",
    "noisy",
    "pair_loss",
    "paired_points",
    "peak_memory",
    "perplexity",
    "perplexity_by_length",
    "population_loss",
    "prefill_speed",
    "probe_depths",
    "psnr",
    "recall_loss",
    "restoration_loss",
    "ridge_probe",
    "score",
    "score_bodies",
    "score_characters",
    "score_recall",
    "sensitivity",
    "shifted_views",
    "spectral_loss",
    "spurious_corner",
    "supervised_contrastive",
    "token_nll",
    "train_examples",
]
