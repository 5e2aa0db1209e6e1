"""The command that aligns new text: a line of links for every line of text, as it is read."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from training import align_text, encoder, extract
from training.data import read_gold
from training.symmetrization import symmetrize

ROOT = Path(__file__).resolve().parents[2]
GOLD = "training/corpus/gold.en-de.tsv"


def run(*arguments: str, text: bytes) -> tuple[int, list[str], str]:
    command = [sys.executable, "-m", "training.align_text", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, cwd=ROOT)
    return done.returncode, done.stdout.decode().split("\n")[:-1], done.stderr.decode()


@pytest.fixture(scope="module")
def mini():
    return encoder.load_encoder(align_text.MODEL)


def aligner(mini, method="ot", symmetrized=None, **settings) -> align_text.Aligner:
    return align_text.Aligner(*mini, method, 3, extract.complete(settings), symmetrized)


def lines_of(text: str) -> list[tuple[str, str]]:
    return [(line, f"line {n}") for n, line in enumerate(text.split("\n"), 1)]


def test_the_command_gives_a_line_for_every_line_and_ends_mistakes_in_a_sentence():
    text = "The house is big .\tDas Haus ist groß .\r\na dog ||| ein\tHund\n\n ||| leer\nlast line ||| letzte Zeile"
    code, output, errors = run("-", text=text.encode())
    assert code == 0 and "reads en, bg, de" in errors and "Traceback" not in errors
    assert output[0] == "0-0 1-1 2-2 3-3 4-4" and output[1] == "0-0 1-1"
    assert output[2:4] == ["", ""] and len(output) == 5 and output[4].startswith("0-0")
    code, output, errors = run("--batch", "1", "-", text=b"a ||| b\nno separator\n")
    assert code == 2 and output == ["0-0"] and errors.endswith("but was 'no separator'\n") and "line 2" in errors


def test_it_gives_the_links_that_evaluation_scores(mini):
    pairs = read_gold(GOLD)
    for method in extract.METHODS:
        expected = extract.GoldEncoder(*mini, pairs, [3], extract.complete({})).links(method, 3)
        found = aligner(mini, method).align([(pair.english, pair.other) for pair in pairs])
        assert sum(len(a ^ set(b)) for a, b in zip(expected, found, strict=True)) <= 2  # the mean is summed otherwise
        assert sum(map(len, expected)) > 300


def test_without_centring_batches_have_no_influence(mini):
    pairs = [(pair.english, pair.other) for pair in read_gold(GOLD)[:20]]
    text = "\n".join(f"{' '.join(source)} ||| {' '.join(target)}" for source, target in pairs)
    outputs = []
    for batch in (1, 7, 64):
        lines = align_text.align_lines(aligner(mini, center=False), lines_of(text), batch=batch)
        outputs.append([line for part in lines for line in part])
    assert outputs[0] == outputs[1] == outputs[2]


def test_lines_are_written_before_the_input_ends(mini):
    def endless():
        while True:
            yield "a dog ||| ein Hund", "somewhere"

    assert next(align_text.align_lines(aligner(mini), endless(), batch=3)) == ["0-0 1-1"] * 3


def test_tokens_are_separated_by_spaces_alone_and_raw_text_by_words():
    assert align_text.read_pair("10\u00a0000  euros\t10\u00a0000 Euro", "") == (
        ["10\u00a0000", "euros"],
        ["10\u00a0000", "Euro"],
    )
    assert align_text.read_pair("It's good. ||| Gut.", "", raw=True) == (["It's", "good", "."], ["Gut", "."])
    assert align_text.read_pair("a\tb\tattribution", "") == (["a"], ["b"])
    with pytest.raises(ValueError, match="here: a line must be"):
        align_text.read_pair("a ||| b ||| c", "here")


def test_raw_lines_and_scores(mini):
    lines = align_text.align_lines(aligner(mini), lines_of("A dog. ||| Ein Hund."), raw=True, scores=True)
    (line,) = next(lines)
    source, target, links = line.split(" ||| ")
    assert (source, target) == ("A dog .", "Ein Hund .")
    assert [link.split(":")[0] for link in links.split()] == ["0-0", "1-1", "2-2"]
    assert all(0 < float(link.split(":")[1]) <= 1 for link in links.split())


def test_standard_input_that_is_not_utf8_names_the_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a ||| b\n\xff ||| b\n")))
    with pytest.raises(ValueError, match="standard input, line 2"):
        list(align_text.read_input("-"))


def test_symmetrization():
    forward, backward = {(0, 0), (1, 1), (2, 1), (3, 4)}, {(0, 0), (1, 1), (1, 2), (4, 3)}
    assert symmetrize(forward, backward, "none") == forward
    assert symmetrize(forward, backward, "intersect") == {(0, 0), (1, 1)}
    assert symmetrize(forward, backward, "union") == forward | backward
    # (2, 1) and (1, 2) touch (1, 1) and bring a new word each; (3, 4) and (4, 3) link words that are free in the end.
    assert symmetrize(forward, backward, "grow-diag-final-and") == forward | backward
    assert symmetrize({(0, 0), (5, 0)}, {(0, 0)}, "grow-diag-final-and") == {(0, 0)}
    with pytest.raises(ValueError, match="symmetrization must be one of"):
        symmetrize(forward, backward, "both")


@pytest.mark.parametrize("method", ["ot", "mutual", "softmax"])
def test_the_directions_of_a_method_meet_in_its_own_links(mini, method):
    pairs = [(pair.english, pair.other) for pair in read_gold(GOLD)[:30]]
    own = [set(links) for links in aligner(mini, method).align(pairs)]
    found = {how: aligner(mini, method, how).align(pairs) for how in ("none", "intersect", "union")}
    assert [set(links) for links in found["intersect"]] == own
    for none, union, links in zip(found["none"], found["union"], own, strict=True):
        assert links <= set(none) <= set(union)


def test_itermax_has_no_directions(mini):
    with pytest.raises(ValueError, match="symmetrization"):
        aligner(mini, "itermax", "union").align([(["a"], ["b"])])
