"""Train like users of other libraries, for bench_goodput.py: a plain loop with DCP, or Hugging Face's Trainer.

    python goodput_peers.py SPEC

SPEC is JSON: way, folder, every, llama (keys of transformers' LlamaConfig), corpus, seq_len. It resumes from the newest
complete checkpoint in `folder` and never ends. It writes lines to folder/journal.jsonl: {"part": ..., "at": ...} during
startup, then {"step": ..., "at": ...}.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "journal.jsonl").open("a", buffering=1)
        self.part("python")

    def part(self, name: str) -> None:
        self._file.write(json.dumps({"part": name, "at": time.time()}) + "\n")

    def step(self, number: int) -> None:
        self._file.write(json.dumps({"step": number, "at": time.time()}) + "\n")


def complete(folder: Path, prefix: str, mark: str) -> Iterator[Path]:
    """Yield the checkpoints whose last file exists, the newest first, as a careful user would."""
    found = sorted(folder.glob(f"{prefix}*"), key=lambda path: -int(path.name.rpartition("-")[2]))
    return (path for path in found if (path / mark).exists())


def dcp_loop(spec: dict[str, Any], folder: Path, journal: Journal) -> None:
    """Train as in torch's tutorials: `get_state_dict`, then `dcp.save`, or `dcp.async_save` after the previous one."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM

    journal.part("torch")
    (folder / "store").unlink(missing_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    journal.part("ranks")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**spec["llama"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    journal.part("model")
    step = 0
    if newest := next(complete(folder, "step-", ".metadata"), None):
        weights, optim = get_state_dict(model, optimizer)
        state = {"model": weights, "optim": optim, "step": 0}
        dcp.load(state, checkpoint_id=newest)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        step = state["step"]
    journal.part("weights")
    text = torch.frombuffer(bytearray(Path(spec["corpus"]).read_bytes()), dtype=torch.uint8)
    pending: Any = None
    while True:
        step += 1
        at = step * spec["seq_len"] % (len(text) - spec["seq_len"])
        tokens = text[None, at : at + spec["seq_len"]].long()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        journal.step(step)
        if step % spec["every"] == 0:
            if pending is not None:
                pending.result()
            weights, optim = get_state_dict(model, optimizer)
            state = {"model": weights, "optim": optim, "step": step}
            place = folder / f"step-{step}"
            shutil.rmtree(place, ignore_errors=True)  # left by a kill
            if spec["way"] == "dcp.save":
                dcp.save(state, checkpoint_id=place)
            else:
                pending = dcp.async_save(state, checkpoint_id=place)
            for old in list(complete(folder, "step-", ".metadata"))[2:]:
                shutil.rmtree(old)


def hugging_face(spec: dict[str, Any], folder: Path, journal: Journal) -> None:
    """Train with `Trainer.train(resume_from_checkpoint=...)`, which skips the rows that it has seen."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        text = torch.frombuffer(bytearray(Path(spec["corpus"]).read_bytes()), dtype=torch.uint8)

        def __len__(self) -> int:
            return len(self.text) // spec["seq_len"]

        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            tokens = self.text[row * spec["seq_len"] : (row + 1) * spec["seq_len"]].long()
            return {"input_ids": tokens, "labels": tokens}

    class Noted(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            journal.part("weights")

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            journal.step(state.global_step)

    journal.part("torch")
    model = LlamaForCausalLM(LlamaConfig(**spec["llama"]))
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=1, max_steps=10**6, save_steps=spec["every"], save_total_limit=2,
        optim="adamw_torch_fused", lr_scheduler_type="constant", report_to=[], use_cpu=True, logging_steps=10**6,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Rows(), callbacks=[Noted()])
    newest = next(complete(folder, "checkpoint-", "trainer_state.json"), None)
    journal.part("model")
    trainer.train(resume_from_checkpoint=newest and str(newest))


def main() -> None:
    spec = json.loads(sys.argv[1])
    folder = Path(spec["folder"])
    journal = Journal(folder)
    warnings.simplefilter("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    (hugging_face if spec["way"] == "HF Trainer" else dcp_loop)(spec, folder, journal)


if __name__ == "__main__":
    main()
