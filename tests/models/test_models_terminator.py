"""The Terminator: shapes of the published network, independence of batch mates on request, what is refused."""

from dataclasses import replace

import pytest
import torch

from lineament._base.errors import InputError
from lineament.models import TERMINATOR_CIFAR, Terminator, TerminatorConfig
from lineament.models.terminator import kernel_spread
from lineament.nn import HyperConfig

SMALL = {"global_hidden": 6, "local_hidden": 5, "channel_hidden": 4, "gate_hidden": 3, "space_hidden": 4}


def config(axes=2, **options):
    return TerminatorConfig(
        blocks=HyperConfig(size=6, axes=axes, **SMALL, **options), channels=1, classes=4, factors=(12, 2, 2),
        layers=(2, 1, 1), dropout=(0.0, 0.1, 0.1), before=((), (), (0,)),
    )  # fmt: skip


@pytest.mark.parametrize("axes", [1, 2])
def test_images_and_sequences_are_classified_and_everything_learns(axes):
    torch.manual_seed(0)
    model = Terminator(config(axes))
    out = model(torch.randn(5, 1, *[6] * axes))
    assert out.logits.shape == (5, 4)
    assert out.spread > 0
    (out.logits.square().mean() + out.spread).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_published_widths():
    assert TERMINATOR_CIFAR.widths == [3, 12, 36, 72, 144, 288]


def test_the_answer_depends_on_the_batch_as_published_with_a_warning_and_not_if_asked():
    torch.manual_seed(0)
    x = torch.randn(6, 1, 6, 6)
    published, independent = Terminator(config()), Terminator(config(context="sample", statistics="running"))
    independent(x)
    with pytest.warns(UserWarning, match="depends on the batch"):
        one = published.eval()(x[:2]).logits
    with pytest.warns(UserWarning, match="depends on the batch"):
        assert not torch.allclose(one, published(x).logits[:2])
    torch.testing.assert_close(independent.eval()(x[:2]).logits, independent(x).logits[:2])


def test_kernels_of_one_form_are_not_apart():
    same = torch.randn(3, 3)
    assert kernel_spread([same, same, same]) == 0
    torch.testing.assert_close(kernel_spread([same, same + 1, same + 3]), torch.tensor(1.0 + 9 + 4))


def test_what_was_learned_is_all_in_the_state(tmp_path):
    model, again = Terminator(config()), Terminator(config())
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 1, 6, 6)
    for made in (model, again):
        made.blocks.eval()  # no dropout
    torch.testing.assert_close(model(x).logits, again(x).logits)
    assert {"blocks.0.bias", "blocks.0.local.0.bias", "blocks.0.local.0.kernel.kept"} <= set(model.state_dict())


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: replace(config(), layers=(1,)), "one entry per block"),
        (lambda: replace(config(), before=((), (1,), ())), "expected blocks before it"),
        (lambda: Terminator(replace(config(), factors=(5, 2, 2))), "multiple of 12"),
        (lambda: Terminator(config())(torch.zeros(2, 3, 6, 6)), "expected 1 channels"),
        (lambda: Terminator(config())(torch.zeros(2, 1, 8, 8)), "made for 2 axes of 6"),
    ],
)
def test_wrong_settings_and_inputs_are_named(run, message):
    with pytest.raises(InputError, match=message):
        run()
