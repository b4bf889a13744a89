"""Recipes build, round-trip through JSON, and refuse what they cannot run with the way out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import chest, schema
from configs.schema import TrainConfig, apply_overrides, from_json, load_recipe, recipes, to_json, to_text
from core.settings import flatten
from core.tasks.clip import CLIP
from core.tasks.siglip import SigLIP
from shards.errors import ConfigError
from shards.loader import MixtureSet


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_round_trips(name: str) -> None:
    config = load_recipe(name)
    assert config.recipe == name
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert schema.read(schema.dumps(config), "config.json") == config
    assert recipes()[name]


def test_recipes_asked_for_are_there() -> None:
    assert {"chest:clip_b16", "chest:siglip_b16", "chest:clip_tiny", "chest:siglip_tiny", "tiny:clip"} <= set(recipes())
    assert isinstance(chest.clip_b16().task, CLIP.Config)
    assert isinstance(chest.siglip_b16().task, SigLIP.Config)
    assert chest.clip_b16().global_batch_size == 768


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optim.learning_rate=2e-3", "optim.learning_rate", 2e-3),
        ("optim.betas=[0.8, 0.95]", "optim.betas", (0.8, 0.95)),
        ("trainer.save_every=none", "trainer.save_every", None),
        ("trainer.save_every=7", "trainer.save_every", 7),
        ("engine.activation_checkpointing=true", "engine.activation_checkpointing", True),
        ("engine.zero_stage=3", "engine.zero_stage", 3),
        ("data.train=s3://bucket/manifest.json", "data.train", "s3://bucket/manifest.json"),
        ("data.train=2024", "data.train", "2024"),
        ("data.sections=[\"findings\"]", "data.sections", ("findings",)),
        ("task.vision.depth=6", "task.vision.depth", 6),
        ("engine.deepspeed.zero_optimization.overlap_comm=false", "engine.deepspeed",
         {"zero_optimization": {"overlap_comm": False}}),
        ("optim.multipliers.logit_scale=0.5", "optim.multipliers", {"logit_scale": 0.5}),
    ],
)  # fmt: skip
def test_overrides_are_converted_to_the_type_of_the_field(override: str, path: str, value: object) -> None:
    config: object = apply_overrides(load_recipe("chest:clip_tiny"), [override])
    for part in path.split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


def test_mixture_by_override() -> None:
    text = '[{"manifest": "a.json", "quota": 80}, {"manifest": "b.json", "quota": 16, "split": "all"}]'
    config = apply_overrides(load_recipe("chest:clip_tiny"), [f"data.train={text}"])
    assert config.data.train == (
        MixtureSet(manifest="a.json", quota=80),
        MixtureSet(manifest="b.json", quota=16, split="all"),
    )
    with pytest.raises(ConfigError, match="add up to 90, global_batch_size is 96"):
        apply_overrides(config, ['data.train=[{"manifest": "a.json", "quota": 90}]'])
    with pytest.raises(ConfigError, match=r"a list of groups of manifest, quota, .* is needed \(raeds: unexpected"):
        apply_overrides(config, ['data.train=[{"manifest": "a.json", "quota": 96, "raeds": "labels"}]'])
    with pytest.raises(ConfigError, match=r"is needed \(reads: input should be 'everything', 'report' or 'labels'"):
        apply_overrides(config, ['data.train=[{"manifest": "a.json", "quota": 96, "reads": "label"}]'])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learnng_rate=1", "--set optim.learnng_rate: unknown; did you mean optim.learning_rate"),
        ("zero_stage=3", "did you mean engine.zero_stage"),
        ("optim=3", "is a group; set one of optim.learning_rate"),
        ("optim.learning_rate.x=3", "--set optim.learning_rate.x: unknown"),
        ("optim.learning_rate", "write key=value"),
        ("optim.learning_rate=fast", "a number is needed"),
        ("optim.learning_rate=-1", "must be above 0"),
        ("engine.zero_stage=7", "one of 0, 1, 2, 3 is needed"),
        ("engine.precision=fp8", "one of fp32, bf16, bf16_master is needed"),
        ("trainer.steps=1.5", "a whole number is needed"),
        ("trainer.steps=0", "trainer.steps=0 must be at least 1"),
        ("global_batch_size=100", "is not divisible by data.lanes=48; use 96 or 144, or set data.lanes=50"),
        ("global_batch_size=10", "is not divisible by data.lanes=48; use 48, or set data.lanes=10"),
        ("data.decode.image_size=128", "task.vision.image_size=64 but data.decode.image_size=128"),
        ("data.text_length=500", "is more than task.text.max_length=128"),
        ("optim.warmup_steps=5000", "is more than trainer.steps=1000"),
        ("engine.deepspeed.zero_optimization.stage=3", "may not set zero_optimization.stage"),
        ("engine.deepspeed.gradient_accumulation_steps=2", "accumulation would shrink the negatives"),
        ("task.kind=../../etc", "unknown"),
    ],
)
def test_refusals_name_key_value_and_way_out(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides(load_recipe("chest:clip_tiny"), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean chest:clip_b16"):
        load_recipe("chest:clip_b61")
    with pytest.raises(ConfigError, match="unknown"):
        load_recipe("os:system")


@pytest.mark.parametrize("kind", ["os", "../clip", "clip.CLIP", "__init__", "", "core.tasks.clip"])
def test_only_modules_of_tasks_are_imported(kind: str) -> None:
    tree = to_json(load_recipe("chest:clip_tiny"))
    tree["task"]["kind"] = kind
    with pytest.raises(ConfigError, match=r"task\.kind"):
        from_json(tree)


def test_json_of_another_version_is_refused() -> None:
    tree = to_json(load_recipe("chest:clip_tiny"))
    with pytest.raises(ConfigError, match=r"optim\.learning_rates: unknown; did you mean learning_rate"):
        from_json({**tree, "optim": {**tree["optim"], "learning_rates": 1}})
    with pytest.raises(ConfigError, match=r"optim\.learning_rate='x'"):
        from_json({**tree, "optim": {**tree["optim"], "learning_rate": "x"}})
    with pytest.raises(ConfigError, match="not JSON"):
        schema.read("{", "run/config.json")


def test_identity_leaves_out_how_a_run_is_fed_and_watched() -> None:
    base = load_recipe("chest:clip_tiny")
    neutral = ["trainer.log_every=3", "data.prefetch_batches=5", "checkpoint.keep_last=9", "engine.micro_batch=8",
               "data.train=elsewhere.json", "data.store.connections=3"]  # fmt: skip
    assert apply_overrides(base, neutral).identity() == base.identity()
    for decisive in ("seed=1", "optim.learning_rate=1e-4", "engine.zero_stage=1", "data.lanes=24", "task.embed_dim=64"):
        assert apply_overrides(base, [decisive]).identity() != base.identity(), decisive


def test_text_shows_everything_and_marks_changes() -> None:
    base = load_recipe("chest:clip_tiny")
    text = to_text(apply_overrides(base, ["optim.learning_rate=0.25"]), base=base)
    lines = text.splitlines()
    assert "*   learning_rate: 0.25" in lines
    assert sum(line.startswith("*") for line in lines) == 1
    leaves = [line for line in lines if not line.rstrip().endswith(":")]
    assert len(leaves) == len(flatten(to_json(base)))


@given(
    st.builds(
        lambda rate, steps, stage, batch: (rate, steps, stage, batch),
        st.floats(1e-8, 1.0), st.integers(60, 10**6), st.sampled_from([0, 1, 2, 3]), st.integers(1, 50),
    )
)  # fmt: skip
def test_any_valid_configuration_round_trips(values: tuple[float, int, int, int]) -> None:
    rate, steps, stage, lanes = values
    base = load_recipe("chest:clip_tiny")
    config: TrainConfig = replace(
        base,
        global_batch_size=48 * lanes,
        optim=replace(base.optim, learning_rate=rate),
        trainer=replace(base.trainer, steps=steps),
        engine=replace(base.engine, zero_stage=stage),  # type: ignore[arg-type]
    )
    assert schema.read(schema.dumps(config), "x") == config


@pytest.mark.parametrize(
    ("recipe", "protocols", "said"),
    [
        (
            "ct:clip_tiny",
            '["anatomy"]',
            "names anatomy, which task VolumeCLIP cannot be asked while it trains; use ret",
        ),
        ("chest:clip_tiny", '["supervised"]', "names supervised, which task CLIP cannot be asked"),
        ("ct:fvlm_tiny", '["anatomy", "supervised"]', "use anatomy, retrieval, uncertainty, zero_shot"),
        (
            "ct:supervised_tiny",
            '["retrieval"]',
            "Supervised cannot be asked while it trains; use supervised",
        ),
    ],
)
def test_protocols_that_would_fail_after_the_first_steps_are_refused(recipe: str, protocols: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        schema.apply_overrides(schema.load_recipe(recipe), [f"evaluation.protocols={protocols}"])
