"""What an export costs at full size, beside a plain copy of the same files, and how much memory it takes.

    python -m benchmarks.export --folder /somewhere/with/12/GB
    python -m benchmarks.export --folder /somewhere/with/12/GB --single-file

The U-Net of SD v1-4's size is a random file of 3.4 GB in float32; 221 neurons are pruned, as many as a public
rerun of NeMo found. Everything ends on disk (fsync) before a clock stops. With --single-file it is a whole pipeline of
SD v1-4's size in float16, exported to a single file, which is converted back.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.full_size import full_size_text_encoder, full_size_unet, full_size_vae
from nemo_prune.checkpoint.diff import diff_folders
from nemo_prune.checkpoint.export import export_checkpoint
from nemo_prune.checkpoint.folder import INDEX_FILE
from nemo_prune.engine.layers import layer_sizes
from nemo_prune.engine.released_code import SD_V1_LAYERS
from nemo_prune.facts import MaskFacts
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.staging import staged_folder
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.models.demo import demo_folder
from nemo_prune.models.source import resolve_model
from nemo_prune.release.from_mask import export_model

WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")
NUM_NEURONS = 221


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where three copies of 3.4 GB find room")
    parser.add_argument("--single-file", action="store_true", help="to a single file and back, in float16")
    parser.add_argument("--export", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.export:
        print(json.dumps(export_alone(*arguments.export)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        measured = measure_single_file if arguments.single_file else measure
        print(json.dumps(measured(Path(name)), indent=2))


def measure(folder: Path) -> dict:
    """Seconds of the copy, of the export, of hashing and of the comparison, and the export's peak memory."""
    base = folder / "base"
    write_base(base)
    copied = seconds(lambda: (run("cp", "-r", "--reflink=never", base, folder / "copy"), run("sync")))
    command = [sys.executable, "-m", "benchmarks.export", "--export", str(base), str(folder / "out")]
    exported = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    hashing = seconds(lambda: (file_hash(base / WEIGHTS), file_hash(folder / "out" / WEIGHTS)))
    compared = seconds(lambda: list(diff_folders(base, folder / "out", mask())))
    return {
        "gigabytes": round((base / WEIGHTS).stat().st_size / 1e9, 2),
        "seconds": {
            "cp and sync": copied,
            "export with both hashes": exported["seconds"],
            "both hashes alone": hashing,
            "diff": compared,
        },
        "export_without_hashes_over_cp": round((exported["seconds"] - hashing) / copied, 2),
        "export_over_cp": round(exported["seconds"] / copied, 2),
        "peak_memory_mb": exported["peak_memory_mb"],
        "memory_of_the_imports_mb": exported["imports_mb"],
    }


def measure_single_file(folder: Path) -> dict:
    """Seconds of an export to a single file and of the first conversion of it, beside a copy of the file."""
    base, out = folder / "base", folder / "out.safetensors"
    write_whole_base(base)
    source = resolve_model(str(base))
    mask().save(folder / "mask.safetensors", MaskFacts())
    run("sync")
    exported = seconds(lambda: export_model(source, folder / "mask.safetensors", out, force=True))
    copied = seconds(lambda: (run("cp", "--reflink=never", out, folder / "copy.safetensors"), run("sync")))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    converted = seconds(lambda: (resolve_model(str(out), config=str(base)), run("sync")))
    return {
        "gigabytes": round(out.stat().st_size / 1e9, 2),
        "seconds": {"cp and sync": copied, "export": exported, "first conversion": converted},
        "export_over_cp": round(exported / copied, 2),
        "conversion_over_cp": round(converted / copied, 2),
    }


def write_whole_base(base: Path) -> None:
    """A pipeline of SD v1-4's size with random weights in float16, but for tokenizer and scheduler, the demo's."""
    with torch.device("meta"):
        parts = {"unet": full_size_unet(), "vae": full_size_vae(), "text_encoder": full_size_text_encoder()}
    for name, part in parts.items():
        (part.config.save_pretrained if name == "text_encoder" else part.save_config)(base / name)
        tensors = {key: torch.randn(each.shape).half() for key, each in part.state_dict().items()}
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_file(tensors, base / name / f"{stem}.safetensors", {"format": "pt"})
    for name in ("tokenizer", "scheduler", INDEX_FILE):
        copy = shutil.copytree if (demo_folder() / name).is_dir() else shutil.copyfile
        copy(demo_folder() / name, base / name)


def export_alone(base: Path, out: Path) -> dict:
    """An export in a process of its own."""
    before = peak_memory()

    def export() -> None:
        with staged_folder(out) as folder:
            export_checkpoint(base, mask(), folder)

    return {"seconds": seconds(export), "peak_memory_mb": peak_memory(), "imports_mb": before}


def mask() -> NeuronMask:
    """Random neurons of SD v1-4."""
    every = [Neuron(layer, index) for layer, size in SD_V1_LAYERS.items() for index in range(size)]
    return NeuronMask.from_neurons(random.Random(0).sample(every, NUM_NEURONS), SD_V1_LAYERS)


def write_base(base: Path) -> None:
    """A diffusers folder whose U-Net has the real names and shapes and random bytes, written piece by piece."""
    with torch.device("meta"):
        unet = full_size_unet()
    assert layer_sizes({name: unet.get_submodule(name) for name in SD_V1_LAYERS}) == SD_V1_LAYERS
    header, place = {}, 0
    for name, tensor in unet.state_dict().items():
        size = 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        place += size
    encoded = json.dumps(header).encode()
    (base / WEIGHTS).parent.mkdir(parents=True)
    (base / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    with (base / WEIGHTS).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for start in range(0, place, 1 << 24):
            file.write(os.urandom(min(1 << 24, place - start)))
        file.flush()
        os.fsync(file.fileno())


def seconds(work: Callable[[], object]) -> float:
    """Wall time of some work."""
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 2)


def run(*command: object) -> None:
    """Run a program that must succeed."""
    subprocess.run(list(map(str, command)), check=True)


def peak_memory() -> int:
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
