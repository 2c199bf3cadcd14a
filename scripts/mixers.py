"""Check every published layer law by law and write the table of what held into docs/mixers.md.

python scripts/mixers.py            # all laws; minutes
python scripts/mixers.py kda gla    # print some rows, write nothing
"""

import sys
import warnings
from pathlib import Path

from lineament.nn import LAYERS, Mixer, MixerCache, published
from lineament.testing import MIXER_LAWS, SLOW_LAWS, MixerCase, check_mixer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "mixers.md"
BEGIN, END = "<!-- written by scripts/mixers.py: begin -->", "<!-- end -->"
GROWS = ("softmax", "mla")  # they keep keys of every token: no constant state, and 1e5 tokens are not their business
LAWS = [*MIXER_LAWS, *SLOW_LAWS]


def verdict(name: str, law: str) -> str:
    """Return "yes", "-" where a law does not apply, or "NO" with the reason printed."""
    if name in GROWS and law in ("constant", "long"):
        return "-"

    def make(heads: int, key_heads: int, model_width: int, **_: int) -> Mixer:
        size = {"model_width": model_width, "heads": heads, "key_heads": key_heads}
        return Mixer(*published(name, layer=1, layers=3, **size))

    try:
        case, constant = MixerCase(length=37), name not in GROWS
        held = check_mixer(make, case=case, begin=MixerCache, laws=[law], constant_state=constant)
    except Exception as error:  # a broken law is a row of the table, whatever broke it
        print(f"{name}, {law}: {type(error).__name__}: {error}", file=sys.stderr)
        return "NO"
    return "yes" if held else "-"


def main() -> int:
    warnings.filterwarnings("ignore")
    rows = []
    for name in sys.argv[1:] or LAYERS:
        rows.append([name, *(verdict(name, law) for law in LAWS)])
        print(" ".join(rows[-1]), flush=True)
    header = ["layer", *LAWS]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    if not sys.argv[1:]:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(before + "\n".join([BEGIN, "", *lines, "", END]) + after, encoding="utf-8")
    return int(any("NO" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
