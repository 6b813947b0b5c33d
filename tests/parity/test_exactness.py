"""The exactness matrix: family x INT8 or as stored x alone or among 32 x seed. A sequence's tokens and logits have the
same bits everywhere.

The batch is run the way a pod runs it: continuous batching over shuffled paged blocks with chunked prefill, so that
every step mixes prompts and single tokens, and experts split over three holders.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from bus.control.messages import SamplingParams
from services.model import AttentionModel, Batch, ExpertModel, KvCache, ReferenceModel, load_config
from services.model.sampling import sample
from services.quantize.layer import Recipe
from services.quantize.quantizer import quantize
from tests.parity.test_goldens import GOLDENS, NAMES, golden_prompts, split_forward

NUM_SEQUENCES = 32
MAX_TOKENS = 12
BLOCK_TOKENS = 8
SEEDS = (0, 1, 2**63 - 1)

Float = npt.NDArray[np.float32]


@dataclass
class Sequence:
    """One request: what it has, how far it is computed, and the logits that each of its tokens was drawn from."""

    tokens: list[int]
    prompt_tokens: int
    params: SamplingParams
    blocks: list[int]
    computed: int = 0
    logits: list[Float] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def finished(self) -> bool:
        return len(self.output) >= self.params.max_tokens


@dataclass
class Split:
    """The two halves of a model as a pod holds them."""

    attention: AttentionModel
    experts: list[ExpertModel]
    model: ReferenceModel
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=[(name, int8) for name in NAMES for int8 in (False, True)], ids=str)
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    name, int8 = request.param
    golden = folder = GOLDENS / name
    if int8:
        folder = tmp_path_factory.mktemp("quantized") / name
        token_ids = np.random.default_rng(3).integers(0, load_config(golden).vocab_size, (4, 40))
        quantize(golden, folder, token_ids, Recipe(), lambda *_: None)
    config = load_config(folder)
    experts = [
        ExpertModel.load(folder, config, range(rank, config.num_experts, 3), shared=config.has_shared_expert)
        for rank in range(3)
    ]
    yield Split(
        AttentionModel.load(folder, config), experts, ReferenceModel.load(folder), golden_prompts(golden)
    )


def params(seed: int, index: int) -> SamplingParams:
    """Half of the requests sample, each with a seed of its own; the others are greedy."""
    if index % 2:
        return SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    return SamplingParams(
        max_tokens=MAX_TOKENS, temperature=0.9, top_p=0.95, seed=(seed + index) % 2**63, ignore_eos=True
    )


def make_sequences(split: Split, seed: int, rng: random.Random) -> list[Sequence]:
    prompts = [split.prompts[i % len(split.prompts)][:24] for i in range(NUM_SEQUENCES)]
    sizes = [-(-(len(prompt) + MAX_TOKENS) // BLOCK_TOKENS) for prompt in prompts]
    blocks = rng.sample(range(sum(sizes)), sum(sizes))
    return [
        Sequence(list(prompt), len(prompt), params(seed, i), [blocks.pop() for _ in range(size)])
        for i, (prompt, size) in enumerate(zip(prompts, sizes, strict=True))
    ]


def draw(logits: Float, params: SamplingParams, position: int) -> int:
    return sample(
        logits,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        position=position,
    )


def step(split: Split, running: list[Sequence], kv: KvCache, rng: random.Random) -> None:
    """Compute a chunk of each sequence in one batch and draw a token where a sequence has caught up."""
    chunks = [range(s.computed, min(len(s.tokens), s.computed + rng.choice([1, 5, 24]))) for s in running]
    width = max(len(s.blocks) for s in running)
    batch = Batch(
        token_ids=np.array([s.tokens[i] for s, chunk in zip(running, chunks, strict=True) for i in chunk]),
        positions=np.array([i for chunk in chunks for i in chunk], dtype=np.int32),
        seq_of_row=np.repeat(np.arange(len(running), dtype=np.int32), [len(chunk) for chunk in chunks]),
        block_tables=np.array([s.blocks + [-1] * (width - len(s.blocks)) for s in running], dtype=np.int32),
        block_tokens=BLOCK_TOKENS,
    )
    logits = split_forward(split.attention, split.experts, batch, kv)
    last = np.cumsum([len(chunk) for chunk in chunks]) - 1
    for sequence, chunk, row in zip(running, chunks, last, strict=True):
        sequence.computed = chunk.stop
        if chunk.stop == len(sequence.tokens):
            sequence.logits.append(logits[row].copy())
            sequence.tokens.append(draw(logits[row], sequence.params, chunk.stop))


def run_together(split: Split, sequences: list[Sequence], rng: random.Random) -> None:
    kv = split.attention.allocate_kv(None, sum(len(s.blocks) for s in sequences), BLOCK_TOKENS)
    kv.array.fill(np.nan)
    while running := [s for s in sequences if not s.finished]:
        rng.shuffle(running)
        step(split, running, kv, rng)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sequence_alone_and_among_32_has_the_same_bits(split: Split, seed: int) -> None:
    rng = random.Random(seed)
    sequences = make_sequences(split, seed, rng)
    run_together(split, sequences, rng)
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.prompt_tokens]
        assert split.model.generate(prompt, sequence.params) == sequence.output
    for sequence in sequences[:6]:
        alone = split.model.logits(sequence.tokens[:-1])[sequence.prompt_tokens - 1 :]
        assert np.array(sequence.logits).tobytes() == alone.tobytes()
