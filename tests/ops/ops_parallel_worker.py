"""One rank of tests/ops/test_parallel.py: every case on a stretch of the tokens, against the whole in one process.

python ops_parallel_worker.py OUT.json      (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment)
"""

import json
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lineament.nn import MixerConfig, ShortConv, build, causal_softmax
from lineament.nn.rows import Rows
from lineament.ops import (
    bidirectional_attention,
    decayed_attention,
    delta_rule,
    elementwise_scan,
    linear_attention,
    lolcats_attention,
    sequence_parallel,
    stretches,
    windowed_linear_attention,
)

PACKED = (0, 3, 4, 15, 15, 16, 31)  # documents that cross cuts, an empty one, and one that ends at a cut (T=31)


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def recurrent(kind: str, decay: str, heads=(4, 2, 2), batch=2, T=31, dtype=torch.float64):
    """Inputs of an op: {name: [B, T, ..]}."""
    Hq, Hk, Hv = heads
    Hs, K, V = max(Hk, Hv), 5, 3
    make = partial(numbers, dtype=dtype)
    found = {"q": make(batch, T, Hq, K, seed=1), "k": make(batch, T, Hk, K, seed=2), "v": make(batch, T, Hv, V, seed=3)}
    if kind == "delta":
        found["k"] = found["k"] / found["k"].norm(dim=-1, keepdim=True)
        found["beta"] = make(batch, T, Hs, seed=4).sigmoid() * (2 if decay == "negative" else 1)
    if decay in ("scalar", "channel"):
        shape = (batch, T, Hs) if decay == "scalar" else (batch, T, Hs, K)
        found["log_decay"] = -make(*shape, seed=5).exp() * 0.2
        found["log_decay"][:, 7] = -torch.inf
    return found


def windowed(T=31, batch=2, dtype=torch.float64, decay=False, F=6):
    make = partial(numbers, dtype=dtype)
    found = {"q": make(batch, T, 4, 5, seed=1), "k": make(batch, T, 2, 5, seed=2), "v": make(batch, T, 2, 3, seed=3)}
    found |= {"phi_q": make(batch, T, 4, F, seed=4).exp(), "phi_k": make(batch, T, 2, F, seed=5).exp()}
    found["log_scale"] = make(batch, T, 4, seed=6)
    if decay:
        found["log_decay"] = -make(batch, T, 2, seed=7).exp() * 0.1
    return found


def one_row(inputs):
    return {name: x[:1] for name, x in inputs.items()}


def op(function, packed=False, **keywords):
    """A case: the whole row's cu_seqlens in one process, the context's in parallel."""

    def run(inputs):
        cu = torch.tensor(PACKED) if packed and run.whole else None
        return function(**inputs, **keywords, cu_seqlens=cu)[0]

    run.packed = packed
    return run


def both_directions(padded=False):
    """With a padding mask that is cut like the tokens: v's first channel says which are real."""

    def run(inputs):
        mask = inputs["v"][:, :, 0, 0] > 0.7 if padded else None
        return bidirectional_attention(**inputs, mask=mask)

    run.packed = False
    return run


def convolution(packed=False):
    conv = ShortConv(6, 4, identity=False).double()
    with torch.no_grad():
        conv.weight.copy_(numbers(4, 6, seed=9, dtype=torch.float64))

    def run(inputs):
        return conv(inputs["x"], None, torch.tensor(PACKED) if packed and run.whole else None)[0]

    run.packed, run.shared = packed, list(conv.parameters())
    return run


def softmax(packed=False):
    def run(inputs):
        rows = Rows.packed(torch.tensor(PACKED), 31) if packed and run.whole else None
        return causal_softmax(**inputs, rows=rows)

    run.packed = packed
    return run


def heads(kind: str, full: tuple[int, ...] = (), packed=False, **options):
    """A converted layer: its filling, its convolution, and heads that stay softmax."""
    shape = {"heads": 4, "key_heads": 2, "key_width": 5, "value_width": 3, "model_width": 8}
    torch.manual_seed(0)
    layer = build(MixerConfig(kind=kind, window=4, sinks=2, full_heads=full, options=options, **shape)).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.1)

    def run(inputs):
        cu = torch.tensor(PACKED) if packed and run.whole else None
        return layer(**inputs, cu_seqlens=cu, keep=False)[0]

    run.packed, run.shared = packed, list(layer.parameters())
    return run


def layer_inputs(batch=2, T=31):
    found = {"q": (batch, T, 4, 5), "k": (batch, T, 2, 5), "v": (batch, T, 2, 3), "x": (batch, T, 8)}
    return {n: numbers(*shape, seed=i, dtype=torch.float64) for i, (n, shape) in enumerate(found.items())}


def cases():
    for decay in ("none", "scalar", "channel"):
        yield f"decayed {decay}", op(decayed_attention), recurrent("decayed", decay)
        yield f"decayed {decay} packed", op(decayed_attention, packed=True), one_row(recurrent("decayed", decay))
        yield f"delta {decay}", op(delta_rule), recurrent("delta", decay)
        yield f"delta {decay} packed", op(delta_rule, packed=True), one_row(recurrent("delta", decay))
    yield "delta negative eigenvalues", op(delta_rule), recurrent("delta", "negative")
    yield "delta more value heads", op(delta_rule), recurrent("delta", "channel", heads=(2, 2, 4))
    yield "decayed more value heads", op(decayed_attention), recurrent("decayed", "channel", heads=(1, 2, 4))
    yield "decayed single precision", op(decayed_attention), recurrent("decayed", "scalar", dtype=torch.float32)
    yield "delta single precision", op(delta_rule), recurrent("delta", "channel", dtype=torch.float32)
    gates = {"x": numbers(2, 31, 6, seed=1, dtype=torch.float64)}
    gates["log_decay"] = -numbers(2, 31, 6, seed=2, dtype=torch.float64).exp()
    yield "scan", op(elementwise_scan), gates
    yield "scan packed", op(elementwise_scan, packed=True), one_row(gates)
    positive = {n: x.exp() for n, x in recurrent("decayed", "none").items()}
    mapped = {"phi_q": positive["q"], "phi_k": positive["k"], "v": positive["v"]}
    yield "linear with a normaliser", op(linear_attention), mapped
    yield "linear with a normaliser packed", op(linear_attention, packed=True), one_row(mapped)
    yield "both directions", both_directions(), mapped
    yield "both directions padded", both_directions(padded=True), mapped
    for window, sinks in ((3, 2), (20, 3), (0, 2), (0, 0), (5, 0), (2, 12)):
        near = {"window": window, "sinks": sinks}
        name = f"window {window} sinks {sinks}"
        yield name, op(windowed_linear_attention, **near), windowed(decay=True)
        yield f"{name} packed", op(windowed_linear_attention, packed=True, **near), one_row(windowed(decay=True))
    outer = windowed(F=5)
    yield "window product features", op(windowed_linear_attention, window=3, sinks=1, outer=2), outer
    bare = {n: x for n, x in windowed().items() if n in "qkv"}
    nothing = {"phi_q": None, "phi_k": None, "log_scale": None}
    yield "window nothing far", op(windowed_linear_attention, window=6, sinks=2, **nothing), bare
    published = windowed()
    published["log_gamma"] = -published.pop("log_scale").exp()
    yield "lolcats", op(lolcats_attention, window=5), published
    x = {"x": numbers(2, 31, 6, seed=8, dtype=torch.float64)}
    yield "convolution", convolution(), x
    yield "convolution packed", convolution(packed=True), one_row(x)
    yield "softmax", softmax(), bare
    yield "softmax packed", softmax(packed=True), one_row(bare)
    for kind in ("kda", "gated-deltanet", "hedgehog-window", "cosformer", "gla"):
        yield f"layer {kind}", heads(kind, full=(1,)), layer_inputs()
        yield f"layer {kind} packed", heads(kind, full=(0,), packed=True), one_row(layer_inputs())
    for kind, options in (("lightnet", {}), ("lightnet", {"virtual_zero": True}), ("diag", {"size": 4})):
        name = " ".join(["heads", kind, *options])
        yield name, heads(kind, **options), layer_inputs()
        yield f"{name} packed", heads(kind, packed=True, **options), one_row(layer_inputs())


def gradients(run, inputs, cotangent):
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    shared = getattr(run, "shared", [])
    for p in shared:
        p.grad = None
    o = run(leaves)
    (o * cotangent).sum().backward()
    zero = torch.zeros_like  # (log_scale cancels where nothing is exact)
    found = {n: zero(x) if x.grad is None else x.grad for n, x in leaves.items()}
    return o.detach(), found, [zero(p) if p.grad is None else p.grad.clone() for p in shared]


def worst(a: Tensor, b: Tensor, scale: Tensor | None = None) -> float:
    """The largest error, relative to the largest value of b or of `scale` (a gradient may be all but 0 everywhere)."""
    return float((a - b).abs().max() / (b if scale is None else scale).abs().max().clamp(min=1e-6))


def errors(run, inputs, lengths, rank) -> dict[str, float]:
    run.whole = True
    T = sum(lengths)
    with torch.no_grad():
        shape = run(inputs).shape
    cotangent = numbers(*shape, seed=11, dtype=torch.float64).to(next(iter(inputs.values())).dtype)
    expected, expected_grads, expected_shared = gradients(run, inputs, cotangent)
    run.whole = False
    cut = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    mine = {n: x[:, cut] for n, x in inputs.items()}
    with sequence_parallel(lengths[rank], cu_seqlens=PACKED if run.packed else None):
        o, grads, shared = gradients(run, mine, cotangent[:, cut])
    assert T == 31
    found = {"o": worst(o, expected[:, cut])}
    for name, grad in grads.items():
        found[name] = worst(grad, expected_grads[name][:, cut], expected_grads[name])
    for i, (grad, whole) in enumerate(zip(shared, expected_shared, strict=True)):
        dist.all_reduce(grad)
        found[f"parameter {i}"] = worst(grad, whole)
    return found


def states(lengths, rank) -> dict[str, float]:
    """The state behind the last rank's tokens is that of the whole; a first state is read by the first rank."""
    inputs = recurrent("delta", "channel")
    start = numbers(2, 2, 5, 3, seed=12, dtype=torch.float64)
    o, last = delta_rule(**inputs, state=start)
    cut = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    with sequence_parallel(lengths[rank]):
        mine, own = delta_rule(**{n: x[:, cut] for n, x in inputs.items()}, state=start)
    found = {"o": worst(mine, o[:, cut])}
    if rank == len(lengths) - 1:
        found["state"] = worst(own, last)
    return found


def traffic(rank, world) -> dict[str, list[int]]:
    """Bytes received for 16 and 64 tokens a rank: [state, halo, softmax]."""
    found = {}
    for T in (16, 64):
        ops = {
            "decayed": lambda T=T: decayed_attention(**recurrent("decayed", "scalar", T=T)),
            "delta": lambda T=T: delta_rule(**recurrent("delta", "channel", T=T)),
            "window": lambda T=T: windowed_linear_attention(**windowed(T=T), window=8, sinks=2),
            "both directions": lambda T=T: bidirectional_attention(
                *(x.exp() for x in list(recurrent("decayed", "none", T=T).values()))
            ),
            "lightnet": lambda T=T: heads("lightnet")(layer_inputs(T=T)),
            "softmax": lambda T=T: causal_softmax(**{n: x for n, x in windowed(T=T).items() if n in "qkv"}),
        }
        for name, run in ops.items():
            with sequence_parallel(T) as part:
                run()
            found.setdefault(name, []).append([part.traffic[kind] for kind in ("state", "halo", "softmax")])
    return found


def refusals(rank, world) -> dict[str, str]:
    found = {}

    def refused(name, run):
        try:
            run()
        except ValueError as error:
            found[name] = str(error)

    x = recurrent("decayed", "none", T=4, batch=1)

    def call(tokens=4, cu=None, **more):
        with sequence_parallel(tokens, cu_seqlens=cu):
            decayed_attention(**x, **more)

    def both_packed():
        with sequence_parallel(4, cu_seqlens=[0, 3, 4 * world]):
            bidirectional_attention(x["q"], x["k"], x["v"])

    refused("no tokens", lambda: call(tokens=0 if rank else 4))
    refused("another length", lambda: call(tokens=5))
    refused("borders", lambda: call(cu=[0, 3, 2, 4 * world]))
    refused("borders not told", lambda: call(cu_seqlens=torch.tensor([0, 2, 4])))
    refused("other borders", lambda: call(cu=[0, 4 * world], cu_seqlens=torch.tensor([0, 2, 4])))
    refused("both directions", lambda: both_packed())
    refused("state of packed", lambda: call(cu=[0, 4 * world], state=torch.zeros(1, 2, 5, 3)))
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    even = stretches(31, world)
    ragged = [1, 30] if world == 2 else [15, 1, 2, 13]
    results = {"errors": {}, "traffic": traffic(rank, world), "refusals": refusals(rank, world)}
    for i, (name, run, inputs) in enumerate(cases()):
        for j, (label, lengths) in enumerate((("", even), (" ragged", ragged))):
            if world == 2 and i % 2 != j:  # the quick test takes even and ragged stretches in turn
                continue
            results["errors"][name + label] = errors(run, inputs, lengths, rank)
    results["errors"]["states"] = states(even, rank)
    everything = [None] * world
    dist.all_gather_object(everything, results)
    if rank == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as out:
            json.dump(everything, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
