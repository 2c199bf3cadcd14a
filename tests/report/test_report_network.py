"""A network of nodes in ranks."""

import pytest

from lineament.report import network


def test_a_network_is_a_picture_and_names_strange_nodes():
    ranks = [["embed"], ["a0.h1", "m0"], ["logits"]]
    edges = {("embed", "m0"): 0.5, ("m0", "logits"): -0.2}
    pictures = [network(ranks, edges, aside=["m0"], title="a", dark=dark) for dark in (False, True)]
    assert all(png[:4] == b"\x89PNG" for png in pictures)
    assert network(ranks, {}) != network(ranks, edges)
    assert network([["$$", "$x$"], ["$^$"]], {("$$", "$^$"): 1.0}, title="'$$' and $_")[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="'m7' is in no rank"):
        network(ranks, {("embed", "m7"): 1.0})
    with pytest.raises(ValueError, match="no node"):
        network([], {})
