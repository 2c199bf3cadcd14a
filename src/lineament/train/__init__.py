"""One training loop, on Accelerate: resumable to the bit, logged as JSON lines, saved whole or not at all; sweeps."""

from lineament.train.config import OPTIMIZERS, SCHEDULES, FitConfig
from lineament.train.kar3 import Kar3
from lineament.train.loop import Fitted, TrainingError, fit, to_device
from lineament.train.sharded import gather_, leave_group, sharded
from lineament.train.sweep import SweepError, finished, sweep

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "FitConfig",
    "Fitted",
    "Kar3",
    "SweepError",
    "TrainingError",
    "finished",
    "fit",
    "gather_",
    "leave_group",
    "sharded",
    "sweep",
    "to_device",
]
