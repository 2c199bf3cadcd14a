"""Walk a sequence chunk by chunk over preallocated buffers: forward, and backward from the saved boundary states.

N rows (batch x state heads), C tokens of a chunk, r query rows per token, K key width, V value width. A chunk does,
with `qk`, `kk` the decayed products of `pairs.py` (kk strictly lower) and S the state before it:

    new = v                                                  decayed attention
    new = (I + Diag(b) kk)^-1 Diag(b) (v - (k read) S)       delta rule: what is really written
    o   = qk new + (q read) S
    S  <- last S + (k write)^T new

The working set of a chunk stays in the cache of a core; nothing of the size of the sequence is made beside the results.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.ops.recurrence.layout import Loader, chunks, room_for, store, tiled
from lineament.ops.recurrence.pairs import make_pairs
from lineament.ops.recurrence.triangular import UnitLowerInverse

ROWS_AT_ONCE = 16  # state heads (times batch) walked together; more would leave the cache


@dataclass(frozen=True)
class Sequence:
    """Inputs of some batch rows, tiled over the state heads; `like` has the dtype and device of the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    log_decay: Tensor | None  # [B, T, Hs] or [B, T, Hs, K], for its axes
    heads: int
    like: Tensor

    @property
    def rows(self) -> int:
        """Query rows per token and state head (r)."""
        return max(1, self.q.shape[2] // self.heads)

    def tiles(self, name: str) -> Tensor | None:
        """Return an input as [B, Hx, s, T, r, W]; scalars per head get the width 1."""
        x = getattr(self, name)
        if x is None:
            return None
        return tiled(x if x.dim() == 4 else x[..., None], self.heads)


class Chunk:
    """Buffers for chunks of one length, and the formulas on them."""

    def __init__(self, inputs: Sequence, size: int, more: dict[str, str] | None = None):
        like, rows = inputs.like, inputs.rows
        B, _, _, K = inputs.k.shape
        N, V = B * inputs.heads, inputs.v.shape[-1]
        self.size, self.rows, self.N = size, rows, N
        shapes = {"q": (size * rows, K), "k": (size, K), "v": (size, V), "beta": (size, 1)}
        tiles = {name: tiles for name in shapes if (tiles := inputs.tiles(name)) is not None}
        shapes |= {"qk": (size * rows, size), "o": (size * rows, V), "q_read": (size * rows, K), "k_write": (size, K)}
        if inputs.beta is not None:
            shapes |= {"kk": (size, size), "k_read": (size, K)}
            shapes |= {"rest": (size, V), "new": (size, V), "product": (size, V)}
            self.inverse = UnitLowerInverse(N, size, like)
        else:
            del shapes["beta"]
        shapes |= {name: shapes[twin] for name, twin in (more or {}).items()}
        self.at = {name: like.new_empty(N, *shape) for name, shape in shapes.items()}
        self.loaders = [Loader(self.at[name], tile) for name, tile in tiles.items()]
        self.pairs = make_pairs(inputs.log_decay, inputs.tiles("log_decay"), self.at, rows)

    def load(self, start: int, stop: int) -> None:
        """Copy the inputs of tokens start..stop into the buffers and form what doesn't need the state."""
        for loader in self.loaders:
            loader(start, stop)
        self.pairs.load(start, stop)
        self.pairs.compute()

    def solve(self, state: Tensor) -> Tensor:
        """Return what the chunk writes, [N, C, V]."""
        at = self.at
        if "beta" not in at:
            return at["v"]
        k_read = self.scaled("k_read", at["k"], self.pairs.read, 1)
        self.inverted = self.inverse(at["kk"], at["beta"])
        torch.bmm(k_read, state, out=at["product"])
        torch.sub(at["v"], at["product"], out=at["rest"])
        return torch.bmm(self.inverted, torch.mul(at["rest"], at["beta"], out=at["product"]), out=at["new"])

    def output(self, state: Tensor, new: Tensor) -> Tensor:
        """Return o [N, C * r, V]."""
        at = self.at
        q_read = self.scaled("q_read", at["q"], self.pairs.read, self.rows)
        return torch.bmm(at["qk"], new, out=at["o"]).baddbmm_(q_read, state)

    def advance(self, state: Tensor, new: Tensor, out: Tensor) -> Tensor:
        """Write the state behind the chunk into `out` (which may be `state`)."""
        k_write = self.scaled("k_write", self.at["k"], self.pairs.write, 1)
        if self.pairs.last is not None:
            torch.mul(state, self.pairs.last, out=out)
        elif out is not state:
            out.copy_(state)
        return out.baddbmm_(k_write.mT, new)

    def scaled(self, name: str, x: Tensor, factor: Tensor | None, rows: int) -> Tensor:
        """Multiply x [N, C * rows, W] with a factor per token, [N, C, 1 or W], into the buffer `name`."""
        if factor is None:
            return x
        if rows == 1:
            return torch.mul(x, factor, out=self.at[name])
        shape = (self.N, self.size, rows, -1)
        torch.mul(x.view(shape), factor[:, :, None], out=self.at[name].view(shape))
        return self.at[name]


class BackwardChunk(Chunk):
    """The same with buffers for gradients."""

    def __init__(self, inputs: Sequence, size: int, grad_o: Tensor):
        more = {"do": "o", "dq": "q", "dk": "k", "dnew": "v", "dqk": "qk"}
        if inputs.beta is not None:
            more |= {"dk_row": "k", "dkk": "kk", "dv": "v"}
        super().__init__(inputs, size, more)
        self.loaders.append(Loader(self.at["do"], tiled(grad_o, inputs.heads)))

    def backward(self, start: int, stop: int, state: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Return the gradients of a chunk's inputs; `grad`, of the state behind it, becomes that of the one before.

        Args:
            start, stop: the tokens.
            state: [N, K, V], the state before the chunk.
            grad: [N, K, V], changed in place.
        """
        at, pairs = self.at, self.pairs
        self.load(start, stop)
        new = self.solve(state)
        q_read = self.scaled("q_read", at["q"], pairs.read, self.rows)
        k_write = self.scaled("k_write", at["k"], pairs.write, 1)
        torch.bmm(at["qk"].mT, at["do"], out=at["dnew"]).baddbmm_(k_write, grad)
        pairs.mask(torch.bmm(at["do"], new.mT, out=at["dqk"]), strict=False)
        dq = torch.bmm(at["do"], state.mT, out=at["dq"])
        dk = torch.bmm(new, grad.mT, out=at["dk"])
        self.scaled("dq", dq, pairs.read, self.rows)
        self.scaled("dk", dk, pairs.write, 1)
        tail = dk[:, stop - start - 1]
        kept, at_end = tail.clone(), None
        if pairs.last is not None:  # the last token's write doesn't decay: it is kept out of the gradient of G
            tail.zero_()
            at_end = (grad.mul_(pairs.last) * state).sum(2) + (at["k"] * dk).sum(1)  # [N, K], by e^{G_C}
        grad.baddbmm_(q_read.mT, at["do"])
        result = {"q": dq, "v": at["dnew"]}
        if "beta" in at:
            result |= self._backward_solve(state, new, grad)
        own = pairs.take_own()
        pairs.backward()
        if at_end is not None:
            result["log_decay"] = pairs.grad_log_decay(self._gate_gradient(dq, dk, at_end))
            tail += kept
        if own is not None:
            shape = (self.N, self.size, self.rows, -1)
            dq.view(shape).addcmul_(own, at["k"][:, :, None])
            dk += (own * at["q"].view(shape)).sum(2) if self.rows > 1 else own[:, :, 0] * at["q"]
        return result | {"k": dk.add_(at["dk_row"]) if "beta" in at else dk}

    def _backward_solve(self, state: Tensor, new: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Go back through the triangular solve; adds to grad, fills dkk and dk_row (the gradient of k as a row)."""
        at, pairs = self.at, self.pairs
        solved = torch.bmm(self.inverted.mT, at["dnew"], out=at["product"])
        dlower = torch.bmm(solved, new.mT, out=at["dkk"]).neg_()
        pairs.mask(dlower, strict=True)
        dbeta = torch.linalg.vecdot(solved, at["rest"]) + torch.linalg.vecdot(dlower, at["kk"])
        dlower.mul_(at["beta"])
        dv = torch.mul(solved, at["beta"], out=at["dv"])
        dk_row = torch.bmm(dv, state.mT, out=at["dk_row"]).neg_()
        self.scaled("dk_row", dk_row, pairs.read, 1)
        grad.baddbmm_(at["k_read" if pairs.read is not None else "k"].mT, dv, alpha=-1)
        return {"v": dv, "beta": dbeta[..., None]}

    def _gate_gradient(self, dq: Tensor, dk: Tensor, at_end: Tensor) -> Tensor:
        """Return the gradient of G [N, C, K]: G stands beside every row with + and beside every column with -."""
        at, shape = self.at, (self.N, self.size, self.rows, -1)
        dgate = (at["q"] * dq).view(shape).sum(2) if self.rows > 1 else at["q"] * dq
        dgate.addcmul_(at["k"], at["dk_row"] - dk if "dk_row" in at else -dk)
        dgate[:, -1] += at_end
        return dgate


def batches(B: int, heads: int) -> Iterator[slice]:
    """Cut the batch so that about `ROWS_AT_ONCE` state heads are walked together."""
    step = max(1, ROWS_AT_ONCE // heads)
    for start in range(0, B, step):
        yield slice(start, start + step)


def forward(inputs: Sequence, states: Tensor, o: Tensor, size: int) -> None:
    """Fill o [B, T, Ho, V] and `states` [1 or chunks + 1, B, Hs, K, V], whose first entry is the state at the start.

    With one entry only the newest state is kept, in place.
    """
    K, V = states.shape[-2:]
    cut = chunks(inputs.q.shape[1], size)
    keep = states.shape[0] > 1
    tiles = tiled(o, inputs.heads)
    works = {room: Chunk(inputs, room) for room in {room_for(stop - start, size) for start, stop in cut}}
    for index, (start, stop) in enumerate(cut):
        chunk = works[room_for(stop - start, size)]
        state = states[index if keep else 0].view(-1, K, V)
        chunk.load(start, stop)
        new = chunk.solve(state)
        store(tiles, chunk.output(state, new), start, stop)
        chunk.advance(state, new, states[index + 1].view(-1, K, V) if keep else state)


def backward(
    inputs: Sequence, states: Tensor, grad_o: Tensor, grad: Tensor, outputs: dict[str, Tensor], size: int
) -> None:
    """Fill `outputs` (tiled gradients by name) from last chunk to first.

    `grad` [N, K, V], the gradient of the last state, becomes that of the first.
    """
    K, V = states.shape[-2:]
    cut = chunks(inputs.q.shape[1], size)
    works = {room: BackwardChunk(inputs, room, grad_o) for room in {room_for(b - a, size) for a, b in cut}}
    for index, (start, stop) in reversed(list(enumerate(cut))):
        chunk = works[room_for(stop - start, size)]
        found = chunk.backward(start, stop, states[index].view(-1, K, V), grad)
        for name, tiles in outputs.items():
            store(tiles, found[name], start, stop)
