"""Every operator that has a rule joins the battery."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lineament.explain import OPERATORS, Rules, relevance
from lineament.explain.linear import share
from lineament.explain.norms import batch_affine
from lineament.explain.recording import Call
from lineament.explain.structure import absorbed_by
from lineament.testing import RULE_LAWS, check_rule

FLAT, GRID, IMAGE = (2, 6), (2, 4, 6), (2, 2, 4, 6)
W = torch.randn(6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
KERNEL = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
MASK = torch.tensor([True, False, True, True, False, True])
INDEX = torch.tensor([[0, 2, 1], [0, 2, 1]])


def attend(x, **options):
    q = x[:, None]
    return F.scaled_dot_product_attention(q, q * 1.3, q + 0.2, **options)[:, 0]


def solve(x):
    a = torch.eye(4, dtype=x.dtype) + (x @ x.mT).tril(-1)
    return torch.linalg.solve_triangular(a, x, upper=False, unitriangular=True)


CASES = {
    "View": (lambda x: x.view(-1, 3, 2), FLAT),
    "UnsafeView": (lambda x: x.mT.matmul(W[:4, :3].to(x)), GRID),
    "Transpose": (lambda x: x.transpose(1, 2), GRID),
    "T": (lambda x: (x.t() @ x).expand(len(x), 6, 6) + x[:, None], FLAT),
    "Permute": (lambda x: x.permute(0, 2, 1), GRID),
    "Expand": (lambda x: x[:, None].expand(-1, 3, 6), FLAT),
    "Repeat": (lambda x: x.repeat(1, 2), FLAT),
    "Slice": (lambda x: x[:, 1:4], FLAT),
    "Select": (lambda x: x[:, 1], GRID),
    "Index": (lambda x: x[:, [1, 1, 3]], FLAT),
    "IndexSelect": (lambda x: x.index_select(1, INDEX[0]), FLAT),
    "Gather": (lambda x: x.gather(1, INDEX[: len(x)]), FLAT),
    "Cat": (lambda x: torch.cat([x, torch.ones_like(x), 2 * x], 1), FLAT),
    "Stack": (lambda x: torch.stack([x, torch.ones_like(x)], 1), FLAT),
    "Split": (lambda x: x.split(2, 1)[1], FLAT),
    "UnsafeSplit": (lambda x: x.unsafe_split(2, 1)[1], FLAT),
    "UnsafeSplitWithSizes": (lambda x: x.unsafe_split_with_sizes([2, 4], 1)[1], FLAT),
    "SplitWithSizes": (lambda x: x.split([2, 4], 1)[1], FLAT),
    "Unbind": (lambda x: x.unbind(1)[2], GRID),
    "Squeeze": (lambda x: x[:, :1].squeeze(1), GRID),
    "Unsqueeze": (lambda x: x.unsqueeze(1), FLAT),
    "Alias": (lambda x: torch.ops.aten.alias(x), FLAT),
    "Clone": (lambda x: x.clone(), FLAT),
    "ConstantPadNd": (lambda x: F.pad(x, (1, 2), value=0.7), FLAT),
    "Roll": (lambda x: x.roll(2, 1), FLAT),
    "Flip": (lambda x: x.flip(1), FLAT),
    "MaskedFill": (lambda x: x.masked_fill(MASK, 0.4), FLAT),
    "Where": (lambda x: torch.where(MASK, x, 0.4 * torch.ones_like(x)), FLAT),
    "AsStrided": (lambda x: x.as_strided((len(x), 2, 3), (6, 3, 1)), FLAT),
    "MaxPool2DWithIndices": (lambda x: F.max_pool2d(x, 2), IMAGE),
    "MaxPool3DWithIndices": (lambda x: F.max_pool3d(x[:, None], (1, 2, 2)), IMAGE),
    "AdaptiveMaxPool2D": (lambda x: F.adaptive_max_pool2d(x, 2), IMAGE),
    "Max": (lambda x: x.max(1).values, GRID),
    "Min": (lambda x: x.min(1).values, GRID),
    "Amax": (lambda x: x.amax(1), GRID),
    "Amin": (lambda x: x.amin(1), GRID),
    "Topk": (lambda x: x.topk(3, 1).values, FLAT),
    "Sort": (lambda x: x.sort(1).values, FLAT),
    "Diagonal": (lambda x: x.diagonal(dim1=1, dim2=2), GRID),
    "Tril": (lambda x: x.tril(), GRID),
    "Triu": (lambda x: x.triu(), GRID),
    "Unfold": (lambda x: x.unfold(1, 3, 1), FLAT),
    "Im2Col": (lambda x: F.unfold(x, 3), IMAGE),
    "Col2Im": (lambda x: F.fold(x.repeat(1, 4, 1), (3, 4), 2), (2, 2, 6)),
    "UpsampleNearest1D": (lambda x: F.interpolate(x, scale_factor=2), GRID),
    "UpsampleNearest2D": (lambda x: F.interpolate(x, scale_factor=2), IMAGE),
    "UpsampleNearest3D": (lambda x: F.interpolate(x[:, None], scale_factor=2), IMAGE),
    "MaskedSelect": (lambda x: x.masked_select(MASK).view(x.shape[0], -1), FLAT),
    "MaskedScatter": (lambda x: torch.ones_like(x).masked_scatter(MASK.expand_as(x), x), FLAT),
    "SelectScatter": (lambda x: torch.ones_like(x).select_scatter(x[:, 0], 1, 2), GRID),
    "SliceScatter": (lambda x: torch.ones_like(x).slice_scatter(x[:, :2], 1, 2, 4), GRID),
    "Maximum": (lambda x: torch.maximum(x, x.flip(1)), FLAT),
    "Minimum": (lambda x: torch.minimum(x, x.flip(1)), FLAT),
    "ReflectionPad1D": (lambda x: F.pad(x, (1, 2), mode="reflect"), GRID),
    "ReflectionPad2D": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), IMAGE),
    "ReplicationPad1D": (lambda x: F.pad(x, (1, 2), mode="replicate"), GRID),
    "ReplicationPad2D": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), IMAGE),
    "Cummax": (lambda x: x.cummax(1).values, FLAT),
    "Median": (lambda x: x.median(1).values, GRID),
    "Kthvalue": (lambda x: x.kthvalue(2, 1).values, GRID),
    "IndexPut": (
        lambda x: torch.ones_like(x).index_put((torch.arange(len(x))[:, None], INDEX[: len(x)]), x[:, :3]),
        FLAT,
    ),
    "Scatter": (lambda x: torch.ones_like(x).scatter(1, INDEX[: len(x)], x[:, :3]), FLAT),
    "NanToNum": (lambda x: x.nan_to_num(), FLAT),
    "PixelShuffle": (lambda x: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 2), IMAGE),
    "PixelUnshuffle": (lambda x: F.pixel_unshuffle(x, 2), IMAGE),
    "Add": (lambda x: x + x.flip(1) + torch.ones(6).to(x), FLAT),
    "Sub": (lambda x: x - 2 * x.flip(1), FLAT),
    "Rsub": (lambda x: torch.rsub(x, 1.0), FLAT),
    "Sum": (lambda x: x.sum(1), GRID),
    "Mean": (lambda x: x.mean(1), GRID),
    "Nansum": (lambda x: x.nansum(1), GRID),
    "AvgPool2D": (lambda x: F.avg_pool2d(x, 2, padding=1), IMAGE),
    "AvgPool3D": (lambda x: F.avg_pool3d(x[:, None], 2), IMAGE),
    "AdaptiveAvgPool2D": (lambda x: F.adaptive_avg_pool2d(x, 3), IMAGE),
    "AdaptiveAvgPool3D": (lambda x: F.adaptive_avg_pool3d(x[:, None], 2), IMAGE),
    "Cumsum": (lambda x: x.cumsum(1), FLAT),
    "IndexAdd": (lambda x: torch.ones_like(x).index_add(1, torch.tensor([0, 0, 1, 2, 3, 3]), x), FLAT),
    "ScatterAdd": (lambda x: torch.ones_like(x).scatter_add(1, INDEX[: len(x)], x[:, :3]), FLAT),
    "UpsampleBilinear2D": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE),
    "UpsampleBicubic2D": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE),
    "UpsampleLinear1D": (lambda x: F.interpolate(x, scale_factor=2, mode="linear"), GRID),
    "UpsampleTrilinear3D": (lambda x: F.interpolate(x[:, None], scale_factor=2, mode="trilinear"), IMAGE),
    "UpsampleBilinear2DAa": (lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), IMAGE),
    "Mul": (lambda x: x * x.flip(1), FLAT),
    "Div": (lambda x: x / (x.flip(1) + 9), FLAT),
    "Neg": (lambda x: -x, FLAT),
    "Relu": (F.relu, FLAT),
    "LeakyRelu": (F.leaky_relu, FLAT),
    "Gelu": (F.gelu, FLAT),
    "Silu": (F.silu, FLAT),
    "Tanh": (torch.tanh, FLAT),
    "Erf": (torch.erf, FLAT),
    "Abs": (torch.abs, FLAT),
    "Sqrt": (torch.sqrt, FLAT),
    "Elu": (F.elu, FLAT),
    "Mish": (F.mish, FLAT),
    "Hardswish": (F.hardswish, FLAT),
    "Hardtanh": (F.hardtanh, FLAT),
    "Softshrink": (F.softshrink, FLAT),
    "Hardshrink": (F.hardshrink, FLAT),
    "Threshold": (lambda x: F.threshold(x, 0.1, 0.0), FLAT),
    "Sin": (torch.sin, FLAT),
    "Log1P": (torch.log1p, FLAT),
    "Expm1": (torch.expm1, FLAT),
    "Asinh": (torch.asinh, FLAT),
    "Atan": (torch.atan, FLAT),
    "Exp": (torch.exp, FLAT),
    "Exp2": (torch.exp2, FLAT),
    "Sigmoid": (torch.sigmoid, FLAT),
    "Softplus": (F.softplus, FLAT),
    "LogSigmoid": (F.logsigmoid, FLAT),
    "Cos": (torch.cos, FLAT),
    "Log": (torch.log, FLAT),
    "Rsqrt": (torch.rsqrt, FLAT),
    "Reciprocal": (torch.reciprocal, FLAT),
    "Hardsigmoid": (F.hardsigmoid, FLAT),
    "Clamp": (lambda x: x.clamp(-0.5, 0.5), FLAT),
    "ClampMin": (lambda x: x.clamp_min(0.3), FLAT),
    "ClampMax": (lambda x: x.clamp_max(0.3), FLAT),
    "Var": (lambda x: x.var(1), GRID),
    "Std": (lambda x: x.std(1), GRID),
    "LinalgVectorNorm": (lambda x: torch.linalg.vector_norm(x, dim=1), GRID),
    "Prod": (lambda x: x.prod(1), GRID),
    "Logsumexp": (lambda x: x.logsumexp(1), GRID),
    "Logaddexp": (lambda x: torch.logaddexp(x, x.flip(1) - 0.5), FLAT),
    "Erfc": (torch.erfc, FLAT),
    "Log2": (torch.log2, FLAT),
    "LogSoftmax": (lambda x: x.log_softmax(1), FLAT),
    "Softmax": (lambda x: x.softmax(1), FLAT),
    "SafeSoftmax": (lambda x: torch._safe_softmax(x, -1), FLAT),
    "Pow": (lambda x: x**3 + x**-2, FLAT),
    "Round": (lambda x: x.round() + x, FLAT),
    "Floor": (lambda x: x.floor() + x, FLAT),
    "Ceil": (lambda x: x.ceil() + x, FLAT),
    "Trunc": (lambda x: x.trunc() + x, FLAT),
    "Sign": (lambda x: x.sign() + x, FLAT),
    "Sgn": (lambda x: x.sgn() + x, FLAT),
    "Mm": (lambda x: x @ W.to(x), FLAT),
    "Bmm": (lambda x: x @ x.mT, GRID),
    "Mv": (lambda x: (x @ W[0].to(x))[:, None], FLAT),
    "Addmm": (lambda x: torch.addmm(W[0].to(x), x, W.to(x), beta=0.5, alpha=2), FLAT),
    "Baddbmm": (lambda x: torch.baddbmm(x, x, W.to(x).expand(len(x), 6, 6), beta=0.5, alpha=2), GRID),
    "Convolution": (lambda x: F.conv2d(x, KERNEL.to(x), KERNEL[:, 0, 0, 0].to(x), padding=1, stride=2), IMAGE),
    "LinalgSolveTriangular": (solve, GRID),
    "PreluKernel": (lambda x: F.prelu(x, W[0, :1].to(x).requires_grad_()), FLAT),
    "Glu": (lambda x: F.glu(x, -1), FLAT),
    "Addcmul": (lambda x: torch.addcmul(x, x, x.flip(1), value=0.7), FLAT),
    "ScaledDotProductFlashAttentionForCpu": (lambda x: attend(x, is_causal=True), GRID),
    "NativeLayerNorm": (lambda x: F.layer_norm(x, (6,), W[0].to(x), W[1].to(x)), GRID),
    "NativeGroupNorm": (lambda x: F.group_norm(x, 1, W[0, :2].to(x), W[1, :2].to(x)), IMAGE),
    "NativeBatchNorm": (lambda x: F.batch_norm(x, W[0, :2].to(x), W[1, :2].to(x).abs(), W[2, :2].to(x)), IMAGE),
}
POSITIVE = {"Log", "Sqrt", "Rsqrt", "Reciprocal", "Log1P", "Log2", "Pow", "Std", "Div"}
MIXED = {"T", "MaskedScatter"}  # these mix the rows
ELSEWHERE = {  # nodes of other devices or of models, tested with whole families
    "FusedRmsNorm",
    "Norm",
    "ToCopy",
    "Reshape",
    "ReshapeAlias",
    "Movedim",
    "Take",
    "Embedding",
    "Detach",
    "CudnnBatchNorm",
    "GroupedMm",
    "ScaledDotProductFlashAttention",
    "ScaledDotProductEfficientAttention",
    "ScaledDotProductCudnnAttention",
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_keeps_the_laws(name):
    op, shape = CASES[name]
    laws = [law for law in RULE_LAWS if not (law == "rows" and name in MIXED)]
    check_rule(name, op, shape, positive=name in POSITIVE, laws=laws)


def test_the_batch_norm_of_cudnn_is_read_by_its_own_names():
    weight, bias, mean, var = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).abs()
    x = torch.randn(2, 5, 3, 3)
    call = Call(torch.ops.aten.cudnn_batch_norm.default, (x, weight, bias, mean, var, False, 0.1, 0.3), {})
    scale, shift = (each[:, None, None] for each in batch_affine(call))
    torch.testing.assert_close(x * scale + shift, F.batch_norm(x, mean, var, weight, bias, eps=0.3))
    tape = SimpleNamespace(only_user=lambda at: 0, names=["CudnnBatchNorm", "Convolution"])
    assert absorbed_by(tape, 1) == 0


def test_no_rule_goes_unchecked():
    assert set(OPERATORS) - set(CASES) == ELSEWHERE


def test_a_wrong_rule_is_found(monkeypatch):
    monkeypatch.setitem(OPERATORS, "Gelu", lambda s: s.send(0, coef=s.coef() * 1.01))
    with pytest.raises(AssertionError, match="conserves"):
        check_rule("Gelu", nn.functional.gelu, FLAT, laws=["conserves"])


def test_the_rule_of_the_documentation_works():
    def positive_weights(linear, R, ledger):
        return share(linear, R, ledger, [(linear.x, linear.weight.clamp(min=0))], linear.bias_or_zero().clamp(min=0))

    model = nn.Linear(4, 2).double()
    found = relevance(model, torch.ones(1, 4).double(), rules=Rules(linear=positive_weights))
    assert found.ledger.unaccounted < 1e-9
    assert bool((found.inputs["input"] / found.value >= 0).all())
