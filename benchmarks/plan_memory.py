"""What `bitdance plan` says of memory, against what a real run on this machine holds.

    python benchmarks/plan_memory.py [STAGE-PRECISION[-cpu] ...]     (all of ZeRO 0 to 3, in both precisions;
                                                                     cpu: the optimizer in host memory)

States: two ranks train a small model; after each backward pass of a step of two micro-steps every storage
that the engine has brought to life is counted. Buckets are made tiny, so that what is counted is states.
Activations: the same model's forward and backward pass, counted while it runs with data (attention stands for
a fused kernel's, as in the plan: a CPU's keeps more).
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

import torch

if __package__ in (None, ""):  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.small_models import small_text_to_image
from models.text_to_image import TextToImageConfig, TextToImageModel
from trainer.engine import Engine, start_distributed
from trainer.peers import stop_distributed
from trainer.plan.activations import FusedAttentionModel, PackShape, activation_bytes, blank_batch, peak_bytes
from trainer.plan.states import Precision, count_parameters, state_bytes
from trainer.recipe import OptimizerSection, ZeroSection

ROOT = Path(__file__).parents[1]
KEPT = ("0-float32", "1-float32", "2-float32", "3-float32", "1-bfloat16", "2-bfloat16", "3-bfloat16")
CASES = (*KEPT, *(f"{case}-cpu" for case in KEPT[1:]))
RANKS = 2
TINY = 1_000  # elements of a bucket
MIB = 2**20


def small_model() -> TextToImageConfig:
    """2.5 million parameters, in proportions like those of the large models."""
    return small_text_to_image(vocabulary=3001, width=128, layers=4, heads=4, head_blocks=4)


def settings_of(case: str) -> tuple[ZeroSection, Precision]:
    """ZeRO with buckets that hold next to nothing, and the precision."""
    number, precision, *offloaded = case.split("-")
    stage = int(number)
    buckets = {"reduce_bucket_size": TINY, "allgather_bucket_size": TINY}
    if stage == 3:
        buckets |= {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": TINY}
        buckets |= {"stage3_param_persistence_threshold": TINY, "stage3_max_reuse_distance": TINY}
    values = {"stage": stage, "overlap_comm": False, **buckets}
    if offloaded:
        values["offload_optimizer"] = {"device": offloaded[0]}
    return ZeroSection.model_validate(values), cast(Precision, precision)


def storages() -> dict[int, int]:
    """Address and bytes of the storages of all tensors that Python knows, views and shards once."""
    gc.collect()
    # Asking an object for its class can wake a lazy module: its type is looked at instead.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    found = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def measure_states(zero: ZeroSection, precision: Precision) -> int:
    """Most bytes that this rank's engine has brought to life, after a backward pass."""
    before = storages().keys()
    config = small_model()
    engine = Engine(TextToImageModel(config).train(), OptimizerSection(lr=1e-3), zero, precision)
    held = 0
    for last in (False, True):
        losses = engine(blank_batch(config, PackShape(200, 64, 20)))
        engine.backward(losses.vision.mean() + losses.text.mean(), last=last)
        del losses
        held = max(held, sum(size for address, size in storages().items() if address not in before))
    return held


def compare_activations(checkpointing: bool) -> tuple[int, int]:
    """(planned, held) bytes of a forward and backward pass in float32."""
    config, pack = small_model(), PackShape(2000, 1600, 300)
    planned = activation_bytes(config, [pack], torch.float32, checkpointing).peak
    model = FusedAttentionModel(config).train()
    if checkpointing:
        model.enable_activation_checkpointing()
    return planned, peak_bytes(model, blank_batch(config, pack))


def compare_states(cases: list[str]) -> dict[str, tuple[int, int]]:
    """Case -> (planned, held) bytes of the states, in host memory too, on the rank that holds most of two."""
    parameters = count_parameters(small_model())
    compared = {}
    for case, held in _run_ranks(cases).items():
        zero, precision = settings_of(case)
        planned = state_bytes(parameters, zero, precision, RANKS, average=False)
        compared[case] = (planned.device + planned.host, held)
    return compared


def _run_ranks(cases: list[str]) -> dict[str, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "--rank", folder, *cases]
        processes = [
            subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(RANKS)
        ]
        try:
            codes = [process.wait(timeout=600) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}")
        measured = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return {case: max(of_rank[case] for of_rank in measured) for case in cases}


def _be_rank(folder: Path, cases: list[str]) -> None:
    start_distributed()
    held = {}
    for case in cases:
        held[case] = measure_states(*settings_of(case))
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(held))
    stop_distributed()


def main(cases: list[str]) -> None:
    print(f"{'':<28}{'planned MiB':>12}{'held MiB':>10}{'ratio':>8}")
    rows = {f"states {case}": pair for case, pair in compare_states(cases).items()}
    for checkpointing in (True, False):
        name = "with" if checkpointing else "without"
        rows[f"activations {name} ckpt."] = compare_activations(checkpointing)
    for name, (planned, held) in rows.items():
        print(f"{name:<28}{planned / MIB:>12.2f}{held / MIB:>10.2f}{planned / held:>8.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        _be_rank(Path(sys.argv[2]), sys.argv[3:])
    else:
        main(sys.argv[1:] or list(CASES))
