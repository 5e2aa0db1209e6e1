"""The alignment run on a tiny random model: it learns, reports, resumes exactly; and the loss by hand."""

import json
import math
import os

import pytest
import torch

from training import align, encoder, loss
from training.config import load_config
from training.trainer import Corpus, Steps

STAGES = """
stages:
  - {name: embedding layer, epochs: 3, learning_rate: 0.01, layers: [0], word_vector: mean, center: true,
     position_prior: [0.5, 0.1], contrast: {weight: 1.0}, regulariser: 0.0}
  - {name: last layer, epochs: 2, learning_rate: 0.002, layers: [-1], plan_layer: 0, word_vector: last,
     contrast: {weight: 1.0}, sentence_contrast: {weight: 0.5}, spread: 0.1, regulariser: 0.1}
"""


@pytest.fixture
def config_file(tmp_path, tiny_model, corpus):
    text = f"""
model: {tiny_model}
languages: [de, fr]
device: cpu
precision: fp32
dropout: 0.1
train: {{source: "{corpus}/train.tsv"}}
dev_pairs: 8
batch_pairs: 8
logging_steps: 2
save_steps: 4
{STAGES}
evaluation:
  alignment: {{made-up: {{de: "{corpus}/gold.en-de.tsv"}}}}
  retrieval: {{held-out: "{corpus}/heldout.tsv"}}
"""
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def clouds():
    torch.manual_seed(1)
    lengths = torch.tensor([3, 2]), torch.tensor([2, 4])
    sides = [torch.randn(2, 4, 5) * loss.inside(4, n)[..., None] for n in lengths]
    return [loss.Cloud(x, n) for x, n in zip(sides, lengths, strict=True)]


def test_the_run_improves_reports_and_leaves_what_it_promises(config_file, tmp_path, tiny_model):
    output = tmp_path / "run"
    align.main(["--config", config_file, "--output_dir", str(output), "--seed", "3"])
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert {"initial_model", "config", "seed", "versions", "metrics", "layers", "times"} <= set(report)
    assert report["initial_model"] == str(tiny_model) and report["seed"] == 3
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    scores = [m["alignment"]["made-up"]["de"]["ot"] for m in (before, after)]
    assert set(scores[1]) == {"aer", "precision", "recall", "f1"}
    accuracies = [m["retrieval"]["held-out"]["fr"]["accuracy"] for m in (before, after)]
    assert accuracies[1] > accuracies[0]
    assert after["anisotropy"]["alignment_layer"] < 0.65
    assert {"loss", "transport", "contrast", "anisotropy", "step"} <= set(report["training"]["log"][0])
    for name in ("loss.png", "scores.png", "alignments.png"):
        assert (output / name).stat().st_size > 5000
    model, _ = encoder.load_encoder(str(output / "model"))
    settings = encoder.card_settings(model)
    assert settings["alignment_layer"] == report["layers"]["after"]["alignment"]
    assert "retrieval_layer" in settings and "reg" in settings["alignment"]
    assert "word alignment" in (output / "model" / "README.md").read_text(encoding="utf-8")


def test_an_interrupted_and_resumed_run_gives_the_same_result(config_file, tmp_path, monkeypatch):
    whole = align.run(load_config(config_file), tmp_path / "whole")

    class Interrupted(Exception):
        pass

    original = align.AlignmentTrainer.compute_loss

    def interrupt(self, *arguments, **keywords):
        if self.state.global_step == 21:
            raise Interrupted
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(align.AlignmentTrainer, "compute_loss", interrupt)
    with pytest.raises(Interrupted):
        align.run(load_config(config_file), tmp_path / "broken")
    monkeypatch.undo()
    assert align.find_checkpoint(tmp_path / "broken" / "checkpoints", "auto").endswith("checkpoint-20")
    resumed = align.run(load_config(config_file), tmp_path / "broken")

    weights = [encoder.load_encoder(str(tmp_path / name / "model"))[0].state_dict() for name in ("whole", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert resumed["metrics"] == whole["metrics"]
    assert [entry["loss"] for entry in resumed["training"]["log"]] == [
        entry["loss"] for entry in whole["training"]["log"]
    ]


def test_an_output_folder_of_another_run_is_refused(config_file, tmp_path):
    config = load_config(config_file)
    other = load_config(config_file, ["seed=5"])
    align.claim_output(tmp_path / "out", config, "auto")
    align.claim_output(tmp_path / "out", other, "auto")  # no checkpoint yet: nothing would be lost
    align.claim_output(tmp_path / "out", config, "auto")
    (tmp_path / "out" / "checkpoints" / "checkpoint-20").mkdir(parents=True)
    align.claim_output(tmp_path / "out", config, "auto")
    with pytest.raises(ValueError, match="--output_dir"):
        align.claim_output(tmp_path / "out", other, "auto")


@pytest.mark.parametrize("result", ["checkpoints/checkpoint-20", "model", "report.json"])
def test_results_without_their_configuration_are_not_overwritten(config_file, tmp_path, result):
    (tmp_path / "out" / result).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"--output_dir.*{result}"):
        align.claim_output(tmp_path / "out", load_config(config_file), "auto")
    assert not (tmp_path / "out" / "config.yaml").exists()
    align.claim_output(tmp_path / "out", load_config(config_file), "never")


def test_held_out_and_evaluated_sentences_never_reach_training(config_file):
    from training.data import read_pairs
    from training.splits import is_held_out

    config = load_config(config_file)
    pairs = read_pairs(config["train"]["source"], "de")
    kept = align.training_pairs(config, "de", {align.normalise_english(pairs[0][0])}, limit=None)
    english = [pair[0] for pair in kept]
    assert pairs[0][0] not in english
    assert any(is_held_out(pair[0]) for pair in pairs)
    assert english and not any(map(is_held_out, english))


@pytest.mark.parametrize("limit", [20, "null"])
def test_no_language_trains_on_a_development_sentence_of_any(config_file, tmp_path, tiny_model, monkeypatch, limit):
    """Every sentence comes three times, spelt differently, with another translation each, in another order a language.

    An English sentence goes to training or to development as a whole, and what that takes from training is made up.
    """
    english = [f"the {a} {b} sees" for a in ("old", "big", "red", "small") for b in ("man", "dog", "cat", "child")]
    for language, step in (("de", 1), ("fr", -1)):
        lines = [
            f"{form}\tx{n}\n" for n, form in enumerate(f(s) for f in (str, str.upper, "{}.".format) for s in english)
        ]
        (tmp_path / f"p.{language}.tsv").write_text("".join(lines[::step]), encoding="utf-8")
    overrides = [f"train.source={tmp_path}/p.{{lang}}.tsv", f"train.limit={limit}", "dev_pairs=2"]
    config = load_config(config_file, overrides)
    _, tokenizer = encoder.load_encoder(str(tiny_model))
    seen, original = [], encoder.tokenize
    monkeypatch.setattr(encoder, "tokenize", lambda t, words, *rest: seen.append(words) or original(t, words, *rest))
    runs = []
    for _ in range(2):
        sets, seen[:] = align.measure.TestSets(), []
        corpora = align.read_training_text(config, sets, tokenizer)
        runs.append((sets.dev_retrieval, list(seen)))
    assert runs[0] == runs[1]
    development = {align.normalise_english(pair[0]) for pairs in sets.dev_retrieval.values() for pair in pairs}
    trained = [{align.normalise_english(" ".join(words)) for words in sentences} for sentences in seen[1::2]]
    assert len(trained) == 2 and not development & set.union(*trained)
    assert [len(pairs) for pairs in sets.dev_retrieval.values()] == [2, 2]
    allowed = [s for s in english if not align.is_held_out(s) and align.normalise_english(s) not in development]
    assert [len(corpus.english) for corpus in corpora] == [20 if limit == 20 else 3 * len(allowed)] * 2


def test_development_pairs_that_leave_nothing_to_train_on_are_refused(config_file, tiny_model):
    _, tokenizer = encoder.load_encoder(str(tiny_model))
    with pytest.raises(ValueError, match="dev_pairs = 64"):
        align.read_training_text(load_config(config_file, ["dev_pairs=64"]), align.measure.TestSets(), tokenizer)


@pytest.mark.parametrize(
    "override",
    ["stages.0.scope=batch", "stages.0.unit=subword", "stages.0.special_tokens=keep", "stages.0.word_vector=first",
     "stages.0.metric=sqeuclidean", "stages.0.metric=euclidean", "stages.0.debias=false",
     "stages.0.target_gradient=detach", "stages.0.reg_reduction=element_mean", "stages.0.reg_reduction=sum",
     "stages.0.layers=[0, 1, -1]", "stages.0.tol=1.0e-2", "stages.0.trainable=[embeddings]"],
)  # fmt: skip
def test_every_option_gives_a_finite_loss_with_gradients(config_file, override):
    config = load_config(
        config_file, ["stages.0.regulariser=1.0", "stages.0.position_prior=[0, 0]", "stages.0.max_iter=200", override]
    )
    model, tokenizer = encoder.load_encoder(config["model"])
    corpora = align.read_training_text(config, align.measure.TestSets(), tokenizer)
    stage = align.number_layers(config["stages"], model)[0]
    step = Steps(corpora, [stage], 8, 1, tokenizer.pad_token_id)[0]
    states = [encoder.hidden_states(model, side, stage["layers"]) for side in step.tokens]
    frozen = {layer: hidden.detach() + 0.1 for layer, hidden in states[1].items()}
    total, parts = loss.alignment_loss(states, frozen, step.tokens, step.groups, stage, 0.0)
    total.backward()
    gradient = model.embeddings.word_embeddings.weight.grad
    assert math.isfinite(total.detach()) and torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    assert {"transport", "contrast", "regulariser", "anisotropy"} == set(parts)


def test_contrast_against_the_identity_is_cross_entropy(clouds):
    x, y = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    lengths = torch.tensor([2, 2, 2])
    plan = torch.eye(2).expand(3, 2, 2) / 2
    value = loss.contrast_loss(loss.Cloud(x, lengths), loss.Cloud(y, lengths), plan, temperature=0.5)
    scores = (
        torch.nn.functional.normalize(x.flatten(0, 1), dim=-1)
        @ torch.nn.functional.normalize(y.flatten(0, 1), dim=-1).T
    )
    truth = torch.arange(6)
    expected = sum(torch.nn.functional.cross_entropy(s / 0.5, truth) for s in (scores, scores.T)) / 2
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(("relaxation", "value"), [("unbalanced", 0.5), ("partial", 0.6), ("null_points", 0.1)])
def test_relaxed_marginals_move_less_mass_in_word_and_position_costs(config_file, clouds, relaxation, value):
    given = [f"stages.0.relaxation={relaxation}", f"stages.0.relaxation_value={value}", "stages.0.debias=false"]
    stage = load_config(config_file, [*given, "stages.0.reg=0.1"])["stages"][0]
    for prior in (0.0, 0.2):
        masses = loss.solve_pairs(*clouds, stage, prior).plan.sum((1, 2))
        assert (masses < 0.999).all()
        if relaxation == "partial":
            torch.testing.assert_close(masses, torch.full_like(masses, value), atol=1e-4, rtol=0)
        plan = loss.plan_of_mass_one(loss.solve_pairs(*clouds, stage, prior), stage)
        torch.testing.assert_close(plan.sum((1, 2)), torch.ones(len(plan)))
    for unusable in ("2.0" if relaxation == "partial" else ".inf", ".nan", "many"):
        with pytest.raises(ValueError, match="must be a finite number"):
            load_config(config_file, [*given, f"stages.0.relaxation_value={unusable}"])
    if relaxation != "unbalanced":
        with pytest.raises(ValueError, match="debias must be false"):
            load_config(config_file, [*given, "stages.0.debias=true"])


def test_the_debiased_loss_of_a_cloud_with_itself_is_zero(clouds):
    options = {"metric": "cosine", "reg": 0.1, "max_iter": 200, "tol": None, "relaxation": "balanced"}
    x, _ = clouds
    value = loss.solve_pairs(x, x, options).value - loss.self_transport(x, x, options)
    torch.testing.assert_close(value, torch.zeros(2), atol=1e-5, rtol=0)


def test_centred_clouds_have_mean_zero_and_an_empty_padding(clouds):
    centred = clouds[0].centered()
    torch.testing.assert_close(centred.flat().mean(0), torch.zeros(5), atol=1e-6, rtol=0)
    assert (centred.vectors[1, 2:] == 0).all()


def test_pooling_makes_one_problem_of_all_points(clouds):
    pooled = clouds[1].pooled()
    assert pooled.vectors.shape == (1, 6, 5) and pooled.lengths.tolist() == [6]


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("stages.0.relaxation=partial", ValueError, "relaxation_value must be a finite number above 0 and up to 1"),
        ("stages.0.relaxation=some", ValueError, "relaxation must be one of"),
        ("stages.0.relaxation_value=1", ValueError, "relaxation_value must be null"),
        ("stages.0.scope=batch", ValueError, "position_prior"),
        ("stages.0.unit=letter", ValueError, "unit must be one of"),
        ("stages.0.nothing=1", ValueError, "no configuration key"),
        ("stages.7.reg=1", ValueError, "no configuration key"),
        ("trian.limit=1", ValueError, "no configuration key"),
        ("model", ValueError, "key=value"),
    ],
)
def test_bad_configurations_are_refused(config_file, override, error, message):
    with pytest.raises(error, match=message):
        load_config(config_file, [override])


def test_overrides_reach_every_depth(config_file):
    config = load_config(config_file, ["stages.1.contrast.temperature=0.2", "evaluation.alignment_settings.reg=0.1"])
    assert config["stages"][1]["contrast"] == {"weight": 1.0, "temperature": 0.2}
    assert config["evaluation"]["alignment_settings"] == {"reg": 0.1}


def test_every_pair_comes_once_an_epoch_and_smaller_languages_repeat():
    def sentences(n):
        return [encoder.Sentence([2, 5 + row, 3], [-1, 0, -1], [0]) for row in range(n)]

    corpora = [Corpus("de", sentences(20), sentences(20)), Corpus("fr", sentences(7), sentences(7))]
    steps = Steps(corpora, [{"epochs": 1}, {"epochs": 2}], batch_pairs=5, seed=1, pad_id=0)
    assert len(steps) == 12 and steps.stage_steps == [4, 8]
    assert [steps.stage_of(step)[0] for step in (0, 3, 4, 11)] == [0, 0, 1, 1]
    rows = [steps[step].tokens[1].input_ids[:, 1] - 5 for step in range(4)]
    first = torch.cat([ids[steps[0].groups[0]] for ids in rows])
    second = torch.cat([ids[steps[0].groups[1]] for ids in rows])
    assert sorted(first.tolist()) == list(range(20))
    assert sorted(set(second.tolist())) == list(range(7)) and len(second) == 20
    assert torch.equal(steps[2].tokens[0].input_ids, steps[2].tokens[0].input_ids)
    assert not torch.equal(steps[0].tokens[1].input_ids, steps[4].tokens[1].input_ids)


@pytest.mark.skipif("OTKERN_DATA" not in os.environ, reason="needs the data folder, OTKERN_DATA")
def test_a_few_steps_on_real_text_improve_a_random_model(tiny_model, tmp_path):
    overrides = [
        f"model={tiny_model}", "train.limit=200", "languages=[de]", "dev_pairs=50", "batch_pairs=20", "device=cpu",
        "stages.0.epochs=1", "stages.1.epochs=1", "evaluation.methods=[ot]",
        "stages.1.layers=[1, 2]", "stages.1.plan_layer=1", "stages.1.sentence_contrast.layer=2",
        "evaluation.dev_alignment={}", "evaluation.retrieval.tatoeba.limit=100",
        "evaluation.retrieval.ntrex={source: '${OTKERN_DATA}/parallel/dev/ntrex.en-{lang}.tsv.gz', limit: 50}",
    ]  # fmt: skip
    report = align.run(load_config("training/configs/tatoeba.yaml", overrides), tmp_path / "run")
    losses = [entry["contrast"] for entry in report["training"]["log"]]
    assert losses[-1] < losses[0]
    assert report["training"]["pairs"] == {"de": 200}
    assert len(report["by_layer"]["after"]["alignment"]["golden-collection"]["fr"]["ot"]) == 3
