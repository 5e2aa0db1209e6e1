"""Readers of parallel text and gold alignments, one test for each format."""

import gzip
import json

import pytest

from training.data import read_gold, read_pairs, resolve_path, split_words

PAIRS = [("A house.", "Ein Haus."), ("Two cats — здравей", "Zwei Katzen — γεια")]


def write(path, text):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["p.tsv", "p.tsv.gz", "p.txt", "p.en-de", "p.en-de.gz"])
def test_text_without_header(tmp_path, name):
    source = write(tmp_path / name, "".join(f"{english}\t{other}\n" for english, other in PAIRS))
    assert read_pairs(source, "de") == PAIRS


def test_table_with_a_header_gives_the_column_of_the_language(tmp_path):
    text = "en\tde\tfr\nA house.\tEin Haus.\tUne maison.\nYes.\t\tOui.\n"
    source = write(tmp_path / "table.tsv", text)
    assert read_pairs(source, "fr") == [("A house.", "Une maison."), ("Yes.", "Oui.")]
    assert read_pairs(source, "de") == [("A house.", "Ein Haus.")]
    with pytest.raises(ValueError, match="columns must be among"):
        read_pairs(source, "es")


def test_a_missing_language_is_named(tmp_path):
    source = write(tmp_path / "table.tsv", "en\tde\nA house.\tEin Haus.\n")
    with pytest.raises(ValueError, match="--language names the second column"):
        read_pairs(source)


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path):
    assert read_pairs(write(tmp_path / "p.tsv", "\ufeffA house.\tEin Haus.\n"), "de") == PAIRS[:1]
    assert read_gold(write(tmp_path / "g.tsv", "\ufeffA house\tEin Haus\t0-0 1-1\n"))[0].english == ["A", "house"]


def test_a_name_of_any_ending_is_found_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "pairs.en-de", "A house.\tEin Haus.\n")
    assert read_pairs("~/pairs.en-de", "de") == PAIRS[:1]


def test_rows_with_a_null_are_left_out(tmp_path, hub_cache):
    rows = [{"en": "A house.", "de": "Ein Haus."}, {"en": "C", "de": None}, {"en": None, "de": "D"}]
    source = write(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read_pairs(source, "de") == PAIRS[:1]


def test_language_is_filled_into_the_name(tmp_path):
    write(tmp_path / "x.en-de.tsv", "A house.\tEin Haus.\n")
    assert read_pairs(str(tmp_path / "x.en-{lang}.tsv"), "de") == PAIRS[:1]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("keys", [("en", "de"), ("source", "target")])
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_json_lines(tmp_path, hub_cache, name, keys):
    lines = "".join(json.dumps(dict(zip(keys, pair, strict=True))) + "\n" for pair in PAIRS)
    assert read_pairs(write(tmp_path / name, lines), "de") == PAIRS


def test_json_lines_with_a_translation_column(tmp_path, hub_cache):
    lines = "".join(json.dumps({"id": 1, "translation": {"de": other, "en": en}}) + "\n" for en, other in PAIRS)
    assert read_pairs(write(tmp_path / "t.jsonl", lines), "de") == PAIRS


def test_null_translations_are_left_out_and_a_missing_language_is_named(tmp_path, hub_cache):
    rows = [{"en": "A house.", "de": "Ein Haus."}, None, {"en": "C", "de": None}, {"en": "D"}]
    source = write(tmp_path / "t.jsonl", "".join(json.dumps({"translation": row}) + "\n" for row in rows))
    assert read_pairs(source, "de") == PAIRS[:1]
    with pytest.raises(ValueError, match=r"\['en', 'de'\].*--language"):
        read_pairs(source)


def test_parquet_with_named_columns(tmp_path, hub_cache):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    english, other = zip(*PAIRS, strict=True)
    english, other = [*english, "null", "blank"], [*other, None, " "]
    table = pyarrow.table({"target": other, "note": [""] * 4, "source": english})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert read_pairs(str(tmp_path / "p.parquet"), "de", columns=("source", "target")) == PAIRS
    with pytest.raises(ValueError, match="columns must be two of"):
        read_pairs(str(tmp_path / "p.parquet"), "de", columns=("source", "nothing"))


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.tsv"):
        read_pairs(str(tmp_path / "nothing.tsv"), "de")


def test_an_unset_variable_is_named(monkeypatch):
    monkeypatch.delenv("OTKERN_NO_SUCH_FOLDER", raising=False)
    with pytest.raises(ValueError, match="OTKERN_NO_SUCH_FOLDER"):
        resolve_path("${OTKERN_NO_SUCH_FOLDER}/x.tsv")


def test_a_line_without_tab_is_named(tmp_path):
    with pytest.raises(ValueError, match="line 2"):
        read_pairs(write(tmp_path / "p.tsv", "a\tb\nno tab\n"), "de")


@pytest.mark.parametrize("name", ["g.tsv", "g.tsv.gz"])
def test_gold_links(tmp_path, name):
    (pair,) = read_gold(write(tmp_path / name, "the house\tdas alte Haus\t0-0 1-2 1?1\n"))
    assert pair.english == ["the", "house"] and pair.other == ["das", "alte", "Haus"]
    assert pair.sure == {(0, 0), (1, 2)}
    assert pair.possible == {(0, 0), (1, 2), (1, 1)}


@pytest.mark.parametrize(
    ("line", "message"),
    [("a\tb\n", "3 tab-separated"), ("a\tb\t0:0\n", "must look like"), ("a\tb\t0-1\n", "points outside")],
)
def test_bad_gold_is_named_with_its_line(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_gold(write(tmp_path / "g.tsv", "a\tb\t0-0\n" + line))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 3.5 km, isn't it?", ["It's", "3.5", "km", ",", "isn't", "it", "?"]),
        ("«Ναι», είπε.", ["«", "Ναι", "»", ",", "είπε", "."]),
        ("¿Qué?", ["¿", "Qué", "?"]),
        ("", []),
    ],
)
def test_words_and_punctuation_are_split(text, words):
    assert split_words(text) == words
