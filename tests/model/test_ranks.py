"""Data parallel training: two processes compute what one would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.checkpoint import load_checkpoint
from model.datasets.presets import preset_set
from model.datasets.synthetic import write_set
from model.runs import RunFolder

ROOT = Path(__file__).resolve().parents[2]
GRADIENTS = """
import os
import sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from model.losses import LossConfig, total_loss
from model.ranks import joined_ranks

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
rows = torch.randn(8, 5, generator=generator)
labels = torch.arange(8) // 2
attention = torch.rand(8, 3, 4, 2, generator=generator).flatten(2).softmax(2).view(8, 3, 4, 2)

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.classify = nn.Linear(5, 6), nn.Linear(6, 4)
    def forward(self, rows):
        embeddings = self.embed(rows)
        return embeddings, self.classify(embeddings)

def loss(network, ranks, rows, labels, attention):
    embeddings, logits = network(rows)
    gather = ranks.gather
    terms = total_loss(
        LossConfig(), gather(embeddings), gather(logits), gather(labels), gather(attention)
    )
    return terms.total

with joined_ranks("cpu") as ranks:
    network = Both()
    parallel = DistributedDataParallel(network) if ranks.count > 1 else network
    part = slice(ranks.rank * 8 // ranks.count, (ranks.rank + 1) * 8 // ranks.count)
    total = loss(parallel, ranks, rows[part], labels[part], attention[part])
    total.backward()
    if ranks.is_first:
        torch.save([total.detach(), *(one.grad for one in network.parameters())], sys.argv[1])
    del parallel, network, total
# How torch ends its threads at the end of a process is not what is tested here.
os._exit(0)
"""


def torchrun(ranks: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, cwd=ROOT, timeout=240)


@pytest.mark.slow
def test_two_ranks_have_the_loss_and_the_gradients_of_one_process(tmp_path: Path) -> None:
    """The hardest positive and negative are sought among the rows of all ranks."""
    import torch

    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    for ranks in (1, 2):
        torchrun(ranks, str(script), str(tmp_path / f"{ranks}.pt"))

    alone = torch.load(tmp_path / "1.pt", weights_only=True)
    together = torch.load(tmp_path / "2.pt", weights_only=True)
    assert len(alone) == 5
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_command_trains_with_two_processes(tmp_path: Path) -> None:
    """One of them writes and speaks."""
    write_set(preset_set("easy", "tiny"), tmp_path / "data", layout="folder", masks=False, jobs=1)
    settings = ["network.backbone=conv5", "preprocessing.height=64", "preprocessing.width=32"]
    settings += ["batch.identities=2", "batch.frames=2", "optimiser.epochs=10"]
    command = ["-m", "service.cli", "train", "folder", "--data", str(tmp_path / "data")]
    command += ["--output", str(tmp_path / "run"), "--device", "cpu", "--weights", "random"]
    for setting in settings:
        command += ["--set", setting]

    torchrun(2, *command)

    product = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert product.provenance["steps"] == 10
    assert [row["step"] for row in RunFolder(tmp_path / "run").read_log() if "loss" in row] == [10]
