"""What was found, shown: evidence, tables, plots, and a page in one file."""

from lineament.report.evidence import Evidence
from lineament.report.figures import bars, curve, heatmap
from lineament.report.machine import machine, versions
from lineament.report.page import Details, Picture, Rows, Samples, Section, Text, Tiles, page
from lineament.report.tables import table

__all__ = [
    "Details",
    "Evidence",
    "Picture",
    "Rows",
    "Samples",
    "Section",
    "Text",
    "Tiles",
    "bars",
    "curve",
    "heatmap",
    "machine",
    "page",
    "table",
    "versions",
]
