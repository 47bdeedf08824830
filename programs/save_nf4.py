"""Save a text-to-image or text-to-video pipeline with nf4 weights, once: `draw.py` then loads a quarter of the bytes.

    python programs/save_nf4.py black-forest-labs/FLUX.1-dev nf4-flux

Denoisers and large text encoders become nf4, the other models bfloat16, one after the other, so that neither the host
nor the card holds more than the largest. DiffusionPipeline.from_pretrained("nf4-flux", dtype=torch.bfloat16) loads it.
"""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock


def stop(*_) -> None:
    """Ctrl-C: end at once."""
    os.write(2, b"\nStopped.\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)  # now, because the imports below take seconds
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # torch reads it: memory in one piece
import helpers  # before the libraries, whose known noise it quiets

helpers.quiet.show_loading_bars()
import diffusers
import torch
import transformers
from diffusers.models import model_loading_utils
from safetensors import SafetensorError
from tqdm import tqdm

from helpers import checks, cpu_backend, devices, files, measure, models
from helpers.errors import TutorialError
from helpers.models import Model

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
# Layers whose weights are used without a call of the layer, which alone knows what nf4 is.
KEPT = {"HunyuanDiT2DModel": ["pooler"], "AnyFlowTransformer3DModel": ["condition_embedder"]}
LOAD_FILE = model_loading_utils.load_state_dict
UNFINISHED = "model_index.unfinished"  # the index has this name until all that it lists is written
ELSEWHERE = "give another folder as OUT"


def find_source(path: str) -> Model:
    """The checkpoint, which is downloaded first if `path` is a repository id."""
    path = models.find_given(path)
    model = models.find_model(path)
    if model.is_quantized:
        raise TutorialError(f"{path} is quantized already: draw with it as it is.")
    if not Path(path).is_dir():
        with checks.hub_errors(path):
            model = models.find_model(diffusers.DiffusionPipeline.download(path, variant=model.variant))
    return model


def prepare(out: Path, model: Model) -> None:
    """Make the folder, with an index that nobody takes for a checkpoint's, once all can be written."""
    if out.is_dir() and any(out.iterdir()) and not (out / UNFINISHED).is_file():
        raise TutorialError(f"{out} is not empty: delete it, or {ELSEWHERE}.")
    # 4.5 bits of 16 in the quantized components, and some layers that stay as they are.
    needed = sum(size * (0.4 if name in model.quantized else 1) for name, size in model.sizes.items())
    files.check_space(out, needed, "A checkpoint with nf4 weights", ELSEWHERE)
    files.check_writable(out, ELSEWHERE)
    shutil.copyfile(Path(model.path) / "model_index.json", out / UNFINISHED)


def load_file(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """As diffusers loads a file of weights, but with copies of all that is no matrix, which nf4 leaves as it is.

    A tensor that is used as it was read keeps its whole file in memory: quantized on the CPU, FLUX had 32 GB of it.
    """
    return {
        name: tensor if tensor.dim() == 2 else tensor.clone() for name, tensor in LOAD_FILE(*args, **kwargs).items()
    }


def save_component(name: str, model: Model, out: Path, device: str) -> None:
    """Load one component, quantized if it is a large one, and save it; what has no weights is copied."""
    source, cls = Path(model.path) / name, model.component_class(name)
    shutil.rmtree(out / name, ignore_errors=True)  # of an earlier try
    if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module):
        shutil.copytree(source, out / name)
        return
    weights = [file.name for file in source.iterdir() if file.suffix in (".safetensors", ".bin")]
    settings = {"dtype": torch.bfloat16, "variant": "fp16" if all(".fp16" in file for file in weights) else None}
    if name in model.quantized:
        library = diffusers if issubclass(cls, diffusers.ModelMixin) else transformers
        settings["quantization_config"] = library.BitsAndBytesConfig(
            **NF4, llm_int8_skip_modules=KEPT.get(cls.__name__)
        )
    if name not in model.quantized or device == "cpu":
        settings["device_map"] = "cpu"  # without it, weights are quantized on the card
    with mock.patch.object(model_loading_utils, "load_state_dict", load_file):
        component = cls.from_pretrained(source, **settings)
    component.save_pretrained(out / name, max_shard_size=models.find_file_size(component))
    del component
    devices.free_memory()


def save(model: Model, out: Path, device: str) -> None:
    """Save all components, then name the index as an index is named: nobody loads half a checkpoint."""
    names = list(models.read_components(model.path))
    with tqdm(total=sum(model.sizes.get(name, 0) for name in names), unit="B", unit_scale=True, disable=None) as bar:
        for name in names:
            bar.set_description(name)
            save_component(name, model, out, device)
            bar.update(model.sizes.get(name, 0))
    (out / UNFINISHED).rename(out / "model_index.json")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, save, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder in diffusers format, or repository id of the Hub")
    parser.add_argument("out", type=Path, help="folder to write: an empty or a new one")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where to quantize (default: on the card, if any)")
    args = parser.parse_args(arguments)
    device = args.device or devices.accelerator().type
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise TutorialError("PyTorch finds no CUDA card: leave --device out.")
        checks.check_versions()
        cpu_backend.enable()  # without a card, diffusers would refuse to quantize
        model = find_source(args.model)
        prepare(args.out, model)
        if more := models.find_more(model.path):
            print(f"{more}: what is saved is for a program of your own, not for draw.py.", flush=True)
        _, took = measure.measure_load(lambda: save(model, args.out, device))
    except TutorialError as error:
        sys.exit(str(error))
    except torch.OutOfMemoryError:
        sys.exit("The card has too little memory for the largest component: quantize with --device cpu.")
    except SafetensorError as error:  # its way to say that the disk is full
        sys.exit(f"{args.out} cannot be written ({error}): free some space or {ELSEWHERE}.")
    except OSError as error:
        if error.errno is None:
            raise  # not the system's but a library's
        sys.exit(str(files.cannot_write(args.out, error, ELSEWHERE)))
    for name in filter(model.sizes.get, models.read_components(model.path)):
        before, after = model.sizes[name], sum(file.stat().st_size for file in (args.out / name).iterdir())
        kind = "nf4" if name in model.quantized else "bfloat16"
        print(f"{name:20} {files.size(before):>9} -> {files.size(after):>9}  {kind}")
    card = f"{devices.reserved_gb():.1f} GB of the card reserved, " if device == "cuda" else ""
    print(f"{args.out} is complete. At most {card}{took.host_peak_gb:.1f} GB in host memory; {took.load_s:.0f} s.")


if __name__ == "__main__":
    main()
