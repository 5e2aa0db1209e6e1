"""The evaluation command: one JSON object on standard output, layers and settings from the model's card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import encoder, evaluate, extract

ROOT = Path(__file__).resolve().parents[2]


def run_command(*arguments):
    command = [sys.executable, "-m", "training.evaluate", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def test_alignment_prints_one_json_object_and_nothing_else(tiny_model, corpus):
    done = run_command("alignment", "--model", tiny_model, "--gold", corpus / "gold.en-de.tsv", "--method", "ot")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert {"aer", "precision", "recall", "f1"} <= set(result)
    assert 0 <= result["aer"] <= 1
    assert result["layer"] == 0 and result["n_pairs"] == 12


def test_retrieval_prints_one_json_object_and_nothing_else(tiny_model, corpus):
    arguments = ["--pairs", corpus / "heldout.tsv", "--language", "fr"]
    done = run_command("retrieval", "--model", tiny_model, *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert result["accuracy"] == pytest.approx((result["accuracy_forward"] + result["accuracy_backward"]) / 2)
    assert result["layer"] == 1


def test_bad_input_fails_with_a_message_and_an_empty_standard_output(tiny_model, tmp_path):
    done = run_command("alignment", "--model", tiny_model, "--gold", tmp_path / "no.tsv")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "no.tsv" in done.stderr


@pytest.mark.parametrize("method", extract.METHODS)
@pytest.mark.parametrize("setting", ["unit=subword", "center=false", "position_prior=0"])
def test_every_method_runs_with_every_setting(tiny_model, corpus, method, setting):
    arguments = ["alignment", "--model", str(tiny_model), "--gold", str(corpus / "gold.en-de.tsv"), "--method", method]
    result = evaluate.run(evaluate.build_parser().parse_args([*arguments, "--layer", "-1", "--set", setting]))
    assert result["layer"] == 2
    assert all(0 <= result[name] <= 1 for name in ("aer", "precision", "recall", "f1"))


def test_unknown_layers_and_settings_are_refused(tiny_model, corpus):
    arguments = ["alignment", "--model", str(tiny_model), "--gold", str(corpus / "gold.en-de.tsv")]
    for extra, message in ((["--layer", "3"], "layer must be"), (["--set", "nothing=1"], "alignment settings")):
        with pytest.raises(ValueError, match=message):
            evaluate.run(evaluate.build_parser().parse_args([*arguments, *extra]))


def test_word_and_subword_vectors_by_hand():
    tokens = encoder.Tokens(
        torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]]),
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        torch.tensor([[-1, 0, 0, 1, -1], [-1, 0, -1, -1, -1]]),
        torch.tensor([2, 1]),
    )
    hidden = torch.arange(10.0).view(2, 5, 1)
    for how, expected in (("first", [[1, 3], [6, 0]]), ("last", [[2, 3], [6, 0]]), ("mean", [[1.5, 3], [6, 0]])):
        vectors, lengths = encoder.word_vectors(hidden, tokens, how)
        assert vectors[..., 0].tolist() == expected and lengths.tolist() == [2, 1]
    vectors, lengths = encoder.subword_vectors(hidden, tokens)
    assert vectors[..., 0].tolist() == [[1, 2, 3], [6, 0, 0]] and lengths.tolist() == [3, 1]
    vectors, lengths = encoder.subword_vectors(hidden, tokens, keep_special=True)
    assert vectors[..., 0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 0, 0]] and lengths.tolist() == [5, 3]
    assert encoder.sentence_vectors(hidden, tokens).tolist() == [[2.0], [6.0]]


def test_lower_layers_are_the_same_when_the_upper_blocks_are_left_out(tiny_model):
    model, tokenizer = encoder.load_encoder(str(tiny_model))
    tokens = encoder.pad(encoder.tokenize(tokenizer, [["the", "dog"], ["a", "big", "cat"]]), tokenizer.pad_token_id)
    with torch.no_grad():
        whole = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
        for layer in (0, 1, 2):
            alone = encoder.hidden_states(model, tokens, [layer])[layer]
            torch.testing.assert_close(alone, whole.hidden_states[layer])
    assert len(model.encoder.layer) == 2


def test_order_and_batch_size_have_no_influence_on_vectors(tiny_model):
    model, tokenizer = encoder.load_encoder(str(tiny_model))
    words = [["the", "dog", "sees"], ["a"], ["old", "man", "reads", "a", "red", "book"], ["child", "and"]]
    sentences = encoder.tokenize(tokenizer, words)
    together = encoder.encode(model, sentences, [2], 0, encoder.subword_vectors)[2]
    apart = encoder.encode(model, sentences, [2], 0, encoder.subword_vectors, batch_tokens=1)[2]
    for x, y in zip(together, apart, strict=True):
        torch.testing.assert_close(x, y)
