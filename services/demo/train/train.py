"""Train the demo model: `python -m services.demo.train.train --minutes 75 --out FOLDER --work FOLDER`.

The schedule follows the wall clock, not a number of steps, so a slow machine gives a weaker model, not a
late one: warm-up, a constant stretch, then linearly to zero. The last stretch trains on the declared
window's full length, so that positions beyond the short windows of the start are not new to the model.
Matrices are trained by Muon, the rest by AdamW; the router is balanced by its bias alone (no auxiliary
loss).

Every few minutes the folder `--out` is written anew, complete and servable, so the run may be stopped at
any time (SIGTERM or Ctrl-C ends it with a last export). `metrics.json` there holds the numbers of the model
card.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from services.demo.train import corpus
from services.demo.train import tokenizer as tokenizers_
from services.demo.train.model import Config, Model, export, load
from services.demo.train.muon import Muon

SHORT_WINDOW = 512
WARM_UP = 0.02  # parts of the whole time
DECAY_FROM = 0.45
MTP_SHARE = 4  # one in so many tokens also trains the MTP layer
MTP_WEIGHT = 0.3
BIAS_RATE = 0.02
SEED = 1


@dataclass
class Data:
    """The tokenizer and both streams of token ids."""

    tokenizer: Tokenizer
    training: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int


@dataclass
class Metrics:
    """What the run has done so far, as written to `metrics.json`."""

    python: str = platform.python_version()
    torch: str = torch.__version__
    parameters: int = 0
    parameters_per_token: int = 0
    training_tokens: int = 0
    held_out_tokens: int = 0
    held_out_bytes: int = 0
    minutes: float = 0.0
    steps: int = 0
    tokens_seen: int = 0
    epochs: float = 0.0
    tokens_per_second: float = 0.0
    final: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def prepare(work: Path, vocab_size: int) -> Data:
    """Return tokenizer and token streams, from `work` when an earlier run left them there."""
    work.mkdir(parents=True, exist_ok=True)
    names = [work / name for name in ("tokenizer.json", "training.npy", "held_out.npy")]
    training, held_out = corpus.split()
    if not all(path.exists() for path in names):
        tokenizer = tokenizers_.train(training, vocab_size)
        tokenizer.save(str(names[0]))
        for path, texts in zip(names[1:], (training, held_out), strict=True):
            np.save(path, corpus.encode(tokenizer, texts, tokenizers_.SEPARATOR_ID))
    streams = [np.load(path, allow_pickle=False) for path in names[1:]]
    return Data(Tokenizer.from_file(str(names[0])), *streams, sum(len(text.encode()) for text in held_out))


def optimisers(model: Model, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices; AdamW for the embedding, the routers and the norms."""
    matrices, fused, routers, rest = [], [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up"):
            fused.append(parameter)
        elif name.endswith("mlp.gate.weight"):
            routers.append(parameter)
        elif parameter.dim() > 1 and "embed" not in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    muon = Muon([{"params": matrices}, {"params": fused, "parts": 2}], lr=muon_lr)
    groups = [{"params": rest}, {"params": routers, "lr": adam_lr / 4}]
    adam = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def rate(progress: float) -> float:
    """Return the learning rate's factor at `progress` (0 to 1) of the time."""
    return max(0.0, min(1.0, (progress + 1e-3) / WARM_UP, (1 - progress) / (1 - DECAY_FROM)))


def losses(model: Model, batch: Tensor, mtp_rows: int) -> tuple[Tensor, Tensor]:
    """Return the mean losses in nats per token: next token, and the MTP layer's token after it."""
    hidden = model.hidden(batch[:, :-1])
    main = F.cross_entropy(model.logits(hidden).flatten(0, 1), batch[:, 1:].flatten())
    drafted = model.draft(batch[:mtp_rows, 1:-1], hidden[:mtp_rows, :-1])
    draft = F.cross_entropy(model.logits(drafted).flatten(0, 1), batch[:mtp_rows, 2:].flatten())
    return main, draft


@torch.no_grad()
def evaluate(model: Model, stream: np.ndarray, window: int, limit: int | None = None) -> dict[str, float]:
    """Return losses and the MTP layer's agreement with the model, over windows of the held-out stream."""
    model.eval()
    totals = np.zeros(3)
    count = 0
    for start in range(0, len(stream) - window - 1, window):
        batch = torch.from_numpy(stream[None, start : start + window + 1].astype(np.int64))
        hidden = model.hidden(batch[:, :-1])
        logits = model.logits(hidden)
        drafts = model.logits(model.draft(batch[:, 1:-1], hidden[:, :-1]))
        agreement = (drafts.argmax(-1) == logits[:, 1:].argmax(-1)).float().mean()
        main = F.cross_entropy(logits[0], batch[0, 1:])
        totals += [float(main), float(F.cross_entropy(drafts[0], batch[0, 2:])), float(agreement)]
        count += 1
        if count == limit:
            break
    model.train()
    main, draft, agreement = (totals / count).tolist()
    return {"held_out_loss": main, "held_out_mtp_loss": draft, "mtp_agreement": agreement}


def parameters_per_token(model: Model) -> int:
    """Return how many weights one token uses in the model proper: no MTP layer, top-k experts."""
    c = model.config
    idle = 0
    for layer in model.layers[:-1]:
        if hasattr(layer.mlp, "gate_up"):
            idle += layer.mlp.gate_up.numel() + layer.mlp.down.numel()
    idle = idle * (c.n_routed_experts - c.num_experts_per_tok) // c.n_routed_experts
    return (
        sum(p.numel() for p in model.parameters())
        - sum(p.numel() for p in model.layers[-1].parameters())
        - idle
    )


def earlier_metrics(work: Path) -> Metrics:
    """Return what an earlier run left in `work`, so that a resumed run counts on."""
    fields = json.loads((work / "metrics.json").read_text())
    return Metrics(**fields)


class Run:
    """One training run, from a fresh or an exported model to the last export."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(SEED)
        self.arguments = arguments
        self.data = prepare(arguments.work, Config.vocab_size)
        self.model = load(arguments.resume).train() if arguments.resume else Model(Config())
        self.optimisers = optimisers(self.model, arguments.muon_lr, arguments.adam_lr)
        before = earlier_metrics(arguments.work) if arguments.resume else Metrics()
        self.windows = corpus.Windows(self.data.training, SEED + before.steps)  # other windows than before
        self.metrics = Metrics(
            parameters=sum(p.numel() for p in self.model.parameters()),
            parameters_per_token=parameters_per_token(self.model),
            training_tokens=len(self.data.training),
            held_out_tokens=len(self.data.held_out),
            held_out_bytes=self.data.held_out_bytes,
            minutes=before.minutes,
            steps=before.steps,
            tokens_seen=before.tokens_seen,
            epochs=before.epochs,
            history=before.history,
        )
        self.before = before
        self.stopped = False

    def stop(self, *_: object) -> None:
        self.stopped = True

    def step(self, progress: float) -> tuple[float, float, float]:
        """Train on one batch; return both losses and the routers' worst imbalance."""
        window = Config.max_position_embeddings if progress >= self.arguments.long_from else SHORT_WINDOW
        rows = max(1, self.arguments.batch_tokens // window)
        batch = torch.from_numpy(self.windows.batch(rows, window))
        main, draft = losses(self.model, batch, max(1, rows // MTP_SHARE))
        (main + MTP_WEIGHT * draft).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = rate(progress)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        imbalance = max(gate.balance(BIAS_RATE * factor) for gate in self.model.gates())
        self.metrics.steps += 1
        self.metrics.tokens_seen += batch[:, 1:].numel()
        return float(main.detach()), float(draft.detach()), imbalance

    def train(self) -> None:
        begun = time.monotonic()
        length = self.arguments.minutes * 60
        next_log, next_export = 0.0, self.arguments.export_every_minutes * 60
        while not self.stopped and (elapsed := time.monotonic() - begun) < length:
            main, draft, imbalance = self.step(elapsed / length)
            self.metrics.minutes = self.before.minutes + (time.monotonic() - begun) / 60
            self.metrics.tokens_per_second = self.metrics.tokens_seen / (self.metrics.minutes * 60)
            self.metrics.epochs = self.before.epochs + self.windows.epochs
            if elapsed >= next_log:
                next_log = elapsed + 15
                self.log(loss=main, mtp_loss=draft, imbalance=imbalance, rate=rate(elapsed / length))
            if elapsed >= next_export:
                next_export = elapsed + self.arguments.export_every_minutes * 60
                self.checkpoint()
        self.finish()

    def log(self, **values: float) -> None:
        row = {
            "minutes": self.metrics.minutes,
            "step": float(self.metrics.steps),
            "tokens": float(self.metrics.tokens_seen),
            "tokens_per_second": self.metrics.tokens_per_second,
        } | values
        self.metrics.history.append({key: round(value, 4) for key, value in row.items()})
        print(" ".join(f"{key}={value:.4g}" for key, value in row.items()), flush=True)

    def checkpoint(self) -> None:
        self.log(**evaluate(self.model, self.data.held_out, SHORT_WINDOW, limit=32))
        self.write()

    def write(self) -> None:
        out = self.arguments.out
        export(self.model, out, tokenizers_.SEPARATOR_ID)
        tokenizers_.save(self.data.tokenizer, out, Config.max_position_embeddings)
        (self.arguments.work / "metrics.json").write_text(json.dumps(asdict(self.metrics), indent=1) + "\n")

    def finish(self) -> None:
        """Export, then measure what was exported: the rounded weights, on all held-out text."""
        self.write()
        rounded = load(self.arguments.out)
        per_byte = len(self.data.held_out) / self.data.held_out_bytes / math.log(2)
        for window in (SHORT_WINDOW, Config.max_position_embeddings):
            result = evaluate(rounded, self.data.held_out, window)
            result["held_out_bits_per_byte"] = result["held_out_loss"] * per_byte
            self.metrics.final |= {f"{key}_{window}": round(value, 4) for key, value in result.items()}
        self.write()
        print(json.dumps(self.metrics.final), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--minutes", type=float, default=75.0, help="wall-clock length of the training")
    parser.add_argument("--out", type=Path, required=True, help="folder for the exported model")
    parser.add_argument("--work", type=Path, required=True, help="folder for cached tokens and metrics.json")
    parser.add_argument("--resume", type=Path, help="folder of an exported model to go on from")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument(
        "--long-from", type=float, default=0.85, help="part of the time after which windows are long"
    )
    parser.add_argument("--export-every-minutes", type=float, default=5.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = Run(arguments)
    signal.signal(signal.SIGTERM, run.stop)
    signal.signal(signal.SIGINT, run.stop)
    run.train()


if __name__ == "__main__":
    main()
