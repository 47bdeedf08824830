"""Trains pocket-flux from nothing and writes it as a diffusers pipeline.

    python training/train_flux.py --out checkpoints/pocket-flux

Two stages: an autoencoder for 128 x 128 pictures, then the text encoders and the transformer together, by rectified
flow on the autoencoder's latents. Both are seeded. The state is saved once a minute: the same command goes on
where it was stopped. It takes about eight minutes on one data-centre GPU (H200).
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from common import UNKNOWN, Graph, Trainer, build_tokenizer, insert_unknown, pick_device, seeded, t5_settings
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from emoji import COLOURS, FONT, TEMPLATES, load_emoji, make_prompt, split_pairs
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

SIZE = 128  # pixels
WIDTH = 192  # of the transformer: a multiple of 64, the block of nf4
TEXT_WIDTH = 128
CLIP_TOKENS, T5_TOKENS = 77, 512  # what FluxPipeline pads to by default
SHORT = 32  # tokens, more than any prompt here has
SHIFT = 1.6  # what the scheduler's dynamic shift comes to at 128 x 128


def build_models(words: list[str]) -> dict:
    """Builds every component with random weights; returns FluxPipeline's keyword arguments."""
    tokenizer = build_tokenizer(words, CLIP_TOKENS, bos=True)
    tokenizer_2 = build_tokenizer(words, T5_TOKENS, bos=False)
    ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            projection_dim=TEXT_WIDTH,
            **ids,
        )
    )
    text_encoder_2 = T5EncoderModel(T5Config(**t5_settings(len(tokenizer_2), TEXT_WIDTH)))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,  # a group of one channel would normalise the colour of a picture away
        latent_channels=16,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=7,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(  # FLUX.1-dev's settings
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15, shift=3.0,
        use_dynamic_shifting=True,
    )  # fmt: skip
    return dict(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


class Pictures:
    """Draws training pictures on the device: emoji with small shifts and scales over plain colours."""

    def __init__(self, emoji: dict, device: torch.device) -> None:
        self.names = list(emoji)
        sprites = torch.stack([torch.from_numpy(s.copy()) for s in emoji.values()]).to(device).float() / 255
        sprites = sprites.permute(0, 3, 1, 2)
        self.alpha, self.colour = sprites[:, 3:], sprites[:, :3] * sprites[:, 3:]
        self.backgrounds = torch.tensor(list(COLOURS.values()), device=device).float() / 255
        self.device = device

    def draw(self, name: torch.Tensor, colour: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Returns pictures in -1..1 of shape (n, 3, 128, 128) for name and colour indices of shape (n,)."""
        n = len(name)
        scale = 1 + 0.04 * (2 * torch.rand(n, device=self.device, generator=generator) - 1)
        shift = 4 / SIZE * (2 * torch.rand(n, 2, device=self.device, generator=generator) - 1)  # 2 pixels
        theta = torch.zeros(n, 2, 3, device=self.device)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
        theta[:, :, 2] = shift
        grid = F.affine_grid(theta, (n, 4, SIZE, SIZE), align_corners=False)
        sprite = torch.cat([self.colour[name], self.alpha[name]], 1)
        sprite = F.grid_sample(sprite, grid, mode="bicubic", align_corners=False).clamp(0, 1)
        background = self.backgrounds[colour][:, :, None, None]
        return (sprite[:, :3] + background * (1 - sprite[:, 3:])) * 2 - 1


def train_vae(
    vae: AutoencoderKL, pictures: Pictures, pairs: torch.Tensor, steps: int, batch: int, state_file: Path, seed: int
) -> None:
    """Trains the autoencoder on the training pairs: error of pixels and of their differences, and a little KL."""
    device = pictures.device
    trainer = Trainer({"vae": vae}, steps, 1.5e-3, 0.998, state_file)
    bar = tqdm(total=steps, initial=trainer.step, desc="autoencoder", mininterval=5)
    while trainer.step < steps:
        generator = seeded(device, seed, 1, trainer.step)
        name, colour = pairs[torch.randint(len(pairs), (batch,), device=device, generator=generator)].unbind(1)
        x = pictures.draw(name, colour, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            latents = vae.encode(x).latent_dist
            z = latents.mean + latents.std * torch.randn(latents.mean.shape, device=device, generator=generator)
            y = vae.decode(z).sample
        y = y.float()
        loss = (y - x).abs().mean()
        for axis in (2, 3):
            loss = loss + 0.5 * (y.diff(dim=axis) - x.diff(dim=axis)).abs().mean()
        error = loss.detach()
        loss = loss + 1e-3 * latents.kl().mean() / latents.mean[0].numel()
        loss.backward()
        trainer.update()
        bar.update()
        if trainer.step % 50 == 0:
            bar.set_postfix(error=f"{error:.4f}", refresh=False)
    trainer.finish()
    bar.close()


@torch.no_grad()
def encode_variants(
    vae: AutoencoderKL, pictures: Pictures, pairs: torch.Tensor, variants: int, seed: int
) -> torch.Tensor:
    """Encodes every training pair in several shifts and scales.

    Returns bf16 of shape (pairs, variants, 16, 16, 16), normalised; sets the VAE's shift and scale.
    """
    device, out = pictures.device, []
    for i, part in enumerate(tqdm(pairs.split(16), desc="latents", mininterval=5)):
        name, colour = part.repeat_interleave(variants, 0).unbind(1)
        x = pictures.draw(name, colour, seeded(device, seed, 2, i)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            mean = vae.encode(x).latent_dist.mean
        out.append(mean.bfloat16().contiguous().unflatten(0, (len(part), variants)))
    latents = torch.cat(out)
    sample = latents[:, 0].float()
    shift, scale = round(sample.mean().item(), 4), round(1 / sample.std().item(), 4)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return latents.sub_(shift).mul_(scale)


def tokenize_prompts(components: dict, names: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenizes every (name, colour, template); returns CLIP and T5 ids, each (names, colours, templates, length)."""
    prompts = [make_prompt(n, c, t) for n in names for c in COLOURS for t in TEMPLATES]
    shape = (len(names), len(COLOURS), len(TEMPLATES))
    out = []
    for tokenizer in (components["tokenizer"], components["tokenizer_2"]):
        ids = tokenizer(prompts, padding="max_length", max_length=SHORT, return_tensors="pt").input_ids
        assert (ids != 0).sum(1).max() < SHORT, "a prompt is too long"
        out.append(ids.to(device).unflatten(0, shape))
    return tuple(out)


class FlowLoss:
    """The loss of the transformer and the text encoders on one batch, with everything that can be made beforehand."""

    def __init__(self, components: dict, device: torch.device) -> None:
        self.transformer, self.clip, self.t5 = (
            components[key] for key in ("transformer", "text_encoder", "text_encoder_2")
        )
        self.device = device
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, device, torch.float32)
        self.text_ids = torch.zeros(T5_TOKENS, 3, device=device)
        # The masks that the encoders would make for themselves: none for T5, nothing from the right for CLIP.
        self.t5_mask = torch.zeros(1, 1, 1, T5_TOKENS, device=device)
        self.clip_mask = torch.full((1, 1, SHORT, SHORT), -1e4, device=device).triu(1)

    def __call__(
        self,
        noisy: torch.Tensor,
        velocity: torch.Tensor,
        sigma: torch.Tensor,
        guidance: torch.Tensor,
        ids: torch.Tensor,
        ids_2: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the mean square error of the velocity for CLIP's and T5's token ids."""
        length = ids_2.shape[1]
        with torch.autocast(self.device.type, torch.bfloat16):
            predicted = self.transformer(
                hidden_states=noisy,
                timestep=sigma,
                guidance=guidance,
                pooled_projections=self.clip(ids, attention_mask=self.clip_mask).pooler_output,
                encoder_hidden_states=self.t5(ids_2, attention_mask=self.t5_mask[..., :length])[0],
                txt_ids=self.text_ids[:length],
                img_ids=self.image_ids,
                return_dict=False,
            )[0]
        return F.mse_loss(predicted.float(), velocity)


def train_flow(
    components: dict,
    latents: torch.Tensor,
    pairs: torch.Tensor,
    names: list[str],
    steps: int,
    batch: int,
    state_file: Path,
    seed: int,
    cuda_graph: bool,
) -> None:
    """Trains the text encoders and the transformer on the training pairs, by rectified flow."""
    device = latents.device
    trainer = Trainer(
        {
            "transformer": components["transformer"],
            "clip": components["text_encoder"],
            "t5": components["text_encoder_2"],
        },
        steps,
        1e-3,
        0.9995,
        state_file,
    )
    flow_loss, graphs = FlowLoss(components, device), {}
    if device.type == "cuda":
        components["transformer"].compile_repeated_blocks(dynamic=False)
    clip_ids, t5_ids = tokenize_prompts(components, names, device)
    bar = tqdm(total=steps, initial=trainer.step, desc="flow", mininterval=5)
    while trainer.step < trainer.steps:
        generator = seeded(device, seed, 3, trainer.step)

        def randint(high: int, n: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randint(high, (n,), device=device, generator=generator)

        # FluxPipeline pads to 512 tokens by default, without a mask: the model must see such padding too.
        n, length = (max(1, batch // 6), T5_TOKENS) if trainer.step % 16 == 15 else (batch, SHORT)
        pair, template = randint(len(pairs), n), randint(len(TEMPLATES), n)
        name, colour = pairs[pair].unbind(1)
        x = latents[pair, randint(latents.shape[1], n)].float()
        x = FluxPipeline._pack_latents(x, n, 16, 16, 16)
        noise = torch.randn(x.shape, device=device, generator=generator)
        u = torch.randn(n, device=device, generator=generator).sigmoid()
        uniform = torch.rand(n, device=device, generator=generator)
        u = torch.where(torch.rand(n, device=device, generator=generator) < 0.3, uniform, u)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        guidance = 10 * torch.rand(n, device=device, generator=generator)
        ids, ids_2 = clip_ids[name, colour, template], t5_ids[name, colour, template]
        # Some words are unknown, and some unknown ones come between: such words should do little harm in a prompt.
        drop = torch.rand(ids_2.shape, device=device, generator=generator) < 0.02
        ids_2 = torch.where(drop & (ids_2 > UNKNOWN), UNKNOWN, ids_2)
        ids[:, 1:] = torch.where(drop[:, :-1] & (ids[:, 1:] > UNKNOWN), UNKNOWN, ids[:, 1:])  # after <s>, the same
        at = torch.where(torch.rand(n, device=device, generator=generator) < 0.2, randint(10, n), 2 * CLIP_TOKENS)
        ids, ids_2 = insert_unknown(ids, at + 1), insert_unknown(ids_2, at)
        ids_2 = F.pad(ids_2, (0, length - ids_2.shape[1]))
        inputs = [torch.lerp(x, noise, sigma[:, None, None]), noise - x, sigma, guidance, ids, ids_2]

        # Compiling for the few long batches would take longer than it saves.
        with torch.compiler.set_stance("default" if length == SHORT else "force_eager"):
            if device.type == "cuda" and cuda_graph:
                if length not in graphs:
                    graphs[length] = Graph(flow_loss, trainer.parameters, inputs)
                loss = graphs[length](*inputs)
            else:
                loss = flow_loss(*inputs)
                loss.backward()
        trainer.update()
        bar.update()
        if trainer.step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    trainer.finish()
    bar.close()


def main() -> None:
    """Trains and writes the checkpoint; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--state", type=Path, default=Path("build/train-flux"), help="folder of the training state")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=10850)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--variants", type=int, default=16, help="shifts and scales of each picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=True, help="GPU only")
    args = parser.parse_args()

    device = pick_device(args.seed)
    args.state.mkdir(parents=True, exist_ok=True)

    emoji = load_emoji(SIZE, args.font)
    names = list(emoji)
    words = {
        w for n in names for c in COLOURS for t in TEMPLATES for w in make_prompt(n, c, t).replace(",", " ").split()
    }
    components = build_models(sorted(words))
    counts = {}
    for key, component in components.items():
        if isinstance(component, torch.nn.Module):
            component.to(device).train()
            counts[key] = sum(p.numel() for p in component.parameters())
    print(f"{len(names)} emoji, {len(words)} words, parameters: {counts}, {2e-6 * sum(counts.values()):.1f} MB in bf16")

    pictures = Pictures(emoji, device)
    index, colours = {name: i for i, name in enumerate(names)}, list(COLOURS)
    pairs = torch.tensor([(index[n], colours.index(c)) for n, c in split_pairs(names)[0]], device=device)
    vae = components["vae"].to(memory_format=torch.channels_last)
    train_vae(vae, pictures, pairs, args.vae_steps, max(1, args.batch // 8), args.state / "vae.pt", args.seed)
    vae.eval().requires_grad_(False)
    latents = encode_variants(vae, pictures, pairs, args.variants, args.seed)
    train_flow(
        components, latents, pairs, names, args.steps, args.batch, args.state / "flow.pt", args.seed, args.cuda_graph
    )

    for key in counts:
        components[key].eval().to("cpu", torch.bfloat16, memory_format=torch.contiguous_format)
    FluxPipeline(**components).save_pretrained(args.out)
    (args.out / "names.json").write_text(json.dumps({"names": names, "colours": COLOURS}, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
