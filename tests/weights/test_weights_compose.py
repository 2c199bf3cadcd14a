"""aTLAS: learned coefficients against plain autograd, and the laws of the specification."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lineament._base.errors import InputError
from lineament.weights import Point
from lineament.weights.compose import (
    Composed,
    best_scalar,
    choose_vectors,
    coefficient_gradients,
    most_confident,
    negation,
    penalty,
    pseudo_label_loss,
)


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double().eval()


@pytest.fixture
def setting():
    base, tuned = net(0), [net(1), net(2), net(3)]
    vectors = [Point.open(t) - Point.open(base) for t in tuned]
    x, y = torch.randn(11, 5, dtype=torch.float64), torch.randint(0, 3, (11,))
    return base, tuned, vectors, x, y


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("linear", [False, True])
def test_zero_is_the_base_to_the_bit(setting, linear):
    base, _, vectors, x, _ = setting
    composed = Composed(base, vectors, linear=linear)
    assert torch.equal(composed(x), base(x))
    assert len(composed.blocks) == 6  # the norm's buffers are no blocks


@pytest.mark.parametrize("parts", [1, 4])
def test_one_is_the_tuned_model(setting, parts):
    base, tuned, vectors, x, _ = setting
    composed = Composed(base, vectors, parts=parts)
    with torch.no_grad():
        composed.coefficients[1] = 1.0
    torch.testing.assert_close(composed(x), tuned[1](x))
    saved = composed.point()
    for name, p in tuned[1].named_parameters():
        torch.testing.assert_close(saved[name], p.data)


@pytest.mark.parametrize("parts", [1, 3])
def test_streamed_gradients_equal_autograd(setting, parts):
    base, _, vectors, x, y = setting
    composed = Composed(base, vectors, parts=parts)
    with torch.no_grad():
        composed.coefficients.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    cross_entropy(composed, (x, y)).backward()
    plain = composed.coefficients.detach().double().requires_grad_()
    weights = {}
    for j, name in enumerate(composed.blocks):
        p = base.get_parameter(name)
        mask = composed.masks(name, p.shape)
        masks = [torch.ones_like(p)] if mask is None else [(mask == k).double() for k in range(parts)]
        weights[name] = p + sum(
            plain[i, j, k] * masks[k] * v.value(name) for i, v in enumerate(vectors) for k in range(parts)
        )
    nn.functional.cross_entropy(functional_call(base, weights, (x,)), y).backward()
    torch.testing.assert_close(composed.coefficients.grad.double(), plain.grad, rtol=1e-5, atol=1e-7)


def test_equal_parts_and_equal_coefficients_are_the_simpler_forms(setting):
    base, _, vectors, x, _ = setting
    one, many = Composed(base, vectors), Composed(base, vectors, parts=5)
    with torch.no_grad():
        one.coefficients.normal_()
        many.coefficients.copy_(one.coefficients.expand(-1, -1, 5))
    torch.testing.assert_close(one(x), many(x))
    with torch.no_grad():
        one.coefficients.fill_(0.3)
    isotropic = net(9)
    (Point.open(base) + 0.3 * (vectors[0] + vectors[1] + vectors[2])).load_into(isotropic)
    parameters = dict(isotropic.named_parameters())
    torch.testing.assert_close(one(x), functional_call(base, parameters, (x,)))


def test_the_linearised_model_is_linear_and_touches_the_curve(setting):
    base, _, vectors, x, y = setting
    composed = Composed(base, vectors, linear=True)
    start = composed(x).detach()
    direction = torch.randn_like(composed.coefficients)
    steps = []
    for size in (1.0, 2.0):
        with torch.no_grad():
            composed.coefficients.copy_(size * direction)
        steps.append(composed(x).detach() - start)
    torch.testing.assert_close(2 * steps[0], steps[1])
    curved = Composed(base, vectors)
    with torch.no_grad():
        curved.coefficients.copy_(1e-4 * direction)
        composed.coefficients.copy_(1e-4 * direction)
    torch.testing.assert_close(curved(x), composed(x), atol=1e-5, rtol=1e-5)
    cross_entropy(composed, (x, y)).backward()
    assert composed.coefficients.grad.abs().sum() > 0


def test_an_adapter_is_a_task_vector():
    base = nn.Linear(6, 4)
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    vector = Point.open({"weight": b @ a})
    composed = Composed(base, [vector])
    x = torch.randn(3, 6)
    with torch.no_grad():
        composed.coefficients.fill_(0.5)
    found = composed.point()  # the bias, which the vector lacks, is the base's
    torch.testing.assert_close(found["weight"], base.weight.detach() + 0.5 * b @ a)
    assert torch.equal(found["bias"], base.bias)
    torch.nn.init.zeros_(composed.coefficients)
    composed(x).square().sum().backward()
    grad = 2 * base(x).T @ x
    assert float(composed.coefficients.grad) == pytest.approx(float((b.T @ grad @ a.T).trace()), rel=1e-4)


def test_a_budget_takes_what_the_loss_feels(setting):
    base, _, vectors, x, y = setting
    weak = vectors[0] * 1e-3
    composed = Composed(base, [weak, vectors[1], vectors[2]])
    grads = coefficient_gradients(composed, [(x, y)], cross_entropy)
    blocks = composed.blocks
    strongest = choose_vectors(composed.vectors, grads, 1, rule="gradient", blocks=blocks)[0]
    assert strongest is composed.vectors[int(grads.abs().sum(1).argmax())]
    first, second = choose_vectors(composed.vectors, grads, 2, blocks=blocks)
    for j, name in enumerate(blocks):
        order = grads[:, j].abs().argsort(descending=True)
        assert torch.equal(first[name], composed.vectors[int(order[0])].value(name))
        assert torch.equal(second[name], composed.vectors[int(order[1])].value(name))
    assert len(choose_vectors(vectors, grads, 2, rule="random", blocks=blocks)) == 2
    with pytest.raises(InputError, match="budget is 4"):
        choose_vectors(vectors, grads, 4, blocks=blocks)
    with pytest.raises(InputError, match="unknown rule 'blokwise'"):
        choose_vectors(vectors, grads, 1, rule="blokwise", blocks=blocks)


def test_trusted_samples_are_the_surest_of_each_class():
    logits = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    trusted = most_confident(logits)
    confidence, label = logits.softmax(-1).max(-1)
    for k in range(4):
        chosen = trusted == k
        assert int(chosen.sum()) == 10  # 400 / (10 x 4), and not everything
        assert confidence[chosen].min() >= confidence[(label == k) & ~chosen].max()


def test_pseudo_labels_count_only_where_they_are_sure_or_trusted():
    model = nn.Identity()
    weak = torch.tensor([[9.0, 0.0], [0.1, 0.0], [0.0, 0.2]])
    strong = torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 2.0]])
    losses = nn.functional.cross_entropy(strong, torch.tensor([0, 0, 0]), reduction="none")
    assert float(pseudo_label_loss(model, weak, strong)) == pytest.approx(float(losses[0]))
    trusted = torch.tensor([-1, -1, 0])
    assert float(pseudo_label_loss(model, weak, strong, trusted=trusted)) == pytest.approx(float(losses[[0, 2]].mean()))


def test_negation_penalty_and_the_best_scalar(setting):
    base, _, vectors, x, y = setting
    composed = Composed(base, vectors[:1])
    value, numbers = negation(cross_entropy, cross_entropy)(composed, ((x, y), (x, y)))
    assert float(value.detach()) == pytest.approx(0)
    assert numbers["target"] == numbers["control"]
    with torch.no_grad():
        composed.coefficients[:] = 2.0
    assert float(penalty(composed).detach()) == pytest.approx(1.0)
    target = 0.35
    found = best_scalar(composed, lambda m: -abs(float(m.coefficients[0, 0, 0]) - target))
    assert found == pytest.approx(0.35)
    assert float(composed.coefficients.detach().min()) == pytest.approx(0.35)


def test_what_does_not_fit_is_refused(setting):
    base = setting[0]
    with pytest.raises(InputError, match="share no parameter"):
        Composed(base, [Point.open({"other": torch.ones(1)})])
    with pytest.raises(InputError, match="has shape"):
        Composed(base, [Point.open({"0.weight": torch.ones(1)})])
