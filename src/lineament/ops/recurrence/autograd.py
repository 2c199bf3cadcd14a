"""The chunked form in plain operators: what tracing, explaining and second derivatives use.

Formulas of `walk.py`. Per-channel decays are taken pairwise in chunks of 16, masked before exp.
"""

import torch
from torch import Tensor

from lineament._base.backends import widest

CHUNK, CHUNK_CHANNEL = 64, 16


def run_decayed(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run decayed attention; the protocol of the package's docstring."""
    return _run(q, k, v, None, log_decay, state, chunk_size)


def run_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the delta rule; the protocol of the package's docstring."""
    return _run(q, k, v, beta, log_decay, state, chunk_size)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    Hs, dtype = state.shape[1], state.dtype
    channels = log_decay is not None and log_decay.dim() == 4
    size = min(chunk_size or CHUNK, CHUNK_CHANNEL) if channels else chunk_size or CHUNK
    split = [_heads_first(x, Hs).to(dtype).split(size, dim=3) for x in (q, k, v)]
    scalars = [
        None if x is None else (x if x.dim() == 4 else x[..., None]).transpose(1, 2).split(size, dim=2)
        for x in (beta, log_decay)
    ]
    outputs = []
    for index, (q_c, k_c, v_c) in enumerate(zip(*split, strict=True)):
        beta_c, gate_c = (None if x is None else x[index] for x in scalars)
        out, state = _chunk(q_c, k_c[:, :, 0], v_c[:, :, 0], beta_c, gate_c, state)
        outputs.append(out)
    o = torch.cat(outputs, dim=3)  # [B, Hs, r, T, V]
    return o.permute(0, 3, 1, 2, 4).flatten(2, 3).to(v.dtype), state


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """Turn [B, T, H, W] into [B, Hs, r, T, W], repeating heads where there are fewer than Hs."""
    if x.shape[2] < heads:
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
    return x.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, gate: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return o [B, Hs, r, C, V] and the next state for q [B, Hs, r, C, K], k, v, beta, gate [B, Hs, C, ..]."""
    C = k.shape[2]
    since = None if gate is None else gate.to(widest(gate.device)).cumsum(2)  # [B, Hs, C, 1 or K]
    read, weight = _read_and_weight(since, k)
    left = torch.ones_like(read) if since is None else (since[:, :, -1:] - since).to(k.dtype).exp()
    if beta is not None:
        kk = _pairs(k[:, :, None], k, weight)[:, :, 0].tril(-1)
        system = torch.eye(C, dtype=k.dtype, device=k.device) + beta * kk
        v = torch.linalg.solve_triangular(system, beta * (v - (k * read) @ state), upper=False, unitriangular=True)
    out = _pairs(q, k, weight) @ v[:, :, None] + (q * read[:, :, None]) @ state[:, :, None]
    return out, read[:, :, -1].unsqueeze(-1) * state + (k * left).mT @ v


def _read_and_weight(since: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return e^G [B, Hs, C, 1 or K] and e^{G_i - G_j} [B, Hs, C, C, 1 or K], 0 for j > i."""
    C = k.shape[2]
    past = torch.ones(C, C, dtype=torch.bool, device=k.device).tril()[..., None]
    if since is None:
        return torch.ones_like(k[..., :1]), past.to(k.dtype).expand(*k.shape[:2], -1, -1, -1)
    gap = (since[:, :, :, None] - since[:, :, None]).to(k.dtype)
    return since.to(k.dtype).exp(), gap.masked_fill(~past, -torch.inf).exp()


def _pairs(x: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """Return the decayed products [B, Hs, r, C, C] of x [B, Hs, r, C, K] with k [B, Hs, C, K]."""
    if weight.shape[-1] == 1:
        return (x @ k[:, :, None].mT) * weight[:, :, None, ..., 0]
    return torch.einsum("bhrik,bhjk,bhijk->bhrij", x, k, weight)
