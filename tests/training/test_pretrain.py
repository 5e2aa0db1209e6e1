"""Pretraining: a tiny run from generated text, what its batches hold, and the encoder that the project ships."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, set_seed

from training import pretrain, pretrain_card
from training.splits import is_held_out
from training.tokenizer import WORD_START, train_tokenizer, word_starts

MINI = Path(__file__).resolve().parents[2] / "training" / "models" / "mini"
TINY = {
    "seed": 1, "threads": 1, "languages": ["bg", "de"], "copies": {"bible": {"all": 1}, "tatoeba": {"all": 2, "bg": 3}},
    "vocab_size": 150, "tokenizer_sentences": 200, "max_pieces": 20,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 48, "pair_fraction": 0.7, "mask_single": 0.2, "mask_pair": 0.3,
    "tokens_per_batch": 256, "max_steps": 6, "learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.01,
    "adam_beta2": 0.98, "bf16": False, "compile": False, "save_steps": 3, "snapshot_steps": 4, "logging_steps": 2,
}  # fmt: skip
NOUNS = {"de": ["Hund", "Haus", "Brot"], "bg": ["куче", "къща", "хляб"], "en": ["dog", "house", "bread"]}
# One sentence of everyday language in each language that the shipped encoder has read.
PLAIN_TEXT = [
    ("The children went home because it was late.", "Die Kinder gingen nach Hause, weil es spät war."),
    ("I do not know where he has put the keys of the house.", "Je ne sais pas où il a mis les clés de la maison."),
    ("My mother told me that she wanted to see the king.", "Mi madre me dijo que quería ver al rey."),
    ("He gave his son water and bread.", "Έδωσε στον γιο του νερό και ψωμί."),
    ("We have to speak with the people of this city.", "Трябва да говорим с хората от този град."),
]


def make_pairs(language: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of number words and nouns that differ by number."""
    rng = np.random.default_rng(seed)
    words = [int(word) for word in rng.integers(0, 3, count)]
    return [
        (f"{number} see the {NOUNS['en'][word]}, yes!", f"{number} {NOUNS[language][word]} {language} {number}.")
        for number, word in enumerate(words)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with the names of the real one."""
    folder = tmp_path_factory.mktemp("data")
    train = folder / "parallel" / "train"
    train.mkdir(parents=True)
    for seed, (corpus, language) in enumerate([("bible", "bg"), ("bible", "de"), ("tatoeba", "bg"), ("tatoeba", "de")]):
        lines = "".join(f"{english}\t{other}\n" for english, other in make_pairs(language, 300, seed))
        with gzip.open(train / f"{corpus}.en-{language}.tsv.gz", "wt", encoding="utf-8") as file:
            file.write(lines)
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished tiny run: its output folder and its metrics."""
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTKERN_DATA", str(data))
        metrics = pretrain.run(TINY, output, snapshot_dir=output / "snapshot")
    return output, metrics


@pytest.fixture
def batches(data):
    corpora, _ = pretrain.load_corpora(TINY, data)
    tokenizer = train_tokenizer(pretrain.tokenizer_text(corpora, 200), 150, 48)
    return pretrain.MaskedBatches(tokenizer, corpora, TINY, steps=40, seed=1), tokenizer


@pytest.mark.parametrize("value", [None, "/nowhere/at/all"])
def test_without_the_data_folder_it_refuses_and_says_what_it_needs(monkeypatch, value):
    monkeypatch.delenv("OTKERN_DATA", raising=False)
    if value:
        monkeypatch.setenv("OTKERN_DATA", value)
    with pytest.raises(ValueError, match=r"OTKERN_DATA must name the data folder.*parallel/train"):
        pretrain.data_folder()


def test_no_corpus_at_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file CORPUS"):
        pretrain.load_corpora(TINY, tmp_path)


def test_held_out_pairs_never_enter_training(data):
    corpora, held_out = pretrain.load_corpora(TINY, data)
    assert len(corpora) == 4
    assert [copies for _, copies in corpora] == [1, 1, 3, 2]
    assert not any(is_held_out(english) for pairs, _ in corpora for english, _ in pairs)
    assert all(held_out.values())
    assert all(is_held_out(english) for pairs in held_out.values() for english, _ in pairs)


def test_a_finished_run_leaves_a_model_that_loads(finished):
    output, metrics = finished
    model, tokenizer = AutoModel.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.float16
    assert tokenizer.is_fast
    inputs = tokenizer("7 see the house", return_tensors="pt")
    assert model.float()(**inputs).last_hidden_state.isfinite().all()
    assert metrics == json.loads((output / "pretrain_metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == 6
    assert metrics["tokens"] > 0
    assert metrics["held_out"]["pair"] > 0
    assert AutoModel.from_pretrained(output / "snapshot").config.hidden_size == 32
    assert [line.split()[2] for line in (output / "STATUS.txt").read_text().splitlines()] == ["4", "6"]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(finished, data, tmp_path, monkeypatch):
    output, metrics = finished
    monkeypatch.setenv("OTKERN_DATA", str(data))
    shutil.copytree(output / "checkpoint-3", tmp_path / "checkpoint-3")
    resumed = pretrain.run(TINY, tmp_path, resume=True)
    assert resumed["held_out"] == metrics["held_out"]
    before, after = (AutoModelForMaskedLM.from_pretrained(folder).state_dict() for folder in (output, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_batch_is_a_function_of_seed_and_step(batches, data):
    first, tokenizer = batches
    again = pretrain.MaskedBatches(tokenizer, pretrain.load_corpora(TINY, data)[0], TINY, steps=40, seed=1)
    again[3]
    assert all(torch.equal(first[17][name], again[17][name]) for name in first[17])


def test_an_epoch_reads_every_pair_as_often_as_configured(batches):
    plan = batches[0]._plan_epoch(np.array([1, 3, 2]), epoch=1)
    sentences = np.concatenate(plan).ravel()
    assert np.bincount(sentences[sentences >= 0]).tolist() == [1, 1, 3, 3, 2, 2]


def test_batches_keep_to_their_size(batches):
    plan, _ = batches
    for step in range(len(plan)):
        rows, width = plan[step]["input_ids"].shape
        assert rows * width <= TINY["tokens_per_batch"]
        assert width <= TINY["max_position_embeddings"]


def test_positions_restart_at_the_second_sentence(batches):
    plan, tokenizer = batches
    for step in range(10):
        batch = plan[step]
        for ids, positions, row in zip(batch["input_ids"], batch["position_ids"], plan.batches[step], strict=True):
            ends = (ids == tokenizer.sep_token_id).nonzero().ravel().tolist()
            assert len(ends) == (2 if row[1] >= 0 else 1)
            starts = [0, *ends[:-1]]
            expected = [0]
            for start, end in zip(starts, ends, strict=True):
                expected += range(1, end - start + 1)
            assert positions[: len(expected)].tolist() == expected


def test_whole_words_are_masked_and_nothing_special(batches):
    plan, tokenizer = batches
    starts_word = torch.tensor(word_starts(tokenizer))
    for step in range(10):
        batch = plan[step]
        ids = batch["input_ids"].ravel().clone()
        ids[batch["masked"]] = batch["targets"]
        assert (batch["targets"] > tokenizer.mask_token_id).all()
        predicted = torch.zeros(len(ids), dtype=torch.bool)
        predicted[batch["masked"]] = True
        inside_word = ~starts_word[ids]
        assert torch.equal(predicted[1:][inside_word[1:]], predicted[:-1][inside_word[1:]])
        untouched = torch.ones(len(ids), dtype=torch.bool)
        untouched[batch["masked"]] = False
        assert (batch["input_ids"].ravel()[untouched] != tokenizer.mask_token_id).all()


def test_raw_text_and_words_are_split_alike():
    tokenizer = train_tokenizer(["It's late, said l'homme.", "Es ist spät."] * 20, 80, 64)
    raw = tokenizer("It's late, l'homme.")["input_ids"]
    words = tokenizer(["It's", "late", ",", "l'", "homme", "."], is_split_into_words=True)["input_ids"]
    assert raw == words
    assert tokenizer.tokenize("late,")[-1] == f"{WORD_START},"


def test_layers_are_chosen_on_the_development_sets_alone():
    scores = {
        "alignment": {
            ("dev", "es", "ot"): [0.5, 0.4, 0.6], ("dev", "bg", "ot"): [0.5, 0.4, 0.7],
            ("dev", "es", "mutual"): [0.1, 0.9, 0.9], ("golden collection", "es", "ot"): [0.1, 0.9, 0.0],
        },
        "retrieval": {("dev", "es"): [0.1, 0.2, 0.4], ("NTREX", "es"): [0.9, 0.2, 0.1]},
    }  # fmt: skip
    assert pretrain_card.choose_layers(scores) == {"alignment_layer": 1, "retrieval_layer": 2}


def test_the_shipped_encoder_loads_and_is_small():
    model, tokenizer = AutoModel.from_pretrained(MINI), AutoTokenizer.from_pretrained(MINI)
    assert sum(file.stat().st_size for file in MINI.iterdir()) <= 8_200_000
    assert tokenizer.is_fast
    assert len(tokenizer) == model.config.vocab_size
    layers = model.config.otkern
    assert all(0 <= layers[name] <= model.config.num_hidden_layers for name in ("alignment_layer", "retrieval_layer"))
    hidden = model.float()(**tokenizer(["Good day", "Καλημέρα"], return_tensors="pt", padding=True)).last_hidden_state
    assert hidden.isfinite().all()


def test_the_shipped_encoder_predicts_words_far_better_than_an_untrained_one():
    tokenizer, shipped = AutoTokenizer.from_pretrained(MINI), AutoModelForMaskedLM.from_pretrained(MINI).float()
    set_seed(1)
    untrained, trained = pretrain.PretrainingModel(shipped.config), pretrain.PretrainingModel(shipped.config)
    trained.load_state_dict(shipped.state_dict())
    config = {**TINY, "max_pieces": 80, "tokens_per_batch": 512}
    pairs = {"all": PLAIN_TEXT * 8}
    before, after = (pretrain.held_out_loss(model, tokenizer, pairs, config) for model in (untrained, trained))
    for kind in ("single", "pair"):
        # A uniform guess costs ln(vocabulary) = 9.3 nats; the margin is far above what 80 sentences scatter.
        assert after[kind] < before[kind] - 2.5, (kind, before, after)
