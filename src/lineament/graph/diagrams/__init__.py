"""Neural circuit diagrams: a traced model as a typed term, which is drawn, told in words and run."""

from lineament.graph.diagrams.diagram import Diagram, diagram
from lineament.graph.diagrams.term import Axis, Data, Op, Port, Repeat, Result, Term

__all__ = ["Axis", "Data", "Diagram", "Op", "Port", "Repeat", "Result", "Term", "diagram"]
