"""Find, use and explain the linear structure in neural networks.

This import is light on purpose: no torch is loaded before it is needed. Rooms are imported by name, for example
`from lineament import ops`, `from lineament import convert`, or `import lineament.models` to let transformers load
converted models.
"""

__version__ = "0.1.0"
