from __future__ import annotations

import numpy as np
import pytest

from bus.bench.routing import A2E, DISPATCH, Shape, check_result, expected, inputs
from bus.bench.rows import Bytes, Float32Wire, Int8Wire, Rows, Wire, check_plain, plain_blocks


def shape(form: str, num_ranks: int, kind: str = "float32") -> Shape:
    return Shape(form=form, num_ranks=num_ranks, batch=5, hidden=16, top_k=3, kind=kind, num_experts=8)


class Loopback:
    """A transport of one rank."""

    def swap_equal(self, out: Bytes, into: Bytes) -> None:
        into[:] = out

    def swap(self, out: Bytes, sent: list[int], into: Bytes, received: list[int]) -> None:
        assert sent == received == [out.size]
        into[:] = out


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_the_message_form_gives_the_expected_result(kind: str) -> None:
    rows = Rows(Loopback(), shape(DISPATCH, 1, kind), 0)
    rows.run()
    rows.verify()
    rows._sum[2] = 0
    with pytest.raises(ValueError, match="wrong result: off by"):
        rows.verify()


def test_the_result_tells_which_rank_a_row_went_to() -> None:
    two = shape(DISPATCH, 2)
    given = inputs(two, 1)
    owners = given.topk_idx // 4
    slots = given.x[:, None, :] * (owners + 1)[..., None]
    wanted = np.einsum("tk,tkh->th", given.topk_weights, slots.astype(np.float32))
    check_result(two, given, wanted)
    other_rank = np.einsum(
        "tk,tkh->th", given.topk_weights, (slots / (owners + 1)[..., None]).astype(np.float32)
    )
    with pytest.raises(ValueError):
        check_result(two, given, other_rank)


def test_ranks_of_a2e_hold_tokens_or_experts() -> None:
    four = shape(A2E, 4)
    assert [four.num_tokens(rank) for rank in range(4)] == [5, 5, 0, 0]
    assert (four.first_expert_rank, four.num_expert_ranks, four.num_local_experts) == (2, 2, 4)
    assert four.rows_max == 2 * 5 * 3
    assert expected(four, inputs(four, 3)).shape == (0, 16)
    check_result(four, inputs(four, 3), np.empty((0, 16), np.float32))


def test_experts_of_a_token_are_distinct() -> None:
    given = inputs(shape(DISPATCH, 2), 0)
    assert all(len(set(row)) == 3 for row in given.topk_idx.tolist())


def added(wire: Wire, x: np.ndarray) -> np.ndarray:
    """Rows 3 and 0 of `x`, multiplied by 2 on the wire, with weights 1 and 0.5."""
    rows, out = wire.packed(x).copy(), np.empty((1, 16), np.float32)
    wire.work(rows, np.float32(2))
    wire.add(out, rows, np.array([3, 0], np.int32), np.array([1, 0.5], np.float32), 1, 2, 16)
    return out


def test_wires_carry_work_and_add_rows() -> None:
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    exact, rounded = Float32Wire(shape(DISPATCH, 1)), Int8Wire(shape(DISPATCH, 1, "int8"))
    assert np.array_equal(added(exact, x)[0], 2 * x[3] + x[0])
    assert rounded.packed(x).shape == (4, 20)
    assert 0 < np.abs(added(rounded, x)[0] - (2 * x[3] + x[0])).max() < 3 * np.abs(x).max() / 127


def test_plain_blocks_testify() -> None:
    blocks = [plain_blocks(rank, 3, 4) for rank in range(3)]
    for rank, (_, _, wanted) in enumerate(blocks):
        got = np.concatenate([out[4 * rank : 4 * rank + 4] for out, _, _ in blocks])
        check_plain(got, wanted)
        with pytest.raises(ValueError, match="wrong result"):
            check_plain(np.roll(got, 4), wanted)
