"""Pairs of prompts: what the generators say, how files are read, and what makes no pair."""

import json

import pytest
import torch

from lineament.tasks.prompt_pairs import Pair, encode, greater_than_pairs, indirect_object_pairs, read_pairs


class Words:
    """A tokenizer of one number per word, made up as words come; long words are two."""

    def __init__(self):
        self.known = ["<pad>"]

    def __call__(self, text, add_special_tokens=True):
        words = [part for word in text.split() for part in (word[:9], word[9:]) if part]
        self.known += [word for word in dict.fromkeys(words) if word not in self.known]
        return {"input_ids": [self.known.index(word) for word in words]}

    def convert_ids_to_tokens(self, ids):
        return [self.known[i] for i in ids]


def test_generators_change_what_decides_the_answer_and_nothing_else():
    pairs = indirect_object_pairs(20, seed=3)
    assert pairs == indirect_object_pairs(20, seed=3) != indirect_object_pairs(20, seed=4)
    for pair in pairs:
        clean, corrupt = pair.clean.replace(",", " ,").split(), pair.corrupt.replace(",", " ,").split()
        (place,) = [i for i, (x, y) in enumerate(zip(clean, corrupt, strict=True)) if x != y]
        assert (f" {corrupt[place]}",) == pair.answer
        assert (f" {clean[place]}",) == pair.distractor
    assert all(" Mary" in pair.answer + pair.distractor for pair in
               indirect_object_pairs(3, fits=lambda word: word in (" Mary", " John")))  # fmt: skip
    for pair in greater_than_pairs(20):
        year = pair.clean.split(" year ")[1][:4]
        assert all(int(d) > int(year[2]) for d in pair.answer)
        assert all(int(d) < int(year[2]) for d in pair.distractor)
        assert pair.clean.replace(year, f"{year[:2]}0{year[3]}") == pair.corrupt


def test_pairs_are_padded_behind_and_answers_are_first_tokens():
    pairs = [Pair("a b c", "a d c", ("x", "y z"), ("w",)), Pair("b c", "b d", ("w",), ("x",))]
    tokenizer = Words()
    found = encode(tokenizer, pairs)
    number = tokenizer.known.index
    assert found.clean.tolist() == [[number(w) for w in "abc"], [number("b"), number("c"), 0]]
    assert found.answer.tolist() == [[number("x"), number("y")], [number("w"), -1]]
    assert found.last.tolist() == [2, 1]
    assert found.rows(torch.tensor([1])).clean.shape == (1, 2)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair("a b", "a b c", ("x",), ("y",)), "pair 0: the clean prompt has 2 tokens and the corrupt one 3"),
        (Pair("a b c", "a incomprehensible c", ("x",), ("y",)), r"token 1: \['b', 'c'\] and \['incompreh', 'ens"),
        (Pair("a b", "a b", ("x",), ("y",)), "clean and corrupt prompt are the same"),
        (Pair("a b", "a c", ("x y",), ("x z",)), "begin with the same token"),
    ],
)  # fmt: skip
def test_what_makes_no_pair_is_said(pair, message):
    with pytest.raises(ValueError, match=message):
        encode(Words(), [pair])
    with pytest.raises(ValueError, match="no pair"):
        encode(Words(), [])


def test_task_files_are_read_and_mistakes_named(tmp_path):
    path = tmp_path / "task.json"
    good = {"clean": "a b", "corrupt": "a c", "answer": ["x", "y"], "distractor": "z"}
    path.write_text(json.dumps({"prompts": [good]}))
    assert read_pairs(path) == [Pair("a b", "a c", ("x", "y"), ("z",))]
    for text, message in (
        ("{", "is not JSON"), ("{}", "has no prompts"), ('{"prompts": [3]}', "prompt 0: expected an object"),
        (json.dumps([good, good | {"answer": ""}]), "prompt 1: answer is ''"),
        (json.dumps([{**good, "anser": 1}]), "Did you mean 'answer'"),
        (json.dumps([{"clean": "a"}]), "corrupt is None"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_pairs(path)
    with pytest.raises(ValueError, match="or one of ioi, greater-than"):
        read_pairs(tmp_path / "none.json")
