"""Algorithm graphs: run by hand, set, drawn; what no graph is; the equality tasks."""

import pytest
import torch

from lineament._base.errors import InputError
from lineament.tasks import (
    ALGORITHMS,
    Algorithm,
    Examples,
    counterfactual,
    equality_batches,
    equality_examples,
    interventions,
)

TASK = {
    "both equalities": "hierarchical",
    "left equality": "hierarchical",
    "first argument": "hierarchical",
    "and-or-and": "distributive",
    "and-or": "distributive",
}


def by_hand(name, base, sources, mask):
    """One row of an algorithm under an intervention, from the paper's definitions; p is a list of tuples."""

    def equal(p, i):
        return p[2 * i] == p[2 * i + 1]

    if name == "both equalities":
        left, right = (equal(sources[i] if mask[i] else base, i) for i in (0, 1))
        return left == right
    if name == "left equality":
        return equal(sources[0] if mask[0] else base, 0) == equal(base, 1)
    if name == "first argument":
        first = (sources[0] if mask[0] else base)[0]
        return (first == base[1]) == equal(base, 1)
    if name == "and-or-and":
        one, two = (sources[i] if mask[i] else base for i in (0, 1))
        return (equal(one, 0) and equal(one, 1)) or (equal(two, 1) and equal(two, 2))
    one, two = (sources[i] if mask[i] else base for i in (0, 1))
    return equal(one, 1) and (equal(two, 0) or equal(two, 2))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_labels_under_interventions_are_those_worked_out_by_hand(name):
    algorithm = ALGORITHMS[name]
    examples = equality_examples(TASK[name], 50)
    drawn = interventions(algorithm, examples)(200, 3)
    rows = [[tuple(p.tolist()) for p in row] for row in torch.stack(list(examples.values.values()), 1)]
    for b, s, m, y in zip(drawn.base, drawn.sources, drawn.mask, drawn.labels, strict=True):
        assert bool(y) == by_hand(name, rows[int(b)], [rows[i] for i in s.tolist()], m.tolist())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_nothing_set_and_own_values_set_leave_the_answer(name):
    algorithm, examples = ALGORITHMS[name], equality_examples(TASK[name], 40)
    base, count = torch.arange(40), len(ALGORITHMS[name].aligned)
    sources = base.flip(0)[:, None].expand(-1, count)
    for where, mask in ((sources, False), (base[:, None].expand(-1, count), True)):
        drawn = counterfactual(algorithm, examples, base, where, torch.full((40, count), mask))
        assert torch.equal(drawn.labels, drawn.before)


def test_a_variable_downstream_follows_one_that_is_set_unless_it_is_set_itself():
    graph = {"out": (("v",), lambda v: v % 3), "v": (("u",), lambda u: u + 1), "u": (("x",), lambda x: 2 * x)}
    chain = Algorithm("chain", ("x",), graph, "out", aligned=("u", "v"))
    assert chain.order == ("u", "v", "out")
    examples = Examples(torch.zeros(2, 1), {"x": torch.tensor([0, 4])})
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    drawn = counterfactual(chain, examples, torch.zeros(3, dtype=torch.long), torch.tensor([[1, 0]] * 3), mask)
    assert drawn.labels.tolist() == [9 % 3, 1 % 3, 1 % 3]


def test_every_subset_but_the_empty_one_is_drawn_and_half_change_the_output_if_asked():
    algorithm, examples = ALGORITHMS["and-or"], equality_examples("distributive", 300)
    drawn = interventions(algorithm, examples, changing=0.5)(600, 0)
    assert (drawn.labels != drawn.before).float().mean() == 0.5
    assert drawn.chance >= 0.5
    plain = interventions(algorithm, examples)(600, 0)
    shares = torch.bincount((plain.mask.long() * torch.tensor([1, 2])).sum(1), minlength=4) / 600
    assert shares[0] == 0
    assert (shares[1:] - 1 / 3).abs().max() < 0.06
    assert torch.equal(interventions(algorithm, examples)(600, 0).base, plain.base)


def test_in_a_chain_the_partner_offers_the_equal_vector_and_pairs_are_as_before():
    examples = equality_examples("hierarchical", 2000, chained=True)
    first, second = examples.values["p1"], examples.values["p2"]
    assert torch.equal(first[examples.partners], second)
    assert abs((first == second).all(1).float().mean() - 0.5) < 0.05
    algorithm = ALGORITHMS["first argument"]
    chained = interventions(algorithm, examples)(2000, 0)
    met = (first[chained.sources[:, 0]] == second[chained.base]).all(1)
    assert abs(met.float().mean() - 0.5) < 0.05
    plain = interventions(algorithm, equality_examples("hierarchical", 2000))(2000, 0)
    other = equality_examples("hierarchical", 2000).values
    assert (other["p1"][plain.sources[:, 0]] == other["p2"][plain.base]).all(1).float().mean() < 0.01


@pytest.mark.parametrize("task", ["hierarchical", "distributive"])
def test_half_of_the_labels_are_true(task):
    x, y = equality_batches(task, 4000)(0)
    assert x.shape == (4000, 16 if task == "hierarchical" else 24)
    assert x.abs().max() <= 0.5
    assert abs(y.float().mean() - 0.5) < 0.03


def graph(**changes):
    given = {"name": "g", "inputs": ("x",), "functions": {"out": (("x",), lambda x: x)}, "output": "out"}
    return Algorithm(**{**given, **changes})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: graph(functions={"a": (("b",), abs), "b": (("a",), abs), "out": (("x",), abs)}), "cycle through a, b"),
        (lambda: graph(functions={"out": (("z",), abs)}), "'z' is no parent of 'out'"),
        (lambda: graph(output="y"), "the output 'y' has no function"),
        (lambda: graph(inputs=("x", "out")), "'out' is an input and has a function"),
        (lambda: graph(aligned=("x",)), "'x' is no variable to align"),
        (lambda: graph().run({}), "'x' is missing"),
        (lambda: interventions(graph(), Examples(torch.zeros(2), {"x": torch.zeros(2)})), "0 variables to align"),
        (lambda: Examples(torch.zeros(2), {"x": torch.zeros(3)}), "a row each in every tensor"),
        (lambda: Examples(torch.zeros(0), {}), "no example"),
        (lambda: equality_examples("hierarchal", 3), "Did you mean 'hierarchical'"),
    ],
)
def test_what_is_no_graph_or_no_examples_is_refused(make, match):
    with pytest.raises(InputError, match=match):
        make()


def test_a_share_of_changes_that_cannot_be_had_is_refused():
    same = Examples(torch.zeros(3, 16), {f"p{i}": torch.zeros(3, 4) for i in range(1, 5)})
    with pytest.raises(InputError, match=r"0\.0% of interventions change the output"):
        interventions(ALGORITHMS["both equalities"], same, changing=0.5)(10, 0)
