"""Every family against transformers, and the exactness that the pod's recovery leans on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from bus.control.messages import SamplingParams
from services.model import AttentionModel, Batch, ExpertModel, KvCache, ReferenceModel, load_config
from services.model.checkpoint import Checkpoint
from services.model.families import FAMILIES
from services.model.inventory import expert_specs

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
LOGIT_ERROR_MAX = 1e-4


@dataclass(frozen=True)
class Golden:
    folder: Path
    prompts: list[list[int]]
    greedy: list[list[int]]
    logits: dict[int, npt.NDArray[np.float32]]
    model: ReferenceModel


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    folder = GOLDENS / request.param
    expected = json.loads((folder / "expected.json").read_text())
    with np.load(folder / "logits.npz") as stored:
        logits = {index: stored[f"prompt_{index}"] for index in expected["logit_prompts"]}
    yield Golden(folder, expected["prompts"], expected["greedy"], logits, ReferenceModel.load(folder))


def golden_prompts(folder: Path) -> list[list[int]]:
    prompts: list[list[int]] = json.loads((folder / "expected.json").read_text())["prompts"]
    return prompts


def test_every_family_has_a_golden() -> None:
    served = {load_config(GOLDENS / name).model_type for name in NAMES}
    assert served == set(FAMILIES)


def greedy_params(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0)


def rows(prompts: list[list[int]], tables: list[list[int]], block_tokens: int) -> Batch:
    """All prompts' rows, one after the other."""
    width = max(len(table) for table in tables)
    return Batch(
        token_ids=np.array([token for prompt in prompts for token in prompt], dtype=np.int64),
        positions=np.concatenate([np.arange(len(prompt), dtype=np.int32) for prompt in prompts]),
        seq_of_row=np.repeat(np.arange(len(prompts), dtype=np.int32), [len(prompt) for prompt in prompts]),
        block_tables=np.array([table + [-1] * (width - len(table)) for table in tables], dtype=np.int32),
        block_tokens=block_tokens,
    )


def take(batch: Batch, index: npt.NDArray[np.int64]) -> Batch:
    return Batch(
        batch.token_ids[index],
        batch.positions[index],
        batch.seq_of_row[index],
        batch.block_tables,
        batch.block_tokens,
    )


def test_logits_equal_transformers(golden: Golden) -> None:
    for index, expected in golden.logits.items():
        error = np.abs(golden.model.logits(golden.prompts[index]) - expected).max()
        assert error <= LOGIT_ERROR_MAX


def test_greedy_tokens_equal_transformers(golden: Golden) -> None:
    assert len(golden.prompts) == 20
    for prompt, expected in zip(golden.prompts, golden.greedy, strict=True):
        output = golden.model.generate(prompt, greedy_params(len(expected)))
        assert output == expected


def test_a_rows_bits_depend_on_no_neighbour_order_or_block(golden: Golden) -> None:
    model, prompts = golden.model, golden.prompts[1:4]
    alone = [model.logits(prompt) for prompt in prompts]
    batch = rows(prompts, [[9, 2], [30, 1, 4], [3, 8, 7, 12, 11]], block_tokens=8)
    kv = model.attention.allocate_kv(None, 31, 8)
    together = model.attention.logits(model.forward(batch, kv))
    assert together.tobytes() == np.concatenate(alone).tobytes()

    order = np.random.default_rng(5).permutation(batch.num_rows)
    kv = model.attention.allocate_kv(None, 31, 8)
    kv.array.fill(np.nan)
    shuffled = model.attention.logits(model.forward(take(batch, order), kv))
    assert shuffled.tobytes() == together[order].tobytes()


@pytest.mark.parametrize("chunk", [1, 3, 16, 23])
def test_chunked_prefill_gives_the_same_bits(golden: Golden, chunk: int) -> None:
    model, prompt = golden.model, golden.prompts[4]
    whole = model.logits(prompt)
    batch = rows([prompt], [[5, 0, 6, 1, 2, 3, 4, 7, 9, 8, 11, 12]], block_tokens=5)
    kv = model.attention.allocate_kv(None, 13, 5)
    kv.array.fill(np.nan)
    pieces = np.split(np.arange(len(prompt)), range(chunk, len(prompt), chunk))
    chunked = [model.attention.logits(model.forward(take(batch, piece), kv)) for piece in pieces]
    assert np.concatenate(chunked).tobytes() == whole.tobytes()


def test_computing_a_position_again_gives_the_same_bits(golden: Golden) -> None:
    """Recovery prefills prompt and output so far; the tokens after that must not change."""
    prompt, expected = golden.prompts[2], golden.greedy[2]
    params = SamplingParams(max_tokens=len(expected), temperature=0.8, top_p=0.9, seed=11)
    sampled = golden.model.generate(prompt, params)
    for cut in (1, 7):
        rest = SamplingParams(max_tokens=len(expected) - cut, temperature=0.8, top_p=0.9, seed=11)
        assert golden.model.generate(prompt + sampled[:cut], rest) == sampled[cut:]


def split_forward(
    attention: AttentionModel, experts: list[ExpertModel], batch: Batch, kv: KvCache
) -> npt.NDArray[np.float32]:
    """The way the pod does it: rows of each expert go to whoever holds it, one at a time here."""
    config = attention.config
    hidden = attention.embed(batch)
    for layer_idx in range(config.num_hidden_layers):
        hidden, moe = attention.attend(layer_idx, hidden, batch, kv)
        if moe is None:
            continue
        out = np.full((batch.num_rows, config.num_slots, config.hidden_size), np.nan, dtype=np.float32)
        for row, slot in np.ndindex(batch.num_rows, config.num_slots):
            expert_id = int(moe.topk_idx[row, slot]) if slot < config.top_k else config.num_experts
            holder = experts[expert_id % len(experts)]
            out[row, slot] = holder.forward(layer_idx, expert_id, moe.x[row : row + 1])[0]
        hidden = attention.add_moe(hidden, out, moe)
    return attention.logits(hidden)


def test_split_over_processes_equals_the_oracle(golden: Golden) -> None:
    config = load_config(golden.folder)
    attention = AttentionModel.load(golden.folder, config)
    experts = [
        ExpertModel.load(
            golden.folder,
            config,
            range(rank, config.num_experts, 3),
            shared=config.has_shared_expert and config.num_experts % 3 == rank,
        )
        for rank in range(3)
    ]
    prompt = golden.prompts[3]
    batch = rows([prompt], [[2, 0, 1]], block_tokens=7)
    buffer = bytearray(attention.kv_bytes(3, 7))
    kv = attention.allocate_kv(buffer, 3, 7)
    result = split_forward(attention, experts, batch, kv)
    assert result.tobytes() == golden.model.logits(prompt).tobytes()
    assert any(buffer)


def test_each_role_maps_only_its_own_weights(golden: Golden) -> None:
    config = load_config(golden.folder)
    checkpoint = Checkpoint.open(golden.folder, config.quantization)
    of_experts = {spec.name for spec in expert_specs(checkpoint, config)}
    seen: list[tuple[int, int]] = []
    attention = AttentionModel.load(golden.folder, config, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert not of_experts & set(attention.weights.tensor_names)
    owned = [1, 6] if config.num_experts else []
    some = ExpertModel.load(golden.folder, config, owned, shared=not owned)
    mine = (".experts.1.", ".experts.6.") if owned else (".mlp.",)
    names = {name for name in of_experts if any(part in name for part in mine)}
    assert set(some.weights.tensor_names) == names
    stored = [name for name in checkpoint.tensors if name.removesuffix("_scale_inv") in names]
    sizes = (checkpoint.tensors[name].end - checkpoint.tensors[name].start for name in stored)
    assert some.weights.held_bytes == sum(sizes)
    with pytest.raises(KeyError):
        some.forward(config.moe_layer_indices[0], 2, np.zeros((1, config.hidden_size), dtype=np.float32))


def test_a_token_or_position_out_of_range_is_refused(golden: Golden) -> None:
    config = golden.model.config
    vocab_size = config.vocab_size
    too_large = rows([[vocab_size]], [[0]], block_tokens=4)
    with pytest.raises(ValueError, match=rf"token id {vocab_size} must be in 0 \.\. {vocab_size - 1}"):
        golden.model.attention.embed(too_large)
    too_far = Batch(
        np.array([1]), np.array([2048], dtype=np.int32), np.zeros(1, np.int32), np.zeros((1, 1), np.int32), 4
    )
    with pytest.raises(ValueError, match=r"position 2048 must be in 0 \.\. 2047"):
        golden.model.attention.embed(too_far)


def test_generation_stops_as_told(golden: Golden) -> None:
    prompt, expected = golden.prompts[3], golden.greedy[3]
    stop = expected[4]
    first = expected.index(stop)
    stopped = SamplingParams(max_tokens=16, temperature=0.0, stop_token_ids=(stop,))
    assert golden.model.generate(prompt, stopped) == expected[: first + 1]
    ended = SamplingParams(max_tokens=16, temperature=0.0, eos_token_ids=(stop,))
    assert golden.model.generate(prompt, ended) == expected[: first + 1]
    ignored = SamplingParams(max_tokens=16, temperature=0.0, eos_token_ids=(stop,), ignore_eos=True)
    assert golden.model.generate(prompt, ignored) == expected
    later = SamplingParams(max_tokens=16, temperature=0.0, stop_token_ids=(stop,), min_tokens=10)
    assert len(golden.model.generate(prompt, later)) > 10
