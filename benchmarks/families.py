"""The models that `benchmarks.random_checkpoints` writes: their shapes, what is quantized, and the usual call.

A new one is one entry of `FAMILIES`. The shapes are those of the repository that it names, on https://huggingface.co:
what is published and what the libraries have as defaults. A test compares the numbers of parameters. What has no
weights:

- "flux" and "wan" take tokenizers and scheduler from the pocket models, and so does what is built like them.
- The others have the scheduler that their entry describes, and `qwen_tokenizer` stands in for their tokenizer.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5EncoderModel,
    UMT5EncoderModel,
)

from helpers.checkpoints import CHECKPOINTS, FULL_FLUX, Checkpoint


@dataclass(frozen=True)
class Family:
    """A model as it is written with random weights.

    Attributes:
        repository: where it is published.
        components: name to class and configuration, of those that have weights.
        checkpoint: how it is called; its path is the name of the checkpoint, "random-" and the name of the model.
        quantized: the components that `--nf4` writes in 4 bits.
        pocket: the model whose pocket checkpoint gives tokenizers, scheduler and index; or "".
        pipeline: class of the pipeline, without a pocket model.
        scheduler: configuration of its FlowMatchEulerDiscreteScheduler, without a pocket model.
        settings: what else the index of the pipeline says.
        steps: what its authors advise, where the checkpoint has fewer.
        file_sizes: largest file of a component's weights, in bytes, where it is not `random_checkpoints.FILE_SIZE`.
    """

    repository: str
    components: dict[str, tuple[type, dict[str, Any]]]
    checkpoint: Checkpoint
    quantized: tuple[str, ...] = ("transformer", "text_encoder")
    pocket: str = ""
    pipeline: str = ""
    scheduler: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    file_sizes: dict[str, float] = field(default_factory=dict)


def picture(model: str, **settings: Any) -> Checkpoint:
    """The usual call of a model that draws FLUX's prompts; a call takes 1024 x 1024 pixels if `settings` do not say."""
    usual = {"height": 1024, "width": 1024, "max_sequence_length": 512}
    return Checkpoint(model, "random", f"random-{model}", FULL_FLUX.prompts, **usual | settings)


# Qwen-Image's pipeline puts the prompt into this sentence, and drops the 34 tokens before the prompt.
QWEN_IMAGE_SENTENCE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content if message.content is string else message.content[0].text }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """A small tokenizer of Qwen's class, in place of those of Qwen2.5-VL, Qwen3 and Mistral 3, which are downloads.

    Its rules and special tokens are Qwen's. Its few hundred tokens are learnt from the prompts here, so that each word
    of them is one token, as nearly all are for the published one: Z-Image and Qwen-Image compute on as many tokens as
    the prompt has, the others on 512. In a prompt of your own a word that is not here takes a token for each of its
    letters or so. The chat template is Qwen's without tools and thoughts. FLUX.2-dev has a processor of text and
    pictures in its place, from Mistral: without a picture it does the same work.
    """
    texts = [*FULL_FLUX.prompts, QWEN_IMAGE_SENTENCE, *("system\n", "user\n", "assistant\n")]
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size=4000, new_special_tokens=special, show_progress=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# The encoders of T5 XXL and UMT5 XXL differ in their vocabulary, and UMT5 has a position bias in each layer.
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
FLUX_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
WAN_14B = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
WAN_VAE = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
FLUX2_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}

FAMILIES = {
    "flux": Family(
        repository="black-forest-labs/FLUX.1-dev",
        checkpoint=CHECKPOINTS["flux", "random"],
        quantized=("transformer", "text_encoder_2"),
        pocket="flux",
        file_sizes={"transformer": 10e9},
        components={
            "transformer": (
                FluxTransformer2DModel,
                {
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768,
                    "guidance_embeds": True,
                },
            ),
            "text_encoder_2": (T5EncoderModel, {"vocab_size": 32128, **T5_XXL}),
            "text_encoder": (
                CLIPTextModel,
                {
                    "vocab_size": 49408,
                    "hidden_size": 768,
                    "intermediate_size": 3072,
                    "num_hidden_layers": 12,
                    "num_attention_heads": 12,
                    "projection_dim": 768,
                    # Those of the pocket model's tokenizer.
                    "pad_token_id": 0,
                    "eos_token_id": 1,
                    "bos_token_id": 2,
                },
            ),
            "vae": (AutoencoderKL, FLUX_VAE),
        },
    ),
    "wan": Family(
        repository="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        checkpoint=CHECKPOINTS["wan", "random"],
        pocket="wan",
        components={
            "transformer": (WanTransformer3DModel, WAN_14B),
            "text_encoder": (UMT5EncoderModel, {"vocab_size": 256384, **T5_XXL}),
            "vae": (AutoencoderKLWan, WAN_VAE),
        },
    ),
    "klein": Family(
        repository="black-forest-labs/FLUX.2-klein-4B",
        checkpoint=picture("klein", num_inference_steps=4, guidance_scale=1.0),
        pipeline="Flux2KleinPipeline",
        scheduler=FLUX2_SCHEDULER,
        settings={"is_distilled": True},
        file_sizes={"transformer": 10e9},
        components={
            "transformer": (
                Flux2Transformer2DModel,
                {
                    "num_layers": 5,
                    "num_single_layers": 20,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 3 * 2560,  # three layers of the text encoder
                    "guidance_embeds": False,
                },
            ),
            "text_encoder": (Qwen3ForCausalLM, QWEN3_4B),
            "vae": (AutoencoderKLFlux2, {}),
        },
    ),
    "z-image": Family(
        repository="Tongyi-MAI/Z-Image-Turbo",
        checkpoint=picture("z-image", num_inference_steps=9, guidance_scale=0.0),
        pipeline="ZImagePipeline",
        scheduler={"shift": 3.0},
        components={
            "transformer": (ZImageTransformer2DModel, {}),
            "text_encoder": (Qwen3Model, QWEN3_4B),
            "vae": (AutoencoderKL, FLUX_VAE),
        },
    ),
    "qwen-image": Family(
        repository="Qwen/Qwen-Image",
        # With a negative prompt it computes each step twice.
        checkpoint=picture("qwen-image", height=1328, width=1328, num_inference_steps=50, negative_prompt=" "),
        pipeline="QwenImagePipeline",
        scheduler={"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
        components={
            "transformer": (QwenImageTransformer2DModel, {}),
            "text_encoder": (
                Qwen2_5_VLForConditionalGeneration,
                {
                    "text_config": {
                        "vocab_size": 152064,
                        "hidden_size": 3584,
                        "intermediate_size": 18944,
                        "num_hidden_layers": 28,
                        "num_attention_heads": 28,
                        "num_key_value_heads": 4,
                        "max_position_embeddings": 128000,
                        "rms_norm_eps": 1e-6,
                        "rope_parameters": {
                            "rope_type": "default",
                            "rope_theta": 1e6,
                            "mrope_section": [16, 24, 24],
                        },
                    },
                    "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "tokens_per_second": 2},
                },
            ),
            "vae": (AutoencoderKLQwenImage, {}),
        },
    ),
    "wan22": Family(
        repository="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        # Of three steps the first is that of one transformer, the others are those of the other.
        checkpoint=replace(CHECKPOINTS["wan", "random"], model="wan22", path="random-wan22", guidance_scale=4.0),
        quantized=("transformer", "transformer_2", "text_encoder"),
        pocket="wan",
        settings={"boundary_ratio": 0.875},
        steps=40,
        components={
            "transformer": (WanTransformer3DModel, WAN_14B),
            "transformer_2": (WanTransformer3DModel, WAN_14B),
            "text_encoder": (UMT5EncoderModel, {"vocab_size": 256384, **T5_XXL}),
            "vae": (AutoencoderKLWan, WAN_VAE),
        },
    ),
    "flux2-dev": Family(
        repository="black-forest-labs/FLUX.2-dev",
        checkpoint=picture("flux2-dev", num_inference_steps=28, guidance_scale=4.0),
        pipeline="Flux2Pipeline",
        scheduler=FLUX2_SCHEDULER,
        components={
            "transformer": (Flux2Transformer2DModel, {}),
            # Mistral Small 3 is the default, but for its last layer.
            "text_encoder": (Mistral3ForConditionalGeneration, {"tie_word_embeddings": False}),
            "vae": (AutoencoderKLFlux2, {}),
        },
    ),
}
