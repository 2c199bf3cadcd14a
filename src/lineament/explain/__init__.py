"""Explain."""
from lineament.explain.relevance import Relevance, relevance
