import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from shards.batch import StudyRecord, ViewRecord
from shards.errors import ConfigError, EmptyReportError
from shards.tokenizer import Tokenizer, load_tokenizer, report_text, train_wordpiece

CORPUS = [
    "Small left pneumothorax. No pleural effusion.",
    "Moderate right pleural effusion with basal atelectasis.",
    "The heart is enlarged. Lungs are clear, without pneumothorax.",
    "No acute cardiopulmonary process; temperature 37 °C.",
] * 5


def record(**report: str) -> StudyRecord:
    return StudyRecord(study="s", patient="p", report=report, views=[ViewRecord(id="0", height=1, width=1)])


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_wordpiece(CORPUS, 300)


def test_training_gives_the_same_bytes_in_another_process(trained: Tokenizer) -> None:
    program = (
        "import json, sys; from shards.tokenizer import train_wordpiece;"
        "print(train_wordpiece(json.loads(sys.argv[1]), 300).sha256)"
    )
    for threads in ("1", "4"):
        result = subprocess.run(
            [sys.executable, "-c", program, json.dumps(CORPUS)],
            capture_output=True, text=True, check=True, env={"RAYON_NUM_THREADS": threads},
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert result.stdout.strip() == trained.sha256


def test_trained_vocabulary_covers_the_corpus(trained: Tokenizer) -> None:
    assert trained.vocab_size <= 300
    ids, mask = trained.encode(CORPUS, 64)
    assert (ids != trained.unk_id).all()
    assert trained.tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert "pneumothorax" in trained.tokens(ids[0].tolist())
    assert ids.dtype.is_signed and ids.shape == mask.shape


def test_trainer_treats_rare_characters_as_unknown_and_refuses_an_empty_corpus() -> None:
    tokenizer = train_wordpiece([*CORPUS, "ж"], 110)
    ids, _ = tokenizer.encode(["ж"], 8)
    assert ids[0].tolist() == [tokenizer.cls_id, tokenizer.unk_id, tokenizer.sep_id]
    with pytest.raises(ConfigError, match="no text"):
        train_wordpiece(["  ", ""], 300)
    with pytest.raises(ConfigError, match="vocab_size=20 is too small"):
        train_wordpiece(CORPUS, 20)


def test_truncation_keeps_the_closing_token(trained: Tokenizer) -> None:
    ids, mask = trained.encode(["clear " * 50, "clear"], 8)
    assert ids.shape == (2, 8)
    assert ids[0, 0] == trained.cls_id and ids[0, -1] == trained.sep_id
    assert mask.sum(dim=1).tolist() == [8, 3]
    assert (ids[1, 3:] == trained.pad_id).all() and ids[1, 2] == trained.sep_id
    with pytest.raises(ConfigError, match="use at least 3"):
        trained.encode(["clear"], 2)
    assert trained.encode([], 8)[0].shape == (0, 0)


def test_special_tokens_inside_a_report_are_text(trained: Tokenizer) -> None:
    ids, _ = trained.encode(["heart [SEP] clear [PAD] [MASK]"], 64)
    inside = set(ids[0, 1:-1].tolist())
    assert not inside & {trained.sep_id, trained.pad_id, trained.mask_id, trained.cls_id}


def test_save_and_load_keep_identity(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer", sha256=trained.sha256)
    assert loaded.sha256 == trained.sha256 and loaded.to_files() == trained.to_files()
    assert loaded.encode(CORPUS, 20)[0].tolist() == trained.encode(CORPUS, 20)[0].tolist()
    assert Tokenizer.from_files(trained.to_files()).sha256 == trained.sha256
    assert load_tokenizer(tmp_path / "tokenizer" / "tokenizer.json").sha256 == trained.sha256
    with pytest.raises(ConfigError, match="is recorded"):
        load_tokenizer(tmp_path / "tokenizer", sha256="0" * 64)


def test_vocab_file_gives_the_ids_of_its_lines(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(trained.tokens(range(trained.vocab_size))) + "\n", encoding="utf-8")
    assert load_tokenizer(file).sha256 == trained.sha256
    assert load_tokenizer(tmp_path).sha256 == trained.sha256


def test_hugging_face_folder_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    scratch = tokenizers.Tokenizer(models.BPE())
    scratch.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    scratch.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    scratch.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    tokenizer = load_tokenizer(tmp_path)
    ids, _ = tokenizer.encode(["Small left pneumothorax."], 64)
    assert tokenizer.tokens([ids[0, 0], ids[0, -1], tokenizer.pad_id]) == ["<s>", "</s>", "<pad>"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither tokenizer.json"),
        ({"vocab.txt": b"[PAD]\nlung\n"}, r"lacks \[UNK\] \[CLS\] \[SEP\] \[MASK\]"),
        ({"vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nlung\nlung\n"}, "'lung' stands on two lines"),
        ({"vocab.txt": b"[PAD]\n\xff\xfe\n"}, "not UTF-8 at byte 6"),
        ({"tokenizer.json": b"{"}, "not a tokenizer"),
        ({"tokenizer_config.json": b"[]"}, "transformers cannot read it"),
    ],
)
def test_broken_folders_are_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_path_and_unknown_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "words.csv").write_text("lung")
    with pytest.raises(ConfigError, match=r"not a vocab\.txt"):
        load_tokenizer(tmp_path / "words.csv")


@pytest.mark.parametrize(
    ("folder", "size", "first", "whole_word"),
    [
        ("bert_base_uncased", 30522, "[CLS]", None),
        ("pubmedbert_medkebert", 28895, "[CLS]", "pneumothorax"),
        ("barthez_fr", 50002, "<s>", "▁droit"),
    ],
)
def test_published_vocabularies(shared_data: Path, folder: str, size: int, first: str, whole_word: str | None) -> None:
    tokenizer = load_tokenizer(shared_data / "vocab" / folder)
    assert tokenizer.vocab_size == size
    ids, _ = tokenizer.encode(["pneumothorax droit", "a " * 100], 16)
    assert ids.shape == (2, 16) and ids[1, -1] == tokenizer.sep_id
    tokens = tokenizer.tokens(ids[0].tolist())
    assert tokens[0] == first
    assert whole_word is None or whole_word in tokens


def test_cased_vocabulary_is_recognised(trained: Tokenizer, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Lung", "lung"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    assert load_tokenizer(tmp_path).encode(["Lung lung"], 8)[0].tolist() == [[2, 5, 6, 3]]


def test_report_text_joins_sections_in_order_and_passes_over_missing_ones() -> None:
    study = record(impression="No  change.\n", findings=" Clear\tlungs. ", history="cough")
    assert report_text(study, ["findings", "impression"]) == "Clear lungs. No change."
    assert report_text(study, ["impression", "findings"]) == "No change. Clear lungs."
    assert report_text(study, ["comparison", "findings"]) == "Clear lungs."


@pytest.mark.parametrize("report", [{}, {"findings": "  \n"}, {"findings": " . - "}, {"history": "cough"}])
def test_report_without_a_word_is_an_error_that_shows_no_text(report: dict[str, str]) -> None:
    with pytest.raises(EmptyReportError, match="no text in sections findings, impression") as caught:
        report_text(record(**report), ["findings", "impression"])
    assert "cough" not in str(caught.value)
