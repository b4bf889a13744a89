"""The picture of dependencies and the "(only X)" notes, checked on the imports themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LAYERS = ("launchers", "configs", "core", "kernels", "shards")

# launchers -> configs -> core -> kernels, and configs, core -> shards. `core` reads only these modules of shards: the
# words, the bytes, the errors and the keyed random numbers, none of which knows a format or an order.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "launchers": frozenset({"launchers", "configs", "core", "kernels", "shards"}),
    "configs": frozenset({"configs", "core", "kernels", "shards"}),
    "core": frozenset({"core", "kernels", "shards"}),
    "kernels": frozenset({"kernels"}),
    "shards": frozenset({"shards"}),
}
CORE_MAY_READ = frozenset({"shards.batch", "shards.store", "shards.errors", "shards.keyed"})

# One owner per heavy dependency: path, or folder with a closing slash, that alone may import it.
OWNERS: dict[str, tuple[str, ...]] = {
    "boto3": ("shards/bucket.py",),
    "botocore": ("shards/bucket.py",),
    "webdataset": (),
    "nvidia": ("shards/decode.py", "shards/decode_volume.py"),
    "transformers": ("core/models/text.py", "shards/tokenizer.py"),
    "tokenizers": ("shards/tokenizer.py",),
    "flash_attn": ("core/models/attention.py",),
    "deepspeed": ("core/engine.py",),
    "tensorboard": ("core/metrics.py",),
    "torch.utils.tensorboard": ("core/metrics.py",),
    "pydicom": ("shards/ingest/dicom_file.py",),
    "nibabel": ("shards/ingest/nifti.py",),
    "totalsegmentator": ("shards/ingest/segment.py",),
    "SimpleITK": (),
    "triton": ("kernels/",),
    "openai": ("shards/reports/llm.py",),
    "ray": ("launchers/submit.py", "launchers/ray_pretrain.py", "launchers/ray_group.py", "launchers/ray_data.py"),
    "streaming": (),
    "litdata": (),
    "open_clip": (),
    "moto": (),
    "nanio": (),
}

# Calls that would run what was read. `shell=True` and `weights_only=False` are looked for apart.
FORBIDDEN_CALLS = frozenset(
    {
        "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.load", "marshal.loads",
        "subprocess.getoutput", "subprocess.getstatusoutput", "joblib.load", "yaml.load", "pandas.read_pickle",
        "pd.read_pickle",
    }
)  # fmt: skip
FORBIDDEN_MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
# torch.load(weights_only=True) raises it for a file that wants more: catching it needs its name.
MAY_BE_CAUGHT = frozenset({"pickle", "pickle.UnpicklingError"})
ATTIC_NAMES = frozenset({"utils", "util", "common", "legacy", "helpers", "misc"})


def sources(*folders: str) -> list[Path]:
    """Python files of the given top folders, relative to the repository."""
    return sorted(path.relative_to(REPOSITORY) for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text("utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; `from a import b` gives both `a` and `a.b`."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, origin
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")) and node.args:
            named = node.args[0]
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                yield node.lineno, named.value


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def direction_faults(path: Path, found: Iterator[tuple[int, str]]) -> list[str]:
    layer = path.parts[0]
    faults = []
    for line, name in found:
        top = name.split(".")[0]
        if top in LAYERS and top not in MAY_IMPORT[layer]:
            faults.append(f"{path}:{line}: {layer} must not import {name}")
        if top in {"ci", "tests"}:
            faults.append(f"{path}:{line}: {name} is not part of the product")
        readable = name == "shards" or any(within(name, allowed) for allowed in CORE_MAY_READ)
        if layer == "core" and top == "shards" and not readable:
            faults.append(f"{path}:{line}: core reads only {', '.join(sorted(CORE_MAY_READ))}, not {name}")
    return faults


def owner_faults(path: Path, found: Iterator[tuple[int, str]]) -> list[str]:
    faults = []
    for line, name in found:
        for dependency, owners in OWNERS.items():
            allowed = any(
                str(path).startswith(owner) if owner.endswith("/") else str(path) == owner for owner in owners
            )
            if within(name, dependency) and not allowed:
                faults.append(f"{path}:{line}: only {' and '.join(owners) or 'ci/ and tests/'} may import {dependency}")
    return sorted(set(faults))


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_points_left(layer: str) -> None:
    faults = [fault for path in sources(layer) for fault in direction_faults(path, imports(path))]
    assert not faults, "\n".join(faults)


def test_one_owner_per_heavy_dependency() -> None:
    faults = [fault for path in sources(*LAYERS) for fault in owner_faults(path, imports(path))]
    assert not faults, "\n".join(faults)


def test_no_import_cycle() -> None:
    """Modules that import each other at the top level, type-checking blocks apart."""
    graph: dict[str, set[str]] = {}
    known = {module_name(path) for path in sources(*LAYERS)}
    for path in sources(*LAYERS):
        tree = parse(path)
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
        top_level = {
            name
            for node in tree.body
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        graph[module_name(path)] = (top_level & known) - {module_name(path)}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "import cycle: " + " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_no_attic() -> None:
    """A helper lives with its first user: no module or folder called utils, common, legacy."""
    attics = [str(path) for path in sources(*LAYERS, "ci", "tests") if ATTIC_NAMES & {*path.parent.parts, path.stem}]
    assert not attics, attics


@pytest.mark.parametrize("layer", ["shards", "core", "configs", "launchers", "kernels"])
def test_nothing_read_is_unpickled_evaluated_or_given_to_a_shell(layer: str) -> None:
    faults = []
    for path in sources(layer):
        for line, name in imports(path):
            if name.split(".")[0] in FORBIDDEN_MODULES and name not in MAY_BE_CAUGHT:
                faults.append(f"{path}:{line}: imports {name}")
        for node in ast.walk(parse(path)):
            used = dotted(node) if isinstance(node, ast.Attribute) else ""
            if used.split(".")[0] in FORBIDDEN_MODULES and used not in MAY_BE_CAUGHT:
                faults.append(f"{path}:{node.lineno}: uses {used}")
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS:
                faults.append(f"{path}:{node.lineno}: calls {name}")
            for keyword in node.keywords:
                setting = isinstance(keyword.value, ast.Constant) and keyword.value.value
                if keyword.arg in {"shell", "allow_pickle"} and setting is not False:
                    faults.append(f"{path}:{node.lineno}: {name}({keyword.arg}={ast.unparse(keyword.value)})")
            if name == "torch.load" and not any(
                keyword.arg == "weights_only"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
                for keyword in node.keywords
            ):
                faults.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
    assert not faults, "\n".join(faults)


class TestTheCheckItself:
    """A checker that cannot fail checks nothing."""

    def test_wrong_direction_is_seen(self) -> None:
        assert direction_faults(Path("core/x.py"), iter([(1, "launchers.pretrain")]))
        assert direction_faults(Path("core/x.py"), iter([(1, "shards.loader")]))
        assert direction_faults(Path("shards/x.py"), iter([(1, "core.world")]))
        assert direction_faults(Path("kernels/x.py"), iter([(1, "shards.errors")]))
        assert direction_faults(Path("core/x.py"), iter([(1, "ci.bench")]))
        assert not direction_faults(Path("core/x.py"), iter([(1, "shards.batch.Batch"), (2, "kernels.a")]))

    def test_wrong_owner_is_seen(self) -> None:
        assert owner_faults(Path("shards/loader.py"), iter([(1, "boto3")]))
        assert owner_faults(Path("shards/loader.py"), iter([(1, "nvidia.dali.fn")]))
        assert owner_faults(Path("core/trainer.py"), iter([(1, "torch.utils.tensorboard.SummaryWriter")]))
        assert not owner_faults(Path("shards/bucket.py"), iter([(1, "boto3.session")]))
        assert not owner_faults(Path("core/x.py"), iter([(1, "rayon")]))
