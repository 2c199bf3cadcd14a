"""Walk a sequence panel by panel over preallocated buffers: forward, and backward from the saved boundary states.

A panel is P chunks: what doesn't need the state is done for all of them at once, then the state walks through them.
N rows (batch x state heads), C tokens of a chunk, r query rows per token, K key width, V value width. A chunk does,
with `qk`, `kk` the decayed products of `pairs.py` (kk strictly lower) and S the state before it:

    new = v                                                  decayed attention
    new = (I + Diag(b) kk)^-1 Diag(b) (v - (k read) S)       delta rule: what is really written
    o   = qk new + (q read) S
    S  <- last S + (k write)^T new

The working set of a panel stays in the cache of a core; nothing of the size of the sequence is made beside the results.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.ops.recurrence.layout import Tiles, cuts, room_for, tiled
from lineament.ops.recurrence.pairs import make_pairs
from lineament.ops.recurrence.triangular import UnitLowerInverse

PANEL = 64  # tokens whose state-free parts are formed together
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


class Panel:
    """Buffers for panels of one size, and the formulas on them; `at` [P * N, ..], cut into chunks in `split`."""

    def __init__(self, inputs: Sequence, count: int, size: int, more: dict[str, str] | None = None):
        like, rows = inputs.like, inputs.rows
        B, _, _, K = inputs.k.shape
        N, V = B * inputs.heads, inputs.v.shape[-1]
        self.count, self.size, self.rows, self.N = count, size, rows, N
        shapes = {"q": (size * rows, K), "k": (size, K), "v": (size, V), "beta": (size, 1)}
        tiles = {name: tiles for name in shapes if (tiles := inputs.tiles(name)) is not None}
        shapes |= {"qk": (size * rows, size), "o": (size * rows, V), "q_read": (size * rows, K), "k_write": (size, K)}
        if inputs.beta is not None:
            shapes |= {"kk": (size, size), "k_read": (size, K)}
            shapes |= {"rest": (size, V), "new": (size, V), "product": (size, V)}
            self.inverse = UnitLowerInverse(count * N, size, like)
        else:
            del shapes["beta"]
        shapes |= {name: shapes[twin] for name, twin in (more or {}).items()}
        self.at = {name: like.new_empty(count * N, *shape) for name, shape in shapes.items()}
        self.split = {name: x.view(count, N, *x.shape[1:]).unbind(0) for name, x in self.at.items()}
        self.inputs = [Tiles(self.at[name], tile, count) for name, tile in tiles.items()]
        self.pairs = make_pairs(inputs.log_decay, inputs.tiles("log_decay"), self.at, rows, count)

    def load(self, start: int, stop: int) -> None:
        """Copy the inputs of tokens start..stop into the buffers and form what doesn't need the state."""
        for tiles in self.inputs:
            tiles.load(start, stop)
        at, pairs = self.at, self.pairs
        pairs.load(start, stop)
        pairs.compute()
        self.q_read = self._parts(self.scaled("q_read", at["q"], pairs.read, self.rows))
        self.k_write = self._parts(self.scaled("k_write", at["k"], pairs.write, 1))
        self.last = None if pairs.last is None else self._parts(pairs.last)
        if "beta" in at:
            self.k_read = self._parts(self.scaled("k_read", at["k"], pairs.read, 1))
            self.inverted = self._parts(self.inverse(at["kk"], at["beta"]))

    def solve(self, p: int, state: Tensor) -> Tensor:
        """Return what chunk p writes, [N, C, V]."""
        of = self.split
        if "beta" not in of:
            return of["v"][p]
        product, rest = of["product"][p], of["rest"][p]
        torch.sub(of["v"][p], torch.bmm(self.k_read[p], state, out=product), out=rest)
        return torch.bmm(self.inverted[p], torch.mul(rest, of["beta"][p], out=product), out=of["new"][p])

    def output(self, p: int, state: Tensor, new: Tensor) -> None:
        """Fill o of chunk p, [N, C * r, V]."""
        torch.bmm(self.split["qk"][p], new, out=self.split["o"][p]).baddbmm_(self.q_read[p], state)

    def advance(self, p: int, state: Tensor, new: Tensor, out: Tensor) -> Tensor:
        """Write the state behind chunk p into `out` (which may be `state`) and return it."""
        if self.last is not None:
            torch.mul(state, self.last[p], out=out)
        elif out is not state:
            out.copy_(state)
        return out.baddbmm_(self.k_write[p].mT, new)

    def scaled(self, name: str, x: Tensor, factor: Tensor | None, rows: int) -> Tensor:
        """Multiply x [P N, C * rows, W] with a factor per token, [P N, C, 1 or W], into the buffer `name`."""
        if factor is None:
            return x
        if rows == 1:
            return torch.mul(x, factor, out=self.at[name])
        shape = (x.shape[0], self.size, rows, -1)
        torch.mul(x.view(shape), factor[:, :, None], out=self.at[name].view(shape))
        return self.at[name]

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut x [P N, ..] into the P chunks."""
        return x.unflatten(0, (self.count, self.N)).unbind(0)


class BackwardPanel(Panel):
    """The same with buffers for gradients."""

    def __init__(self, inputs: Sequence, count: int, size: int, grad_o: Tensor, outputs: dict[str, Tensor]):
        more = {"do": "o", "dq": "q", "dk": "k", "dnew": "v", "dqk": "qk"}
        if inputs.beta is not None:
            more |= {"dk_row": "k", "dkk": "kk", "dv": "v", "solved": "v", "dbeta": "beta"}
        super().__init__(inputs, count, size, more)
        K, V = inputs.k.shape[-1], inputs.v.shape[-1]
        self.inputs.append(Tiles(self.at["do"], tiled(grad_o, inputs.heads), count))
        self.between = inputs.like.new_empty(count, self.N, K, V)
        self.at_end = inputs.like.new_zeros(count, self.N, K)
        self.kept = inputs.like.new_zeros(count, self.N, K)
        names = {"q": "dq", "k": "dk", "v": "dv" if "dv" in more else "dnew", "beta": "dbeta"}
        self.outputs = [Tiles(self.at[names[name]], x, count) for name, x in outputs.items() if name in names]
        gates = outputs.get("log_decay")
        self.gate = None if gates is None else Tiles(like_gate(self.at["k"], gates), gates, count)

    def backward(self, start: int, stop: int, state: Tensor, grad: Tensor) -> None:
        """Store the gradients of a panel's inputs; `grad`, of the state behind it, becomes that of the one before.

        Args:
            start, stop: the tokens.
            state: [N, K, V], the state before the panel.
            grad: [N, K, V], changed in place.
        """
        at, pairs = self.at, self.pairs
        self.load(start, stop)
        states, news = [state], []
        for p in range(self.count):
            news.append(self.solve(p, states[p]))
            if p + 1 < self.count:
                states.append(self.advance(p, states[p], news[p], self.between[p]))
        for p in reversed(range(self.count)):
            tokens = min(self.size, stop - start - p * self.size)
            self._backward_through_state(p, tokens, states[p], news[p], grad)
        new = at["new"] if "new" in at else at["v"]
        pairs.mask(torch.bmm(at["do"], new.mT, out=at["dqk"]), strict=False)
        self.scaled("dq", at["dq"], pairs.read, self.rows)
        if "beta" in at:
            self._backward_solve()
        own = pairs.take_own()
        pairs.backward()
        if self.gate is not None:
            self.gate.buffer.copy_(pairs.grad_log_decay(self._gate_gradient()))
            self.gate.store(start, stop)
            for p in range(self.count):
                self.split["dk"][p][:, min(self.size, stop - start - p * self.size) - 1] += self.kept[p]
        if own is not None:
            shape = (own.shape[0], self.size, self.rows, -1)
            at["dq"].view(shape).addcmul_(own, at["k"][:, :, None])
            at["dk"] += (own * at["q"].view(shape)).sum(2) if self.rows > 1 else own[:, :, 0] * at["q"]
        if "beta" in at:
            at["dk"] += at["dk_row"]
        for tiles in self.outputs:
            tiles.store(start, stop)

    def _backward_through_state(self, p: int, tokens: int, state: Tensor, new: Tensor, grad: Tensor) -> None:
        """Do what needs the gradient of the state, for chunk p; `grad` moves from behind the chunk to before it."""
        of = {name: parts[p] for name, parts in self.split.items()}
        torch.bmm(of["qk"].mT, of["do"], out=of["dnew"]).baddbmm_(self.k_write[p], grad)
        torch.bmm(of["do"], state.mT, out=of["dq"])
        dk = torch.bmm(new, grad.mT, out=of["dk"])
        if self.last is not None:  # the last token's write doesn't decay: it is kept out of the gradient of G
            dk.mul_(self.writes[p])
            tail = dk[:, tokens - 1]
            self.kept[p].copy_(tail)
            tail.zero_()
            grad.mul_(self.last[p])
            torch.sum(grad * state, 2, out=self.at_end[p]).add_((of["k"] * dk).sum(1))  # by e^{G_C}
        grad.baddbmm_(self.q_read[p].mT, of["do"])
        if "beta" in of:
            solved = torch.bmm(self.inverted[p].mT, of["dnew"], out=of["solved"])
            dv = torch.mul(solved, of["beta"], out=of["dv"])
            torch.bmm(dv, state.mT, out=of["dk_row"])
            grad.baddbmm_(self.k_read[p].mT, dv, alpha=-1)

    def _backward_solve(self) -> None:
        """Finish dk_row (the gradient of k as a row of kk and k_read), dbeta and dkk."""
        at, pairs = self.at, self.pairs
        dlower = torch.bmm(at["solved"], at["new"].mT, out=at["dkk"]).neg_()
        pairs.mask(dlower, strict=True)
        dbeta = torch.linalg.vecdot(at["solved"], at["rest"]) + torch.linalg.vecdot(dlower, at["kk"])
        at["dbeta"].copy_(dbeta[..., None])
        dlower.mul_(at["beta"])
        self.scaled("dk_row", at["dk_row"].neg_(), pairs.read, 1)

    def _gate_gradient(self) -> Tensor:
        """Return the gradient of G [P N, C, K]: G stands beside every row with + and beside every column with -."""
        at, shape = self.at, (self.count * self.N, self.size, self.rows, -1)
        dgate = (at["q"] * at["dq"]).view(shape).sum(2) if self.rows > 1 else at["q"] * at["dq"]
        dgate.addcmul_(at["k"], at["dk_row"] - at["dk"] if "dk_row" in at else -at["dk"])
        dgate[:, -1] += self.at_end.flatten(0, 1)
        return dgate

    @property
    def writes(self) -> tuple[Tensor, ...]:
        """e^{G_C - G_j} of every chunk."""
        assert self.pairs.write is not None
        return self._parts(self.pairs.write)


def like_gate(k: Tensor, tiles: Tensor) -> Tensor:
    """Allocate a buffer [P N, C, 1 or K] for the gradient of log_decay."""
    return k.new_empty(*k.shape[:2], tiles.shape[-1])


def batches(B: int, heads: int) -> Iterator[slice]:
    """Cut the batch so that about `ROWS_AT_ONCE` state heads are walked together."""
    step = max(1, ROWS_AT_ONCE // heads)
    for start in range(0, B, step):
        yield slice(start, start + step)


def panel_length(size: int) -> int:
    """Return the tokens of a panel; states are saved at its borders."""
    return max(PANEL, size)


def forward(inputs: Sequence, states: Tensor, o: Tensor, size: int) -> None:
    """Fill o [B, T, Ho, V] and `states` [1 or panels + 1, B, Hs, K, V], whose first entry is the state at the start.

    With one entry only the newest state is kept, in place.
    """
    K, V = states.shape[-2:]
    keep = states.shape[0] > 1
    panels: dict[tuple[int, int], tuple[Panel, Tiles]] = {}
    for index, (start, stop) in enumerate(cuts(inputs.q.shape[1], panel_length(size))):
        room = room_for(stop - start, size)
        if room not in panels:
            made = Panel(inputs, *room)
            panels[room] = made, Tiles(made.at["o"], tiled(o, inputs.heads), room[0])
        panel, output = panels[room]
        panel.load(start, stop)
        state, after = (states[i if keep else 0].view(-1, K, V) for i in (index, index + 1))
        after = after if keep else state
        for p in range(panel.count):
            new = panel.solve(p, state)
            panel.output(p, state, new)
            state = panel.advance(p, state, new, after)
        output.store(start, stop)


def backward(
    inputs: Sequence, states: Tensor, grad_o: Tensor, grad: Tensor, outputs: dict[str, Tensor], size: int
) -> None:
    """Fill `outputs` (tiled gradients by name) from last panel to first.

    `grad` [N, K, V], the gradient of the last state, becomes that of the first.
    """
    K, V = states.shape[-2:]
    panels: dict[tuple[int, int], BackwardPanel] = {}
    for index, (start, stop) in reversed(list(enumerate(cuts(inputs.q.shape[1], panel_length(size))))):
        room = room_for(stop - start, size)
        if room not in panels:
            panels[room] = BackwardPanel(inputs, *room, grad_o, outputs)
        panels[room].backward(start, stop, states[index].view(-1, K, V), grad)
