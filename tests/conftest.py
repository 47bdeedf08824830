"""Fixtures: a tiny, untrained FLUX checkpoint with the architecture of the real one, built in a temporary folder.

Nothing here needs the network or the trained checkpoints of the repository.
"""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.quantizers import PipelineQuantizationConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from helpers import checkpoints, checks, cpu_backend
from helpers.errors import TutorialError

# A shell starts a job in the background with Ctrl-C ignored, and so would be the programs that the tests stop by it.
signal.signal(signal.SIGINT, signal.default_int_handler)


cpu_backend.enable()


@pytest.fixture(autouse=True)
def whole_card():
    """A limit on the memory of this process, which streamed placements and programs set, ends with the test."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def one_thread():
    """So small operations are no faster with more, and far slower where another process has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WIDTH = 64  # every inner dimension is a multiple of 64, the nf4 block
WORDS = ["cat", "dog", "face", "on", "a", "yellow", "blue", "background"]
CALL = {
    "prompt": "cat face on a yellow background",
    "height": 32,
    "width": 32,
    "num_inference_steps": 3,
    "guidance_scale": 3.5,
    "max_sequence_length": 16,
}


def build_tokenizer(special: dict[str, str], max_length: int, template: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `template` says where the special tokens go, in the syntax of `tokenizers`."""
    tokens = [*special.values(), *WORDS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in set(special.values())]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **special)


def build_pipeline() -> FluxPipeline:
    """A FLUX pipeline with random weights of a fixed seed, two double and two single blocks."""
    torch.manual_seed(0)
    clip_special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    t5_special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=16,
            norm_num_groups=8,
            sample_size=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1,
            scaling_factor=0.36,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=64,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                projection_dim=WIDTH,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ),
        tokenizer=build_tokenizer(clip_special, 16, "<s> $A </s>"),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=64,
                d_model=WIDTH,
                d_kv=32,
                d_ff=2 * WIDTH,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_2=build_tokenizer(t5_special, 16, "$A </s>"),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=WIDTH // 32,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
    ).to(torch.bfloat16)


def nf4_config() -> PipelineQuantizationConfig:
    """The quantization of the lessons: nf4 on the transformer and the large text encoder."""
    return PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        components_to_quantize=["transformer", "text_encoder_2"],
    )


def draw(pipeline, **changes):
    """One small picture as an array of shape (height, width, 3) in 0..1."""
    arguments = {**CALL, "output_type": "np", "generator": torch.Generator().manual_seed(0), **changes}
    return pipeline(**arguments).images[0]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Folder of the tiny FLUX checkpoint in diffusers format. Read only: copy it before you change it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-flux"
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def bf16_pipeline(tiny_checkpoint) -> FluxPipeline:
    """The tiny pipeline in bf16, fresh for each test."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def nf4_pipeline(tiny_checkpoint) -> FluxPipeline:
    """The tiny pipeline with nf4 transformer and text_encoder_2, fresh for each test."""
    pipeline = DiffusionPipeline.from_pretrained(
        tiny_checkpoint, dtype=torch.bfloat16, quantization_config=nf4_config()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pocket(tmp_path, monkeypatch, tiny_checkpoint) -> Path:
    """A copy of the tiny checkpoint where the pocket checkpoint belongs, in a repository of its own."""
    for name in ("TUTORIAL_MODELS", "TUTORIAL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "repository" / "checkpoints" / "pocket-flux"
    shutil.copytree(tiny_checkpoint, folder)
    for module in (checkpoints, checks):
        monkeypatch.setattr(module, "PACKAGE_ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    return folder


def message_of(function, *arguments) -> str:
    """The text of the TutorialError that the call raises, which must be one sentence."""
    with pytest.raises(TutorialError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text
    return text
