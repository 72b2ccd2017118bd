"""The program that makes the checkpoints of test_sharded.py.

`python -m tests.gpt.weights.sharded_runs FOLDER` imports torch once, and forks the ranks of each group of
scenarios. Rank N of a group saves its results in FOLDER/GROUP-N.pt.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # these are imported here, so that the forks need not do it
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from gpt import Trainer
from gpt.config import TrainConfig
from gpt.data.dataset import TokenData
from gpt.errors import ReportedError
from gpt.training import trainer as training
from gpt.training.distributed import Ranks
from gpt.training.parallel import parallelize
from gpt.training.run_folder import RunFolder
from gpt.training.saver import Saver
from gpt.training.trainer import TrainResult
from gpt.weights import checkpoint, commit
from tests.gpt.text import TEXT
from tests.gpt.training.forks import fork_ranks, wait_for
from tests.gpt.training.small_runs import CONFIG, make_model, stop_at

SHORT = replace(CONFIG, grad_accum=4, optimizer="muon", max_steps=5, final_eval_batches=1, keep_best=True)
FSDP, DDP = (replace(SHORT, parallel=name) for name in ("fsdp", "ddp"))
STOPPED = 3  # the step after which the stopped run goes on
STAGES = ("half written", "written", "set aside", "renamed")


def data() -> TokenData:
    return TokenData.from_text(TEXT)


def trainer(
    ranks: Ranks, out: Path, config: TrainConfig, content: TokenData | None = None, resume: bool = False
) -> Trainer:
    torch.manual_seed(11)
    content = data() if content is None else content
    return Trainer(make_model(content), content, config, out=out, resume=resume, ranks=ranks)


def whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for key, t in tensors.items()}


def state(trained: Trainer) -> dict[str, torch.Tensor]:
    """All weights, and the whole state of the optimizers."""
    return whole({**dict(trained.model.named_parameters()), **trained._step.tensors()})


def straight(ranks: Ranks, out: Path) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    """A run without interruption."""
    run = trainer(ranks, out / "straight", FSDP)
    return run.run(), state(run)


def stopped(ranks: Ranks, out: Path) -> TrainResult:
    """A run that a signal to rank 1 stops, and copies of it for others to go on from."""
    result = trainer(ranks, out / "stopped", FSDP, stop_at(data(), STOPPED - 1, 1, signal.SIGTERM)).run()
    if ranks.rank == 0:
        for name in ("same", "ddp", "alone", "four"):
            shutil.copytree(out / "stopped", out / name)
    dist.barrier()
    return result


def resumed(name: str, config: TrainConfig, *, ends: bool = True) -> Callable[[Ranks, Path], Any]:
    """Resumes the run in a folder: its state, what it warns of, and with `ends` its result and last state."""

    def resume(ranks: Ranks, out: Path) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = trainer(ranks, out / name, config, resume=True)
        before = state(run)
        warned = [str(w.message) for w in caught if "resume" in str(w.message)]
        return before, warned, *((run.run(), state(run)) if ends else ())

    return resume


def from_whole_files(ranks: Ranks, out: Path) -> Any:
    """A sharded run that goes on from the checkpoint of a run with a whole model in each rank."""
    trainer(ranks, out / "whole", replace(DDP, max_steps=STOPPED)).run()
    return resumed("whole", FSDP, ends=False)(ranks, out)


class Saves:
    """Saves small sharded checkpoints, without training."""

    def __init__(self, ranks: Ranks, out: Path, config: TrainConfig = FSDP) -> None:
        self.model = make_model(data())
        parallelize(self.model, torch.device("cpu"), config, ranks)
        self.saver = Saver(RunFolder(out), ranks, None, sharded=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        moments = {f"{key}/exp_avg": p.detach() * 2 for key, p in self.model.named_parameters()}
        return moments | {"wte.weight/step": torch.tensor(3.0)}

    def save(self, step: int) -> None:
        self.saver.save(
            self.model,
            data().tokenizer,
            optimizer=self.tensors(),
            state={"step": step},
            best=None,
            loss=1.0,
            timer=nullcontext(),
        )

    def error(self, step: int) -> tuple[type, str]:
        """The error of a save that fails in the background."""
        self.save(step)
        with pytest.raises(ReportedError) as error:
            self.saver.finish()
        return type(error.value), str(error.value)


def replacing_write(patch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Calls `before` in the background, before a rank writes its shards."""
    write = HuggingFaceStorageWriter.write_data

    def write_data(*args: Any) -> Any:
        before()
        return write(*args)

    patch.setattr(HuggingFaceStorageWriter, "write_data", write_data)


def background(ranks: Ranks, out: Path) -> Any:
    """Changes the weights while they are being saved; then a value that is not finite on rank 1 alone."""
    saves = Saves(ranks, out / "background")
    before = whole(dict(saves.model.named_parameters()))
    changed, in_time = threading.Event(), []
    with pytest.MonkeyPatch.context() as patch:
        replacing_write(patch, lambda: in_time.append(changed.wait(20)))
        saves.save(1)
        visible = checkpoint.list_checkpoints(out / "background")
        with torch.no_grad():
            for p in saves.model.parameters():
                p.add_(1)
        changed.set()
        saves.saver.finish()

    if ranks.rank == 1:
        with torch.no_grad():
            saves.model.blocks[0].ffn.up.weight.to_local()[0, 0] = torch.nan
    with pytest.raises(ReportedError) as error:
        saves.save(2)
    saves.saver.close()
    return in_time, before, visible, saves.saver.newest, (type(error.value), str(error.value))


def failing(ranks: Ranks, out: Path) -> Any:
    """A disk that is full on rank 1, a folder that is gone on rank 0, and a save after them."""
    folder = out / "failing"
    saves = Saves(ranks, folder)
    saves.save(1)
    errors = []

    def disk_full() -> None:
        if ranks.rank == 1:
            raise OSError(28, "No space left on device")

    def remove() -> None:
        if ranks.rank == 0:
            (folder / "checkpoints/.unfinished-step-3").rename(folder / "gone")

    for step, cause in ((2, disk_full), (3, remove)):
        with pytest.MonkeyPatch.context() as patch:
            saves.saver.finish()
            replacing_write(patch, cause)
            errors.append(saves.error(step))
            dist.barrier()
            names = sorted(os.listdir(folder / "checkpoints"))
            errors.append((checkpoint.find_checkpoint(folder).name, names))
    saves.save(4)
    saves.saver.close()
    return errors


def hybrid(ranks: Ranks, out: Path) -> Any:
    """A save of four ranks of which two share a model, and of parameters with fewer rows than ranks."""
    saves = Saves(ranks, out / "hybrid", replace(FSDP, shard_size=2))
    saves.save(1)
    saves.saver.close()
    return whole({**dict(saves.model.named_parameters()), **saves.tensors()})


def killed(stage: str) -> Callable[[Ranks, Path], None]:
    """Kills rank 0, or rank 1 where half the shards are to be written, at one stage of a save."""

    def run(ranks: Ranks, out: Path) -> None:
        folder = out / stage.replace(" ", "-")
        saves = Saves(ranks, folder)
        saves.save(1)
        saves.saver.finish()
        dist.barrier()

        def kill(*args: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def kill_rank_1() -> None:
            if ranks.rank == 1:
                time.sleep(0.1)
                kill()

        rename = Path.rename
        victim = ranks.rank == 0
        with pytest.MonkeyPatch.context() as patch:
            if stage == "half written":
                replacing_write(patch, kill_rank_1)
            elif stage == "written" and victim:
                patch.setattr(commit, "write_sums", kill)
            elif stage == "set aside" and victim:
                patch.setattr(Path, "rename", lambda path, target: rename(path, target) and kill())
            elif stage == "renamed" and victim:
                patch.setattr(checkpoint, "_tidy", kill)
            saves.save(1 if stage == "set aside" else 2)
            saves.saver.finish()

    return run


GROUPS: dict[str, tuple[int, Mapping[str, Callable[[Ranks, Path], Any]]]] = {
    "two": (
        2,
        {
            "straight": straight,
            "stopped": stopped,
            "same": resumed("same", FSDP),
            "ddp": resumed("ddp", DDP),
            "whole": from_whole_files,
            "background": background,
            "failing": failing,
        },
    ),
    "four": (4, {"hybrid": hybrid, "four": resumed("four", FSDP, ends=False)}),
    **{stage: (2, {"killed": killed(stage)}) for stage in STAGES},
}


def run_rank(group: str, out: Path, rank: int) -> None:
    """Runs the scenarios of a group in this process."""
    size, scenarios = GROUPS[group]
    dist.init_process_group("gloo")
    ranks = Ranks(rank, size, rank, size)
    results = {name: scenario(ranks, out) for name, scenario in scenarios.items()}
    torch.save(results, out / f"{group}-{rank}.pt")
    dist.barrier()


def main(out: Path) -> None:
    """Forks the ranks of each group, and saves how each of them ended."""
    torch.set_num_threads(1)
    training.SAMPLE_TOKENS = 4
    ends = {}
    for group, (size, _) in GROUPS.items():
        ranks = fork_ranks(partial(run_rank, group, out), size, out / f"{group}-output")
        ends[group] = [asdict(rank) for rank in wait_for(ranks)]
    (out / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
