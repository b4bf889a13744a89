from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import ct, tiny
from core.models.gaussian import Gaussian
from core.tasks.clip import CLIP
from launchers import evaluate, evaluation_protocols
from launchers.export import export, load_exported
from launchers.past_run import open_run
from shards.errors import ConfigError
from shards.ingest.phantom_chest import ChestPhantom
from shards.ingest.phantom_ct import CtPhantom
from shards.ingest.phantom_ct_text import PROMPTS
from shards.loader import MixtureSet
from shards.manifest import Manifest
from shards.store import open_store
from shards.tokenizer import Tokenizer, train_wordpiece
from shards.transforms import label_text
from shards.writer import WriterConfig, write_shards
from tests.launchers.past_runs import STEP, make_run, pack


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def run_dir(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a", manifest)


def test_all_protocols_are_printed_and_written(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = tmp_path / "all.json"
    options = ["--batch-size", "16", "--replicates", "50", "--device", "cpu", "--json", str(reports)]
    options += ["--corruption-studies", "8"]
    assert evaluate.main(["--run-dir", str(run_dir), *options]) == 0
    shown = capsys.readouterr()
    assert "macro" in shown.out and "R@10" in shown.out and "test: features" in shown.err
    assert "1 empty report" in shown.out
    found = json.loads(reports.read_text())
    assert set(found) == {"zero_shot", "retrieval", "linear_probe", "uncertainty"}
    for protocol in found:
        assert json.loads((run_dir / "eval" / f"{protocol}.json").read_text()) == found[protocol]
        assert found[protocol]["step"] == STEP and found[protocol]["split"] == "test"
    assert list((run_dir / "eval" / "tb").iterdir())
    # The study without a report counts wherever no text is needed.
    assert found["zero_shot"]["studies"] == 40 and found["retrieval"]["studies"] == 39
    assert found["retrieval"]["skipped"] == {"empty report": 1} and found["zero_shot"]["skipped"] == {}
    assert found["zero_shot"]["prompts_from"] == "configs/prompts.py"
    probe = found["linear_probe"]
    assert probe["labels"]["effusion"]["value"] > 0.9  # half of the image is brighter
    assert probe["studies"] == {"train": 60, "validation": 24, "test": 40}
    assert probe["labels_not_fitted"] == ["nodule"]
    # A task without distributions: the baselines, and a word about it.
    uncertainty = found["uncertainty"]
    assert {"area_max_probability", "area_norm", "calibration_error"} <= set(uncertainty["figures"])
    assert "uncertainty: task CLIP has no log-variance: baselines only" in shown.out
    assert uncertainty["labels_decided"] == ["effusion"] and 1 < uncertainty["logit_scale"] < 100
    assert set(found["retrieval"]["abstention"]["image_to_text"]) == {"margin"}
    assert "R@1, surest 50 % by margin" in shown.out and "area max probability" in shown.out


def test_a_task_with_log_variance_is_measured_in_full(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spread(x: torch.Tensor) -> torch.Tensor:
        return (x.float().flatten(1).std(dim=1) - 4.0)[:, None].expand(-1, 16)

    # One image a study here, so rows of images are rows of studies.
    of_images = lambda task, batch: Gaussian(mean=task.embed_images(batch), logvar=spread(batch["pixel_values"]))  # noqa: E731
    of_texts = lambda task, ids, mask: Gaussian(mean=task.embed_texts(ids, mask), logvar=spread(ids))  # noqa: E731
    monkeypatch.setattr(CLIP, "distribution_of_images", of_images, raising=False)
    monkeypatch.setattr(CLIP, "distribution_of_texts", of_texts, raising=False)
    run_dir = make_run(tmp_path / "run", manifest)
    options = ["--protocol", "uncertainty", "retrieval", "--replicates", "10", "--device", "cpu"]
    assert evaluate.main(["--run-dir", str(run_dir), *options, "--corruption-studies", "6", "--limit", "30"]) == 0
    report = json.loads((run_dir / "eval" / "uncertainty.json").read_text())
    expected = {"gain", "area_logvar", "corruption_blur", "corruption_noise_within", "masked_words", "logvar_spread"}
    assert expected | {"sampled_minus_mean", "vague_auc"} <= set(report["figures"])
    assert report["studies"] == 30 and report["curves"]["logvar"]["coverage"][-1] == 1.0
    assert [note for note in report["notes"] if "degraded_auc" in note] == report["notes"]
    retrieval = json.loads((run_dir / "eval" / "retrieval.json").read_text())
    assert set(retrieval["abstention"]["text_to_image"]) == {"logvar", "margin"}
    events = EventAccumulator(str(run_dir / "eval" / "tb"), size_guidance={"images": 0})
    events.Reload()
    assert "eval/uncertainty/gain" in events.Tags()["scalars"]
    assert "eval/retrieval/text_to_image_r1_at_50_by_logvar" in events.Tags()["scalars"]
    (drawn,) = events.Images("eval/uncertainty/risk_coverage")
    assert (drawn.width, drawn.height) == (640, 440)

    nan = lambda task, batch: Gaussian(mean=task.embed_images(batch), logvar=spread(batch["pixel_values"]) * torch.nan)  # noqa: E731
    monkeypatch.setattr(CLIP, "distribution_of_images", nan)
    capsys.readouterr()
    assert evaluate.main(["--run-dir", str(run_dir), *options[:2], "--limit", "8"]) == 4
    assert "error: image_logvar of sample 0 is nan" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["anatomies", "whole volumes"])
def test_reports_are_generated_and_kept_only_when_asked_for(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = CtPhantom(CtPhantom.Config(train=12, validation=2, test=8, shape=(24, 32, 32), normal=0.5))
    write_shards(source, str(tmp_path / "set"), WriterConfig(shard_samples=8, workers=1))
    config = ct.fvlm_tiny() if kind == "anatomies" else ct.clip_tiny()
    vision = replace(config.task.vision, volume_size=(24, 32, 32), width=16, heads=2)
    volume = replace(config.data.volume, size=(24, 32, 32))
    config = replace(config, task=replace(config.task, vision=vision), data=replace(config.data, volume=volume))
    corpus = [text for sides in PROMPTS.values() for texts in sides.values() for text in texts]
    run = make_run(tmp_path / "run", tmp_path / "set" / "manifest.json", config, corpus)
    options = ["--run-dir", str(run), "--protocol", "generation", "--device", "cpu", "--replicates", "20"]
    options += ["--decoder-steps", "4", "--report-length", "64", "--limit", "8"]
    assert evaluate.main([*options, "--generated-reports", str(tmp_path / "reports.jsonl")]) == 0
    shown = capsys.readouterr()
    assert "generation: 8 studies read, 8 written" in shown.out and "bleu 4" in shown.out
    kept = [json.loads(line) for line in (tmp_path / "reports.jsonl").read_text().splitlines()]
    keys = {source.plan().items[place].key for place in range(14, 22)}
    assert {one["study"] for one in kept} == keys and all(set(one) == {"study", "report"} for one in kept)
    report = json.loads((run / "eval" / "generation.json").read_text())
    assert report["labels_from"] == "sentences of the CT phantom" and set(report["labels"]) == set(PROMPTS)
    assert (report["abnormal"] is None) == (kind == "whole volumes")
    # Reports are nowhere else, neither those that were read nor those that were written.
    texts = [one["report"] for one in kept if len(one["report"].split()) > 4]
    for item in source.plan().items:
        texts += source.load(item).sample.record.report.values()
    everything = shown.out + shown.err + json.dumps(report)
    assert texts and not any(text in everything for text in texts)
    assert evaluate.main(options) == 0
    assert json.loads((run / "eval" / "generation.json").read_text()) == report


def test_words_of_a_vocabulary() -> None:
    tokenizer = train_wordpiece(["Left pleural effusion.", "The heart is normal."] * 3, 96)
    words = evaluation_protocols.words_of(tokenizer)
    assert words is not None and words.mask_id == tokenizer.mask_id and words.special_ids == tokenizer.special_ids
    spelled = tokenizer.tokens(range(tokenizer.vocab_size))
    assert [token for token, on in zip(spelled, words.continues, strict=True) if on] == [
        token for token in spelled if token.startswith("##")
    ]


def test_probe_is_fitted_on_the_training_manifest_when_validation_has_its_own(manifest: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out"
    shutil.copytree(manifest.parent, held_out)
    whole = Manifest.from_bytes(manifest.read_bytes())
    kept = replace(whole, shards=tuple(shard for shard in whole.shards if shard.split != "train"))
    (held_out / "manifest.json").write_bytes(kept.to_bytes())
    run_dir, report = make_run(tmp_path / "run", manifest, validation=f"{held_out}/manifest.json"), tmp_path / "a.json"
    options = ["--protocol", "linear_probe", "--replicates", "20", "--device", "cpu", "--json", str(report)]
    assert evaluate.main(["--run-dir", str(run_dir), *options]) == 0
    assert json.loads(report.read_text())["linear_probe"]["studies"] == {"train": 60, "validation": 24, "test": 40}


def test_prompts_file_and_limit(run_dir: Path, tmp_path: Path) -> None:
    prompts, reports = tmp_path / "prompts.toml", tmp_path / "out.json"
    prompts.write_text('[effusion]\npositive = ["Left effusion."]\nnegative = ["Clear."]\n')
    options = ["--prompts", str(prompts), "--limit", "12", "--replicates", "20", "--json", str(reports)]
    assert evaluate.main(["--run-dir", str(run_dir), "--protocol", "zero_shot", "--checkpoint", "best", *options]) == 0
    report = json.loads(reports.read_text())["zero_shot"]
    assert report["studies"] == 12 and report["prompts"] == {"effusion": {"positive": 1, "negative": 1}}
    assert report["labels_without_prompts"] == ["nodule"]


def test_a_run_on_structured_reports_is_asked_in_their_parts(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[tuple[int, str], ...]] = []
    encode_parts = Tokenizer.encode_parts
    monkeypatch.setattr(
        Tokenizer, "encode_parts", lambda self, rows, n: asked.extend(rows) or encode_parts(self, rows, n)
    )
    run_dir = make_run(tmp_path / "run", manifest, report="structured")
    options = ["--protocol", "zero_shot", "--limit", "12", "--replicates", "5", "--device", "cpu"]
    assert evaluate.main(["--run-dir", str(run_dir), *options]) == 0
    report = json.loads((run_dir / "eval" / "zero_shot.json").read_text())
    assert report["prompts_from"] == "structured reports" and set(report["prompts"]) == {"effusion", "nodule"}
    assert {parts[-1] for parts in asked} >= {
        (4, "Verdict: pleural effusion absent."),
        (4, "Verdict: pulmonary nodule present."),
    }


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--run-dir", "nowhere"], 2, "nowhere"),
        (["--split", "exam"], 3, "split 'exam' has no shard; this manifest has test, train, validation"),
        (["--checkpoint", "step-9"], 2, "steps at hand: 4"),
        (["--checkpoint", "../x"], 2, "names no checkpoint"),
        (["--data", "missing/manifest.json"], 2, "missing"),
        (["--prompts", "missing.toml"], 2, "cannot be read"),
        (["--protocol", "generation"], 2, "CLIP cannot be asked"),
        (["--generated-reports", "a.jsonl"], 2, "nothing is generated without --protocol generation"),
    ],
)
def test_bad_arguments_are_one_line(
    run_dir: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    assert evaluate.main(["--run-dir", str(run_dir), *options]) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_labels_without_any_prompt_are_named_before_anything_is_embedded(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_protocols.built_in, "PLAIN_PROMPTS", {})
    run_dir = make_run(tmp_path / "run", manifest)
    assert evaluate.main(["--run-dir", str(run_dir)]) == 2
    shown = capsys.readouterr().err
    assert "no prompts for the labels of this data (effusion, nodule)" in shown and "test:" not in shown


def test_a_changed_weight_file_is_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    weights = copy / "checkpoints" / f"step-{STEP}" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert evaluate.main(["--run-dir", str(copy)]) == 3
    assert "differs from its checksum" in capsys.readouterr().err


def test_run_and_data_in_a_bucket(
    bucket: str, run_dir: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_store(bucket) as store:
        for path in sorted(path for path in run_dir.rglob("*") if path.is_file() and "eval" not in path.parts):
            store.put(f"run/{path.relative_to(run_dir).as_posix()}", path)
        for path in sorted(manifest.parent.iterdir()):
            store.put(f"data/{path.name}", path)
        options = ["--data", f"{bucket}/data/manifest.json", "--protocol", "zero_shot", "--replicates", "20"]
        assert evaluate.main(["--run-dir", f"{bucket}/run", *options]) == 0
        report = json.loads(store.get("run/eval/zero_shot.json"))
        assert report["manifest_sha256"] == Manifest.from_bytes(manifest.read_bytes()).sha256
        assert store.list("run/eval/tb/")
        assert evaluate.main(["--run-dir", f"{bucket}/run", "--checkpoint", "step-9"]) == 2
    assert "there are step-4" in capsys.readouterr().err


def test_a_run_of_anatomies_is_asked_by_every_protocol(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = CtPhantom.Config(train=12, validation=8, test=16, shape=(16, 32, 32))
    write_shards(CtPhantom(counts), str(tmp_path / "set"), WriterConfig(workers=1))
    config = replace(ct.fvlm_tiny(), recipe="ct:fvlm_tiny")
    vision = replace(config.task.vision, volume_size=(16, 32, 32), width=32, heads=2, depth=1, levels=(1,))
    volume = replace(config.data.volume, size=vision.volume_size)
    config = replace(config, task=replace(config.task, vision=vision), data=replace(config.data, volume=volume))
    run_dir = make_run(tmp_path / "run", tmp_path / "set" / "manifest.json", config)
    options = ["--run-dir", str(run_dir), "--batch-size", "8", "--replicates", "10", "--device", "cpu"]
    assert evaluate.main([*options, "--json", str(tmp_path / "all.json")]) == 0
    found = json.loads((tmp_path / "all.json").read_text())
    assert set(found) == {"zero_shot", "retrieval", "linear_probe", "uncertainty", "anatomy", "anatomy_probe"}
    assert all(report["skipped"] == {} for report in found.values())
    assert found["retrieval"]["compared_by"] == "anatomies" and set(found["anatomy_probe"]["shares"]) == {
        "1",
        "10",
        "100",
    }
    assert len(found["anatomy"]["paraphrases"]["macro"]["each"] or []) in (0, 3)
    assert found["anatomy"]["decisions"]["validation_studies"] == 8
    assert set(found["anatomy"]["coverage"].values()) == {1.0}
    drawn = list((run_dir / "eval" / "anatomy" / "heat_map").iterdir())
    assert drawn and all(file.read_bytes().startswith(b"\x89PNG") for file in drawn)
    capsys.readouterr()
    assert evaluate.main([*options, "--protocol", "zero_shot"]) == 0  # no other protocol asks for the label maps
    assert "macro" in capsys.readouterr().out
    # Radiographs have no organs: said by name, not found while volumes are decoded.
    assert evaluate.main([*options, "--protocol", "anatomy", "--data", str(manifest)]) == 2
    assert f"{manifest}: its label maps do not know lung" in capsys.readouterr().err


def test_learned_prompts_are_judged_beside_wordings_of_written_ones(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.umcl()
    classes = tuple(name for name in recipe.task.classes if name != "lung nodule")  # which the data ask for
    task = replace(recipe.task, classes=classes)
    data = replace(recipe.data, label_text=label_text.Config(classes=classes))
    config = replace(recipe, recipe="tiny:umcl", task=task, data=data)
    run = make_run(tmp_path / "umcl", manifest, config)
    found = evaluate_json(run, tmp_path, "wording", "zero_shot")
    assert found["zero_shot"]["macro_over"] == ["pleural effusion"] and found["zero_shot"]["unseen"] == ["lung nodule"]
    assert found["zero_shot"]["macro_of"]["seen"]["value"] == found["zero_shot"]["macro"]["value"]
    wording = found["wording"]
    assert wording["labels"][0] == "atelectasis" and len(wording["paraphrases"]) == 20
    assert set(wording["figures"]) == {
        "written", "paraphrases_mean", "paraphrases_deviation", "learned", "false_negatives_pushed_apart",
    }  # fmt: skip
    assert wording["figures"]["written"]["value"] == found["zero_shot"]["macro"]["value"]
    assert 0 < wording["figures"]["false_negatives_pushed_apart"]["value"] < 1
    shown = capsys.readouterr().out
    assert "paraphrases deviation" in shown and "lung nodule (unseen)" in shown
    assert "macro, unseen classes" in shown
    exported = tmp_path / "exported"
    with open_run(str(run)) as past:
        export(past, exported)
    encoder = load_exported(exported)
    prompts = encoder.embed_classes()
    assert prompts.shape == (len(classes), 16)
    torch.testing.assert_close(encoder.embed_classes(["a rare disease", "no finding"])[1], prompts[0])


def test_sets_of_a_mixture_are_told_apart(manifest: Path, tmp_path: Path) -> None:
    phantoms = ChestPhantom(ChestPhantom.Config(train=40, validation=2, test=2, size=40))
    write_shards(phantoms, str(tmp_path / "phantoms"), WriterConfig(shard_samples=40, workers=1))
    sets = tuple(
        MixtureSet(manifest=str(path), quota=4)
        for path in (manifest, tmp_path / "phantoms" / "manifest.json", manifest)
    )
    options = evaluation_protocols.Options(protocols=("set_identity",), replicates=20, batch_size=16)
    with open_run(str(make_run(tmp_path / "run", manifest)), device=torch.device("cpu")) as run:
        with pytest.raises(ConfigError, match="trained on 1 set, which has no other to be told from"):
            evaluation_protocols.evaluate(run, options)
        mixed = replace(run, config=replace(run.config, data=replace(run.config.data, train=sets)))
        found = evaluation_protocols.evaluate(mixed, options)
    report = found.reports["set_identity"]
    assert set(report["labels"]) == {sets[0].manifest, sets[1].manifest} and report["macro"]["value"] > 0.9
    assert report["split"] == "training split" and report["skipped"] == {}


def evaluate_json(run: Path, folder: Path, *protocols: str) -> dict[str, Any]:
    """What evaluate.py says of a run on the CPU."""
    target = folder / "found.json"
    flags = ["--batch-size", "16", "--replicates", "20", "--device", "cpu", "--json", str(target)]
    assert evaluate.main(["--run-dir", str(run), "--protocol", *protocols, *flags]) == 0
    found: dict[str, Any] = json.loads(target.read_text())
    return found
