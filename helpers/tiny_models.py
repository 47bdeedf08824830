"""Things with random weights to try a program on: a tiny model of another family than `checkpoints/`, a LoRA."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from helpers import files

HEADS, HEAD, WIDTH = 4, 32, 128  # nf4 quantizes 64 weights at a time: widths are multiples of that
LAYERS = 27  # klein reads what layers 9, 18 and 27 of its language model give
MAX_TOKENS = 512
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_tiny_klein(folder: str | Path) -> str:
    """Write a FLUX.2 klein of a few megabytes, in bfloat16, as a repository of the Hub has it. Returns the folder.

    Its classes are those of the published model, its weights are random (of a fixed seed, which leaves the caller's
    random numbers alone), and its tokenizer has one token for each character. It draws noise.

    Raises:
        TutorialError: the folder cannot be written.
    """
    files.check_writable(Path(folder), "give another folder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=AutoencoderKLFlux2(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(16, 16, 32, 32),
                layers_per_block=1,
                latent_channels=32,
                norm_num_groups=8,
            ),
            text_encoder=Qwen3ForCausalLM(_qwen3()),
            tokenizer=_tokenizer(),
            transformer=Flux2Transformer2DModel(
                in_channels=128,
                num_layers=2,
                num_single_layers=8,
                attention_head_dim=HEAD,
                num_attention_heads=HEADS,
                joint_attention_dim=3 * WIDTH,
                axes_dims_rope=(8, 8, 8, 8),
                guidance_embeds=False,
            ),
            is_distilled=True,
        )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        part.bfloat16()
    pipeline.save_pretrained(folder)
    return str(folder)


def _qwen3() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    tokens = [*SPECIAL.values(), *(chr(code) for code in range(32, 127))]
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, model_max_length=MAX_TOKENS, chat_template=CHAT, **SPECIAL
    )


def save_random_lora(pipeline: DiffusionPipeline, folder: str | Path, rank: int) -> None:
    """Write a LoRA of random numbers for the queries and values of a FLUX transformer, in place of a trained one.

    The pipeline is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rank)
        settings = {"r": rank, "lora_alpha": rank, "init_lora_weights": False, "target_modules": ["to_q", "to_v"]}
        pipeline.transformer.add_adapter(LoraConfig(**settings), "random")
    layers = get_peft_model_state_dict(pipeline.transformer, adapter_name="random")
    pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    pipeline.transformer.delete_adapters("random")
