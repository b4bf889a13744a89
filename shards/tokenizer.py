"""Report -> `input_ids`, `attention_mask`.

A tokenizer is trained on the corpus (`train_wordpiece`), or read from a `vocab.txt`, a folder of ours or a Hugging
Face folder (`load_tokenizer`). Whatever it came from, it becomes one Rust tokenizer and two files on disk.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from shards.batch import StudyRecord
from shards.errors import ConfigError, EmptyReportError

if TYPE_CHECKING:  # training a vocabulary needs no torch, which takes seconds to import
    from torch import Tensor

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
FORMAT = "roentgen-tokenizer"
SMALLEST_VOCABULARY = 64
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Roles under the names that transformers uses in tokenizer_config.json, so that it can read our folders too.
ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
# What the common vocabularies call them, for folders that do not say.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}


@dataclass(frozen=True, kw_only=True)
class PartTokens:
    """Rows of texts in parts. `words` [B, L] int64 numbers the words of a row from 0, -1 for special tokens, padding.

    `input_ids`, `attention_mask` as of `Tokenizer.encode`; `section_ids` [B, L] int64, 0 where `words` is -1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    section_ids: np.ndarray
    words: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The n tokens of one text alone. `words` numbers its words from 0; `start`, `end`: characters [start, end)."""

    ids: np.ndarray
    words: np.ndarray
    start: np.ndarray
    end: np.ndarray


class Tokenizer:
    """Texts to ids. Holds no state between calls, so several threads may share it; encoding releases the GIL.

    `pad_id` fills up short rows; `unk_id`, `cls_id`, `sep_id`, `mask_id` are None where the vocabulary has no such
    token. `prefix` and `suffix` are the ids put around every text ([CLS] and [SEP] for BERT, <s> and </s> for BARThez).
    """

    def __init__(self, backend: tokenizers.Tokenizer, roles: Mapping[str, str | None]) -> None:
        """`roles`: token text of each of ROLES. Raises ConfigError without a padding token, or one not in the vocab."""
        backend.no_truncation()
        backend.no_padding()
        # A report that happens to hold the characters "[SEP]" must not close its own sentence.
        backend.encode_special_tokens = True
        self._backend = backend
        self._roles = {role: roles.get(role) for role in ROLES}
        ids = {role: None if token is None else backend.token_to_id(token) for role, token in self._roles.items()}
        for role, token in self._roles.items():
            if token is not None and ids[role] is None:
                raise ConfigError(f"tokenizer: {role} {token!r} is not in its vocabulary; correct {CONFIG_FILE}")
        if ids["pad_token"] is None:
            raise ConfigError(f'tokenizer has no padding token; name one as "pad_token" in its {CONFIG_FILE}')
        self.pad_id: int = ids["pad_token"]
        self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[role] for role in ROLES[1:])
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        # What the post-processor puts around a text, found by asking it; "a" is a token, or [UNK], in any vocabulary.
        bare = backend.encode("a", add_special_tokens=False).ids
        full = backend.encode("a").ids
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        if not starts:
            raise ConfigError("tokenizer changes a text's own tokens when it adds special ones; such are not supported")
        self.prefix: tuple[int, ...] = tuple(full[: starts[0]])
        self.suffix: tuple[int, ...] = tuple(full[starts[0] + len(bare) :])

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text; the unknown token is not among them, since it does stand for some."""
        named = {self.pad_id, self.cls_id, self.sep_id, self.mask_id, *self.prefix, *self.suffix} - {None, self.unk_id}
        return frozenset(int(token) for token in named if token is not None)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """`input_ids [B, L]` int64 padded with `pad_id`, `attention_mask [B, L]` bool; L = longest row <= `max_length`.

        A text that is too long loses its end, never the closing special token. Raises ConfigError where `max_length`
        leaves no room for a token of the text.
        """
        import torch

        room = self._room(max_length)
        # Special tokens are placed here and not by the backend, whose truncation length is state shared by all threads.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [[*self.prefix, *encoding.ids[:room], *self.suffix] for encoding in encodings]
        ids, mask = _padded(rows, self.pad_id)
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def pieces(self, texts: Sequence[str]) -> list[Pieces]:
        """Each text's own tokens, none cut, with the characters that they stand for; int64 [n] each."""
        found = self._backend.encode_batch(list(texts), add_special_tokens=False)
        result = []
        for one in found:
            spans = np.asarray(one.offsets, dtype=np.int64).reshape(-1, 2)
            result.append(
                Pieces(
                    ids=np.asarray(one.ids, dtype=np.int64),
                    words=np.asarray([word or 0 for word in one.word_ids], dtype=np.int64),
                    start=spans[:, 0],
                    end=spans[:, 1],
                )
            )
        return result

    def encode_parts(self, rows: Sequence[Sequence[tuple[int, str]]], max_length: int) -> PartTokens:
        """Texts in parts, each with its section's number above 0 and a [SEP] between neighbours.

        A row that is too long loses the ends of its parts, those of the lowest section first and of equal length among
        them. Raises ConfigError where `max_length` leaves no room, or parts need a separator the vocabulary lacks.
        """
        import torch

        room = self._room(max_length)
        separator = self.sep_id
        if separator is None:
            raise ConfigError("text in parts needs a tokenizer with a separator token; this one names none")
        # Definitions and questions stand in many rows: each text is encoded once. (The fast call tells no words.)
        texts = list(dict.fromkeys(text for parts in rows for _, text in parts))
        found = self._backend.encode_batch(texts, add_special_tokens=False)
        encodings = {text: (one.ids, one.word_ids) for text, one in zip(texts, found, strict=True)}
        tokens: list[list[int]] = []
        sections: list[int] = []  # of the tokens of all rows that belong to one
        words: list[list[int]] = []
        for parts in rows:
            lengths = _shortened(
                [len(encodings[text][0]) for _, text in parts],
                [section for section, _ in parts],
                room - max(0, len(parts) - 1),
            )
            row, row_words, first_word = list(self.prefix), [-1] * len(self.prefix), 0
            for (section, text), length in zip(parts, lengths, strict=True):
                if not length:
                    continue
                ids, word_ids = encodings[text]
                if first_word:
                    row.append(separator)
                    row_words.append(-1)
                row += ids[:length]
                sections += [section] * length
                row_words += [first_word + (word or 0) for word in word_ids[:length]]
                first_word = row_words[-1] + 1
            tokens.append([*row, *self.suffix])
            words.append(row_words + [-1] * len(self.suffix))
        input_ids, mask = _padded(tokens, self.pad_id)
        numbers, _ = _padded(words, -1)
        section_ids = np.zeros_like(numbers)
        section_ids[numbers >= 0] = sections
        return PartTokens(
            input_ids=torch.from_numpy(input_ids), attention_mask=torch.from_numpy(mask), section_ids=section_ids,
            words=numbers,
        )  # fmt: skip

    def _room(self, max_length: int) -> int:
        """Tokens left for the text. Raises ConfigError when there are none."""
        room = max_length - len(self.prefix) - len(self.suffix)
        if room < 1:
            raise ConfigError(
                f"text length {max_length} leaves no room beside {len(self.prefix) + len(self.suffix)} special tokens; "
                f"use at least {max_length - room + 1}"
            )
        return room

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's spelling of each id."""
        return [self._backend.id_to_token(int(token)) or "" for token in ids]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids as far as the vocabulary holds it, without special tokens."""
        return list(self._backend.decode_batch([list(row) for row in rows], skip_special_tokens=True))

    def to_files(self) -> dict[str, bytes]:
        """The two files of a tokenizer folder; equal tokenizers give equal bytes."""
        config = {"format": FORMAT, "tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {role: token for role, token in self._roles.items() if token is not None}
        return {
            TOKENIZER_FILE: self._backend.to_str(pretty=False).encode() + b"\n",
            CONFIG_FILE: json.dumps(config, indent=1, ensure_ascii=False).encode() + b"\n",
        }

    @property
    def sha256(self) -> str:
        """Hash over both files, the identity that manifests and checkpoints record."""
        digest = hashlib.sha256()
        for name, data in sorted(self.to_files().items()):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write both files into a local folder, made if missing; the same tokenizer writes the same bytes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.to_files().items():
            (folder / name).write_bytes(data)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], name: str = "tokenizer") -> Tokenizer:
        """From the contents of the two files, which may have come from a store. Raises ConfigError naming `name`."""
        missing = sorted({TOKENIZER_FILE, CONFIG_FILE} - set(files))
        if missing:
            raise ConfigError(f"{name}: no {' and no '.join(missing)}; give a folder made by this program")
        config = _json_object(files[CONFIG_FILE], f"{name}/{CONFIG_FILE}")
        backend = _backend_from_json(files[TOKENIZER_FILE], f"{name}/{TOKENIZER_FILE}")
        return cls(backend, {role: _token_text(config.get(role)) for role in ROLES})


def load_tokenizer(path: str | Path, sha256: str | None = None) -> Tokenizer:
    """From a local `vocab.txt`, a folder holding one, a folder written by `Tokenizer.save`, or a Hugging Face folder.

    Nothing is downloaded and no code from the folder runs. `sha256`: refuse a tokenizer other than this one.
    Raises ConfigError naming the path when it is missing, holds no tokenizer, is broken, or has another hash.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"tokenizer {path}: no such file or folder; give a vocab.txt or a tokenizer folder")
    if path.is_file():
        if path.name == TOKENIZER_FILE:
            tokenizer = _load_folder(path.parent)
        elif path.suffix == ".txt":
            tokenizer = _from_vocab(path)
        else:
            raise ConfigError(f"tokenizer {path}: not a vocab.txt or {TOKENIZER_FILE}; give one, or its folder")
    else:
        tokenizer = _load_folder(path)
    if sha256 is not None and tokenizer.sha256 != sha256:
        raise ConfigError(
            f"tokenizer {path}: sha256 {tokenizer.sha256[:12]} where {sha256[:12]} is recorded; "
            f"ids would mean other words, so give the tokenizer that the data and weights were made with"
        )
    return tokenizer


def train_wordpiece(
    texts: Iterable[str],
    vocab_size: int,
    path: str | Path | None = None,
    *,
    lowercase: bool = True,
    min_frequency: int = 2,
) -> Tokenizer:
    """A BERT-like WordPiece vocabulary of at most `vocab_size` from the corpus; saved to folder `path` if given.

    The same corpus gives the same bytes on any number of threads. (The library's trainer alone does not: it numbers
    continuation characters in the order of a randomly seeded hash map, and breaks ties of merges by those numbers. So
    they are numbered here first.) Holds the normalised corpus in memory. Raises ConfigError for a corpus without text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"vocab_size={vocab_size} is too small to spell words; use at least {SMALLEST_VOCABULARY}")
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    corpus = [normalizer.normalize_str(text) for text in texts]
    counts: Counter[str] = Counter()
    for text in corpus:
        counts.update(text)
    for character in [c for c in counts if c.isspace()]:
        del counts[character]
    if not counts:
        raise ConfigError(
            "no text to train a tokenizer on; name the sections that the reports have with data.sections, or, for data "
            "without reports, a vocabulary or the tokenizer folder of another run with data.tokenizer"
        )
    # Characters beyond a quarter of the vocabulary are rarities (symbols, foreign scripts) and become unknown.
    room = (vocab_size - len(SPECIAL_TOKENS)) // 4
    kept = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:room])
    # Punctuation always stands alone after pre-tokenisation, so it needs no form inside a word.
    alphabet = [*kept, *(f"##{c}" for c in kept if not _is_punctuation(c))]
    rare = dict.fromkeys((ord(c) for c in counts if c not in set(kept)), " ")
    scratch = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS[1]))
    scratch.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *alphabet],
        show_progress=False,
    )
    scratch.train_from_iterator((text.translate(rare) if rare else text for text in corpus), trainer)
    tokenizer = _bert_tokenizer(scratch.get_vocab(), lowercase=lowercase)
    if path is not None:
        tokenizer.save(path)
    return tokenizer


def report_text(record: StudyRecord, sections: Sequence[str]) -> str:
    """The named sections in this order with white space made single; a section the record lacks is passed over.

    Raises EmptyReportError when nothing with a letter or digit is left: such a study becomes a void slot.
    """
    text = " ".join(" ".join(record.report.get(section, "").split()) for section in sections).strip()
    if not any(character.isalnum() for character in text):
        present = ", ".join(sorted(record.report)) or "none"
        raise EmptyReportError(f"no text in sections {', '.join(sections)} (sections present: {present})")
    return " ".join(text.split())


def _padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [B, L], short rows filled up with `fill`, and bool [B, L], False there; L is the longest row."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mask = np.arange(int(lengths.max(initial=0))) < lengths[:, None]  # [B, L]
    values = np.full(mask.shape, fill, dtype=np.int64)
    values[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if rows else 0
    return values, mask


def _shortened(lengths: Sequence[int], sections: Sequence[int], room: int) -> list[int]:
    """Lengths that add up to at most `room`: sections lose in ascending order, the longest parts of one first."""
    result = list(lengths)
    for section in sorted(set(sections)):
        members = [place for place, of in enumerate(sections) if of == section]
        own = [result[place] for place in members]
        budget = max(0, room - sum(result) + sum(own))
        cap = max(own)
        while sum(min(length, cap) for length in own) > budget:
            cap -= 1
        spare = budget - sum(min(length, cap) for length in own)
        for place in members:
            extra = int(result[place] > cap and spare > 0)
            result[place], spare = min(result[place], cap + extra), spare - extra
    return result


def _load_folder(folder: Path) -> Tokenizer:
    names = {file.name for file in folder.iterdir() if file.is_file()}
    if TOKENIZER_FILE in names:  # the complete Rust definition, ours or Hugging Face's
        return _from_tokenizer_json(folder)
    if CONFIG_FILE not in names and "vocab.txt" in names:
        return _from_vocab(folder / "vocab.txt")
    if names & {CONFIG_FILE, "config.json"}:
        return _from_hugging_face(folder)
    raise ConfigError(
        f"tokenizer folder {folder}: neither {TOKENIZER_FILE}, {CONFIG_FILE}, config.json nor vocab.txt in it; "
        f"give a vocab.txt, a folder made by this program, or a Hugging Face tokenizer folder"
    )


def _from_tokenizer_json(folder: Path) -> Tokenizer:
    backend = _backend_from_json((folder / TOKENIZER_FILE).read_bytes(), str(folder / TOKENIZER_FILE))
    roles: dict[str, str | None] = {}
    for role, names in USUAL_NAMES.items():
        roles[role] = next((name for name in names if backend.token_to_id(name) is not None), None)
    for file in (folder / "special_tokens_map.json", folder / CONFIG_FILE):
        if file.is_file():
            said = _json_object(file.read_bytes(), str(file))
            roles |= {role: _token_text(said[role]) for role in ROLES if said.get(role) is not None}
    return Tokenizer(backend, roles)


def _from_vocab(file: Path) -> Tokenizer:
    """BERT's `vocab.txt`: one token a line, id = line number. Cased if any token holds an upper-case letter."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"tokenizer {file}: not UTF-8 at byte {error.start}") from None
    tokens = [line.rstrip("\r") for line in (lines[:-1] if lines and not lines[-1] else lines)]
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise ConfigError(f"tokenizer {file}: not a BERT vocabulary, it lacks {' '.join(missing)}")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise ConfigError(f"tokenizer {file}: token {twice!r} stands on two lines")
    bracketed = {token for token in tokens if token.startswith("[") and token.endswith("]")}
    lowercase = not any(token != token.lower() for token in vocabulary if token not in bracketed)
    return _bert_tokenizer(vocabulary, lowercase=lowercase)


def _from_hugging_face(folder: Path) -> Tokenizer:
    """Folders without tokenizer.json (SentencePiece models, vocab.json with merges.txt), converted by transformers."""
    from transformers import AutoTokenizer  # takes seconds to import, and only such folders need it

    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers and the formats below it raise for a broken folder
        raise ConfigError(f"tokenizer folder {folder}: transformers cannot read it ({_first_line(error)})") from None
    if not getattr(loaded, "is_fast", False):
        raise ConfigError(
            f"tokenizer folder {folder}: only a slow Python tokenizer; convert it to a {TOKENIZER_FILE} first"
        )
    roles = {role: _token_text(getattr(loaded, role, None)) for role in ROLES}
    return Tokenizer(_backend_from_json(loaded.backend_tokenizer.to_str().encode(), str(folder)), roles)


def _backend_from_json(data: bytes, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the Rust library raises bare Exception
        raise ConfigError(f"{name}: not a tokenizer ({_first_line(error)})") from None


def _bert_tokenizer(vocabulary: dict[str, int], *, lowercase: bool) -> Tokenizer:
    unknown, opening, closing = SPECIAL_TOKENS[1:4]
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A {closing}",
        pair=f"{opening} $A {closing} $B:1 {closing}:1",
        special_tokens=[(opening, vocabulary[opening]), (closing, vocabulary[closing])],
    )
    return Tokenizer(backend, dict(zip(ROLES, SPECIAL_TOKENS, strict=True)))


def _is_punctuation(character: str) -> bool:
    """As BERT's pre-tokeniser sees it: every ASCII symbol, and Unicode's punctuation."""
    return unicodedata.category(character).startswith("P") or (character.isascii() and not character.isalnum())


def _token_text(token: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return None if token is None else str(token)


def _json_object(data: bytes, name: str) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{name}: not JSON ({_first_line(error)})") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{name}: not a JSON object; is this a tokenizer folder?")
    return body


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
