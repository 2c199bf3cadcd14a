"""The page of a conversion: its heading, and what its tiles say."""

from lineament.convert.pages import report_page
from lineament.report import Evidence


def test_tiles_say_ratios_and_points_lost_and_nothing_lost_is_0(tmp_path):
    rows = [
        {"measure": "perplexity docs 512", "student": 10.1, "teacher": 10.0, "ratio": 1.01, "goal": 1.02,
         "verdict": "pass"},
        {"measure": "retrieval 1024", "student": 87.5, "teacher": 87.5, "lost": -0.0, "low": -2.5, "high": 2.5,
         "goal": 3, "verdict": "pass"},
        {"measure": "KL to teacher docs 1024", "student": 0.777, "teacher": 0.0},
    ]  # fmt: skip
    evidence = Evidence(name="conversion", rows=rows, claim="c", threshold="t", passed=True)
    shown = report_page(evidence, tmp_path / "a.html").read_text()
    tiles = shown.split("At a glance")[2].split("<h2")[0]
    assert "1.010x" in tiles
    assert ">0<" in tiles
    assert "-0<" not in tiles
    assert "points lost: pass" in tiles
    assert "0.777" not in tiles


def test_the_heading_counts_goals(tmp_path):
    rows = [
        {"measure": f"perplexity docs {n}", "student": 10.0, "teacher": 10.0, "ratio": 1.0, "goal": 1.02, "verdict": v}
        for n, v in ((512, "pass"), (2048, "miss"), (8192, "pass"))
    ]
    for given, said in ((rows, "conversion: 2 of 3 goals reached"), ([], "conversion: no verdict")):
        evidence = Evidence(name="conversion", rows=given, claim="c", threshold="t", passed=False if given else None)
        assert said in report_page(evidence, tmp_path / "a.html").read_text()
