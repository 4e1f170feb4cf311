"""How long OpenMP's threads spin is set before torch is loaded, in every program, and never against the user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
    path.relative_to(ROOT)
    for folder in ("lingua", "apps", "scripts", "setup")
    for path in (ROOT / folder).rglob("*.py")
    if '\nif __name__ == "__main__":\n' in path.read_text()
)
FIRST_LOADED = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("lingua", "torch"):
            print(name, flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
run = runpy.run_path if sys.argv[1].endswith(".py") else runpy.run_module
run(sys.argv[1], run_name="watched")
print("neither")
"""


def environment(**set_by_user: str) -> dict[str, str]:
    rest = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))  # a script finds its neighbours
    return rest | {"PYTHONPATH": paths} | set_by_user


def run(*words: str, **set_by_user: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, *words], environment(**set_by_user)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("program", [*PROGRAMS, Path("tests/conftest.py")], ids=str)
def test_no_program_loads_torch_before_lingua(program: Path) -> None:
    in_package = program.parts[0] in ("lingua", "apps")  # started by `python -m`
    done = run("-c", FIRST_LOADED, ".".join(program.with_suffix("").parts) if in_package else str(program))
    assert done.returncode == 0, done.stderr
    assert done.stdout in ("lingua\n", "neither\n")


def test_the_programs_are_found() -> None:
    assert {"apps/main/train.py", "lingua/data/workers.py", "scripts/bench_step.py"} <= set(map(str, PROGRAMS))


SAY = "import os, lingua; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize("own", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "ACTIVE"}], ids=str)
def test_the_users_own_setting_wins(own: dict[str, str]) -> None:
    assert run("-c", SAY, **own).stdout == f"{own.get('GOMP_SPINCOUNT')}\n"


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="torch brings libgomp along on Linux")
def test_libgomp_itself_hears_of_it_where_a_trainer_loads_torch() -> None:
    count = int(run("-c", SAY).stdout)
    assert 0 < count < 100_000  # libgomp's own is 300,000
    done = run("-m", "apps.main.loop", OMP_DISPLAY_ENV="verbose")
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr
