"""The shipped configuration on a tiny dataset and at a tiny size, as command-line options."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mmfast.cli import main

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "data"))

from loading import holes, parts, write_dataset  # noqa: E402

SHRINK = {
    "data.modalities.image.size": 32,
    "data.modalities.text.max_tokens": 5,
    "data.modalities.audio.n_mels": 16,
    "data.modalities.audio.max_seconds": 0.5,
    "model.encoders.image.width": 16,
    "model.encoders.image.groups": 4,
    "model.encoders.image.depths": "[1,1]",
    "model.encoders.text.dim": 24,
    "model.encoders.text.layers": 1,
    "model.encoders.audio.dim": 24,
    "model.encoders.audio.layers": 1,
    "model.fusion.dim": 32,
    "trainer.batch_size": 8,
    "trainer.warmup": 4,
    "trainer.device": "cpu",
    "data.device": "cpu",
}


def dataset(folder, train=37, validation=9, test=10):
    """Write shards with holes."""
    sizes = {"train": train, "validation": validation, "test": test}
    starts = {"train": 0, "validation": 100, "test": 200}
    made = {split: holes([parts(starts[split] + i) for i in range(n)]) for split, n in sizes.items()}
    return write_dataset(Path(folder) / "data", made)


def options(data, out, **changes):
    """Arguments of ``mmfast fit`` for the tiny job; ``trainer__max_steps=3`` sets ``trainer.max_steps``."""
    settings = SHRINK | {"data.path": data, "trainer.out": out}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    pairs = [f"--{key}={value}" for key, value in settings.items()]
    return ["--config", str(ROOT / "configs" / "stamps.yaml"), *pairs]


def _run(arguments, folder, before):
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    import torch

    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.exit(main(arguments))


class Command:
    """``mmfast ARGUMENTS`` in a new process, forked from a server that has done the imports and nothing else."""

    def __init__(self, *arguments, before=None):
        self.folder = Path(tempfile.mkdtemp())
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["mmfast.train", "mmfast.data.dali", "torch.utils.tensorboard", "tiny"]
        )
        self.process = context.Process(target=_run, args=(arguments, self.folder, before))
        self.process.start()

    def wait(self, timeout=120):
        """Give (exit status, standard output, standard error)."""
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
        return status, (self.folder / "out").read_text(), (self.folder / "err").read_text()


def torchrun(processes, *arguments, module="mmfast", **kwargs):
    """Run ``mmfast``, or a script, in several processes under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    target = ["-m", module] if module else []
    return subprocess.run(
        [*launch, *target, *map(str, arguments)],
        cwd=ROOT, text=True, capture_output=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs,
    )  # fmt: skip
