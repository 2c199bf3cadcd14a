"""What was found, shown: evidence, tables, plots, and a page in one file."""

from lineament.report.evidence import Evidence
from lineament.report.figures import bars, curve, heatmap
from lineament.report.front import front
from lineament.report.heat import HeatText, heat_image, heat_text
from lineament.report.machine import machine, versions
from lineament.report.network import network
from lineament.report.page import Details, Drawing, Picture, Rows, Samples, Section, Text, Tiles, page
from lineament.report.routes import routes
from lineament.report.tables import table

__all__ = [
    "Details",
    "Drawing",
    "Evidence",
    "HeatText",
    "Picture",
    "Rows",
    "Samples",
    "Section",
    "Text",
    "Tiles",
    "bars",
    "curve",
    "front",
    "heat_image",
    "heat_text",
    "heatmap",
    "machine",
    "network",
    "page",
    "routes",
    "table",
    "versions",
]
