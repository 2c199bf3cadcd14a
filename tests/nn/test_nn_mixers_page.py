"""The page of mixers has a row for every layer and a column for every law, and nothing on it failed."""

from pathlib import Path

from lineament.nn import LAYERS
from lineament.testing import MIXER_LAWS, SLOW_LAWS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mixers.md"


def test_the_table_is_complete_and_green():
    text = PAGE.read_text(encoding="utf-8")
    written = text.partition("begin -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.strip().splitlines()]
    assert rows[0] == ["layer", *MIXER_LAWS, *SLOW_LAWS], "run scripts/mixers.py"
    assert [row[0] for row in rows[2:]] == list(LAYERS), "run scripts/mixers.py"
    assert {cell for row in rows[2:] for cell in row[1:]} <= {"yes", "-"}


def test_every_layer_is_explained():
    above = PAGE.read_text(encoding="utf-8").partition("## What holds")[0]
    assert [name for name in LAYERS if f"`{name}`" not in above] == []
