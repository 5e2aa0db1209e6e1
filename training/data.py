"""Readers for parallel text and gold word alignments, and the one word splitter that every part of training uses."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import regex

ROOT = Path(__file__).resolve().parent.parent
TEXT_SUFFIXES = (".tsv", ".txt", ".tab")
DATASET_SUFFIXES = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
# A letter or digit, with what belongs to it and is no word of its own: combining marks (Hindi, vocalised Arabic, any
# text in NFD), joiners (Persian, Bengali) and soft hyphens. Marks of direction and word joiners do not end a word, but
# belong to none at its edges. Anything else that shows is a word by itself.
LETTER = r"[\u200c\u200d\u00ad]*[\p{L}\p{N}\p{M}_][\p{M}\u200c\u200d\u00ad]*"
STEM = rf"{LETTER}(?:[\u200e\u200f\u061c\u2060\ufeff]*{LETTER})*"
WORD = regex.compile(rf"{STEM}(?:[’'\-.,:׳״]{STEM})*|(?![\s\p{{Cf}}\p{{Cc}}])\X")
LINK = re.compile(r"(\d+)([-?])(\d+)")


@dataclass(frozen=True)
class GoldPair:
    """A sentence pair, split into words, with hand-made links (English index first, 0-based).

    `possible` contains `sure`: AER counts a link on a possible pair as correct without asking for it.
    """

    english: list[str]
    other: list[str]
    sure: frozenset[tuple[int, int]]
    possible: frozenset[tuple[int, int]]


class ColumnError(ValueError):
    """A data set has not the columns that were asked for."""


def split_words(text: str) -> list[str]:
    """Split a raw sentence into words and single punctuation marks.

    Args:
        text: a sentence in a language that writes spaces; others come out as long words.

    Returns:
        The words in order; numbers, abbreviations and hyphenated or elided forms stay whole.

    Example:
        >>> split_words("It's 3.5 km, isn't it?")
        ["It's", '3.5', 'km', ',', "isn't", 'it', '?']
    """
    return WORD.findall(text)


def split_tokens(text: str) -> list[str]:
    """Split a line of tokens at its spaces, and at nothing else: a no-break space is part of its token."""
    return [token for token in text.split(" ") if token]


def resolve_path(source: str) -> Path:
    """Return the file that `source` names: environment variables filled in, relative to here or to the project.

    Raises:
        ValueError: an environment variable in `source` is not set.
        FileNotFoundError: there is no such file.
    """
    expanded = os.path.expandvars(os.path.expanduser(str(source)))
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise ValueError(f"source needs the environment variable {unset[1]}, which is not set, in {source!r}")
    for candidate in (Path(expanded), ROOT / expanded):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"source must be an existing file or folder, but was {source!r}")


def read_lines(path: str | Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text file, gzipped or not (told by its first bytes), without newline and BOM.

    Raises:
        ValueError: a line is not UTF-8, or the file is no whole gzip file; the message names file and line.
    """
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    number = 0
    with gzip.open(path, "rb") if is_gzip else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):  # at \n alone, whatever Unicode counts as the end of a line
                yield decode_line(line, path, number)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}, after line {number}: the gzip file is damaged or cut off ({error})") from None


def decode_line(line: bytes, path: str | Path, number: int) -> str:
    """A line of a file as text, without its newline, and without the BOM that a first line may have."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: text must be UTF-8, but byte {error.start + 1} of the line is "
            f"0x{line[error.start]:02x}"
        ) from None
    return text.rstrip("\r\n")


def read_gold(source: str) -> list[GoldPair]:
    """Read gold word alignments: English tokens, other tokens, links, tab-separated, one pair a line.

    Args:
        source: path, gzipped or not; links are `i-j` (sure) or `i?j` (possible), English index first, 0-based.

    Returns:
        The pairs in file order.

    Raises:
        ValueError: a line has not three columns, a link is malformed or points outside its sentence.
    """
    path, pairs = resolve_path(source), []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip(" \t"):
            continue
        columns = line.split("\t")
        if len(columns) != 3:
            raise ValueError(f"{path}, line {number}: gold must have 3 tab-separated columns, but has {len(columns)}")
        english, other = split_tokens(columns[0]), split_tokens(columns[1])
        sure, possible = set(), set()
        for link in split_tokens(columns[2]):
            if not (match := LINK.fullmatch(link)):
                raise ValueError(f"{path}, line {number}: a link must look like 3-4 or 3?4, but was {link!r}")
            i, j = int(match[1]), int(match[3])
            if i >= len(english) or j >= len(other):
                sizes = f"{len(english)} and {len(other)} words"
                raise ValueError(f"{path}, line {number}: link {link} points outside sentences of {sizes}")
            possible.add((i, j))
            if match[2] == "-":
                sure.add((i, j))
        pairs.append(GoldPair(english, other, frozenset(sure), frozenset(possible)))
    return pairs


def read_pairs(
    source: str,
    language: str | None = None,
    *,
    name: str | None = None,
    split: str = "train",
    columns: tuple[str, str] | None = None,
) -> list[tuple[str, str]]:
    """Read sentence pairs (English, other) from any supported source.

    Args:
        source: a text file `english<TAB>other` (gzipped or not; with a header line that names `en` and `language` those
            columns are taken), JSON lines or parquet (gzipped or not where `datasets` reads it), or the name of a
            dataset on the hub. `{lang}` is replaced by `language`.
        language: code of the other language, such as `de`.
        name: configuration of a hub dataset, `{lang}` replaced.
        split: split of a hub dataset.
        columns: names of the English and the other column (`{lang}` replaced); None: `en` and `language`, else a
            `translation` column that holds both, else the first two text columns.

    Returns:
        Pairs with both sides non-empty, surrounding spaces removed, in file order.

    Raises:
        ValueError: no such columns, or a text line with fewer than two.
        FileNotFoundError: `source` looks like a path but does not exist.
    """
    source, name = (text.replace("{lang}", language or "") if text else text for text in (source, name))
    suffix = Path(source.removesuffix(".gz")).suffix.lower()
    if suffix in TEXT_SUFFIXES:
        rows = _read_text(resolve_path(source), language, columns)
    elif suffix in DATASET_SUFFIXES:
        rows = _read_dataset(DATASET_SUFFIXES[suffix], language, columns, "train", data_files=str(resolve_path(source)))
    elif Path(os.path.expandvars(os.path.expanduser(source))).is_file():
        rows = _read_text(resolve_path(source), language, columns)
    elif source.startswith((".", "/", "$", "~")):
        raise FileNotFoundError(f"source must be an existing file or a hub name, but was {source!r}")
    else:
        rows = _read_dataset(source, language, columns, split, name=name)
    # A side may be null in JSON lines and parquet.
    pairs = ((english.strip(), other.strip()) for english, other in rows if english and other)
    return [pair for pair in pairs if all(pair)]


def _read_text(path: Path, language: str | None, columns: tuple[str, str] | None) -> Iterator[tuple[str, str]]:
    """Yield the pairs of a tab-separated file, by header names where its first line is such a header."""
    wanted = _column_names(language, columns)
    indices = (0, 1)
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split("\t")
        if number == 1 and _is_header(cells):
            if not set(wanted) <= set(cells):
                hint = "; --language names the second column" if not language and columns is None else ""
                raise ValueError(f"columns must be among the header {cells} of {path}, but were {list(wanted)}{hint}")
            indices = cells.index(wanted[0]), cells.index(wanted[1])
        elif number == 1 and columns is not None:
            raise ValueError(f"columns were given, but the first line of {path} is no header: {cells}")
        elif line.strip():
            if len(cells) <= max(indices):
                raise ValueError(
                    f"{path}, line {number}: expected at least {max(indices) + 1} columns, got {len(cells)}"
                )
            yield cells[indices[0]], cells[indices[1]]


def _is_header(cells: list[str]) -> bool:
    """A header is a line of two or more distinct column names, the first of them `en` or `english`."""
    return len(cells) > 1 and cells[0] in ("en", "english") and len(set(cells)) == len(cells)


def _column_names(language: str | None, columns: tuple[str, str] | None) -> tuple[str, str]:
    english, other = columns or ("en", "{lang}")
    return english.replace("{lang}", language or ""), other.replace("{lang}", language or "")


def _check_json_lines(path: str) -> None:
    """Raise ValueError that names the first line that is no JSON or not UTF-8; a file of one JSON list passes."""
    for number, line in enumerate(read_lines(path), 1):
        if number == 1 and line.lstrip()[:1] == "[":
            return
        try:
            json.loads(line or "{}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None


def _read_dataset(
    loader: str, language: str | None, columns: tuple[str, str] | None, split: str, **arguments
) -> list[tuple[str, str]]:
    """Return the pairs of anything the `datasets` library loads."""
    import datasets

    path = arguments.get("data_files")
    try:
        table = datasets.load_dataset(loader, split=split, **arguments)
        rows = list(_rows_of(table, language, columns))
    except ColumnError:
        raise
    # Bytes that are not UTF-8 may show only when a column is read.
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        if loader == "json":
            _check_json_lines(path)
        raise ValueError(f"{path or loader} cannot be read: {error.__cause__ or error}") from None
    return rows


def _rows_of(table, language: str | None, columns: tuple[str, str] | None) -> Iterator[tuple[str, str]]:
    """Yield the pairs of a table's two columns, or of its column `translation`."""
    names, wanted = table.column_names, _column_names(language, columns)
    if set(wanted) <= set(names):
        return zip(table[wanted[0]], table[wanted[1]], strict=True)
    if "translation" in names and columns is None:
        rows = [row for row in table["translation"] if row is not None]
        # A row of JSON lines may lack a language that others have.
        languages = list(dict.fromkeys(code for row in rows for code in row))
        if rows and not set(wanted) <= set(languages):
            hint = "" if language else "; --language names the second column"
            raise ColumnError(f"columns must be among {languages} of `translation`, but were {list(wanted)}{hint}")
        return ((row.get(wanted[0]), row.get(wanted[1])) for row in rows)
    text = [column for column in names if getattr(table.features[column], "dtype", None) in ("string", "large_string")]
    if columns is None and len(text) >= 2:
        return zip(table[text[0]], table[text[1]], strict=True)
    raise ColumnError(f"columns must be two of {names}, but were {list(wanted)}")
