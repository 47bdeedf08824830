"""Tiny pipelines of many families with random weights, for tests: seconds to build, about a second to call on a CPU.

`FAMILIES` maps a name to a function that builds the pipeline; `CALLS` has the arguments that keep a call small. Nothing
here needs the network.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    ModelMixin,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.schedulers import SchedulerMixin
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import devices
from helpers.streaming import fill_card

WIDTH = 64  # every inner dimension is a multiple of 64, the nf4 block
HEAD = 32
ROPE = (8, 12, 12)  # adds up to HEAD
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
VOCABULARY = 128
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SETTINGS = [  # with which a scheduler draws noise, steps along a flow, or can take few steps
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"} | FLOW),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("UniPCMultistepScheduler", FLOW),
]
CALLS = {
    "sd3": {"height": 32, "width": 32},
    "sdxl": {"height": 32, "width": 32},
    "pixart": {"height": 256, "width": 256},
    "ltx": {"height": 32, "width": 32, "num_frames": 9},
    # No guidance by skipped layers: its default layer is the 28th, and a tiny transformer has two.
    "ltx2": {"height": 64, "width": 64, "num_frames": 9, "stg_scale": 0.0, "audio_stg_scale": 0.0},
    "hunyuan-video": {"height": 32, "width": 32, "num_frames": 5},
    "qwen-image": {"height": 32, "width": 32},
    "flux2": {"height": 32, "width": 32},
    "lumina2": {"height": 32, "width": 32},
    "wan22": {"height": 32, "width": 32, "num_frames": 5},
    "z-image": {"height": 32, "width": 32},
}


def tokenizer(max_length: int = 77) -> PreTrainedTokenizerFast:
    """One token for each character: long templates stay long, as some pipelines cut their start off."""
    tokens = [*SPECIAL.values(), *(chr(code) for code in range(32, 127))]
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        model_max_length=max_length,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        **SPECIAL,
    )


def clip(projection: bool = True) -> transformers.PreTrainedModel:
    """A CLIP text encoder, with or without its projection."""
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        **IDS,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5(width: int = WIDTH) -> transformers.T5EncoderModel:
    """A T5 text encoder."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=32, d_ff=4 * WIDTH, num_layers=4, num_heads=2, is_gated_act=True
    )
    return transformers.T5EncoderModel(config)


def decoder(config_class: type, **changes) -> transformers.PretrainedConfig:
    """Configuration of a small language model."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4, "head_dim": HEAD}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return config_class(**(sizes | heads | IDS | changes))


def autoencoder(latent_channels: int, blocks: int = 2) -> AutoencoderKL:
    """The image autoencoder of most families; each block after the first halves the picture."""
    return AutoencoderKL(
        block_out_channels=(16,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=32,
        shift_factor=0.1,
    )


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: two CLIPs and a T5."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            num_layers=2,
            attention_head_dim=HEAD,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(16),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(2 * WIDTH),
        tokenizer_3=tokenizer(),
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: a UNet and two CLIPs."""
    return StableDiffusionXLPipeline(
        vae=autoencoder(4),
        text_encoder=clip(projection=False),
        tokenizer=tokenizer(),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(WIDTH, 2 * WIDTH),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=6 * 32 + WIDTH,
            cross_attention_dim=2 * WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(),
    )


def pixart() -> PixArtSigmaPipeline:
    """PixArt-Sigma: a T5 alone. It draws at sizes of its own, 256 x 256 here."""
    return PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=autoencoder(4, blocks=4),
        transformer=PixArtTransformer2DModel(
            sample_size=32,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=HEAD,
            cross_attention_dim=WIDTH,
            caption_channels=WIDTH,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )


def ltx() -> LTXPipeline:
    """LTX-Video."""
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTXVideo(
            latent_channels=WIDTH,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=2,
        ),
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=LTXVideoTransformer3DModel(
            in_channels=WIDTH,
            out_channels=WIDTH,
            num_attention_heads=2,
            attention_head_dim=HEAD,
            cross_attention_dim=WIDTH,
            num_layers=2,
            caption_channels=WIDTH,
        ),
    )


def ltx2() -> LTX2Pipeline:
    """LTX-2: video with sound. It copies its scheduler, and one of the two steps the latents of the sound."""
    gemma = transformers.Gemma3Config(
        text_config=decoder(transformers.Gemma3TextConfig, num_hidden_layers=2).to_dict(),
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        mm_tokens_per_image=4,
    )
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLLTX2Video(
            latent_channels=WIDTH,
            block_out_channels=(8, 16, 32, 64),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 4,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=WIDTH, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=16, resolution=32, mel_bins=16
        ),
        text_encoder=transformers.Gemma3ForConditionalGeneration(gemma),
        tokenizer=tokenizer(),
        connectors=LTX2TextConnectors(
            caption_channels=WIDTH,
            text_proj_in_factor=3,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=HEAD,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=HEAD,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
        ),
        transformer=LTX2VideoTransformer3DModel(
            in_channels=WIDTH,
            out_channels=WIDTH,
            num_attention_heads=2,
            attention_head_dim=HEAD,
            cross_attention_dim=WIDTH,
            audio_in_channels=WIDTH,
            audio_out_channels=WIDTH,
            audio_num_attention_heads=2,
            audio_attention_head_dim=HEAD,
            audio_cross_attention_dim=WIDTH,
            num_layers=2,
            caption_channels=WIDTH,
        ),
        vocoder=LTX2Vocoder(
            in_channels=32,
            hidden_channels=16,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
        ),
    )


def hunyuan_video() -> HunyuanVideoPipeline:
    """HunyuanVideo: a Llama and a CLIP."""
    return HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel(decoder(transformers.LlamaConfig)),
        tokenizer=tokenizer(),
        transformer=HunyuanVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=HEAD,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            rope_axes_dim=ROPE,
        ),
        vae=AutoencoderKLHunyuanVideo(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=clip(projection=False),
        tokenizer_2=tokenizer(),
    )


def qwen_image() -> QwenImagePipeline:
    """Qwen-Image: a vision-language model reads the prompt."""
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "rope_scaling": {"type": "default", "mrope_section": [4, 6, 6], "rope_type": "default"},
        "rope_theta": 1000000.0,
    }
    vision = {"depth": 2, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=3, vision_end_token_id=3, vision_token_id=3
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(
            base_dim=24,
            z_dim=16,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer(1024),
        transformer=QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=HEAD,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=ROPE,
        ),
    )


def flux2() -> Flux2KleinPipeline:
    """FLUX.2 klein: three layers of a Qwen3, of which it reads the 27th, make its text."""
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 16),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=8,
        ),
        text_encoder=transformers.Qwen3ForCausalLM(
            decoder(transformers.Qwen3Config, num_hidden_layers=27, tie_word_embeddings=True)
        ),
        tokenizer=tokenizer(512),
        transformer=Flux2Transformer2DModel(
            in_channels=WIDTH,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=HEAD,
            num_attention_heads=2,
            joint_attention_dim=3 * WIDTH,
            axes_dims_rope=(8, 8, 8, 8),
            guidance_embeds=False,
        ),
    )


def lumina2() -> Lumina2Pipeline:
    """Lumina 2: a Gemma 2."""
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=16,
            hidden_size=WIDTH,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=64,
            axes_dim_rope=ROPE,
            cap_feat_dim=WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(16, blocks=4),
        text_encoder=transformers.Gemma2Model(decoder(transformers.Gemma2Config)),
        tokenizer=tokenizer(),
    )


def wan22() -> WanPipeline:
    """Wan 2.2: two transformers, one for the noisy steps and one for the rest."""
    umt5 = transformers.UMT5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=32, d_ff=4 * WIDTH, num_layers=4, num_heads=2
    )

    def denoiser() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=HEAD, text_dim=WIDTH, freq_dim=64, ffn_dim=2 * WIDTH, num_layers=2
        )

    return WanPipeline(
        tokenizer=tokenizer(512),
        text_encoder=transformers.UMT5EncoderModel(umt5),
        vae=AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=denoiser(),
        transformer_2=denoiser(),
        boundary_ratio=0.875,
    )


def z_image() -> ZImagePipeline:
    """Z-Image: refiners of text and of picture, and blocks of both. Its feed-forward layers have 8/3 of the width."""
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16),
        text_encoder=transformers.Qwen3Model(decoder(transformers.Qwen3Config)),
        tokenizer=tokenizer(),
        transformer=ZImageTransformer2DModel(
            dim=3 * WIDTH,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=6,
            n_kv_heads=6,
            cap_feat_dim=WIDTH,
            axes_dims=ROPE,
        ),
    )


FAMILIES = {
    "sd3": sd3,
    "sdxl": sdxl,
    "pixart": pixart,
    "ltx": ltx,
    "ltx2": ltx2,
    "hunyuan-video": hunyuan_video,
    "qwen-image": qwen_image,
    "flux2": flux2,
    "lumina2": lumina2,
    "wan22": wan22,
    "z-image": z_image,
}


def schedulers(pipeline) -> dict[str, SchedulerMixin]:
    """Every scheduler of diffusers that can be made from the configuration of the pipeline's own, by its name."""
    plain = [(name, {}) for name in dir(diffusers.schedulers) if name.endswith("Scheduler")]
    made = {}
    for name, settings in [*plain, *SETTINGS]:
        try:
            made[f"{name} {settings}"] = getattr(diffusers, name).from_config(pipeline.scheduler.config, **settings)
        except Exception:  # a library that is not installed, or a configuration of another kind
            continue
    return made


def build(family: str) -> DiffusionPipeline:
    """The pipeline of a family, with weights of a fixed seed, in bfloat16."""
    torch.manual_seed(0)
    return FAMILIES[family]().to(torch.bfloat16)


def save(family: str, folder: Path) -> Path:
    """Writes the checkpoint of a family into `folder`, which is returned."""
    build(family).save_pretrained(folder)
    return folder


def encode_once(pipeline: DiffusionPipeline) -> None:
    """Let a pipeline keep what its text encoders make of the first prompt: it takes most of the time of a call."""
    encode, encoded = pipeline.encode_prompt, []

    def encode_prompt(*args, **kwargs) -> Any:
        if not encoded:
            encoded.append(encode(*args, **kwargs))
        return encoded[0]

    pipeline.encode_prompt = encode_prompt


def tight_limit(pipeline: DiffusionPipeline, call: dict[str, Any]) -> float:
    """GB that leave little room for blocks of the denoisers, so that most are streamed.

    Two on a GPU, whose pages are larger than tiny models: all of them fit.
    """
    if devices.accelerator().type != "cpu":
        return 2.0
    filled = fill_card(pipeline, 50, **call)
    denoisers = [part for part in filled.parts.values() if isinstance(part.model, ModelMixin)]
    blocks = sum(parcel.bytes for part in denoisers for parcel in part.parcels)
    filled.remove()
    return filled.least_gb + 0.05 * blocks / devices.GB


def streams(pipeline: DiffusionPipeline, denoisers: tuple[str, ...]) -> bool:
    """Whether blocks of each of these components are streamed."""
    handles = [getattr(pipeline, name)._streamed for name in denoisers]
    return all(any(parcel.host is not None for parcel in handle.parcels) for handle in handles)
