"""One sequence over several devices: each rank holds a stretch of the tokens, boundary states travel.

Inside `with sequence_parallel(tokens):` the doors of `ops` (and the layers of `nn` and `models` that stand on them)
take a rank's own tokens and give its own outputs, as if one process had run the whole sequence. What travels: a
recurrence's state and transition, once; the last tokens before a short convolution or a window, and the sinks; and for
softmax heads the earlier keys and values, counted apart.

- `sequence_parallel`, `Part`: the context and what a rank knows in it. `active() -> Part | None`;
  `alone()`: a block that is this rank's own business.
- `exchange`: any tokens of earlier ranks, one collective, differentiable. `gathered`, `summed`: every rank's tensor, or
  their sum, likewise. `tied`: keeps a collective in the graph.
- `recurrence.py`, `window.py`: the doors' parallel forms.
"""

from lineament.ops.parallel.collectives import exchange, gathered, summed, tied
from lineament.ops.parallel.part import Part, active, alone, sequence_parallel, stretches

__all__ = ["Part", "active", "alone", "exchange", "gathered", "sequence_parallel", "stretches", "summed", "tied"]
