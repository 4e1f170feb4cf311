"""A node of a real Slurm dies with its memory: the run goes on from that of the others, with nothing on the disk."""

from __future__ import annotations

import pytest

from lingua.checkpoint.shm.area import area_of
from lingua.run.metrics import read_metrics
from tests.checkout import Checkout, tiny
from tests.slurm_cluster import until
from tests.trainer import published

pytestmark = pytest.mark.slurm

EVERY = 500
"""Steps between two saves: more than are trained between a look at the copies and the end of the node."""


@pytest.mark.parametrize("n_nodes", [pytest.param(2, marks=pytest.mark.gate), 3])
@pytest.mark.parametrize("which", [pytest.param("last", marks=pytest.mark.gate), "first"])
def test_at_most_one_interval_is_lost_and_nothing_is_read_from_the_disk(checkout: Checkout, n_nodes: int, which: str):
    """Of two nodes one is replaced by the third; of three two go on. The disk is so slow that nothing gets there."""
    cluster, name = checkout.cluster, f"{which}_of_{n_nodes}"
    nodes = cluster.nodes[:n_nodes]
    lost = nodes[-1 if which == "last" else 0]
    words = tiny(name, 100_000, f"checkpoint.dump.every={EVERY}", "checkpoint.async_save_mode=shm")
    words += ["checkpoint.replicate=1", f"checkpoint.shm_path={cluster.folder}/memory"]
    words += ["checkpoint.bandwidth_gb_per_s=1e-6", "checkpoint.node_timeout_s=3600", "global_batch_size=12"]
    where = [f"--nodelist={','.join(nodes)}", f"--nodes={n_nodes}", "--ntasks-per-node=1"]
    job_id = checkout.submit("sphinx_1.slurm", words, *where)
    run_dir = checkout.run_dir(name)

    def copied(node: str) -> set[int]:
        slots = area_of(run_dir, cluster.memory_of(node)).copies.slots()
        return {found[0].step for slot in slots if (found := slot.complete())}

    checkout.wait_for_step(name, EVERY)
    saved = until(lambda: max(set.intersection(*map(copied, nodes)), default=None), "a copy on each node", 300.0)
    cluster.kill_node(lost)
    try:
        cluster.wait(job_id, "PENDING")
        n_left = 2
        change = [f"NumNodes={n_left}-{n_left}", f"NumTasks={n_left}", f"NumCPUs={4 * n_left}"]
        cluster.run("scontrol", "update", f"JobId={job_id}", "ReqNodeList=", *(change if n_nodes > n_left else []))
        last = max(record["global_step"] for record in read_metrics(run_dir / "metrics.jsonl"))
        first = checkout.wait_for_start(name, 2)
        assert published(run_dir) == [], "there is nothing that could have been read"
        assert first > saved
        assert last - (first - 1) <= EVERY
        assert "loaded full state from memory" in (run_dir / "train.log").read_text()
        until(lambda: all(copied(node) for node in cluster.nodes if node != lost), "copies for the new start", 300.0)
        cluster.run("scancel", job_id)
        cluster.wait(job_id, "CANCELLED")
        assert published(run_dir), "what came from memory can be published"
    finally:
        cluster.start_node(lost)
    until(lambda: cluster.idle_nodes() == 3, "three idle nodes")
