"""Checks of the shipped parallel corpus: its two halves, and the gold alignments of the held-out half.

Run as `python -m training.corpus.check [folder]`: prints the counts and every problem, exit status 1 if there is one.
"""

import sys
from pathlib import Path

from training.data import LINK, read_lines, split_tokens, split_words
from training.splits import normalise_english

LANGUAGES = ("en", "de", "fr", "es", "el", "bg")
HALVES = ("train", "heldout")
GOLD_LANGUAGES = ("de", "fr")
RUN_LENGTH = 5  # words: a longer shared run would let training text give away held-out text
MIN_SENTENCES = 300
MIN_HELD_OUT = 80
MIN_ENGLISH_WORDS = 1200
MIN_GOLD_LINES = 60


def english_words(sentence: str) -> list[str]:
    """Return the case-folded words of an English sentence, punctuation left out."""
    return [word.casefold() for word in split_words(sentence) if word[0].isalnum()]


def counts(folder: str | Path) -> dict[str, int]:
    """Count what `problems` sets limits on.

    Args:
        folder: holds `train.tsv`, `heldout.tsv`, `gold.en-de.tsv` and `gold.en-fr.tsv`; a missing file counts as empty.

    Returns:
        Sentences of each half, running and distinct English words of both, gold lines of each language.
    """
    rows = {half: _read_half(Path(folder), half)[0] for half in HALVES}
    words = [word for half in HALVES for _, row in rows[half] for word in english_words(row[0])]
    result = {f"{half} sentences": len(rows[half]) for half in HALVES}
    result |= {"English words": len(words), "distinct English words": len(set(words))}
    return result | {f"gold lines en-{code}": len(_lines(_gold_path(Path(folder), code))) for code in GOLD_LANGUAGES}


def problems(folder: str | Path) -> list[str]:
    """Return every defect of a corpus folder, each as one sentence that names the file and line.

    Args:
        folder: holds `train.tsv`, `heldout.tsv` (header line `en de fr es el bg`, tab-separated) and `gold.en-de.tsv`,
            `gold.en-fr.tsv` (English tokens, other tokens, links).

    Returns:
        The defects in the order of the files; empty for a sound corpus.
    """
    folder, found, rows = Path(folder), [], {}
    for half in HALVES:
        rows[half], defects = _read_half(folder, half)
        found += defects
    located = [(f"{half}.tsv, line {number}", row) for half in HALVES for number, row in rows[half]]
    found += _repeated_sentences(located)
    found += _repeated_runs(located)
    found += _too_small(counts(folder))
    for language in GOLD_LANGUAGES:
        found += _gold_problems(_gold_path(folder, language), language, [row for _, row in rows["heldout"]])
    return found


def _gold_path(folder: Path, language: str) -> Path:
    return folder / f"gold.en-{language}.tsv"


def _lines(path: Path) -> list[str]:
    return list(read_lines(path)) if path.is_file() else []


def _read_half(folder: Path, half: str) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """Return the well-formed rows of one half with their line numbers, and what is wrong with the others."""
    lines, rows, found = _lines(folder / f"{half}.tsv"), [], []
    if not lines:
        return [], [f"{half}.tsv is missing or empty"]
    if lines[0].split("\t") != list(LANGUAGES):
        found.append(f"{half}.tsv, line 1: the header must be {' '.join(LANGUAGES)}, but was {lines[0]!r}")
    for number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        if len(cells) != len(LANGUAGES):
            found.append(f"{half}.tsv, line {number}: expected {len(LANGUAGES)} columns, got {len(cells)}")
        elif empty := [code for code, cell in zip(LANGUAGES, cells, strict=True) if not cell.strip()]:
            found.append(f"{half}.tsv, line {number}: empty column {' '.join(empty)}")
        elif untidy := [code for code, cell in zip(LANGUAGES, cells, strict=True) if cell != " ".join(cell.split())]:
            found.append(f"{half}.tsv, line {number}: stray spaces in column {' '.join(untidy)}")
        else:
            rows.append((number, cells))
    return rows, found


def _repeated_sentences(located: list[tuple[str, list[str]]]) -> list[str]:
    """Find sentences of any language that occur twice, within a half or in both, case and punctuation aside."""
    found, first_place = [], {}
    for place, row in located:
        for language, sentence in zip(LANGUAGES, row, strict=True):
            first = first_place.setdefault((language, normalise_english(sentence)), place)
            if first != place:
                kind = "duplicate" if first.split(",")[0] == place.split(",")[0] else "held-out sentence shared"
                found.append(f"{place}: {kind}, {language} already in {first}: {sentence!r}")
    return found


def _repeated_runs(located: list[tuple[str, list[str]]]) -> list[str]:
    """Find runs of `RUN_LENGTH` English words that occur twice anywhere in the two halves."""
    found, first_place = [], {}
    for place, row in located:
        words = english_words(row[0])
        for start in range(len(words) - RUN_LENGTH + 1):
            run = " ".join(words[start : start + RUN_LENGTH])
            if run in first_place:
                found.append(f"{place}: repeated run of {RUN_LENGTH} words, already in {first_place[run]}: {run!r}")
            first_place.setdefault(run, place)
    return found


def _too_small(count: dict[str, int]) -> list[str]:
    """Compare the counts with the least that the corpus promises."""
    limits = [
        ("sentences", count["train sentences"] + count["heldout sentences"], MIN_SENTENCES),
        ("held-out sentences", count["heldout sentences"], MIN_HELD_OUT),
        ("distinct English words", count["distinct English words"], MIN_ENGLISH_WORDS),
    ]
    limits += [(f"gold lines en-{code}", count[f"gold lines en-{code}"], MIN_GOLD_LINES) for code in GOLD_LANGUAGES]
    return [f"too few {what}: {number}, expected at least {least}" for what, number, least in limits if number < least]


def _gold_problems(path: Path, language: str, held_out: list[list[str]]) -> list[str]:
    """Check one gold file line by line; each line must be a held-out pair, split into tokens and nothing else."""
    column = LANGUAGES.index(language)
    pairs, seen, found = {("".join(row[0].split()), "".join(row[column].split())) for row in held_out}, {}, []
    for number, line in enumerate(_lines(path), 1):
        place, columns = f"{path.name}, line {number}", line.split("\t")
        if len(columns) != 3:
            found.append(f"{place}: expected 3 columns, got {len(columns)}")
            continue
        english, other = split_tokens(columns[0]), split_tokens(columns[1])
        pair = "".join(english), "".join(other)
        if pair not in pairs:
            found.append(f"{place}: no held-out sentence pair reads {columns[0]!r}, {columns[1]!r}")
        if seen.setdefault(pair, place) != place:
            found.append(f"{place}: sentence pair already in {seen[pair]}")
        found += [f"{place}: {defect}" for defect in _link_problems(split_tokens(columns[2]), len(english), len(other))]
    return found


def _link_problems(links: list[str], n_english: int, n_other: int) -> list[str]:
    """Check the links of one gold line between sentences of `n_english` and `n_other` tokens."""
    found, seen, n_sure = [], set(), 0
    for link in links:
        if not (match := LINK.fullmatch(link)):
            found.append(f"a link must look like 3-4 or 3?4, but was {link!r}")
            continue
        i, j = int(match[1]), int(match[3])
        if i >= n_english or j >= n_other:
            found.append(f"link {link} points outside sentences of {n_english} and {n_other} tokens")
        if (i, j) in seen:
            found.append(f"duplicate link {link}")
        seen.add((i, j))
        n_sure += match[2] == "-"
    return found if n_sure else [*found, "no sure link"]


def main() -> int:
    """Print counts and problems of the folder on the command line (default: this one); return the exit status."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    for what, number in counts(folder).items():
        print(f"{what}: {number}")
    found = problems(folder)
    print("\n".join(found) if found else "no problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
