"""Words where they stand: their tokens, and what each token adds to a text."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from lineament.data import going_on, pieces

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer like Llama 2's: a space is put in front of every text, and none is shown at its beginning."""
    words = ["<unk>", "▁", "▁The", "▁capital", "▁of", "▁France", "▁is", "▁Paris", "▁Mar", "y", "!"]
    model = Tokenizer(Unigram([(word, -1.0 - 0.01 * i) for i, word in enumerate(words)], unk_id=0))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer like GPT-2's, of bytes, with "17" and "175" as numbers of one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "17", "175"])}
    model = Tokenizer(BPE(vocabulary, [("1", "7"), ("17", "5")]))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model)


def test_a_word_is_tokenised_where_it_stands(spaced, bytewise):
    alone = spaced(" Paris", add_special_tokens=False)["input_ids"]
    assert spaced.convert_ids_to_tokens(alone) == ["▁", "▁Paris"]  # what the word is not behind a text
    assert spaced.convert_ids_to_tokens(going_on(spaced, TEXT, " Paris")) == ["▁Paris"]
    assert spaced.convert_ids_to_tokens(going_on(spaced, TEXT, " Mary")) == ["▁Mar", "y"]
    assert spaced.convert_ids_to_tokens(going_on(spaced, TEXT, "!")) == ["!"]
    assert bytewise.convert_ids_to_tokens(going_on(bytewise, "year 17", "5")) == ["5"]  # 175 would be another token
    with pytest.raises(ValueError, match="makes no token of ''"):
        going_on(bytewise, TEXT, "")
    with pytest.raises(ValueError, match="has no token for ' Zoë', only its '<unk>'"):
        going_on(spaced, TEXT, " Zoë")
    assert spaced.unk_token_id in going_on(spaced, TEXT, "<unk>")  # asked for by name


def test_pieces_make_up_the_text(spaced, bytewise):
    said = f"{TEXT} Mary!"
    found = pieces(spaced, spaced(said, add_special_tokens=False)["input_ids"])
    assert found == ["The", " capital", " of", " France", " is", " Mar", "y", "!"]
    assert pieces(bytewise, bytewise("a 17!")["input_ids"]) == ["a", " ", "17", "!"]
    smile = pieces(bytewise, bytewise("a😀b")["input_ids"])
    assert (smile[0], smile[-2], smile[-1]) == ("a", "😀", "b")
    assert pieces(spaced, []) == []
    for tokenizer in (spaced, bytewise):  # longer than what a token is decoded with
        long = " ".join([said] * 9)
        assert "".join(pieces(tokenizer, tokenizer(long, add_special_tokens=False)["input_ids"])) == long
