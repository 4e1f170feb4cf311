"""Nothing is deleted or written through a link that somebody has put there: every call that could is guarded or listed.

Guarded are the operations of `lingua.files` and `open(..., opener=no_follow)`. A new call of another kind fails this
test: use those, or list the call with a reason.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BY_NAME = {
    "write_text", "write_bytes", "rmtree", "unlink", "rmdir", "removedirs", "truncate", "ftruncate", "touch", "chmod",
    "symlink", "symlink_to", "link", "hardlink_to", "rename", "renames", "copyfile", "copy2", "copytree", "move",
    "save_file", "save_pretrained", "savefig", "tofile",
}  # fmt: skip
GUARDED = ("files", "self._files", "self.files", "DISK")
"""Names of a `Files`."""

ALLOWED = {
    "takes a name away or gives it: unlink, rename, link and symlink follow no link in the last part of a path": """
        lingua/checkpoint/pins.py:pinned unlink
        lingua/checkpoint/tools/diff.py:consolidate unlink
        lingua/data/generate.py:_write unlink
        lingua/data/local_copy.py:_remove unlink
        lingua/data/prepare/external_sort.py:write_output unlink
        lingua/data/prepare/hub.py:_remove_wrong unlink
        lingua/data/prepare/pipeline.py:_copy unlink
        lingua/launch/job.py:_link symlink_to
        lingua/launch/job.py:_link replace
        lingua/profiling/profiler.py:_write replace
        lingua/profiling/windows.py:take_request unlink
        lingua/run/code_snapshot.py:freeze_code rename
        lingua/run/folder.py:archive_exit_records replace
        lingua/run/lock.py:_claim link
        lingua/run/lock.py:_create unlink
        lingua/run/lock.py:_time unlink
        lingua/selfcheck/node_check.py:check_folder unlink
        lingua/sweep/sweep.py:make_sweep rename
    """,
    "a log is only appended to, and its owner may have linked it to another disk": """
        lingua/checkpoint/shm/service_client.py:start_service open
        lingua/eval/spawn.py:start_process open
        lingua/launch/job.py:_redirect_output open
        lingua/selfcheck/drill.py:start open
        lingua/sweep/sweep.py:run_points open
    """,
    "an open descriptor, a stream or a file of the kernel, no path of a disk": """
        lingua/checkpoint/dcp.py:blob torch.save
        lingua/checkpoint/tools/diff.py:_allocate torch.save
        lingua/data/prepare/worker_pool.py:each write_text
        lingua/data/workers.py:__init__ ftruncate
        lingua/report/figure.py:_written savefig
        lingua/run/metrics.py:_flush ftruncate
    """,
    "O_NOFOLLOW, or x, which makes a file and opens none": """
        lingua/checkpoint/shm/slot_writer.py:__init__ os.open
        lingua/data/local_copy.py:_lock os.open
        lingua/run/lock.py:_claim open
    """,
    "below a folder that was just made, or of which it was checked that it is this user's own and no link": """
        lingua/config/trust.py:note_run touch
        lingua/data/local_copy.py:_copy copyfile
        lingua/data/local_copy.py:_copy touch
        lingua/data/local_copy.py:_copy write_text
        lingua/data/local_copy.py:_own_folder chmod
        lingua/data/local_copy.py:_remove rmtree
        lingua/data/prepare/pipeline.py:_scratch chmod
        lingua/run/code_snapshot.py:freeze_code copyfile
    """,
    "a benchmark, in a folder of its own or in the file that its user names": """
        scripts/bench_checkpoint.py:_stock rmtree
        scripts/bench_checkpoint.py:_cp rmtree
        scripts/bench_common.py:write_corpus open
        scripts/bench_eval.py:make_run write_text
        scripts/bench_eval.py:make_tasks write_text
        scripts/bench_step.py:measure_loop rmtree
        scripts/goodput_peers.py:__init__ open
        scripts/goodput_peers.py:dcp_loop rmtree
        scripts/goodput_peers.py:dcp_loop unlink
        scripts/goodput_runs.py:__post_init__ write_bytes
        scripts/goodput_runs.py:start open
        scripts/bench_loader.py:write_formats link
        scripts/bench_loader.py:write_formats write_bytes
        scripts/bench_step.py:main write_text
        scripts/compare_families.py:validations open
    """,
}


def kind_of(call: ast.Call) -> str | None:
    """Return the name of a call that deletes or writes without a guard, or None."""
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if owner in GUARDED:
        return None
    if name in BY_NAME or (name == "replace" and (owner == "os" or (len(call.args) == 1 and not call.keywords))):
        return name
    if (owner, name) in {("os", "remove"), ("torch", "save"), ("np", "save")}:
        return f"{owner}.{name}"
    if name != "open":
        return None
    if owner == "os":
        return None if "O_RDONLY" in ast.unparse(call) else "os.open"
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    mode = given.get("mode", call.args[0 if owner else 1] if len(call.args) > (0 if owner else 1) else None)
    writes = isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) & set("wax+")
    return "open" if writes and ast.unparse(given.get("opener", ast.Constant(None))) != "no_follow" else None


def calls_in(node: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """Yield (function, kind) of every unguarded call."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call) and (kind := kind_of(child)):
            yield function, kind
        inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from calls_in(child, child.name if inner else function)


def test_every_call_that_deletes_or_writes_is_guarded_or_listed() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{function} {kind}"
        for top in ("lingua", "apps", "setup", "scripts")
        for path in (ROOT / top).rglob("*.py")
        if path != ROOT / "lingua/files.py"
        for function, kind in calls_in(ast.parse(path.read_text()))
    }
    allowed = {line.strip() for lines in ALLOWED.values() for line in lines.strip().splitlines()}
    new, gone = sorted(found - allowed), sorted(allowed - found)
    assert not new, f"{new}: use lingua.files or opener=no_follow, or list the call with a reason"
    assert not gone, f"{gone}: take out what is gone"


def test_the_walk_sees_each_kind() -> None:
    code = """
def f():
    open(p, "w"); open(p, mode="ab"); p.open("x"); p.open("r+"); os.open(p, flags); os.open(p, os.O_RDWR)
    p.write_text(""); shutil.rmtree(p); os.unlink(p); p.rename(q); p.replace(q); os.replace(p, q); os.remove(p)
    open(p); open(p, "rb"); p.open("rb"); open(p, "w", opener=no_follow); os.open(p, os.O_RDONLY | os.O_NOFOLLOW)
    text.replace("a", "b"); replace(args, a=1); files.rename(p, q); listed.remove(p)
"""
    assert [kind for function, kind in calls_in(ast.parse(code)) if function == "f"] == [
        *("open", "open", "open", "open", "os.open", "os.open"),
        *("write_text", "rmtree", "unlink", "rename", "replace", "replace", "os.remove"),
    ]
