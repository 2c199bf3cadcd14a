"""Ordinary causal softmax for the heads that keep it, over key-value buffers that grow by chunks."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lineament._base.errors import InputError
from lineament.nn.rows import Rows
from lineament.ops.parallel import Part, active, exchange, tied

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what sdpa calls; returns log sums too
LONG = 4096  # keys from which one token's are read by all threads
CHUNK = 256  # columns by which a full buffer grows: one copy of the cache per 256 tokens
QUERIES = 1024  # of a parallel stretch that read the earlier ranks' keys at once


class KeyValues:
    """Keys and values of the tokens seen, in the columns of the padded block they came in.

    Attributes:
        keys: [B, Hk, capacity, K]. values: [B, Hk, capacity, V].
        valid: [B, capacity] bool, or None while every column seen is a real token.
        length: columns in use.
        value_width: values are the first so many channels of the keys, and are not stored again; None: they are apart.
    """

    def __init__(self, value_width: int | None = None) -> None:
        self.value_width = value_width
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.valid: Tensor | None = None
        self.length = 0

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add k [B, Hk, T, K] and v [B, Hk, T, V]; return all seen. `valid` [B, T]: None when all are real tokens."""
        start, self.length = self.length, self.length + k.shape[2]
        if self.keys is None:
            layout = torch.contiguous_format  # cloned: a head's slice would keep the whole projection alive
            self.keys = k.clone(memory_format=layout)
            self.values = v.clone(memory_format=layout) if self.value_width is None else None
            self.valid = valid
            return k, v
        if torch.is_grad_enabled() and (k.requires_grad or self.keys.requires_grad):
            return self._joined(start, k, v, valid)
        if self.length > self.keys.shape[2]:
            self._grow(start)
        self.keys[:, :, start : self.length] = k
        if self.values is not None:
            self.values[:, :, start : self.length] = v
        if valid is not None and self.valid is None:
            self.valid = torch.ones(self.keys.shape[0], self.keys.shape[2], dtype=torch.bool, device=k.device)
        if self.valid is not None:
            self.valid[:, start : self.length] = True if valid is None else valid
        return self._seen()

    def _seen(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        keys = self.keys[:, :, : self.length]
        return keys, keys[..., : self.value_width] if self.values is None else self.values[:, :, : self.length]

    def _joined(self, start: int, k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Append in new tensors: what gradients were taken through may not be written to."""
        keys, values, known = self.keys, self.values, self.valid
        assert keys is not None
        self.keys = torch.cat([keys[:, :, :start], k], dim=2)
        if values is not None:
            self.values = torch.cat([values[:, :, :start], v], dim=2)
        if valid is not None or known is not None:
            real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
            old = real.new_ones(len(real), start) if known is None else known[:, :start]
            self.valid = torch.cat([old, real if valid is None else valid], dim=1)
        return self._seen()

    def _grow(self, used: int) -> None:
        capacity = -(-self.length // CHUNK) * CHUNK
        assert self.keys is not None

        def grown(x: Tensor, axis: int) -> Tensor:
            shape = list(x.shape)
            shape[axis] = capacity
            new = x.new_empty(shape)
            new.narrow(axis, 0, used).copy_(x.narrow(axis, 0, used))
            return new

        self.keys = grown(self.keys, 2)
        if self.values is not None:
            self.values = grown(self.values, 2)
        if self.valid is not None:
            self.valid = grown(self.valid, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Name the tensors held."""
        found = {"keys": self.keys, "values": self.values, "valid": self.valid}
        return {name: x for name, x in found.items() if x is not None}

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens` columns (the memory stays)."""
        self.length = max(self.length - tokens, 0)

    def select(self, index: Tensor) -> None:
        """Keep (or repeat) the given rows."""
        for name, x in self.tensors().items():
            setattr(self, name, x.index_select(0, index.to(x.device)))

    def mark(self) -> "KeyValues":
        """Return how long the buffer is now, without what it holds: what `crop` comes back to."""
        other = KeyValues(self.value_width)
        other.length = self.length
        return other

    def map(self, function: Callable[[Tensor], Tensor]) -> "KeyValues":
        """Return a buffer of what `function` makes of every tensor."""
        other = KeyValues(self.value_width)
        for name, x in self.tensors().items():
            setattr(other, name, function(x))
        other.length = self.length
        return other

    def copy(self) -> "KeyValues":
        """Return a buffer that appends to this one can't reach."""
        return self.map(Tensor.clone)


def _grouped(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Softmax attention on [B, H, T, K] heads that share keys; q is scaled already."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        groups = 1
    return sdpa(q, k, v, attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=groups > 1)


def _behind(q: Tensor, past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to all of a past and causally to a block behind it: two calls without a mask, joined by their log sums."""
    B, Hq, T, K = q.shape
    before, sums = FLASH(q.reshape(B, k.shape[1], -1, K), past_k, past_v, scale=1.0)
    here, own = FLASH(q, *(x.repeat_interleave(Hq // k.shape[1], 1) for x in (k, v)), is_causal=True, scale=1.0)
    share = (sums.reshape(B, Hq, T) - own).sigmoid().unsqueeze(-1).to(here.dtype)
    return torch.lerp(here, before.reshape(here.shape), share)


def _one_token(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """Let the query heads of one key head stand as rows of one product: no key is repeated."""
    B, Hq, _, K = q.shape
    q = q.reshape(B, k.shape[1], -1, K)
    if valid is None and k.shape[2] >= LONG and _flashes(q, k, v):
        threads, rows = torch.get_num_threads(), B * k.shape[1]
        stretches = threads // math.gcd(threads, rows)  # the kernel gives a row to one thread, whole
        if stretches > 1:
            return _in_stretches(q, k, v, stretches).reshape(B, Hq, 1, v.shape[-1])
    mask = None if valid is None else valid[:, None, None, :]
    return sdpa(q, k, v, attn_mask=mask, scale=1.0).reshape(B, Hq, 1, v.shape[-1])


def _in_stretches(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """Attend to `count` stretches of the keys side by side and to what is left over, joined by their log sums."""
    L = k.shape[2] // count
    cut = [x[:, :, : L * count].unflatten(2, (count, L)).transpose(1, 2).flatten(0, 1) for x in (k, v)]
    o, sums = FLASH(q[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1), *cut, scale=1.0)
    o, sums = o.unflatten(0, (-1, count)), sums.unflatten(0, (-1, count))
    if L * count < k.shape[2]:
        rest, own = FLASH(q, k[:, :, L * count :], v[:, :, L * count :], scale=1.0)
        o, sums = torch.cat([o, rest[:, None]], 1), torch.cat([sums, own[:, None]], 1)
    return (o * sums.softmax(1).unsqueeze(-1)).sum(1).to(v.dtype)


def _flashes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Say whether the CPU's kernel that also returns log sums takes a call, which nothing adapts to it."""
    adapted = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return q.device.type == "cpu" and q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1] and not adapted


def causal_softmax(
    q: Tensor, k: Tensor, v: Tensor, *, rows: Rows | None = None, past: KeyValues | None = None
) -> Tensor:
    """Attend to every earlier token of the same document.

    Args:
        q: [B, T, Hq, K], scaled already. k: [B, T, Hk, K]. v: [B, T, Hk, V].
        rows: padding and packing of this block; None when every row is one document of T real tokens.
        past: what the layer has seen before; gets this block's keys and values.

    Returns:
        [B, T, Hq, V]; rows of padding hold zeros or leftovers that no real token reads.

    Example:
        >>> q = k = torch.zeros(1, 3, 1, 2)
        >>> causal_softmax(q, k, torch.tensor([0.0, 3.0, 6.0]).view(1, 3, 1, 1)).flatten().tolist()
        [0.0, 1.5, 3.0]
    """
    seen = past.length if past is not None else 0
    part = active()
    if part is not None:
        return _parallel(part, q, k, v, rows, past)
    if seen and rows is not None and rows.valid is None:
        raise InputError("packed documents can't go on from a state where heads stay softmax; run them apart")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    valid = rows.valid if rows is not None else None
    keys, values = past.append(k, v, valid) if past is not None else (k, v)
    if seen == 0 and rows is None:
        causal = torch.compiler.is_compiling() or q.shape[2] > 1  # (a traced length gives no plain bool)
        return _grouped(q, k, v, causal=causal).transpose(1, 2)
    if seen == 0 and rows is not None:
        return _by_document(q, k, v, rows).transpose(1, 2)
    assert past is not None
    known = None if past.valid is None else past.valid[:, : past.length]
    T, L = q.shape[2], keys.shape[2]
    if T == 1:
        return _one_token(q, keys, values, known).transpose(1, 2)
    if known is None and k.dtype == keys.dtype and _flashes(q, keys, values):
        return _behind(q, keys[:, :, : L - T], values[:, :, : L - T], k, v).transpose(1, 2)
    mask = torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T)[None, None]
    if known is not None:
        mask = mask & known[:, None, None, :]
        mask = mask | ~mask.any(-1, keepdim=True)  # a row of padding reads anything rather than nothing (NaN)
    return _grouped(q, keys, values, mask=mask).transpose(1, 2)


def _by_document(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Softmax inside each document: no T x T mask, no work on padding."""
    q, k, v = (rows.pack(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
    parts = [
        _grouped(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], causal=True)
        for a, b in zip(rows.bounds, rows.bounds[1:], strict=False)
        if b > a
    ]
    return rows.unpack(torch.cat(parts, dim=2).transpose(1, 2)).transpose(1, 2)


def _parallel(part: Part, q: Tensor, k: Tensor, v: Tensor, rows: Rows | None, past: KeyValues | None) -> Tensor:
    """Softmax over the whole sequence: earlier ranks' keys and values of this rank's first document are fetched."""
    if past is not None or (rows is not None and rows.valid is not None):
        raise InputError("under sequence_parallel softmax heads take no cache (keep=False) and no padding")
    part.check_call(q.shape[1], None if rows is None else rows.cu_seqlens)
    Hk, widths = k.shape[2], [k.shape[3], v.shape[3]]

    def wants(rank: int) -> list[tuple[int, int]]:
        return [(part.document_start(rank), part.starts[rank])]

    fetched = exchange(part, torch.cat([k, v], dim=-1).flatten(2), wants, kind="softmax")
    earlier = fetched.unflatten(2, (Hk, -1)).split(widths, dim=-1)
    outputs = []
    for i, (a, b) in enumerate(zip(part.borders, part.borders[1:], strict=False)):
        q_i, k_i, v_i = (x[:, a:b].transpose(1, 2) for x in (q, k, v))
        if i == 0:
            k_i, v_i = (
                torch.cat([old.transpose(1, 2), new], dim=2) for old, new in zip(earlier, (k_i, v_i), strict=True)
            )
        outputs.append(_lower_right(q_i, k_i, v_i))
    return tied(torch.cat(outputs, dim=2).transpose(1, 2), fetched)


def _lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax of the last T of L tokens, some queries at a time so that no [T, L] mask is made."""
    outputs, behind = [], k.shape[2] - q.shape[2]
    if not behind:
        return _grouped(q, k, v, causal=True)
    for start in range(0, q.shape[2], QUERIES):
        block = q[:, :, start : start + QUERIES]
        seen = behind + start + block.shape[2]
        mask = torch.ones(block.shape[2], seen, dtype=torch.bool, device=q.device).tril(behind + start)[None, None]
        outputs.append(_grouped(block, k[:, :, :seen], v[:, :, :seen], mask=mask))
    return torch.cat(outputs, dim=2)
