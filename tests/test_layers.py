"""The structure that docs/architecture.md promises: imports point down, folders are registries, no second ways."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    {"config", "distributed", "bounded_store", "sharding", "blocks", "location", "optional", "plain_yaml", "worker"},
    {"peers", "stragglers", "costs", "tensor_files"},
    {"log", "optim", "views", "patch_embed", "batch_norm", "progress"},
    {"masks", "backbones", "heads", "checkpoint", "run_lock", "saving"},
    {"modalities"},
    {"objectives", "data"},
    {"student_teacher"},
    {"recipe", "recipe_checks"},
    {"stages", "step", "flops", "health", "health_facts"},
    {"monitors", "dry_run", "live_bytes"},
    {"run_folder", "estimate", "encoder", "show_views", "weights", "initialise", "init_report", "mishaps"},
    {"train", "export", "averaging"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# backbones name the Modality that builds their patch embedding, for its type alone; a modality builds that embedding.
TYPE_ONLY = {("backbones", "modalities")}


def imported(path: Path) -> set[str]:
    """The first two parts of every import of our packages."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "ssl_platform" else [f"ssl_platform.{a.name}" for a in node.names]
        found |= {".".join(name.split(".")[:2]) for name in names}
    return {name for name in found if name.split(".")[0] in {"ssl_platform", "eval_protocols", "launch"}}


def test_every_module_has_a_level() -> None:
    names = {path.stem if path.suffix else path.name for path in (ROOT / "ssl_platform").iterdir()}
    assert names - {"__init__", "__pycache__", "py"} == LEVEL.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "ssl_platform").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT / "ssl_platform").parts[0].removesuffix(".py")
    for name in imported(path):
        package, _, module = name.partition(".")
        assert package == "ssl_platform", f"{path} imports {name}"
        if not module or module == own or module == "__version__" or (own, module) in TYPE_ONLY:
            continue
        assert LEVEL[module] < LEVEL[own] or LEVEL[module] == LEVEL[own], f"{own} imports {module}, which is above it"


def test_evaluation_uses_only_the_encoders_surface() -> None:
    allowed = {
        f"ssl_platform.{name}" for name in ("encoder", "data", "config", "location", "log", "modalities", "backbones")
    }
    for path in (ROOT / "eval_protocols").glob("*.py"):
        used = {name for name in imported(path) if name.startswith("ssl_platform.")}
        assert used - {"ssl_platform.__version__"} <= allowed, path


def test_rules_of_the_code() -> None:
    for path in [*(ROOT / "ssl_platform").rglob("*.py"), *(ROOT / "eval_protocols").rglob("*.py")]:
        text = path.read_text()
        assert not re.search(
            r"\.cuda\(\)|(?<![.\w])print\(|\bTODO\b|\bpickle\b(?!\.|,| )|torch\.(load|save)\(",
            re.sub(r"torch\.load\(path, map_location=\"cpu\", weights_only=True\)", "", text)
            if path.name == "weights.py"  # public files of torch.save, of which only tensors are read
            else text,
        ), path
        if path.name != "distributed.py":
            assert "is_initialized" not in text, path
        assert not re.search(r"utils|helpers|common", path.name), path
        assert ast.get_docstring(ast.parse(text)), f"{path} does not say what it is for"
