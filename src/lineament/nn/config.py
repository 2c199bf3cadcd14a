"""What a head mixer is made of: one frozen value, JSON through and through."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from lineament._base.errors import InputError, unknown


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """The shape and the choices of one head mixer.

    Attributes:
        kind: a key of `nn.BUILDERS`, e.g. "hedgehog-window".
        heads: query heads Hq. key_heads: key-value heads Hk, which divides Hq.
        value_heads: value heads Hv where the query heads are fewer and divide them; None: as many as key heads.
        key_width: K. value_width: V. model_width: D, the width of the layer's input x.
        window: exact softmax over the last `window` tokens (kinds with a window only).
        sinks: exact softmax over the first `sinks` tokens of a document (same kinds).
        full_heads: key-value heads that stay ordinary causal softmax inside the layer.
        check: raise on gates that are NaN or out of range, at every call (retention, gla,
            hgrn, hgrn2, ssd and delta-rule).
        options: the kind's own keyword arguments (see its class).

    Example:
        >>> config = MixerConfig(kind="kda", heads=9, key_heads=3, key_width=64, value_width=64, model_width=576)
        >>> MixerConfig.from_json(config.to_json()) == config
        True
        >>> config.with_heads(6, 2).heads
        6
    """

    kind: str
    heads: int
    key_heads: int
    key_width: int
    value_width: int
    model_width: int
    window: int = 64
    sinks: int = 4
    full_heads: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    value_heads: int | None = None
    check: bool = False

    def __post_init__(self) -> None:
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise InputError(
                f"heads={self.heads} and key_heads={self.key_heads}; key heads must divide the query heads"
            )
        if self.value_heads is not None and (self.value_heads < 1 or self.value_heads % self.heads or self.full_heads):
            given = f"value_heads={self.value_heads}, heads={self.heads} and full_heads={list(self.full_heads)}"
            raise InputError(f"{given}; query heads must divide the value heads, and none may be full then")
        if self.window < 0 or self.sinks < 0:
            raise InputError(f"window={self.window}, sinks={self.sinks}; both must be 0 or more")
        object.__setattr__(self, "full_heads", tuple(sorted({int(h) for h in self.full_heads})))
        object.__setattr__(self, "options", dict(self.options))
        wrong = [h for h in self.full_heads if not 0 <= h < self.key_heads]
        if wrong:
            raise InputError(f"full_heads has {wrong[0]}, but the layer has key-value heads 0 to {self.key_heads - 1}")

    @property
    def groups(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.key_heads

    @property
    def states(self) -> int:
        """State heads Hs, and heads of the values."""
        return self.value_heads or self.key_heads

    @property
    def out_heads(self) -> int:
        """Heads of the result."""
        return max(self.heads, self.states)

    def with_heads(self, heads: int, key_heads: int) -> "MixerConfig":
        """Return the same mixer for another number of heads, none of them full."""
        return self if heads == self.heads else replace(self, heads=heads, key_heads=key_heads, full_heads=())

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "full_heads": list(self.full_heads), "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MixerConfig":
        """Build from `to_json`'s values.

        Raises:
            InputError: a field is unknown (near miss suggested) or missing.
        """
        names = [f.name for f in fields(cls)]
        for name in data:
            if name not in names:
                raise unknown("field of a mixer", name, names)
        try:
            return cls(**data)
        except TypeError as error:
            raise InputError(f"a mixer's fields are incomplete: {error}") from None
