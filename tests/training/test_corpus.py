import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training.corpus import check

ROOT = Path(check.__file__).resolve().parents[2]
SHIPPED = ROOT / "training" / "corpus"


@pytest.fixture
def corpus(tmp_path):
    """A copy of the shipped corpus that a test may damage."""
    for path in SHIPPED.glob("*.tsv"):
        shutil.copy(path, tmp_path)
    return tmp_path


def read(folder, name):
    return (folder / name).read_text(encoding="utf-8").splitlines()


def write(folder, name, lines):
    (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def replace_cell(folder, name, line, column, text):
    lines = read(folder, name)
    cells = lines[line].split("\t")
    cells[column] = text
    write(folder, name, [*lines[:line], "\t".join(cells), *lines[line + 1 :]])


def cell(folder, name, line, column):
    return read(folder, name)[line].split("\t")[column]


def assert_reports(folder, *parts):
    found = check.problems(folder)
    assert any(all(part in problem for part in parts) for problem in found), found


def test_shipped_corpus_has_no_problems():
    assert check.problems(SHIPPED) == []


def test_readme_states_the_counts_of_the_shipped_corpus():
    count, readme = check.counts(SHIPPED), (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert f"`train.tsv` | header + {count['train sentences']} |" in readme
    assert f"`heldout.tsv` | header + {count['heldout sentences']} |" in readme
    assert f"`gold.en-de.tsv` | {count['gold lines en-de']} |" in readme
    assert f"`gold.en-fr.tsv` | {count['gold lines en-fr']} |" in readme
    assert f"{count['distinct English words']} distinct English words in {count['English words']}" in readme


def test_command_line_exit_status_tells_whether_there_are_problems(corpus):
    command = [sys.executable, "-m", "training.corpus.check", str(corpus)]
    sound = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert "no problems" in sound.stdout
    (corpus / "train.tsv").unlink()
    damaged = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert damaged.returncode == 1
    assert "train.tsv is missing or empty" in damaged.stdout


@pytest.mark.parametrize("name", ["train.tsv", "heldout.tsv"])
class TestEachHalf:
    def test_missing_file_is_found(self, corpus, name):
        (corpus / name).unlink()
        assert_reports(corpus, f"{name} is missing or empty")

    def test_wrong_header_is_found(self, corpus, name):
        replace_cell(corpus, name, 0, 1, "nl")
        assert_reports(corpus, f"{name}, line 1", "header")

    def test_missing_column_is_found(self, corpus, name):
        lines = read(corpus, name)
        write(corpus, name, [*lines[:4], lines[4].rsplit("\t", 1)[0], *lines[5:]])
        assert_reports(corpus, f"{name}, line 5", "expected 6 columns, got 5")

    def test_empty_column_is_found(self, corpus, name):
        replace_cell(corpus, name, 6, 4, " ")
        assert_reports(corpus, f"{name}, line 7", "empty column el")

    def test_stray_space_is_found(self, corpus, name):
        replace_cell(corpus, name, 6, 2, cell(corpus, name, 6, 2) + " ")
        assert_reports(corpus, f"{name}, line 7", "stray spaces in column fr")

    @pytest.mark.parametrize("column", range(6))
    def test_duplicate_sentence_is_found_in_every_language_despite_case_and_punctuation(self, corpus, name, column):
        replace_cell(corpus, name, 9, column, cell(corpus, name, 3, column).rstrip(".?!;").upper())
        assert_reports(corpus, f"{name}, line 10", "duplicate", f"{check.LANGUAGES[column]} already in {name}, line 4")

    def test_too_few_sentences_are_found(self, corpus, name):
        write(corpus, name, read(corpus, name)[:20])
        assert_reports(corpus, "too few sentences", f"expected at least {check.MIN_SENTENCES}")
        assert_reports(corpus, "too few distinct English words", f"expected at least {check.MIN_ENGLISH_WORDS}")


def test_too_few_held_out_sentences_are_found(corpus):
    write(corpus, "heldout.tsv", read(corpus, "heldout.tsv")[: check.MIN_HELD_OUT])  # the header is one of them
    assert_reports(corpus, f"too few held-out sentences: {check.MIN_HELD_OUT - 1}")


def test_held_out_sentence_in_the_training_half_is_found(corpus):
    replace_cell(corpus, "heldout.tsv", 2, 0, cell(corpus, "train.tsv", 5, 0))
    assert_reports(corpus, "heldout.tsv, line 3", "held-out sentence shared, en already in train.tsv, line 6")


@pytest.mark.parametrize("name", ["train.tsv", "heldout.tsv"])
def test_repeated_run_of_five_english_words_is_found_within_and_across_halves(corpus, name):
    replace_cell(corpus, "train.tsv", 1, 0, "Seven purple owls juggled, quite happily, over Quito.")
    replace_cell(corpus, name, 8, 0, "Yesterday purple owls juggled quite happily!")
    assert_reports(corpus, f"{name}, line 9", "repeated run of 5 words", "'purple owls juggled quite happily'")


def test_repeated_run_of_four_english_words_is_allowed(corpus):
    replace_cell(corpus, "train.tsv", 1, 0, "Seven purple owls juggled quite happily.")
    replace_cell(corpus, "train.tsv", 8, 0, "Yesterday purple owls juggled quite badly.")
    assert check.problems(corpus) == []


@pytest.mark.parametrize("language", check.GOLD_LANGUAGES)
class TestGold:
    def test_missing_file_is_found(self, corpus, language):
        (corpus / f"gold.en-{language}.tsv").unlink()
        assert_reports(corpus, f"too few gold lines en-{language}: 0")

    def test_too_few_lines_are_found(self, corpus, language):
        name = f"gold.en-{language}.tsv"
        write(corpus, name, read(corpus, name)[: check.MIN_GOLD_LINES - 1])
        assert_reports(corpus, f"too few gold lines en-{language}: {check.MIN_GOLD_LINES - 1}")

    def test_missing_column_is_found(self, corpus, language):
        name = f"gold.en-{language}.tsv"
        lines = read(corpus, name)
        write(corpus, name, [lines[0].rsplit("\t", 1)[0], *lines[1:]])
        assert_reports(corpus, f"{name}, line 1", "expected 3 columns, got 2")

    @pytest.mark.parametrize("column", [0, 1])
    def test_sentence_that_is_not_held_out_is_found(self, corpus, language, column):
        name = f"gold.en-{language}.tsv"
        replace_cell(corpus, name, 3, column, "x" + cell(corpus, name, 3, column))
        assert_reports(corpus, f"{name}, line 4", "no held-out sentence pair reads")

    def test_sentences_of_two_different_held_out_rows_are_found(self, corpus, language):
        name = f"gold.en-{language}.tsv"
        replace_cell(corpus, name, 3, 1, cell(corpus, name, 4, 1))
        assert_reports(corpus, f"{name}, line 4", "no held-out sentence pair reads")

    def test_repeated_pair_is_found(self, corpus, language):
        name = f"gold.en-{language}.tsv"
        lines = read(corpus, name)
        write(corpus, name, [*lines, lines[2]])
        assert_reports(corpus, f"{name}, line {len(lines) + 1}", f"sentence pair already in {name}, line 3")

    @pytest.mark.parametrize(
        ("links", "defect"),
        [
            ("0-0 3:4", "a link must look like 3-4 or 3?4, but was '3:4'"),
            ("0-0 1--1", "a link must look like 3-4 or 3?4, but was '1--1'"),
            ("0-0 99-0", "link 99-0 points outside"),
            ("0-0 0?99", "link 0?99 points outside"),
            ("0-0 1-1 0-0", "duplicate link 0-0"),
            ("0-0 1-1 1?1", "duplicate link 1?1"),
            ("0?0 1?1", "no sure link"),
            ("", "no sure link"),
        ],
    )
    def test_bad_link_is_found(self, corpus, language, links, defect):
        name = f"gold.en-{language}.tsv"
        replace_cell(corpus, name, 5, 2, links)
        assert_reports(corpus, f"{name}, line 6", defect)

    def test_links_past_the_last_token_are_found_and_to_it_allowed(self, corpus, language):
        name = f"gold.en-{language}.tsv"
        n_english, n_other = (len(cell(corpus, name, 0, column).split()) for column in (0, 1))
        replace_cell(corpus, name, 0, 2, f"{n_english - 1}-{n_other - 1}")
        assert check.problems(corpus) == []
        replace_cell(corpus, name, 0, 2, f"0-0 {n_english}-0 0-{n_other}")
        assert_reports(corpus, f"{name}, line 1", f"link {n_english}-0 points outside")
        assert_reports(corpus, f"{name}, line 1", f"link 0-{n_other} points outside")
