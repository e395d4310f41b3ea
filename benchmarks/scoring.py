"""What a scoring pass costs against a plain forward of the teacher with its logits, on the shape of SmolLM2-135M.

python benchmarks/scoring.py --pairs 20 --supervised 0.12 1

Both run over the same batches of 8 x 256 tokens under bfloat16 autocast, in turns in one process; the ratio of a pair
is taken of CPU time and of wall time, and its median has a 95 % bootstrap interval. The bars are 0.95 where 12 % of the
positions are supervised, and 1.25 where all are.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from flexkd.train.scoring import score_units

ROWS, LENGTH = 8, 256


def smollm2() -> LlamaForCausalLM:
    """Random weights in the shape of SmolLM2-135M."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def batches(count: int, supervised: float) -> list[dict[str, Tensor]]:
    """Full rows whose last tokens have labels."""
    found = []
    for _ in range(count):
        ids = torch.randint(5, 49152, (ROWS, LENGTH))
        prompt = torch.arange(LENGTH) < round((1 - supervised) * LENGTH)
        labels = ids.masked_fill(prompt, -100)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def compare(model: LlamaForCausalLM, given: list[dict[str, Tensor]], pairs: int) -> list[list[float]]:
    """Ratios of CPU time and of wall time, scoring to forward."""

    def forward() -> None:
        for batch in given:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                model(**inputs, use_cache=False).logits  # noqa: B018

    def score() -> None:
        score_units(model, given, precision=torch.bfloat16)

    forward(), score()
    ratios: list[list[float]] = [[], []]
    for index in range(pairs):
        # Who goes first changes, so that a drift of the machine falls on both.
        order = (forward, score) if index % 2 == 0 else (score, forward)
        found = {work: seconds(work) for work in order}
        for kind, kept in enumerate(ratios):
            kept.append(found[score][kind] / found[forward][kind])
    return ratios


def main() -> None:
    """Print one line for each share of supervised positions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--batches", type=int, default=4, help="batches of a pass; the head is proven once a pass")
    parser.add_argument("--supervised", type=float, nargs="+", default=[0.12, 1.0])
    settings = parser.parse_args()
    model = smollm2()
    for share in settings.supervised:
        ratios = compare(model, batches(settings.batches, share), settings.pairs)
        for name, kept in zip(("CPU", "wall"), ratios, strict=True):
            low, high = interval(kept)
            print(
                f"supervised {share:g}: {name} time {statistics.median(kept):.3f} [{low:.3f}, {high:.3f}]", flush=True
            )


if __name__ == "__main__":
    main()
