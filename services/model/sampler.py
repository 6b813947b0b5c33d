"""From one row of logits and one request's parameters to its next token. The one place where masks are made.

A request that uses neither penalties, bias nor a grammar takes the short way: its row goes to `sampling.sample`
as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bus.control.messages import SamplingParams
from services.model import sampling
from services.model.grammar import Grammars

Float = npt.NDArray[np.float32]


class Sampler:
    """Draws for the requests of one worker. Not thread-safe.

    Args:
        folder: the checkpoint's; read only when a request has a grammar.
        vocab_size: of the model.
    """

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        self._grammars = Grammars(folder, vocab_size)

    def draw(
        self,
        logits_row: Float,
        params: SamplingParams,
        *,
        position: int,
        allow_stop: bool,
        request_id: str = "",
        prompt_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
    ) -> int:
        """Return the next token id.

        Args:
            logits_row: [vocab] float32, left as it is.
            position: absolute position of the token drawn.
            allow_stop: False bans the eos and stop tokens, unless the grammar leaves no other.
            request_id: under which the grammar's state is kept; the result does not depend on it.
            prompt_token_ids, output_token_ids: all of them, where `params` uses them.

        Raises:
            GrammarError: the grammar leaves no token.
            ValueError: the banned tokens leave none.
        """
        row: Float | npt.NDArray[np.float64] = logits_row
        banned = () if allow_stop else (*params.eos_token_ids, *params.stop_token_ids)
        if params.uses_outputs or params.logit_bias:
            allowed = self._grammars.allowed(request_id, params, output_token_ids)
            if allowed is not None and banned:
                banned = _bearable(banned, allowed)
            row = sampling.adjust(
                logits_row,
                params,
                prompt_token_ids=prompt_token_ids,
                output_token_ids=output_token_ids,
                allowed=allowed,
            )
        return sampling.sample(
            row,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=params.seed,
            position=position,
            banned_ids=banned,
        )


def _bearable(banned: tuple[int, ...], allowed: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """Return `banned`, or nothing when the grammar allows no other token: a complete text must end."""
    others = allowed.copy()
    others[[token_id for token_id in banned if 0 <= token_id < len(others)]] = False
    return banned if others.any() else ()
