"""The head cut over two real processes (gloo), chunk by chunk, against the whole head in one.

test_parity.py trains with it; here are what its model has not: padding, several chunks, ignored targets, losses per
token, and a NaN.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def test_two_processes_give_the_whole_heads_numbers() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    run = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("as one process") == 2


def compare() -> None:
    """On each rank: assert the same losses, hidden's whole gradient, and this rank's rows of weight's."""
    from kernels.cross_entropy import chunked
    from longhorn_layers.config import ModelConfig
    from longhorn_layers.model import LMHead
    from pretrain.parallel.mesh import init_mesh
    from pretrain.parallel.tensor_parallel import VocabParallelHead

    chunked.CHUNK_STEP, chunked.CPU_CHUNK_LOGITS = 1, 192 * 5  # five tokens a chunk
    with init_mesh(2) as mesh:
        torch.manual_seed(0)
        whole = LMHead(ModelConfig(vocab_size=300, d_model=16)).double()  # padded to 384
        part = VocabParallelHead(whole, mesh)
        rows = slice(mesh.tensor_rank * 192, (mesh.tensor_rank + 1) * 192)
        hidden, targets = torch.randn(2, 9, 16, dtype=torch.float64), torch.randint(300, (2, 9))
        targets[0, 3:5] = -100
        for reduction in ("sum", "none"):
            ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
            losses, expected = part(ours, targets, reduction), whole(theirs, targets, reduction)
            seed = torch.rand_like(expected)
            got = torch.autograd.grad(losses, (ours, part.weight), seed)
            want = torch.autograd.grad(expected, (theirs, whole.weight), seed)
            torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
            torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(got[1], want[1][rows], rtol=1e-12, atol=1e-14)
            others = [torch.empty_like(losses) for _ in range(2)]
            dist.all_gather(others, losses.detach())
            assert torch.equal(others[0], others[1])
        with torch.no_grad():
            part.weight[0, 0] = torch.nan if mesh.tensor_rank else 1.0
            assert part(hidden, targets, "none").isnan().equal(targets != -100)
    print("as one process")


if __name__ == "__main__":
    compare()
