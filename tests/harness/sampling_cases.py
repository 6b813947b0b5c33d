"""Every sampling parameter at work, as a client spells it and as the oracle takes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import llguidance

EOS = 2  # of the golden checkpoints
WORDS = r"([a-z0-9]{1,8}[ ,.])*"  # never has to end


class Case(NamedTuple):
    """One way of sampling."""

    name: str
    http: dict[str, Any]  # fields of a body
    oracle: dict[str, Any]  # fields of `SamplingParams`


def _case(
    name: str, http: dict[str, Any] | None = None, oracle: dict[str, Any] | None = None, **both: Any
) -> Case:
    return Case(name, {**both, **(http or {})}, {**both, **(oracle or {})})


_GRAMMAR = {"grammar": llguidance.grammar_from("regex", WORDS), "eos_token_ids": (EOS,)}
_BIAS: tuple[dict[str, Any], dict[str, Any]] = (
    {"logit_bias": {"40": 4.5, str(EOS): -100}},
    {"logit_bias": ((EOS, -100.0), (40, 4.5))},
)

CASES = [
    _case("greedy", temperature=0.0),
    _case("sampled", temperature=0.8, top_p=0.95, top_k=60, min_p=0.02),
    _case("penalties", temperature=0.9, presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.2),
    _case("greedy_penalties", temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.3),
    _case("bias", *_BIAS, temperature=1.0),
    _case("grammar", {"guided_regex": WORDS, **_BIAS[0]}, {**_GRAMMAR, **_BIAS[1]}, temperature=1.0),
    _case(
        "everything", {"structured_outputs": {"regex": WORDS}, **_BIAS[0]}, {**_GRAMMAR, **_BIAS[1]},
        temperature=1.1, top_p=0.9, top_k=80, min_p=0.01, presence_penalty=-0.2, frequency_penalty=0.2,
        repetition_penalty=1.1,
    ),
    _case("grammar_that_ends", {"guided_choice": ["yes please", "no"]},
          {"grammar": llguidance.grammar_from("choice", '["yes please","no"]'), "eos_token_ids": (EOS,)},
          temperature=1.0),
]  # fmt: skip
