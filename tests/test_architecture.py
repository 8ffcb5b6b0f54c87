"""The shape of the code: imports run one way, and flags and environment are read in one place each."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

MODULES = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "trainer").glob("*.py")}


def imports(tree: ast.AST) -> set[str]:
    """The modules of `trainer` that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "trainer":
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("trainer.")}
    return found


def test_imports_have_no_cycle() -> None:
    graph = {name: imports(tree) for name, tree in MODULES.items()}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


def test_trainer_does_not_know_what_starts_it() -> None:
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(module.split(".")[0] in ("launch", "benchmarks", "tests") for module in names), name


def test_environment_is_read_in_one_module() -> None:
    for name, tree in MODULES.items():
        reads = [
            node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
        ]
        assert not reads or name == "cluster", name


def test_flags_are_read_by_the_commands_alone() -> None:
    commands = {"task", "evaluate", "predict", "serve", "prepare", "data_server", "doctor", "tune", "cli"}
    for name, tree in MODULES.items():
        reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "FLAGS"]
        assert not reads or name in commands, name


def test_commands_find_mistakes_before_they_import_tensorflow() -> None:
    """TensorFlow takes seconds: a wrong flag is told at once."""
    light = set(
        "task doctor prepare serve data_server flags config options presets cli cluster sources dataset collection formats "
        "records idx pictures children convert shards synthetic errors storage signals console tune search space trial winner "
        "evaluate folders plan locks runs lookup".split()
    )
    for name in light:
        for node in MODULES[name].body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {module.split(".")[0] for module in names} & {"tensorflow", "keras", "sklearn"}, name
            assert not (imports(node) if isinstance(node, ast.ImportFrom) else set()) - light - {"__init__"}, name


def test_graphs_are_traced_without_autograph() -> None:
    """It costs a fifth of a short job, and one function that asks for it brings it to all that it calls."""
    for name, tree in MODULES.items():
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "tf.function"]
        assert not found or name == "tracing", name


def test_what_draws_is_imported_only_to_draw() -> None:
    # In a process of its own: pytest's has them already. Keras imports both, if it is let, and a worker may need neither.
    script = """if True:
        import gc, sys
        from trainer import cli
        with cli.quiet_start():
            from trainer import job, recording
        assert gc.isenabled() and gc.get_freeze_count() > 200_000
        assert "keras" in sys.modules
        late = {"matplotlib", "sklearn"}
        assert not (late | {"jax"}) & set(sys.modules)
        from trainer import report
        assert late < set(sys.modules) and None not in sys.modules.values()
    """
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_files_stay_small() -> None:
    for path in Path(ROOT / "trainer").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path


def test_make_installs_cuda_libraries_where_there_are_nvidia_gpus() -> None:
    found = {}
    for gpus in ("", "/dev/nvidia0 /dev/nvidia1"):
        command = ["make", "--dry-run", f"NVIDIA={gpus}", "VENV=nowhere", "train"]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        (found[gpus],) = re.findall(r"--editable '\.\[(.*)\]'", printed)
    assert found == {"": "dev", "/dev/nvidia0 /dev/nvidia1": "gpu,dev"}
