"""The shipped configuration on a tiny dataset and at a tiny size, as command-line options."""

import os
import subprocess
import sys
from pathlib import Path

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


def command(*arguments, processes=0, start=subprocess.run, **kwargs):
    """Run ``mmfast`` in a process of its own, or in several under torchrun."""
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if start is subprocess.run:
        kwargs = {"capture_output": True, "timeout": 240} | kwargs
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    return start([*launch, "-m", "mmfast", *arguments], cwd=ROOT, text=True, env=environment, **kwargs)
