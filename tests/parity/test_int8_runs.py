"""Latent models with an INT8 cache, INT8 on the wire, or both: the same bits in any batch, close to float32."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from bus.xccl.reference import transport
from services.model import AttentionModel, Batch, ExpertModel, KvCache, ReferenceModel, load_config
from tests.parity import test_exactness
from tests.parity.test_exactness import GOLDENS, Split, make_sequences
from tests.parity.test_goldens import golden_prompts, greedy_params, rows, split_forward, take

LATENT = ("deepseek_v3", "deepseek_v3_plain", "kimi_k2")

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Run:
    """A form in which a model runs."""

    kv_cache_dtype: str
    wire_int8: bool


RUNS = [Run("int8", False), Run("auto", True), Run("int8", True)]


class SentExperts:
    """Experts that are reached over a wire that rounds, by the wire's slow twin."""

    def __init__(self, experts: ExpertModel) -> None:
        self._experts = experts

    def forward(self, layer_idx: int, expert_id: int, x: Float) -> Float:
        return transport(self._experts.forward(layer_idx, expert_id, transport(x, int8=True)), int8=True)


@pytest.fixture(scope="module", params=LATENT)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=RUNS, ids=["kv", "wire", "kv-wire"])
def split(request: pytest.FixtureRequest, name: str) -> Iterator[Split]:
    folder, run = GOLDENS / name, request.param
    config = load_config(folder)
    whole = ExpertModel.load(folder, config, range(config.num_experts), shared=config.has_shared_expert)
    experts = SentExperts(whole) if run.wire_int8 else whole
    yield Split(
        AttentionModel.load(folder, config, kv_cache_dtype=run.kv_cache_dtype),
        [experts],  # type: ignore[list-item]
        ReferenceModel.load(folder, kv_cache_dtype=run.kv_cache_dtype, wire_int8=run.wire_int8),
        golden_prompts(folder),
    )


def test_a_sequence_alone_and_among_32_has_the_same_bits(split: Split) -> None:
    rng = random.Random(1)
    sequences = make_sequences(split, 1, rng)
    test_exactness.run_together(split, sequences, rng)
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.prompt_tokens]
        assert split.model.generate(prompt, sequence.params) == sequence.output
    for sequence in sequences[:6]:
        alone = split.model.logits(sequence.tokens[:-1])[sequence.prompt_tokens - 1 :]
        assert np.array(sequence.logits).tobytes() == alone.tobytes()


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunks_and_order_do_not_change_a_bit(split: Split, chunk: int) -> None:
    prompt = split.prompts[4]
    whole = split.model.logits(prompt)
    batch = rows([prompt], [[5, 0, 6, 1, 2, 3, 4, 7, 9, 8, 11, 12]], block_tokens=5)
    kv = poisoned(split.attention, 13, 5)
    pieces = np.split(np.arange(len(prompt)), range(chunk, len(prompt), chunk))
    chunked = [split_forward(split.attention, split.experts, take(batch, piece), kv) for piece in pieces]
    assert np.concatenate(chunked).tobytes() == whole.tobytes()
    order = np.random.default_rng(5).permutation(len(prompt))
    shuffled: Batch = take(batch, order)
    kv = poisoned(split.attention, 13, 5)
    out = split_forward(split.attention, split.experts, shuffled, kv)
    assert out.tobytes() == whole[order].tobytes()


def poisoned(attention: AttentionModel, num_blocks: int, block_tokens: int) -> KvCache:
    """Return a cache over a buffer of exactly `kv_bytes`, full of NaN."""
    kv = attention.allocate_kv(
        bytearray(attention.kv_bytes(num_blocks, block_tokens)), num_blocks, block_tokens
    )
    kv.array.fill(np.nan)
    return kv


def test_recovery_computes_the_same_tokens_again(split: Split) -> None:
    prompt = split.prompts[2]
    whole = split.model.generate(prompt, greedy_params(12))
    for cut in (1, 7):
        assert split.model.generate(prompt + whole[:cut], greedy_params(12 - cut)) == whole[cut:]


def test_it_is_close_to_float32_but_not_the_same(split: Split, name: str) -> None:
    prompt = split.prompts[3]
    expected, got = ReferenceModel.load(GOLDENS / name).logits(prompt), split.model.logits(prompt)
    errors = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0 < np.median(errors) < 0.1
