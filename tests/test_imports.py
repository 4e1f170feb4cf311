"""Wings import one way. Imports inside functions and under TYPE_CHECKING count; there is no list of exceptions."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A name imports only names of lower levels, and its own modules.
LEVELS = [
    ["masking"],
    ["files", "logger", "signals"],
    ["slurm", "slurm_script"],
    ["scheduler"],
    ["config"],
    ["tokenizer"],
    ["run", "optim"],
    ["console", "model"],
    ["data", "distributed"],
    ["profiling", "checkpoint"],
    ["report"],
    ["train"],
    ["launch"],
    ["sweep", "selfcheck"],
    ["eval"],
    ["lingua"],  # the package itself: the door for notebooks
    ["stool", "args", "schema", "schedule"],  # the last three are old names, for plugins
    ["apps"],
    ["setup", "scripts"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_of(path): path for top in ("lingua", "apps", "setup", "scripts") for path in (ROOT / top).rglob("*.py")
}


def wing_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "lingua" and len(parts) > 1 else parts[0]


@cache
def imports_of(module: str) -> set[str]:
    """The modules of this repository that a module names in its import statements, wherever they stand."""
    found: set[str] = set()
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name not in ("", "apps", module):
                found.add(name)
    return found


def test_every_wing_has_a_level():
    assert {wing_of(module) for module in MODULES} == set(LEVEL)


def test_wings_import_only_lower_wings():
    wrong = [
        f"{module} imports {other}"
        for module in sorted(MODULES)
        for other in sorted(imports_of(module))
        if wing_of(module) != wing_of(other) and LEVEL[wing_of(other)] >= LEVEL[wing_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_files_import_each_other_in_no_circle():
    graph = {module: imports_of(module) for module in MODULES}
    done: set[str] = set()

    def follow(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                follow(other, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        follow(module, [])


# Files with Slurm's names, and why; docstrings and comments, which are the help of keys too, may have them everywhere.
SLURM = {
    "lingua.slurm": "its variables, commands and answers",
    "lingua.slurm_script": "the text of its jobs",
    "lingua.stool": "Meta Lingua's command line has launcher=sbatch",
    "scripts.chinchilla_scaling": "submits a *.slurm script by its own sbatch command",
}
SLURMS_COMMAND = r"\b(sbatch|srun|scontrol|squeue|sacct|scancel|sinfo)\b"
SLURMS_NAME = re.compile(
    rf"SLURM|SBATCH|slurm-|{SLURMS_COMMAND}|KillWait|GraceTime|PreemptMode"
    r"|\b(PENDING|RUNNING|COMPLETING|CANCELLED|NODE_FAIL|BOOT_FAIL|PREEMPTED|REQUEUED)\b"
)


def texts_of(module: str) -> list[str]:
    """The strings of a module that are no docstrings, those in f-strings too."""
    text = MODULES[module].read_text()
    nodes = list(ast.walk(ast.parse(text))) if SLURMS_NAME.search(text) else []  # which is faster
    docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    values = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docs]
    return [str(value) for value in values if isinstance(value, str | bytes)]


def test_slurms_variables_commands_directives_and_states_are_named_in_two_files():
    assert {module for module in MODULES if any(map(SLURMS_NAME.search, texts_of(module)))} == set(SLURM)
    assert not re.search(SLURMS_COMMAND, (ROOT / "scripts/job.sh").read_text()), "it serves other schedulers too"


def test_the_scheduler_is_chosen_in_one_file():
    slurm = {"lingua.slurm", "lingua.slurm_script"}
    assert {module for module in MODULES if imports_of(module) & slurm} == {"lingua.scheduler"}
