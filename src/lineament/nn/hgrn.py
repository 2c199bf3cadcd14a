"""HGRN: a vector state with a forget gate per channel."""

from torch import Tensor, nn

from lineament.nn.config import MixerConfig
from lineament.nn.decays import ForgetGate
from lineament.nn.state import State
from lineament.nn.windowed import stepping
from lineament.ops.gates import check_gates
from lineament.ops.scan import elementwise_scan, scan_step_


class HGRN(nn.Module):
    """`h_t = f_t h_{t-1} + (1 - f_t) v_t`, `o = h` (arXiv:2311.04823); `k` holds the logits of f, q is not read.

    Args:
        config: the shape, with heads = key_heads and K = V. layer, layers: the place, for the gate's lower bound.
    """

    backend = "auto"
    backends = ("chunked",)  # beside the reference

    def __init__(self, config: MixerConfig, *, layer: int = 0, layers: int = 1) -> None:
        super().__init__()
        self.config = config
        self.forget = ForgetGate(config.key_heads * config.key_width, layer, layers)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, cu_seqlens: Tensor | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        """See `HeadMixer`."""
        log_decay, share = self.forget(k)
        if self.config.check:
            check_gates(log_decay)
        write = share * v
        if cu_seqlens is None and stepping(v.shape[1], state):
            o, state = scan_step_(write[:, 0], log_decay[:, 0], state)[:, None], state
        else:
            o, state = elementwise_scan(write, log_decay, state=state, cu_seqlens=cu_seqlens, backend=self.backend)
        groups = self.config.groups
        return (o if groups == 1 else o.repeat_interleave(groups, 2)).to(v.dtype), state
