"""Groups: their tables, what is no group, and representations that add up."""

import json

import pytest
import torch

from lineament._base.errors import InputError
from lineament.data import Group, generated, irreps, load_group, purity

NAMES = ["Z1", "Z7", "Z8", "D4", "D5", "S3", "S4", "A4", "Q8", "Z2xZ3", "S3xZ3"]


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_associative_with_identity_and_inverses(name):
    group = load_group(name)
    table, every = group.table.tolist(), range(len(group))
    assert all(table[table[g][h]][k] == table[g][table[h][k]] for g in every for h in every for k in every)
    assert all(table[group.identity][g] == table[g][group.identity] == g for g in every)
    assert all(table[g][int(group.inverse[g])] == group.identity for g in every)
    assert group.abelian == all(table[g][h] == table[h][g] for g in every for h in every)


@pytest.mark.parametrize("name", NAMES)
def test_there_is_an_irrep_for_every_class_and_their_squares_add_up(name):
    group = load_group(name)
    parts = irreps(group)
    conjugate = [2 if each.kind == "complex" else 1 for each in parts]
    assert sum(two * each.dim**2 for two, each in zip(conjugate, parts, strict=True)) == len(group)
    assert sum(conjugate) == int(group.classes.max()) + 1
    P = torch.stack([each.projector for each in parts])
    torch.testing.assert_close(P.sum(0), torch.eye(len(group), dtype=torch.float64))
    torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-10)
    left = torch.eye(len(group), dtype=torch.float64)[group.table]  # [g] sends e_h to e_gh
    torch.testing.assert_close(left[:, None] @ P, P @ left[:, None], rtol=0, atol=1e-10)


def test_known_characters():
    kinds = {name: [(each.dim, each.kind) for each in irreps(load_group(name))] for name in ("Q8", "A4", "Z5", "S4")}
    assert kinds["Q8"] == [(1, "real")] * 4 + [(2, "quaternionic")]
    assert kinds["A4"] == [(1, "real"), (1, "complex"), (3, "real")]
    assert kinds["Z5"] == [(1, "real"), (1, "complex"), (1, "complex")]
    assert [dim for dim, _ in kinds["S4"]] == [1, 1, 2, 3, 3]


def test_on_a_cyclic_group_the_irreps_are_the_fourier_frequencies():
    u = torch.randn(9, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    power = torch.fft.rfft(u, dim=0).abs().square()[1:]
    share, which = purity(u, irreps(load_group("Z9")))
    torch.testing.assert_close(share, power.max(0).values / power.sum(0))
    assert len(set(zip(which.tolist(), power.argmax(0).tolist(), strict=True))) == len(which.unique())


def test_a_group_from_a_file(tmp_path):
    (tmp_path / "klein.json").write_text(json.dumps({"name": "V4", "table": load_group("Z2xZ2").table.tolist()}))
    group = load_group(tmp_path / "klein.json")
    assert (group.name, len(group), group.abelian) == ("V4", 4, True)
    (tmp_path / "bad.json").write_text(json.dumps({"table": [[0, 1], [1]]}))
    with pytest.raises(InputError, match="no matrix of whole numbers"):
        load_group(tmp_path / "bad.json")
    with pytest.raises(InputError, match="does not exist"):
        load_group(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: load_group("X7"), "unknown group 'X7'"),
        (lambda: load_group("D2"), "3 corners or more"),
        (lambda: load_group("Z0"), "unknown group"),
        (lambda: Group("g", torch.tensor([[0, 1], [0, 1]])), "column 0 of the table names an element twice"),
        (lambda: Group("g", torch.tensor([[0, 2], [1, 0]])), "products are 0 to 2; expected 0 to 1"),
        (lambda: Group("g", torch.zeros(2, 3, dtype=torch.long)), r"\[2, 3\]; expected M x M"),
        (lambda: Group("g", torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 1]]).flip(0)), "not associative"),
        (lambda: generated("g", [(0, 0)]), "no permutation"),
        (lambda: load_group("S7"), "more than 1000 elements"),
    ],
)
def test_what_is_no_group_is_refused(make, match):
    with pytest.raises(InputError, match=match):
        make()
