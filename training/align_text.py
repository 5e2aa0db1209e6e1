"""Align the words of new sentence pairs: Pharaoh links on standard output, a line for every line of the input.

    python -m training.align_text [--model M] [--method ot|mutual|itermax|softmax] FILE
    paste source.txt target.txt | python -m training.align_text -

A line holds `source ||| target` or `source<TAB>target`, words separated by spaces (`|||` wins where a line has both; of
more columns the first two count). An output line holds links `i-j`: source word i and target word j, from 0. Lines
with an empty side give empty lines. `--raw` takes raw sentences, splits their words, and prints
`source words ||| target words ||| links`.

Lines are read, aligned and written in batches. With `center`, which the models' cards set, the mean vector of the words
read so far is taken from each side's; `--set center=false` makes a line's links independent of those before it.
"""

import argparse
import itertools
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from training import cli, encoder, extract, symmetrization
from training.data import ROOT, decode_line, read_lines, split_tokens, split_words
from training.evaluate import alignment_settings, default_layer, parse_settings

MODEL = "training/models/mini"
Pair = tuple[list[str], list[str]]


def read_pair(line: str, place: str, raw: bool = False) -> Pair:
    """The words of both sides of an input line.

    Args:
        line: `source ||| target` or `source<TAB>target`; a blank line is a pair of empty sides.
        place: what an error calls the line.
        raw: split raw sentences into words; else at spaces.

    Raises:
        ValueError: the line has no separator, or more than one `|||`.
    """
    sides = line.split("|||") if "|||" in line else line.split("\t")[:2]
    if len(sides) == 1 and not line.strip():
        return [], []
    if len(sides) != 2:
        raise ValueError(f"{place}: a line must be `source ||| target` or `source<TAB>target`, but was {line[:60]!r}")
    split = split_words if raw else split_tokens
    return split(sides[0].replace("\t", " ")), split(sides[1].replace("\t", " "))


def read_input(source: str) -> Iterator[tuple[str, str]]:
    """(line, place) of each line of a file, or of standard input for `-`."""
    if source == "-":
        lines = (decode_line(line, "standard input", n) for n, line in enumerate(sys.stdin.buffer, 1))
        name = "standard input"
    else:
        lines, name = read_lines(source), source
    for number, line in enumerate(lines, 1):
        yield line, f"{name}, line {number}"


class Aligner:
    """An encoder and an extraction method, applied to one batch of sentence pairs after the other.

    Args:
        model: the encoder.
        tokenizer: its fast tokenizer.
        method: one of `extract.METHODS`.
        layer: the layer of the vectors, from 0.
        settings: completed extraction settings.
        symmetrized: one of `symmetrization.METHODS`, or None: the method's own links.
    """

    def __init__(self, model, tokenizer, method: str, layer: int, settings: dict, symmetrized: str | None = None):
        self.model, self.tokenizer, self.method = model, tokenizer, method
        self.layer, self.settings, self.symmetrized = layer, settings, symmetrized
        self.n_words = self.n_lost = 0
        self._sums, self._counts = [0.0, 0.0], [0, 0]

    def align(self, pairs: Sequence[Pair]) -> list[dict[tuple[int, int], float]]:
        """{(source word, target word): score} of each pair; see `extract.links_of` for the scores."""
        units, vectors = [], []
        for side in (0, 1):
            words = [pair[side] for pair in pairs]
            found, by_layer = extract.encode_words(self.model, self.tokenizer, words, [self.layer], self.settings)
            units.append(found)
            self.n_words += sum(map(len, words))
            self.n_lost += sum(len(sentence) - len(set(kept)) for sentence, kept in zip(words, found, strict=True))
            vectors.append(self._centered(side, by_layer[self.layer]))
        return extract.extract(
            tuple(vectors), self.method, self.settings, units=tuple(units), symmetrization=self.symmetrized
        )

    def _centered(self, side: int, vectors: list[torch.Tensor]) -> list[torch.Tensor]:
        if not self.settings["center"] or not any(map(len, vectors)):
            return vectors
        words = torch.cat(vectors).double()
        self._sums[side] = self._sums[side] + words.sum(0)
        self._counts[side] += len(words)
        mean = (self._sums[side] / self._counts[side]).float()
        return [x - mean for x in vectors]


def format_links(links: dict[tuple[int, int], float], scores: bool) -> str:
    """Pharaoh links in order, `i-j`, or `i-j:score` with four decimals."""
    return " ".join(f"{i}-{j}:{links[i, j]:.4f}" if scores else f"{i}-{j}" for i, j in sorted(links))


def align_lines(
    aligner: Aligner, lines: Iterable[tuple[str, str]], *, raw: bool = False, scores: bool = False, batch: int = 64
) -> Iterator[list[str]]:
    """The output lines of each batch of input lines."""
    # Not itertools.batched, which needs Python 3.12.
    lines = iter(lines)
    while chunk := list(itertools.islice(lines, batch)):
        pairs = [read_pair(line, place, raw) for line, place in chunk]
        output = [format_links(links, scores) for links in aligner.align(pairs)]
        if raw:
            output = [
                f"{' '.join(source)} ||| {' '.join(target)} ||| {links}".rstrip()
                for (source, target), links in zip(pairs, output, strict=True)
            ]
        yield output


def languages_of(model: str) -> str:
    """The languages that the model's card names, or an empty text."""
    card = Path(encoder.find_model(model), "README.md")
    if not card.is_file():
        return ""
    front = card.read_text(encoding="utf-8").split("---\n")
    values = cli.read_yaml(front[1], str(card)) if len(front) > 2 else None
    return ", ".join(values.get("language") or []) if isinstance(values, dict) else ""


def build_parser() -> argparse.ArgumentParser:
    """Command line of `python -m training.align_text`."""
    parser = argparse.ArgumentParser(
        prog="python -m training.align_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="UTF-8 text, gzipped or not; - is standard input")
    parser.add_argument("--model", help=f"folder or hub name of any AutoModel; default: {MODEL}")
    parser.add_argument("--method", choices=extract.METHODS, default="ot")
    parser.add_argument("--layer", type=int, help="default: the best for alignment according to the model's card")
    parser.add_argument(
        "--symmetrization",
        choices=symmetrization.METHODS,
        help="combine the links of both directions so (none: from source to target); default: as the method does it",
    )
    parser.add_argument("--raw", action="store_true", help="split raw sentences into words, and print them")
    parser.add_argument("--scores", action="store_true", help="print i-j:score")
    parser.add_argument("--batch", type=int, default=64, help="lines read before any is written; default: 64")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings other than the card's")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: links go to standard output as batches are done, all else to standard error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = build_parser().parse_args(argv)
    if arguments.batch < 1:
        raise ValueError(f"--batch must be at least 1, but was {arguments.batch}")
    if arguments.symmetrization and arguments.method == "itermax":
        raise ValueError("--symmetrization must not be given with --method itermax, whose links have no direction")
    if arguments.file != "-" and not Path(arguments.file).is_file():
        raise ValueError(f"FILE must be a file or -, but was {arguments.file!r}")
    name = arguments.model or str(ROOT / MODEL)
    if arguments.model is None:
        print(f"no --model: the small encoder in {MODEL} reads {languages_of(name)}", file=sys.stderr, flush=True)
    model, tokenizer = encoder.load_encoder(name)
    settings = alignment_settings(model, parse_settings(arguments.set))
    layer = (
        default_layer(model, "alignment")
        if arguments.layer is None
        else encoder.check_layer(arguments.layer, model, "--layer")
    )
    aligner = Aligner(model, tokenizer, arguments.method, layer, settings, arguments.symmetrization)
    options = {"raw": arguments.raw, "scores": arguments.scores, "batch": arguments.batch}
    # Said once, at the end, instead of for every batch.
    with (
        warnings.catch_warnings(),
        tqdm(unit=" lines", file=sys.stderr, disable=not sys.stderr.isatty()) as progress,
    ):
        warnings.filterwarnings("ignore", message=r"\d+ words of .* have no vector")
        for output in align_lines(aligner, read_input(arguments.file), **options):
            sys.stdout.write("".join(f"{line}\n" for line in output))
            sys.stdout.flush()
            progress.update(len(output))
    if aligner.n_lost:
        print(
            f"warning: {aligner.n_lost} of {aligner.n_words} words have no vector and are not linked: they lie behind "
            f"the first {extract.MAX_LENGTH} subwords of their sentence, or the tokenizer has no subword for them",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli.run(main)
