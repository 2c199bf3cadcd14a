import pytest
import torch

from lineament._base.errors import InputError, near_miss, unknown
from lineament._base.shapes import bind, check_heads


def test_bind_returns_every_axis():
    assert bind("q: B T K, v: B T V", torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)) == {"B": 2, "T": 3, "K": 4, "V": 5}


def test_bind_skips_a_missing_tensor_and_anonymous_axes():
    assert bind("q: B _, state: B K", torch.zeros(2, 7), None) == {"B": 2}


def test_the_error_names_both_tensors():
    with pytest.raises(InputError, match="v has H=2, but q has H=3; these must agree"):
        bind("q: B H, v: B H", torch.zeros(1, 3), torch.zeros(1, 2))


def test_a_wrong_number_of_axes_is_named():
    with pytest.raises(InputError, match=r"q has shape \[2\]; expected the axes \[B, H\]"):
        bind("q: B H", torch.zeros(2))


def test_a_fixed_size_is_checked():
    with pytest.raises(InputError, match="expected size 3"):
        bind("q: B 3", torch.zeros(2, 4))


@pytest.mark.parametrize(("heads", "largest"), [({"q": 9, "k": 3, "v": 3}, 9), ({"q": 2, "k": 2, "v": 8}, 8)])
def test_grouped_heads_divide(heads, largest):
    assert check_heads(**heads) == largest


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="k has 4 heads and q has 9"):
        check_heads(q=9, k=4)


def test_near_misses():
    assert near_miss("hedghog", ["hedgehog", "kda"]) == " Did you mean 'hedgehog'?"
    assert near_miss("zzz", ["hedgehog"]) == ""
    assert str(unknown("mixer", "zzz", ["b", "a"])) == "unknown mixer 'zzz'. Known: a, b."
