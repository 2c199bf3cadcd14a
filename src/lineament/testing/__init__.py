"""The batteries any new row joins: operators' backends, head mixers, merges, relevance rules. Needs no test runner.

A broken law is an AssertionError that says which law, where, and by how much. With pytest, one test per law:

    @pytest.mark.parametrize("law", MIXER_LAWS)
    def test_my_mixer(law):
        check_mixer(make, laws=[law])
"""

from lineament.testing.compare import TOLERANCE, rms, same
from lineament.testing.merge import MERGE_LAWS, check_merge
from lineament.testing.mixer import MIXER_LAWS, check_mixer
from lineament.testing.mixer_numbers import SLOW_LAWS
from lineament.testing.op import INPUTS, OP_LAWS, OpCase, check_op
from lineament.testing.rule import RULE_LAWS, check_rule
from lineament.testing.trial import MixerCase

__all__ = [
    "INPUTS",
    "MERGE_LAWS",
    "MIXER_LAWS",
    "OP_LAWS",
    "RULE_LAWS",
    "SLOW_LAWS",
    "TOLERANCE",
    "MixerCase",
    "OpCase",
    "check_merge",
    "check_mixer",
    "check_op",
    "check_rule",
    "rms",
    "same",
]
