"""Sentence pairs a second of `python -m training.align_text`, for each method: one JSON object on standard output.

    python -m benchmarks.align_text [--model M] [--rounds 5]

The text is the corpus that ships with the project. Loading the model is not counted; encoding is, and the same encoding
without any extraction is the first row.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from training import align_text, encoder, extract
from training.data import read_pairs, split_words
from training.evaluate import alignment_settings, default_layer


def main() -> None:
    """Time every method in interleaved rounds over the same pairs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.align_text", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=align_text.MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, tokenizer = encoder.load_encoder(arguments.model)
    settings, layer = alignment_settings(model), default_layer(model, "alignment")
    pairs = [tuple(map(split_words, pair)) for pair in read_pairs("training/corpus/heldout.tsv", "de")]
    pairs = [pairs[start : start + 64] for start in range(0, len(pairs), 64)]
    seconds: dict[str, list[float]] = {name: [] for name in ("encoding alone", *extract.METHODS)}
    for _ in range(arguments.rounds + 1):
        for name, times in seconds.items():
            aligner = align_text.Aligner(model, tokenizer, extract.METHODS[0], layer, settings)
            aligner.method = name
            start = time.perf_counter()
            for batch in pairs:
                if name == "encoding alone":
                    for side in (0, 1):
                        extract.encode_words(model, tokenizer, [pair[side] for pair in batch], [layer], settings)
                else:
                    aligner.align(batch)
            times.append(time.perf_counter() - start)
    count = sum(map(len, pairs))
    # The first round warms up.
    rates = {name: round(count / statistics.median(times[1:]), 1) for name, times in seconds.items()}
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps({"pairs": count, "pairs_per_second": rates, "model": arguments.model, **machine}))


if __name__ == "__main__":
    main()
