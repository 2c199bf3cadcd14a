"""The logit difference, and how estimates are compared with patching."""

import pytest
import torch
from tiny_families import ids, make

from lineament.explain import LogitDifference, agreement, effects


def test_a_difference_is_read_at_each_rows_place_and_as_a_share():
    model = make("llama", torch.float64)[0]
    clean, corrupt = {"input_ids": ids(6)}, {"input_ids": (ids(6) + 7) % 58 + 3}
    answers = torch.tensor([[5, 8, -1], [4, -1, -1]])
    metric = LogitDifference(answers, torch.tensor([9, 7]), at=torch.tensor([5, 3]))
    with torch.no_grad():
        output = model(**clean)
    logits = output.logits
    expected = [logits[0, 5, [5, 8]].mean() - logits[0, 5, 9], logits[1, 3, 4] - logits[1, 3, 7]]
    torch.testing.assert_close(metric(output), torch.stack(expected))
    torch.testing.assert_close(metric(logits.repeat(3, 1, 1)), torch.stack(expected).repeat(3))
    torch.testing.assert_close(metric.rows(1, 2)(logits[1:]), torch.stack(expected[1:]))
    share = metric.between(model, clean, corrupt)
    with torch.no_grad():
        torch.testing.assert_close(share(model(**clean)), torch.ones(2).double())
        torch.testing.assert_close(share(model(**corrupt)), torch.zeros(2).double())
    with pytest.raises(ValueError, match="in row 0 clean and corrupt run give the same"):
        metric.between(model, clean, clean)
    with pytest.raises(ValueError, match="its own distractor"):
        LogitDifference(torch.tensor([3]), torch.tensor([3]))
    with pytest.raises(ValueError, match="its own distractor"):
        LogitDifference(torch.tensor([[5, 3], [4, 2]]), torch.tensor([[3, 7], [8, 9]]))


def test_rows_may_have_fewer_answers_and_distractors_than_others():
    metric = LogitDifference(torch.tensor([[5, 8, -1], [4, -1, -1]]), torch.tensor([[1, -1, -1], [2, 3, -1]]))
    logits = torch.arange(20.0).view(2, 1, 10) ** 2
    torch.testing.assert_close(metric(logits), torch.tensor([(25 + 64) / 2 - 1, 14**2 - (12**2 + 13**2) / 2]))


def test_long_batches_pass_in_parts():
    model = make("llama", torch.float64)[0]
    tokens = torch.cat([ids(6), ids(6) + 1, ids(6)[:1] - 1])
    metric = LogitDifference(torch.arange(5) + 10, torch.arange(5) + 20)
    given = model, {"input_ids": tokens.clamp_min(3)}, {"input_ids": (tokens + 7) % 58}, metric, "blocks.0.hook_mlp_out"
    for method in ("relp", "patch", "mean"):
        whole, parts = (effects(*given, method=method, rows=rows).scores["model.layers.0.mlp"] for rows in (99, 2))
        torch.testing.assert_close(parts, whole)


def test_agreement_has_a_row_per_kind_with_its_cost():
    model = make("gpt2", torch.float64)[0]
    clean, corrupt = {"input_ids": ids(5)}, {"input_ids": (ids(5) + 7) % 58 + 3}
    metric = LogitDifference(torch.tensor([5, 6]), torch.tensor([9, 2])).between(model, clean, corrupt)
    said = []
    found = agreement(
        model, clean, corrupt, metric, kinds=("residual", "head", "edge"), methods=("relp", "patch"), said=said.append
    )
    assert [(row["places"], row["count"]) for row in found] == [("residual", 10), ("head", 40), ("edge", 33)]
    assert all(row["patch"] == pytest.approx(1) and -1 <= row["relp"] <= 1 and row["relp, s"] > 0 for row in found)
    assert said[0].startswith("residual: patch in")
    with pytest.raises(ValueError, match="Did you mean 'head'"):
        agreement(model, clean, corrupt, metric, kinds=["heads"])
