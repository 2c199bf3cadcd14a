"""Transcoders and sparse autoencoders: the module, its files, its place in a model, learning and scores."""

from lineament.explain.dictionaries.activations import Activations, cache_activations
from lineament.explain.dictionaries.attribution import into_feature
from lineament.explain.dictionaries.dashboards import Dashboard, dashboard
from lineament.explain.dictionaries.feature_circuits import feature_circuit, feature_picture
from lineament.explain.dictionaries.feature_graph import AttributionGraph, attribute
from lineament.explain.dictionaries.files import load_dictionary, save_dictionary
from lineament.explain.dictionaries.hooks import Placed, placed, substituted
from lineament.explain.dictionaries.module import Dictionary, DictionaryConfig
from lineament.explain.dictionaries.scores import DictionaryScore, best_affine, evaluate_dictionaries
from lineament.explain.dictionaries.training import DictionaryTraining, Trained, train_dictionary
from lineament.explain.dictionaries.weights import connections, de_embedding, direct_tokens

__all__ = [
    "Activations",
    "AttributionGraph",
    "Dashboard",
    "Dictionary",
    "DictionaryConfig",
    "DictionaryScore",
    "DictionaryTraining",
    "Placed",
    "Trained",
    "attribute",
    "best_affine",
    "cache_activations",
    "connections",
    "dashboard",
    "de_embedding",
    "direct_tokens",
    "evaluate_dictionaries",
    "feature_circuit",
    "feature_picture",
    "into_feature",
    "load_dictionary",
    "placed",
    "save_dictionary",
    "substituted",
    "train_dictionary",
]
