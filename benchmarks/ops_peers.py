"""What a user without our library runs on a CPU: torch's attention, transformers' fallbacks, fla's plain formulas.

Each peer maps the benchmark's inputs (q, k, v, beta, head and channel log decays, [B, T, H, ..]) to its output. A peer
whose package is missing is None.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from lineament._base.extras import available

Data = dict[str, Tensor]


def sdpa(x: Data) -> Tensor:
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def qwen3_next(x: Data) -> Tensor:
    return torch_chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["head"], x["beta"])[0]


def kimi(x: Data) -> Tensor:
    return chunk_kimi_delta_attention(x["q"], x["k"], x["v"], x["channel"], x["beta"])[0]


def mamba2(x: Data) -> Tensor:
    """The scan alone: dt = 1, so v holds dt x and the (constant) decay is A."""
    ones = torch.ones_like(x["beta"])
    return mamba2_chunk_scan(x["v"], ones, -torch.ones(x["v"].shape[2]) / 16, x["k"], x["q"], chunk_size=256)


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def _minimax() -> Callable[[Data], Tensor]:
    """The tiles of MiniMax's layer: its projections, norm and gate are taken out (one multiplication by 1/2 stays)."""
    config = MiniMaxConfig(hidden_size=512, num_attention_heads=8, head_dim=64, num_hidden_layers=4)
    layer = MiniMaxLightningAttention(config, 0)
    layer.act_fn = layer.norm = layer.qkv_proj = layer.out_proj = nn.Identity()
    layer.output_gate = _Zero()

    def run(x: Data) -> Tensor:
        joined = torch.cat([x["q"], x["k"], x["v"]], -1).flatten(2)
        return layer(joined, (joined, joined), None)[0].view(x["v"].shape)

    return run


def _fla(place: str, function: str, *names: str, heads_first: bool = False) -> Callable[[Data], Tensor] | None:
    """A plain formula of flash-linear-attention, from its file alone: the package can't be imported without a GPU."""
    if not (available("fla") and available("einops")):
        return None
    formula = run_path(str(Path(find_spec("fla").submodule_search_locations[0]) / place))[function]  # type: ignore

    def run(x: Data) -> Tensor:
        given = [x[name].transpose(1, 2) if heads_first else x[name] for name in names]
        out = formula(*given)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2) if heads_first else out

    return run


def _hgrn() -> Callable[[Data], Tensor] | None:
    formula = _fla("ops/hgrn/naive.py", "naive_recurrent_hgrn", "v", "channel")
    return formula and (lambda x: formula({"v": x["v"].flatten(2), "channel": x["channel"].flatten(2)}))


_GATED = ("q", "k", "v", "head", "beta")

PEERS: dict[str, Callable[[Data], Tensor] | None] = {
    "sdpa": sdpa,
    "qwen3-next": qwen3_next,
    "kimi": kimi,
    "minimax": _minimax(),
    "mamba2": mamba2,
    "fla linear": _fla("ops/linear_attn/naive.py", "naive_chunk_linear_attn", "q", "k", "v"),
    "fla scalar": _fla("ops/simple_gla/naive.py", "naive_chunk_simple_gla", "q", "k", "v", "head"),
    "fla gla": _fla("ops/gla/naive.py", "naive_recurrent_gla", "q", "k", "v", "channel"),
    "fla hgrn": _hgrn(),
    "fla delta": _fla("ops/delta_rule/naive.py", "delta_rule_chunkwise", "q", "k", "v", "beta", heads_first=True),
    "fla gated delta": _fla("ops/gated_delta_rule/naive.py", "naive_chunk_gated_delta_rule", *_GATED),
}
