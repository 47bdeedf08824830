"""Everything is built at tiny sizes, with a pocket folder of its own for the tokenizers and the scheduler."""

import errno
import inspect
import json
import os
import re
import shutil
import signal
import time
from argparse import Namespace
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import CALL, WIDTH, build_tokenizer
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from diffusers.quantizers import PipelineQuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import streams, tight_limit
from tqdm import tqdm
from transformers import Qwen2Tokenizer

from benchmarks import __main__ as program
from benchmarks import random_checkpoints, strategies
from benchmarks.families import FAMILIES, QWEN_IMAGE_SENTENCE, qwen_tokenizer
from benchmarks.random_checkpoints import NF4, build
from helpers import checkpoints, devices, models
from helpers.errors import TutorialError

T5 = {"vocab_size": 64, "d_model": WIDTH, "d_kv": 32, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": 2}
DECODER = {
    "vocab_size": 1024,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
SMALL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 32,
}
# What replaces entries of the families' configurations.
TINY = {
    "flux": {
        "transformer": {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "axes_dims_rope": (8, 12, 12),
        },
        "text_encoder_2": T5,
        "text_encoder": {
            "vocab_size": 64,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "projection_dim": WIDTH,
        },
        "vae": SMALL_VAE,
    },
    "wan": {
        "transformer": {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "text_dim": WIDTH,
            "freq_dim": WIDTH,
            "ffn_dim": 2 * WIDTH,
            "num_layers": 2,
        },
        "text_encoder": T5,
        "vae": {"base_dim": 8},
    },
    "klein": {
        "transformer": {
            "in_channels": WIDTH,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 3 * WIDTH,
            "axes_dims_rope": (8, 8, 8, 8),
        },
        "text_encoder": DECODER | {"num_hidden_layers": 27, "head_dim": 32},  # the pipeline reads the 27th
        "vae": SMALL_VAE | {"latent_channels": WIDTH // 4},
    },
    "z-image": {
        # The feed-forward layers have 8/3 of the width, which must be a multiple of 64.
        "transformer": {
            "dim": 3 * WIDTH,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 6,
            "n_kv_heads": 6,
            "cap_feat_dim": WIDTH,
            "axes_dims": [8, 12, 12],
        },
        "text_encoder": DECODER | {"num_hidden_layers": 2, "head_dim": 32},
        "vae": SMALL_VAE,
    },
    "qwen-image": {
        "transformer": {
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (8, 12, 12),
        },
        "text_encoder": {
            "text_config": DECODER
            | {
                "num_hidden_layers": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
            },
        },
        "vae": {"base_dim": 8, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True]},
    },
}
TINY["flux2-dev"] = {
    "transformer": TINY["klein"]["transformer"] | {"guidance_embeds": True},
    "text_encoder": {
        "text_config": DECODER | {"num_hidden_layers": 30, "head_dim": 32},  # the pipeline reads the 30th
        "vision_config": {
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 32,
        },
    },
    "vae": TINY["klein"]["vae"],
}
TINY["wan22"] = TINY["wan"] | {"transformer_2": TINY["wan"]["transformer"]}
CALLS = {
    "flux": CALL,
    "wan": {"prompt": "cat face", "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
    "klein": {"prompt": "a cat", "height": 32, "width": 32, "max_sequence_length": 32},
    "z-image": {"prompt": "a cat", "height": 32, "width": 32, "max_sequence_length": 32},
    "qwen-image": {"prompt": "a cat", "height": 32, "width": 32, "negative_prompt": " "},
    "wan22": {"prompt": "cat face", "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
    "flux2-dev": {"prompt": "a cat", "height": 32, "width": 32, "max_sequence_length": 512},
}
# Files of the lessons' models, as bf16 and in one piece.
LESSONS = {
    "flux": "scheduler/scheduler_config.json tokenizer/tokenizer.json tokenizer/tokenizer_config.json "
    "tokenizer_2/tokenizer.json tokenizer_2/tokenizer_config.json text_encoder/config.json "
    "text_encoder/model.safetensors text_encoder_2/config.json text_encoder_2/model.safetensors "
    "transformer/config.json transformer/diffusion_pytorch_model.safetensors "
    "vae/config.json vae/diffusion_pytorch_model.safetensors",
    "wan": "scheduler/scheduler_config.json tokenizer/tokenizer.json tokenizer/tokenizer_config.json "
    "text_encoder/config.json text_encoder/model.safetensors "
    "transformer/config.json transformer/diffusion_pytorch_model.safetensors "
    "vae/config.json vae/diffusion_pytorch_model.safetensors",
}
MODELS = pytest.mark.parametrize("model", CALLS)


@pytest.fixture(scope="session")
def pocket_root(tiny_checkpoint, tmp_path_factory) -> Path:
    """A package root with the parts of the pocket models that a random checkpoint takes over."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(tiny_checkpoint, root / "checkpoints" / "pocket-flux")
    wan = root / "checkpoints" / "pocket-wan"
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    build_tokenizer(special, 16, "$A </s>").save_pretrained(wan / "tokenizer")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.save_pretrained(wan / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "transformer_2": [None, None],
    }
    (wan / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def cache(pocket_root, tmp_path, monkeypatch) -> Path:
    """The cache folder; components are tiny."""
    for model, changes in TINY.items():
        for name, change in changes.items():
            component, config = FAMILIES[model].components[name]
            monkeypatch.setitem(FAMILIES[model].components, name, (component, config | change))
    monkeypatch.setattr(checkpoints, "PACKAGE_ROOT", pocket_root)
    monkeypatch.setenv("TUTORIAL_CACHE", str(tmp_path))
    return tmp_path


def left_in(folder):
    """What a failed build left, besides the lock."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def load(folder, **changes):
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16, **changes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(model, pipeline):
    # In two steps: of a single one, Qwen-Image's scheduler makes a division by zero.
    arguments = CALLS[model] | {"num_inference_steps": 2, "output_type": "np"}
    output = pipeline.to(devices.accelerator())(**arguments, generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(output[0][0])


def read_stored(folder):
    """{name: shape and dtype} of the tensors in a component's folder, and its configuration."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                # A wider copy of the same values: libraries keep some layers in float32.
                kind = "float" if tensor.dtype in (torch.bfloat16, torch.float32) else str(tensor.dtype)
                tensors[name] = (tuple(tensor.shape), kind)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    return tensors, config


def quantized_layers(module):
    return {name for name, layer in module.named_modules() if isinstance(layer, Linear4bit)}


# The real sizes


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("flux", {"transformer": 11.90, "text_encoder_2": 4.76, "text_encoder": 0.123, "vae": 0.0838}),
        ("wan", {"transformer": 14.29, "text_encoder": 5.68, "vae": 0.1269}),
        # GB of the published files, at 2 bytes a parameter:
        # https://smeltcore.com/recipes/flux-2-klein-4b-on-rtx-4090-bf16-full-resident-4-step-text-to-image-via-diffusers-or-comfyui/
        ("klein", {"transformer": 7.75 / 2, "text_encoder": 8.05 / 2, "vae": 0.168 / 2}),
        # The text encoder is klein's, the VAE that of FLUX.1:
        # https://sumitkant.github.io/Blogs/AI-ML/Eight-Steps-to-a-Picture-Z-Image-Turbo.html
        ("z-image", {"transformer": 6.15, "text_encoder": 8.05 / 2, "vae": 0.0838}),
        # The VAE has the layers of Wan's: https://willitrunai.com/de/blog/qwen-image-local-guide
        ("qwen-image", {"transformer": 20.4, "text_encoder": 8.3, "vae": 0.1269}),
        ("wan22", {"transformer": 14.29, "transformer_2": 14.29, "text_encoder": 5.68, "vae": 0.1269}),
        # Published as 32 and 24 billion: https://awesomeagents.ai/models/flux-2-dev
        ("flux2-dev", {"transformer": 32, "text_encoder": 24, "vae": 0.168 / 2}),
    ],
)
def test_parameter_counts_are_the_published_ones(model, published):
    billions = {name: count / 1e9 for name, count in random_checkpoints.count_parameters(model).items()}
    assert billions == pytest.approx(published, rel=1e-2 if model == "flux2-dev" else 1.5e-3)
    # The table of GB in the program's help.
    bf16, nf4 = re.search(rf"^    {model} +.* (\d+) +(\d+)$", random_checkpoints.__doc__, re.MULTILINE).groups()
    assert abs(int(bf16) - 2 * sum(billions.values())) < 0.55
    parts = [random_checkpoints.create(model, name, nf4=True) for name in FAMILIES[model].components]
    size = sum(random_checkpoints.stored_bytes(tensor) for part in parts for tensor in part.parameters())
    assert abs(int(nf4) - size / 1e9) < 0.55


@pytest.mark.parametrize(
    ("model", "nf4", "needed"), [("flux", False, 34.7), ("flux", True, 12.4), ("wan", False, 41.2), ("wan", True, 15.5)]
)
def test_too_small_a_disk(model, nf4, needed, pocket_root, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoints, "PACKAGE_ROOT", pocket_root)
    monkeypatch.setenv("TUTORIAL_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 3 * 10**9))
    with pytest.raises(TutorialError, match=rf"needs {needed} GB of disk .* has 3.0 GB free"):
        build(model, nf4)
    assert left_in(tmp_path) == []


@MODELS
def test_all_that_has_values_is_stored(model):
    for name in FAMILIES[model].components:
        module = random_checkpoints.create(model, name)
        shared = {name for name, _ in module.named_parameters(remove_duplicate=False)} - dict(
            module.named_parameters()
        ).keys()
        assert random_checkpoints.stored_tensors(module).keys() == set(module.state_dict()) - shared


# What is written


@MODELS
def test_checkpoint_is_what_the_libraries_save(model, cache, tmp_path):
    """bf16 and nf4: the same tensors and configurations as a pipeline's own, the same layers, the same weights."""
    folder, nf4_folder = build(model), build(model, nf4=True)
    assert (folder.name, nf4_folder.name) == (f"random-{model}", f"random-{model}-nf4")
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit", quant_kwargs=NF4, components_to_quantize=list(FAMILIES[model].quantized)
    )
    plain, quantized, stored = load(folder), load(folder, quantization_config=config), load(nf4_folder)

    for pipeline, written in ((plain, folder), (quantized, nf4_folder)):
        saved = tmp_path / "saved" / written.name
        pipeline.save_pretrained(saved)
        for name in FAMILIES[model].components:
            assert read_stored(written / name) == read_stored(saved / name), name

    assert devices.component_footprints(stored) == devices.component_footprints(quantized)
    assert all("nf4" in devices.footprint(getattr(stored, name)) for name in FAMILIES[model].quantized)
    for name, module in devices.component_modules(stored).items():
        reference = getattr(quantized, name)
        assert quantized_layers(module) == quantized_layers(reference)
        assert bool(quantized_layers(module)) == (name in FAMILIES[model].quantized)
        assert all(map(torch.equal, module.state_dict().values(), reference.state_dict().values())), name

    for pipeline in (plain, stored):
        assert draw(model, pipeline).isfinite().all()
    assert torch.equal(draw(model, stored), draw(model, quantized))


@pytest.mark.parametrize("model", LESSONS)
@pytest.mark.parametrize("nf4", [False, True])
def test_large_components_are_several_files(model, nf4, cache, monkeypatch):
    for size in ("FILE_SIZE", "NF4_FILE_SIZE"):
        monkeypatch.setattr(random_checkpoints, size, 20_000)
    monkeypatch.setitem(FAMILIES[model].file_sizes, "transformer", 20_000)
    folder = build(model, nf4)
    for name in FAMILIES[model].quantized:
        files = list((folder / name).glob("*.safetensors"))
        assert len(files) > 1
        largest = max(map(random_checkpoints.stored_bytes, random_checkpoints.create(model, name, nf4).parameters()))
        assert max(file.stat().st_size for file in files) < max(20_000, largest) + 10_000  # the headers
    assert draw(model, load(folder)).isfinite().all()


def test_a_file_is_aligned_and_read_back(tmp_path):
    tensors = {
        "packed": torch.arange(3, dtype=torch.uint8).reshape(3, 1),
        "half": torch.randn(5).to(torch.bfloat16),
        "scales": torch.randn(2, 3),
    }
    for length in range(1, 9):  # of a name, so that headers of all lengths occur
        path = tmp_path / "file.safetensors"
        random_checkpoints.write_file(path, {"x" * length: torch.ones(1), **tensors}, tqdm(disable=True))
        read = load_file(path)
        assert read.keys() == {"x" * length, *tensors}
        assert all(read[name].dtype == tensor.dtype for name, tensor in tensors.items())
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        assert size % 8 == 0
        header = json.loads(content[8 : 8 + size])
        assert all(header[name]["data_offsets"][0] % tensor.element_size() == 0 for name, tensor in tensors.items())


def test_weights_are_random_and_norms_are_ones(cache):
    generator = torch.Generator().manual_seed(0)
    module = random_checkpoints.create("wan", "vae")
    made = {
        name: random_checkpoints.random_tensor(name, parameter, generator)
        for name, parameter in module.named_parameters()
    }
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert made["decoder.conv_in.weight"].float().std() == pytest.approx(0.02, rel=0.1)
    assert made["decoder.conv_in.bias"].eq(0).all() and made["encoder.norm_out.gamma"].eq(1).all()
    assert random_checkpoints.random_tensor("norm.weight", torch.empty(4), generator).eq(1).all()


@pytest.mark.parametrize(("model", "files"), LESSONS.items())
def test_the_lessons_models_are_the_same_files_as_ever(model, files, cache):
    """Same names, same numbers: recorded rows and weights saved as nf4 stay those of the checkpoint."""
    folder = build(model)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*")) == sorted(files.split())
    assert json.loads((folder / "model_index.json").read_text()) == json.loads(
        (checkpoints.PACKAGE_ROOT / "checkpoints" / f"pocket-{model}" / "model_index.json").read_text()
    )
    for name in FAMILIES[model].components:
        generator = torch.Generator(devices.accelerator()).manual_seed(0)
        stored = load_file(next((folder / name).glob("*.safetensors")))
        parameters = dict(random_checkpoints.create(model, name).named_parameters())
        assert stored.keys() == parameters.keys()
        for key, parameter in parameters.items():
            expected = torch.full(parameter.shape, 1.0 if key.endswith(("weight", "gamma")) else 0.0).bfloat16()
            if parameter.dim() > 1 and not key.endswith("gamma"):
                expected = expected.to(generator.device).normal_(0, 0.02, generator=generator).cpu()
            assert torch.equal(stored[key], expected), key


def test_statistics_of_a_norm_change_nothing(cache):
    vae = load_file(build("klein") / "vae" / "diffusion_pytorch_model.safetensors")
    assert vae["bn.running_mean"].eq(0).all() and vae["bn.running_var"].eq(1).all()
    assert vae["bn.num_batches_tracked"].dtype == torch.int64 and vae["bn.num_batches_tracked"] == 0


# What stands in for a tokenizer


def test_words_of_the_prompts_are_one_token_each():
    tokenizer = qwen_tokenizer()
    assert type(tokenizer) is Qwen2Tokenizer
    for family in FAMILIES.values():
        for prompt in family.checkpoint.prompts if not family.pocket else ():
            words = re.findall(r"\w+|[^\w\s]", prompt)
            assert len(tokenizer(prompt).input_ids) == len(words)
    assert len(tokenizer("zyx").input_ids) == 3  # another word
    assert tokenizer.decode(tokenizer("a zyx, ééé").input_ids) == "a zyx, ééé"


def test_qwen_image_drops_what_is_before_the_prompt(cache):
    pipeline = load(build("qwen-image"))
    before = pipeline.prompt_template_encode.split("{}")[0]
    assert QWEN_IMAGE_SENTENCE in before
    assert len(pipeline.tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx
    embeddings, _ = pipeline.encode_prompt("a cat in a pool")
    assert embeddings.shape[1] == 5 + len(pipeline.tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids)


# The benchmark


NEWER = [model for model, family in FAMILIES.items() if model not in LESSONS]


@pytest.mark.parametrize("model", NEWER)
@pytest.mark.parametrize("ending", ["", "-nf4"])
def test_the_benchmark_finds_them_and_the_lessons_do_not(model, ending, monkeypatch):
    built = []
    monkeypatch.setattr(random_checkpoints, "build", lambda *arguments: built.append(arguments) or "folder")
    monkeypatch.setattr(program.models, "call_parameters", lambda path: {})
    args = Namespace(
        checkpoint=f"random-{model}{ending}", prompt=None, height=None, width=None, frames=None, steps=None
    )
    checkpoint = program.choose_checkpoint(args)
    assert built == [(model, bool(ending))] and checkpoint == replace(FAMILIES[model].checkpoint, path="folder")
    call = checkpoint.call_arguments
    parameters = inspect.signature(getattr(diffusers, FAMILIES[model].pipeline or "WanPipeline").__call__).parameters
    assert {"height", "width", "num_inference_steps", "max_sequence_length"} <= call.keys() <= parameters.keys()
    with pytest.raises(TutorialError, match=f"no model '{model}': ask get_checkpoint for 'flux' or 'wan'"):
        checkpoints.get_checkpoint(model)


@pytest.mark.skipif(devices.accelerator().type != "cpu", reason="a GPU's pages are larger than these models")
@pytest.mark.parametrize("model", NEWER)
def test_a_streamed_checkpoint_draws_what_the_resident_one_draws(model, cache):
    call = CALLS[model] | {"num_inference_steps": 2}
    for start, folder in (("saved nf4", build(model, nf4=True)), ("bf16", build(model))):
        found = models.find_model(str(folder))
        assert found.quantized == FAMILIES[model].quantized and found.is_quantized == (start == "saved nf4")
        arguments = asdict(replace(found, saved=str(folder)))
        limit = tight_limit(load(folder), call)
        resident, streamed = (
            strategies.assemble(f"{start}, {place}, eager", arguments, call)
            for place in ("resident", f"streamed, {limit:.9f} GB")
        )
        assert streams(streamed, found.denoisers)
        assert torch.equal(draw(model, streamed), draw(model, resident))


# Building


def test_build_is_made_once_with_a_message_and_a_bar(cache, capsys, monkeypatch):
    folder = build("flux")
    printed = capsys.readouterr()
    assert f"into {cache}." in printed.out and "Writing random-flux, 1.2 MB" in printed.out
    bar = printed.err.split("\r")[-1]
    assert "100%" in bar and "vae" in bar
    changed = (folder / "vae" / "config.json").stat().st_mtime_ns
    assert build("flux") == folder and (folder / "vae" / "config.json").stat().st_mtime_ns == changed
    assert capsys.readouterr() == ("", "")
    with monkeypatch.context() as patch:
        patch.delattr(random_checkpoints, "WeakFileLock")  # nothing is written: a cache that is read-only will do
        build("flux")

    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    build("flux")
    assert checkpoints.find_fault(folder) is None


def test_bar_moves_inside_a_component(cache, tmp_path):
    class Bar:
        moves = []

        def update(self, size):
            self.moves.append(size)

    module = random_checkpoints.create("flux", "transformer", nf4=True)
    total = sum(map(random_checkpoints.stored_bytes, module.parameters()))
    random_checkpoints.write_component(module, tmp_path / "new", 5e9, Bar())
    assert len(Bar.moves) > 50 and max(Bar.moves) < total / 5
    assert sum(Bar.moves) == pytest.approx(total, rel=0.2)  # the small tables are not small beside these weights


def test_a_killed_build_is_noticed_and_redone(cache, monkeypatch):
    ready = cache / "ready.lock"
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cpu"))  # a fork cannot use CUDA
    write_component = random_checkpoints.write_component

    def stop_at_the_second(module, folder, *arguments, **settings):
        if folder.name == "text_encoder_2":
            folder.mkdir()
            ready.touch()
            time.sleep(60)
        write_component(module, folder, *arguments, **settings)

    child = os.fork()
    if child == 0:
        try:
            random_checkpoints.write_component = stop_at_the_second
            build("flux")
        finally:  # whatever goes wrong: this process must not go on with the other tests
            os._exit(1)
    try:
        deadline = time.monotonic() + 30
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(TutorialError, match="Another process is building .*random-flux"):
            build("flux")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert left_in(cache) == ["random-flux.part"]
    assert (cache / "random-flux.part" / "transformer").is_dir()
    monkeypatch.setenv("TUTORIAL_MODELS", "random")
    with pytest.raises(TutorialError, match="it has not been built.*random_checkpoints flux`"):
        checkpoints.get_checkpoint("flux")

    assert checkpoints.find_fault(build("flux")) is None
    assert left_in(cache) == ["random-flux"]
    assert checkpoints.get_checkpoint("flux").path == str(cache / "random-flux")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            r"cannot be written \(the disk is full\): free some space or set",
        ),
        (OSError(errno.EIO, os.strerror(errno.EIO)), r"cannot be written \(Input/output error\): set TUTORIAL_CACHE"),
        (KeyboardInterrupt(), "Interrupted: what was written is removed"),
    ],
)
def test_an_error_half_way_is_one_sentence_and_leaves_nothing(error, message, cache, monkeypatch):
    write_file = random_checkpoints.write_file

    def fail_at_the_second(path, *arguments):
        if path.parent.name == "text_encoder_2":
            path.write_bytes(b"half")
            raise error
        write_file(path, *arguments)

    monkeypatch.setattr(random_checkpoints, "write_file", fail_at_the_second)
    monkeypatch.setattr("sys.argv", ["random_checkpoints", "flux", "--nf4"])
    with pytest.raises(SystemExit, match=message):
        random_checkpoints.main()
    assert left_in(cache) == []


def test_a_missing_pocket_model_is_named(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PACKAGE_ROOT", tmp_path)
    with pytest.raises(TutorialError, match="git checkout -- checkpoints/pocket-wan"):
        build("wan")
    assert left_in(cache) == []


def test_command_line(cache, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["random_checkpoints", "wan", "--nf4"])
    random_checkpoints.main()
    assert capsys.readouterr().out.endswith(f"The checkpoint is in {cache / 'random-wan-nf4'}\n")
