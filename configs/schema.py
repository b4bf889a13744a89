"""TrainConfig: the parts of a run joined, checked together, changed by `--set`, printed, written as JSON and read back.

Each part owns its own Config and its own range checks; this module owns the only parser of overrides.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import pkgutil
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol, Union

import pydantic

import core.tasks
from core.alerts import AlertsConfig
from core.checkpoint import CheckpointConfig
from core.credentials import HIDDEN
from core.engine import EngineConfig
from core.evaluation.embed import protocols_in_training
from core.evaluation.zero_shot import check_temperature
from core.first_weights import InitConfig
from core.models.volume import VolumeEncoder
from core.optim import OptimConfig
from core.settings import flatten
from core.tasks import Task
from core.trainer import TrainerConfig
from shards.errors import ConfigError
from shards.loader import Loader

# What may differ between a checkpoint and the run that goes on from it: how a run is watched, kept and fed, not what it
# learns. The data themselves are compared by content (the manifest's and tokenizer's hashes), not by place.
NEUTRAL = (
    "recipe",
    "init",
    "checkpoint",
    "evaluation",
    "alerts",
    "trainer.profile_steps",
    "trainer.log_every",
    "trainer.evaluate_every",
    "trainer.save_every",
    "trainer.picture_every",
    "trainer.validation_batches",
    "trainer.best_metric",
    "trainer.best_is",
    "trainer.hang_after_s",
    "engine.micro_batch",
    "engine.exchange",
    "engine.attention",
    "engine.kernel",
    "engine.activation_checkpointing",
    "data.train",
    "data.validation",
    "data.validation_split",
    "data.tokenizer",
    "data.buffer_bytes",
    "data.fetch_threads",
    "data.prefetch_batches",
    "data.cache_dir",
    "data.cache_bytes",
    "data.max_skip_rate",
    "data.decode.threads",
    "data.decode.device_id",
    "data.volume.threads",
    "data.volume.device_id",
    "data.store",
)


class TaskConfig(Protocol):
    """The nested `Config` of a module under core/tasks."""

    def build(self, *, vocab_size: int | None = None, seed: int = 0) -> Task: ...


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated every `trainer.evaluate_every` steps beside the validation loss.

    `protocols`: `uncertainty` costs no more encoding than the other two, and corrupts nothing (evaluate.py does).
    `prompts`: label -> {"positive": sentences, "negative": sentences}, for zero-shot classification; other labels get
    those of configs/prompts.py. `prompt_temperature`: `zero_shot` pools the similarities to a label's prompts by a
    softmax of this temperature, None: by their mean. `anatomy_of`: label -> anatomy in whose embedding the `anatomy`
    protocol looks for it. `paraphrases`: other wordings of the prompts, for how far its figures hang on the words.
    `around_anatomies`: evaluate.py crops volumes so that it sees every anatomy whole, not at their centre.
    """

    protocols: tuple[Literal["zero_shot", "retrieval", "uncertainty", "anatomy", "supervised"], ...] = (
        "zero_shot",
        "retrieval",
    )
    prompts: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    prompt_temperature: float | None = None
    anatomy_of: dict[str, str] = field(default_factory=dict)
    paraphrases: tuple[dict[str, dict[str, tuple[str, ...]]], ...] = ()
    around_anatomies: bool = True

    def __post_init__(self) -> None:
        check_temperature(self.prompt_temperature)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. `recipe` is the name it was asked for by; `global_batch_size` counts studies over all ranks."""

    recipe: str = ""
    seed: int = 0
    global_batch_size: int = 768
    tokenizer_words: int = 8192  # of the WordPiece trained when neither recipe nor data name a tokenizer
    task: Any  # Config of a module under core/tasks; `kind` in JSON names the module
    data: Loader.Config = field(default_factory=Loader.Config)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)

    def __post_init__(self) -> None:
        lanes = self.data.lanes
        if self.global_batch_size < 1:
            raise ConfigError(f"global_batch_size={self.global_batch_size} must be at least 1")
        if self.global_batch_size % lanes:
            below = self.global_batch_size // lanes * lanes
            fits = f"{below} or {below + lanes}" if below else f"{lanes}"
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is not divisible by data.lanes={lanes}; use {fits}, or "
                f"set data.lanes={_nearest_divisor(self.global_batch_size, lanes)}"
            )
        if self.optim.warmup_steps > self.trainer.steps:
            raise ConfigError(
                f"optim.warmup_steps={self.optim.warmup_steps} is more than trainer.steps={self.trainer.steps}"
            )
        quotas = [part.quota for part in self.data.train if not isinstance(part, str)]
        if quotas and sum(quotas) != self.global_batch_size:
            raise ConfigError(
                f"the quotas of data.train add up to {sum(quotas)}, global_batch_size is {self.global_batch_size}"
            )
        task_image, data_image = _image_size(self.task), self.data.decode.image_size
        if task_image is not None and task_image != data_image:
            twice = " and images come at twice that" if task_image != self.task.vision.image_size else ""
            raise ConfigError(
                f"task.vision.image_size={self.task.vision.image_size}{twice} but data.decode.image_size={data_image}; "
                + (f"set the latter to {task_image}" if twice else "set both to one value")
            )
        if isinstance(getattr(self.task, "vision", None), VolumeEncoder.Config):
            self._check_volumes()
        if "patch_mask" in task_class(self.task).fields:
            # Of an image that the task makes smaller a patch is as much larger.
            scale = (task_image or data_image) // self.task.vision.image_size
            masked, encoded = self.data.masking.patch_size, self.task.vision.patch_size * scale
            if masked != encoded:
                raise ConfigError(
                    f"data.masking.patch_size={masked} but task.vision.patch_size={encoded // scale}"
                    + (
                        f" of an image half as large; set the former to {encoded}"
                        if scale > 1
                        else "; set both to one value"
                    )
                )
        if "text_is_report" in task_class(self.task).fields:
            self._check_classes()
        ours, theirs = getattr(self.task, "compat", None), self.data.entity_masking.compat
        if ours is not None and ours != theirs:
            raise ConfigError(f"task.compat={ours} but data.entity_masking.compat={theirs}; set both to one value")
        self._check_protocols()
        text = getattr(self.task, "text", None)
        if text is not None and self.data.text_length > text.max_length:
            raise ConfigError(
                f"data.text_length={self.data.text_length} is more than task.text.max_length={text.max_length}; "
                f"set data.text_length={text.max_length}"
            )

    def _check_protocols(self) -> None:
        """Raises ConfigError for a protocol that cannot be asked while the task trains; its steps would be lost."""
        task = task_class(self.task)
        answered = protocols_in_training(task)
        for protocol in self.evaluation.protocols:
            if protocol not in answered:
                raise ConfigError(
                    f"evaluation.protocols names {protocol}, which task {task.__name__} cannot be asked while it "
                    f"trains; use {', '.join(sorted(answered)) or 'none: []'}"
                )

    def _check_classes(self) -> None:
        """Raises ConfigError where data and task do not speak of the same classes in the same way."""
        task, texts = self.task, self.data.label_text
        if texts is None:
            raise ConfigError("the task reads labels as texts, but data.label_text is not set; see configs/chest.py")
        if task.classes != texts.classes:
            apart = [
                name for name in (*task.classes, *texts.classes) if (name in task.classes) != (name in texts.classes)
            ]
            raise ConfigError(
                "task.classes and data.label_text.classes differ in "
                f"{', '.join(apart) or 'their order'}; set both to one list"
            )
        if (task.prompts == "hand") != bool(texts.sentences):
            raise ConfigError(
                f"task.prompts={task.prompts}, but data.label_text.sentences is {'not ' * bool(texts.sentences)}empty; "
                "sentences are for task.prompts=hand, and only for it"
            )

    def _check_volumes(self) -> None:
        """Raises ConfigError where the crops are not what the encoder of volumes takes."""
        vision, volume = self.task.vision, self.data.volume
        if volume is None:
            raise ConfigError("the task encodes volumes, but data.volume is not set; the recipes of configs/ct.py do")
        pairs = [
            ("vision.volume_size", vision.volume_size, "size", volume.size),
            ("vision.fine_size", vision.fine_size, "patch_size", volume.patch_size),
            ("vision.channels", vision.channels, "windows_hu", len(volume.windows_hu)),
        ]
        if hasattr(self.task, "anatomies"):
            pairs.append(("anatomies", self.task.anatomies, "anatomies", volume.anatomies))
        for ours, task_value, theirs, data_value in pairs:
            if task_value != data_value:
                raise ConfigError(
                    f"task.{ours}={task_value} but data.volume.{theirs} gives {data_value}; set both to one value"
                )

    def identity(self) -> dict[str, Any]:
        """What decides what is learned, as JSON: all but `NEUTRAL`."""
        tree = to_json(self)
        for dotted in NEUTRAL:
            node: Any = tree
            *path, last = dotted.split(".")
            for part in path:
                node = node[part]
            if node is not None:  # a part that this run has not
                del node[last]
        return tree


def _nearest_divisor(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - near), d))


def _image_size(task: Any) -> int | None:
    """Side of the images that the task takes, pixels."""
    vision = getattr(task, "vision", None)
    return getattr(task, "pixels", None) or getattr(vision, "image_size", None)


# ---- recipes by name ----


@cache
def recipes() -> dict[str, str]:
    """Every recipe `module:function` under configs/, with the first line of its docstring."""
    import configs

    found = {}
    for module_info in pkgutil.iter_modules(configs.__path__):
        if module_info.name == "schema":
            continue
        module = importlib.import_module(f"configs.{module_info.name}")
        for name, value in vars(module).items():
            if not isinstance(value, types.FunctionType) or value.__module__ != module.__name__ or name[0] == "_":
                continue
            if not inspect.signature(value).parameters and typing.get_type_hints(value).get("return") is TrainConfig:
                found[f"{module_info.name}:{name}"] = (value.__doc__ or "").strip().split("\n")[0]
    return found


def load_recipe(name: str) -> TrainConfig:
    """`chest:clip_b16` -> the configuration that configs/chest.py's `clip_b16()` returns."""
    if name not in recipes():
        raise ConfigError(f"--recipe {name}: unknown{_nearest(name, list(recipes()))}")
    module, _, function = name.partition(":")
    config: TrainConfig = getattr(importlib.import_module(f"configs.{module}"), function)()
    return dataclasses.replace(config, recipe=name)


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    if not close:  # `zero_stage` for `engine.zero_stage`
        close = [name for name in known if name.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:3]
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(sorted(known)[:12])}"


# ---- overrides ----


def apply_overrides(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """The configuration with every `a.b.c=value` applied, checked once after all of them.

    Values are read as JSON where that works (`true`, `1e-3`, `[0.9, 0.98]`), as text otherwise, then converted to the
    type of the field. Below a dictionary (`engine.deepspeed.x.y=1`) new keys may be made.

    Raises:
        ConfigError: unknown key, with the nearest known ones; value of the wrong type or out of range.
    """
    tree = to_json(config)
    known = list(flatten(tree))
    types_of: dict[str, Any] = _types(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set {override}: write key=value")
        _set(tree, key, text, types_of, known)
    return from_json(tree)


def _types(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field that is not itself a configuration."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(type(config))
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found.update(_types(value, f"{prefix}{part.name}."))
        else:
            found[f"{prefix}{part.name}"] = hints[part.name]
    return found


def _set(tree: dict[str, Any], key: str, text: str, types_of: Mapping[str, Any], known: Sequence[str]) -> None:
    parts = key.split(".")
    # The longest beginning that is a field; the rest, if any, are keys of a dictionary.
    field_name = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in types_of), None)
    if field_name is None or (field_name != key and not _is_dictionary(types_of[field_name])):
        groups = [name for name in known if name.startswith(f"{key}.")]
        if groups:
            raise ConfigError(f"--set {key}: is a group; set one of {', '.join(groups[:6])}")
        raise ConfigError(f"--set {key}: unknown{_nearest(key, [name for name in types_of if name != 'task.kind'])}")
    try:
        value = json.loads(text)
    except ValueError:
        value = {"none": None, "None": None, "True": True, "False": False}.get(text, text)
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {part} holds a value, not a group")
    if field_name == key:
        value = _convert(value, text, types_of[key], key)
    node[parts[-1]] = value


def _is_dictionary(hint: Any) -> bool:
    return typing.get_origin(hint) in (dict, Mapping)


def _convert(value: Any, text: str, hint: Any, key: str) -> Any:
    """`value` as the field's type, as plain JSON again."""
    adapter = pydantic.TypeAdapter(hint)
    # What reads as a list or a group is meant as one: as text it would become a path that nobody has.
    for attempt in (value,) if isinstance(value, list | dict) else (value, text):
        try:
            return json.loads(adapter.dump_json(adapter.validate_python(attempt)))
        except pydantic.ValidationError as error:
            problem = error
    # Of the forms that a value may have, the one that went furthest is the one that was meant.
    found = max(problem.errors(), key=lambda one: len(one["loc"]))
    inside = f"{found['loc'][-1]}: " if len(found["loc"]) > 1 else ""
    raise ConfigError(f"--set {key}={text}: {_describe(hint)} is needed ({inside}{found['msg'].lower()})")


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _describe(part) for part in arguments)
    if origin is tuple:
        if dataclasses.is_dataclass(arguments[0]):
            return f"a list of groups of {', '.join(part.name for part in dataclasses.fields(arguments[0]))}"
        return "a list such as [1, 2]"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


# ---- JSON ----


def to_json(config: Any) -> dict[str, Any]:
    """Plain JSON values; the task carries its module's name as `kind`."""
    tree: dict[str, Any] = {}
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if part.name == "task" and isinstance(config, TrainConfig):
            tree[part.name] = task_to_json(value)
        else:
            tree[part.name] = _plain(value)
    return tree


def task_to_json(task: Any) -> dict[str, Any]:
    """The `Config` of a task as plain JSON values, with its module's name as `kind`."""
    return {"kind": _kind_of(task), **to_json(task)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _kind_of(task: Any) -> str:
    module = type(task).__module__
    if not module.startswith("core.tasks."):
        raise ConfigError(f"task {type(task).__qualname__} of {module}: tasks live in core/tasks")
    return module.removeprefix("core.tasks.")


def task_class(config: Any) -> type[Task]:
    """The task that a `Config` of core/tasks builds."""
    return _task_of_kind(_kind_of(config))


def _task_of_kind(kind: str) -> type[Task]:
    """The one Task in core/tasks/<kind>.py; nothing outside that folder is ever imported."""
    known = [module.name for module in pkgutil.iter_modules(core.tasks.__path__)]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", kind) or kind not in known:
        raise ConfigError(f"task.kind={kind!r}: unknown{_nearest(kind, known)}")
    module = importlib.import_module(f"core.tasks.{kind}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"core/tasks/{kind}.py must define exactly one Task, has {len(found)}"
    return found[0]


def from_json(tree: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `to_json` wrote. Unknown or missing keys and wrong types are ConfigErrors."""
    task = task_from_json(tree.get("task", {}))
    return typing.cast(TrainConfig, _build(TrainConfig, {**tree, "task": task}, ""))


def task_from_json(tree: Mapping[str, Any]) -> Any:
    """The `Config` of a task that `task_to_json` wrote; ConfigErrors as of `from_json`."""
    task = dict(tree)
    kind = task.pop("kind", None)
    if not isinstance(kind, str):
        raise ConfigError("task.kind is missing; it names a module of core/tasks, such as clip")
    return _build(_task_of_kind(kind).__dict__["Config"], task, "task")


def _build(kind: type, tree: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = {part.name for part in dataclasses.fields(kind)}
    dotted = f"{path}." if path else ""
    for name in tree:
        if name not in names:
            raise ConfigError(f"{dotted}{name}: unknown{_nearest(name, sorted(names))}")
    values = {name: _restore(value, hints[name], f"{dotted}{name}") for name, value in tree.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        # Parts name their own fields; say which part where that is not clear.
        raise ConfigError(str(error) if not path or path in str(error) else f"{path}: {error}") from None
    except TypeError as error:
        raise ConfigError(f"{path or 'configuration'}: {error}") from None


def _restore(value: Any, hint: Any, path: str) -> Any:
    if hint is Any or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r}: is a group of settings, not a value")
        return _build(hint, value, path)
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        message = error.errors()[0]["msg"].lower()
        raise ConfigError(f"{path}={value!r}: {_describe(hint)} is needed ({message})") from None


def shown(config: TrainConfig) -> dict[str, Any]:
    """`to_json` without secrets, for every eye."""
    tree = to_json(config)
    if tree["alerts"]["webhook_url"]:
        tree["alerts"]["webhook_url"] = HIDDEN
    return tree


def dumps(config: TrainConfig) -> str:
    """The text of a run's config.json, without secrets."""
    return json.dumps(shown(config), indent=1) + "\n"


def read(text: str, source: str) -> TrainConfig:
    """A run's config.json."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{source}: not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: not a configuration")
    return from_json(tree)


# ---- text ----


def to_text(config: TrainConfig, *, base: TrainConfig | None = None) -> str:
    """The whole run, one setting a line, groups indented; `*` marks what differs from `base`, the recipe itself."""
    changed = set()
    if base is not None:
        before, now = flatten(to_json(base)), flatten(to_json(config))
        changed = {name for name in now if before.get(name, ...) != now[name]}
    lines: list[str] = []

    def add(tree: Mapping[str, Any], prefix: str, depth: int) -> None:
        for name, value in tree.items():
            dotted = f"{prefix}{name}"
            if isinstance(value, Mapping) and value:
                lines.append(f"  {'  ' * depth}{name}:")
                add(value, f"{dotted}.", depth + 1)
            else:
                shown = value if isinstance(value, str) and value else json.dumps(value)
                lines.append(f"{'*' if dotted in changed else ' '} {'  ' * depth}{name}: {shown}")

    add(shown(config), "", 0)
    return "\n".join(lines)
