"""Words of any script, tokens of any file, and words that have no vector."""

import re
import shutil
import unicodedata

import pytest
import torch
import yaml

from training import align, align_text, baselines, cli, encoder, evaluate, extract, measure, pretrain
from training.config import load_config
from training.data import read_gold, read_lines, read_pairs, split_words

SAMPLE = "training/configs/sample.yaml"
MINI = "training/models/mini"

SPLIT = {
    "hindi": ("यह हिन्दी में", ["यह", "हिन्दी", "में"]),
    "bengali": ("বাংলা ভাষা।", ["বাংলা", "ভাষা", "।"]),
    "tamil": ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
    "vocalised arabic": ("صباحُ الخَيرِ، يا", ["صباحُ", "الخَيرِ", "،", "يا"]),
    "hebrew with niqqud": ("שָׁלוֹם עוֹלָם", ["שָׁלוֹם", "עוֹלָם"]),
    "persian": ("می\u200cخواهم بروم", ["می\u200cخواهم", "بروم"]),
    "soft hyphen": ("ein Bei\u00adspiel.", ["ein", "Bei\u00adspiel", "."]),
    "emoji": ("ok 👨\u200d👩\u200d👧!", ["ok", "👨\u200d👩\u200d👧", "!"]),
    "invisible": ("\ufeffone\u200b two", ["one", "two"]),
    "marks of direction": ("\u200fשלום\u200f, a\u200eb\u200e.", ["שלום", ",", "a\u200eb", "."]),
    "word joiner": ("10\u2060000 x", ["10\u2060000", "x"]),
    "as before": ("It's 3.5 km², isn't it? a_b-c", ["It's", "3.5", "km²", ",", "isn't", "it", "?", "a_b-c"]),
}


@pytest.mark.parametrize("name", SPLIT)
def test_words_keep_their_marks_and_joiners(name):
    text, words = SPLIT[name]
    assert split_words(text) == words


@pytest.mark.parametrize("text", ["Tiếng Việt có dấu", "l'été à Genève", "Η μεγάλη πόλη"])
def test_composed_and_decomposed_text_have_the_same_words(text):
    decomposed = unicodedata.normalize("NFD", text)
    assert [unicodedata.normalize("NFC", word) for word in split_words(decomposed)] == split_words(text)


@pytest.mark.parametrize("space", ["\u00a0", "\u2028", "\u000b", "\u000c", "\u0085", "\u3000"])
def test_gold_tokens_are_separated_by_spaces_alone(tmp_path, space):
    gold = tmp_path / "gold.tsv"
    gold.write_bytes(f"10{space}000 euros\t10{space}000 Euro\t0-0 1-1\n".encode())
    (pair,) = read_gold(str(gold))
    assert pair.english == [f"10{space}000", "euros"] and pair.sure == {(0, 0), (1, 1)}


def test_lines_end_at_newlines_alone_and_a_bad_byte_names_its_line(tmp_path):
    text = tmp_path / "text.tsv"
    text.write_bytes("one\u2028still one\r\ntwo\x0b\x0c\u0085".encode())
    assert list(read_lines(text)) == ["one\u2028still one", "two\x0b\x0c\u0085"]
    text.write_bytes(b"fine\nfa\xffulty\n")
    with pytest.raises(ValueError, match=r"text\.tsv, line 2: .*UTF-8.*byte 3.*0xff"):
        list(read_lines(text))


def test_a_cut_off_gzip_file_is_named(tmp_path):
    import gzip

    whole = gzip.compress(b"a\tb\n" * 5000)
    (tmp_path / "cut.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.tsv\.gz, after line \d+: the gzip file"):
        list(read_lines(tmp_path / "cut.tsv.gz"))


@pytest.fixture(scope="module")
def mini():
    return encoder.load_encoder(MINI)


def test_words_behind_the_limit_or_without_subwords_are_no_points(mini):
    model, tokenizer = mini
    sentences = [["the"] * 40, ["a", "", "dog"]]
    with pytest.warns(UserWarning, match="33 words of 2 of 2 sentences have no vector"):
        tokenized = encoder.tokenize(tokenizer, sentences, max_length=10)
    assert [sentence.kept for sentence in tokenized] == [list(range(8)), [0, 2]]
    tokens = encoder.pad(tokenized, tokenizer.pad_token_id)
    hidden = encoder.hidden_states(model, tokens, [2])[2]
    vectors, lengths = encoder.word_vectors(hidden, tokens)
    assert lengths.tolist() == [8, 2]
    assert all((vectors[s, : lengths[s]].norm(dim=-1) > 0).all() for s in (0, 1))


@pytest.mark.parametrize("method", extract.METHODS)
def test_words_without_a_vector_are_never_linked_and_keep_the_place_of_the_others(mini, method):
    model, tokenizer = mini
    settings = extract.complete({"center": False})
    with pytest.warns(UserWarning, match="no vector"):
        sides = [extract.encode_words(model, tokenizer, [["", "the", "dog"]], [2], settings) for _ in (0, 1)]
    vectors, units = ([side[1][2] for side in sides], [side[0] for side in sides])
    (links,) = extract.extract(tuple(vectors), method, settings, units=tuple(units))
    assert set(links) == {(1, 1), (2, 2)}


@pytest.mark.parametrize("method", extract.METHODS)
def test_a_file_of_empty_pairs_has_no_links(mini, method):
    from training.data import GoldPair

    model, tokenizer = mini
    pairs = [GoldPair([], [], frozenset(), frozenset())] * 2
    gold = extract.GoldEncoder(model, tokenizer, pairs, [2], extract.complete({}))
    assert gold.links(method, 2) == [set(), set()]


@pytest.mark.parametrize("text", ["1e-4", "5e-2", "1e0", "1E5", "-2e-3", "2.5e3", ".5e1"])
def test_numbers_are_read_as_people_write_them(text):
    assert isinstance(yaml.safe_load(text), str) or "." in text
    assert cli.read_yaml(text, "here") == float(text)


def test_numeric_keys_are_numbers_before_anything_is_claimed():
    config = load_config(SAMPLE, ["stages.0.learning_rate=1e-4", "stages.1.reg=5e-2"])
    assert config["stages"][0]["learning_rate"] == 1e-4 and config["stages"][1]["reg"] == 0.05
    for override, message in (
        ("stages.0.learning_rate=fast", "stages.0.learning_rate must be a number above 0, but was 'fast'"),
        ("stages.0.contrast.temperature=0", "stages.0.contrast.temperature must be a number above 0, but was 0"),
        ("stages.1.max_iter=2.5", "stages.1.max_iter must be a whole number of at least 1, but was 2.5"),
        ("stages.0.layers=3", "stages.0.layers must be a list of one or more numbers, but was 3"),
        ("adam_betas=[0.9, 1.0]", "adam_betas must be a number of at least 0 and below 1"),
        ("batch_pairs=true", "batch_pairs must be a whole number"),
        ("evaluation.alignment_layer=last", "evaluation.alignment_layer must be auto or a whole number"),
        ("stages.0.debias='no'", "stages.0.debias must be true or false"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_config(SAMPLE, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages=3", "stages must be a list"),
        ("stages.0=3", "stages.0 must be a mapping"),
        ("stages.0.contrast=3", "stages.0.contrast must be a mapping"),
        ("stages.0.trainable=['(']", "stages.0.trainable: '(' is no regular expression"),
        ("evaluation.methods=[foo]", "evaluation.methods must be a list of some of"),
        ("evaluation.alignment_settings.reg=fast", "evaluation.alignment_settings: reg must be a number"),
        ("evaluation.alignment_settings.reg=-1", "evaluation.alignment_settings: reg must be a number above 0"),
        ("evaluation.alignment_settings.max_iter=2.5", "max_iter must be a whole number of at least 1, but was 2.5"),
        ("evaluation.alignment_settings.word_vector=x", "word_vector must be one of"),
        ("evaluation.retrieval_settings.csls_neighbours=x", "evaluation.retrieval_settings: csls_neighbours must be"),
        ("evaluation.retrieval.x={source: a, limit: x}", "evaluation.retrieval.x.limit must be a whole number"),
        ("evaluation.alignment.x=3", "evaluation.alignment.x must map languages to files"),
        ("languages=de", "languages must be a list of texts"),
        ("train.columns=[en]", "train.columns must be null or two names"),
        ("precision=fp8", "precision must be one of"),
        ("model=3", "model must be text"),
    ],
)
def test_no_key_of_the_configuration_is_left_for_the_run_to_stumble_over(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(SAMPLE, [override])


def test_whole_numbers_may_be_written_with_an_exponent():
    config = load_config(SAMPLE, ["train.limit=1e3", "stages.0.max_iter=2e1", "stages.0.layers=[1e0]"])
    values = config["train"]["limit"], config["stages"][0]["max_iter"], config["stages"][0]["layers"][0]
    assert values == (1000, 20, 1) and all(type(value) is int for value in values)


@pytest.mark.parametrize(
    ("override", "resume", "message"),
    [
        ("stages.0.layers=[99]", "auto", "stages.0.layers must be an integer from"),
        ("evaluation.retrieval_layer=99", "auto", "evaluation.retrieval_layer must be an integer from"),
        ("train.source=./no/such/file.tsv", "auto", "source must be an existing file"),
        ("seed=1", "no-such-folder", "--resume must be auto, never or a checkpoint folder"),
    ],
)
def test_a_run_that_cannot_start_claims_no_folder(tmp_path, override, resume, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        align.run(load_config(SAMPLE, [f"model={MINI}", override]), tmp_path / "out", resume)
    assert not (tmp_path / "out").exists()


def test_a_pretraining_configuration_is_checked_by_key(tmp_path):
    example = cli.read_yaml_file("training/configs/pretrain.yaml")
    path = tmp_path / "pretrain.yaml"
    path.write_text(yaml.safe_dump(example | {"max_steps": 1e4, "learning_rate": 1}), encoding="utf-8")
    assert pretrain.read_config(path)["max_steps"] == 10000
    path.write_text(yaml.safe_dump(example | {"learning_rate": "fast"}), encoding="utf-8")
    with pytest.raises(ValueError, match="learning_rate must be a number, but was 'fast'"):
        pretrain.read_config(path)
    path.write_text(yaml.safe_dump({"max_step": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="must have the keys of"):
        pretrain.read_config(path)


def test_pairs_with_a_side_without_subwords_are_not_trained_on(mini, tmp_path, monkeypatch):
    _, tokenizer = mini
    text = tmp_path / "text.tsv"
    text.write_text("the dog sees\tder Hund sieht\nthe cat sees\tKatze\n", encoding="utf-8")
    config = load_config(SAMPLE, [f"train.source={text}", "languages=[de]", "dev_pairs=0", "train.limit=null"])
    monkeypatch.setattr(align, "is_held_out", lambda english: False)
    # Stands for a word of which the tokenizer makes nothing.
    monkeypatch.setattr(align, "split_words", lambda text: [word.replace("Katze", "") for word in text.split(" ")])
    with pytest.warns(UserWarning, match="1 words of 1 of 2 sentences have no vector"):
        (corpus,) = align.read_training_text(config, measure.TestSets(), tokenizer)
    assert [len(corpus.english), len(corpus.other)] == [1, 1] and corpus.other[0].n_words == 3
    text.write_text("the cat sees\tKatze\n", encoding="utf-8")
    with (
        pytest.warns(UserWarning, match="no vector"),
        pytest.raises(ValueError, match=r"train\.source .*in none of them"),
    ):
        align.read_training_text(config, measure.TestSets(), tokenizer)


def test_empty_pairs_and_texts_give_no_links_and_no_numbers(mini):
    assert baselines.align([[], []], [[], []]) == [set(), set()]
    assert baselines.align([[], ["a"]], [["x"], []]) == [set(), set()]
    assert evaluate.evaluate_anisotropy(*mini, ["", ""], [1]) == {}


def test_the_command_counts_words_without_a_vector_once(tmp_path, capsys):
    path = tmp_path / "long.txt"
    path.write_text(f"{'the ' * 300}||| the\n" * 3 + "the ||| the\n", encoding="utf-8")
    align_text.main(["--batch", "1", str(path)])
    output = capsys.readouterr()
    assert output.out.count("\n") == 4
    assert output.err.count("have no vector") == 1 and "warning: 138 of 905 words" in output.err


def test_faulty_json_lines_and_damaged_models_are_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"en": "a", "de": "b"}\n{"en": "a\xff", "de": "b"}\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 2: text must be UTF-8"):
        read_pairs(str(path), "de")
    path.write_bytes(b'{"en": "a", "de": "b"}\n{"en": "a"\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 2: not valid JSON"):
        read_pairs(str(path), "de")
    model = tmp_path / "model"
    shutil.copytree(MINI, model)
    (model / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model '.*' cannot be loaded"):
        encoder.load_encoder(str(model))


def test_a_mistake_in_yaml_names_file_and_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: x\nstages: [\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.yaml, line \d: not valid YAML"):
        cli.read_yaml_file(path)
    path.write_bytes(b"model: x\nname: \xff\n")
    with pytest.raises(ValueError, match=r"run\.yaml, line 2: text must be UTF-8"):
        cli.read_yaml_file(path)


def test_a_users_mistake_ends_in_a_sentence_and_code_2(capsys):
    def main(argv):
        raise FileNotFoundError("source must be an\nexisting file")

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: source must be an existing file\n"


def test_padding_of_points_takes_no_mass():
    vectors = torch.randn(2, 3, 4)
    settings = extract.complete({"position_prior": 0.0})
    _, scores = extract.links_of("ot", vectors, vectors, torch.tensor([3, 2]), torch.tensor([3, 2]), settings)
    assert scores[1, 2].eq(0).all() and scores[1, :, 2].eq(0).all()
