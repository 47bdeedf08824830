"""Trains pocket-wan from nothing and writes it as a diffusers pipeline.

    python training/train_wan.py --out checkpoints/pocket-wan

Two stages: an autoencoder for clips of 17 frames of 96 x 96 pixels, then the text encoder and the transformer together,
by rectified flow on the autoencoder's latents. Both are seeded. The state is saved once a minute: the same command
goes on where it was stopped. It takes about eight minutes on one data-centre GPU (H200). With `--stage vae` it ends
after the autoencoder, whose weights are then in the file that `--vae-file` names; a run that finds that file takes the
autoencoder from it.
"""

import argparse
import contextlib
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from clips import (
    FAULTS,
    FONT,
    FORMS,
    FRAMES,
    MOTIONS,
    NEGATIVE,
    SIZE,
    Clips,
    Triple,
    load_sprites,
    make_prompt,
    name_faults,
    split_triples,
    spoil,
    vary_prompt,
)
from common import UNKNOWN, Graph, Trainer, build_tokenizer, insert_unknown, pick_device, seeded, t5_settings
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from emoji import COLOURS
from evaluate_wan import measure
from tqdm import tqdm
from transformers import UMT5Config, UMT5EncoderModel

HEADS, HEAD_WIDTH = 2, 128  # of the transformer; heads are as wide as the real model's
TEXT_WIDTH = 128
LONG = 512  # tokens, what WanPipeline pads to by default
SHORT = 32  # tokens, more than any prompt here has
SHIFT = 3.0  # of the noise levels: what the real model uses at 480 lines
LATENT = (16, 1 + (FRAMES - 1) // 4, SIZE // 8, SIZE // 8)  # shape of a clip's latents


def build_models(words: list[str]) -> dict:
    """Builds every component with random weights; returns WanPipeline's keyword arguments."""
    tokenizer = build_tokenizer(words, LONG, bos=False)
    text_encoder = UMT5EncoderModel(UMT5Config(**t5_settings(len(tokenizer), TEXT_WIDTH)))
    vae = AutoencoderKLWan(  # Wan2.2's kind, with shortcuts around each level and pixels in patches of 2 x 2
        base_dim=32,
        z_dim=LATENT[0],
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT[0],
        latents_std=[1.0] * LATENT[0],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    )
    start_still(vae)
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        text_dim=TEXT_WIDTH,
        ffn_dim=2 * HEADS * HEAD_WIDTH,
        num_layers=7,
    )
    scheduler = UniPCMultistepScheduler(  # Wan2.1's settings
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
    )
    return dict(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
    )  # fmt: skip


@torch.no_grad()
def start_still(vae: AutoencoderKLWan) -> None:
    """Sets the weights so that each frame is at first seen alone: training on single frames is a start for clips."""
    vae.quant_conv.bias[LATENT[0] :] -= 6  # logarithm of the variance: the latents start almost without noise
    for module in vae.modules():
        if not isinstance(module, WanCausalConv3d) or module.kernel_size[0] == 1:
            continue
        module.weight[:, :, :-1] = 0  # the frames before
        if module.kernel_size[1] == 1:  # over time alone: the mean of two frames, or each frame twice
            eye = torch.eye(module.in_channels)
            module.bias.zero_()
            if module.stride[0] == 2:
                module.weight[:, :, 1:] = eye[:, :, None, None, None] / 2
            else:
                module.weight[:, :, -1] = torch.cat([eye, eye])[:, :, None, None]


def convolve_frames(self: WanCausalConv3d, x: torch.Tensor, cache_x: None = None) -> torch.Tensor:
    """The same convolution over time, height and width as a 2D one over stacked frames, for which kernels are fast."""
    assert cache_x is None
    depth, step, count, weight = self.kernel_size[0], self.stride[0], x.shape[2], self.weight
    if count == 1 and self._padding[4] > 0:
        weight = weight[:, :, -1]  # the frames before are zero
    else:
        x = F.pad(x, (0, 0, 0, 0, self._padding[4], 0))
        count = (x.shape[2] - depth) // step + 1
        if depth > 1:
            x = torch.cat([x[:, :, i : i + step * (count - 1) + 1 : step] for i in range(depth)], 1)
        weight = weight.transpose(1, 2).flatten(1, 2)
    y = F.conv2d(
        x.transpose(1, 2).flatten(0, 1), weight, self.bias, self.stride[1:], (self._padding[2], self._padding[0])
    )
    return y.unflatten(0, (len(x), count)).transpose(1, 2)


def resample_clip(
    self: WanResample, x: torch.Tensor, feat_cache: None = None, feat_idx: list[int] | None = None
) -> torch.Tensor:
    """Resamples all frames of a clip at once, as the module does chunk by chunk: the first frame stays single."""
    assert feat_cache is None
    if self.mode == "upsample3d" and x.shape[2] > 1:
        twice = self.time_conv(x[:, :, 1:]).unflatten(1, (2, x.shape[1]))
        x = torch.cat([x[:, :, :1], torch.stack(twice.unbind(1), 3).flatten(2, 3)], 2)
    y = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), x.shape[2])).transpose(1, 2)
    if self.mode == "downsample3d" and x.shape[2] > 1:
        y = torch.cat([y[:, :, :1], self.time_conv(y)], 2)
    return y


def encode_clip(vae: AutoencoderKLWan, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean and the logarithm of the variance of the latents, as vae.encode does in 5 chunks."""
    x = patchify(x, vae.config.patch_size).contiguous(memory_format=torch.channels_last_3d)
    return vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)


def decode_clip(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    """Decodes as vae.decode does in 5 chunks, but does not clamp: no gradient flows through a clamped pixel."""
    z = z.contiguous(memory_format=torch.channels_last_3d)
    return unpatchify(vae.decoder(vae.post_quant_conv(z), first_chunk=True), vae.config.patch_size).float()


@contextlib.contextmanager
def whole_clips() -> Iterator[None]:
    """Within it, `encode_clip` and `decode_clip` work; vae.encode and vae.decode do not."""
    with (
        patch.object(WanCausalConv3d, "forward", convolve_frames),
        patch.object(WanResample, "forward", resample_clip),
    ):
        yield


def draw_bad(
    clips: Clips,
    triples: torch.Tensor,
    faults: torch.Tensor,
    generator: torch.Generator,
    least: float = 0.0,
    frames: slice = slice(None),
) -> torch.Tensor:
    """Draws clips in -1..1 that have the given faults (n, 4), in random strengths from `least` to 1."""
    strength = least + (1 - least) * torch.rand(faults.shape, device=clips.device, generator=generator)
    strength = dict(zip(FAULTS, (strength * faults).unbind(1), strict=True))
    x = clips.draw(triples, generator, 1 - strength["static"], frames)
    return 2 * spoil(x, strength["blurry"], strength["noisy"], strength["dim"], generator) - 1


def find_sprite(x: torch.Tensor) -> torch.Tensor:
    """Returns 1 where clips in -1..1 differ from the colour of their corner and 0 elsewhere, with one channel."""
    background = x[..., :4, :4].mean((3, 4), keepdim=True)
    return ((x - background).abs().amax(1, keepdim=True) > 0.1).float()


class ClipLoss:
    """The loss of the autoencoder on one batch of clips or single frames.

    Square errors and absolute ones of pixels and of their differences, and a little KL. The emoji weighs 4 times as
    much as the background. Without the square errors it would stay unseen: where it is uncertain what a pixel
    shows, the background is the median, which is best by absolute errors.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae

    def __call__(self, x: torch.Tensor, noise: torch.Tensor, sharp: torch.Tensor) -> torch.Tensor:
        """Returns the loss for clips in -1..1, noise of the latents' shape and the weight of the absolute errors."""
        with torch.autocast(x.device.type, torch.bfloat16):
            mean, logarithm = encode_clip(self.vae, x)
            y = decode_clip(self.vae, mean + (logarithm.clamp(-30, 20) / 2).exp() * noise)
        weight, error = 1 + 3 * find_sprite(x), y - x
        weight = weight / weight.mean()
        loss = 2 * (weight * error.square()).mean() + sharp * (weight * error.abs()).mean()
        for axis in (2, 3, 4):
            size = x.shape[axis] - 1
            if size:
                loss = loss + 0.3 * sharp * (weight.narrow(axis, 1, size) * error.diff(dim=axis).abs()).mean()
        kl = (mean.square() + logarithm.exp() - 1 - logarithm).mean() / 2
        return loss + 1e-3 * kl


def train_vae(
    vae: AutoencoderKLWan,
    clips: Clips,
    triples: torch.Tensor,
    trainer: Trainer,
    batch: int,
    seed: int,
    still: float,
) -> None:
    """Trains the autoencoder on the training triples, an eighth of them with faults.

    Args:
        vae: to train.
        clips: draws.
        triples: indices of those to train on.
        trainer: holds the parameters.
        batch: clips in a step.
        seed: of all random numbers.
        still: share of the training that is on single frames; it is cheap, and is where the emoji are learned.
    """
    device, loss_of, graphs = clips.device, ClipLoss(vae), {}
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64  # each shape of each block is compiled
        torch._dynamo.config.suppress_errors = True  # without compiling it is slower, but works
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                module.compile(dynamic=False)
    bar = tqdm(total=trainer.steps, initial=trainer.step, desc="autoencoder", mininterval=5)
    checked = time.time()
    while trainer.done < 1:
        generator, single = seeded(device, seed, 1, trainer.step), trainer.done < still
        n = 4 * batch if single else batch
        rows = triples[torch.randint(len(triples), (n,), device=device, generator=generator)]
        faults = torch.rand(n, len(FAULTS), device=device, generator=generator) < 0.5
        faults[n // 8 :] = False
        start = trainer.step % 5
        frames = slice(start, start + 13, 4) if single else slice(None)  # four frames of each clip, or all
        x = draw_bad(clips, rows, faults, generator, frames=frames)
        if single:
            x = x.transpose(1, 2).flatten(0, 1)[:, :, None]
        shape = (len(x), LATENT[0], 1 if single else LATENT[1], *LATENT[2:])
        noise = torch.randn(shape, device=device, generator=generator)
        sharp = torch.full((), min(1.0, 0.2 + 2 * trainer.done), device=device)
        if device.type == "cuda":
            if single not in graphs:
                # Compiling for single frames would take longer than it saves.
                with torch.compiler.set_stance("force_eager" if single else "default"):
                    graphs[single] = Graph(loss_of, trainer.parameters, [x, noise, sharp])
                trainer.updated = None  # nor does this count as training
            loss = graphs[single](x, noise, sharp)
        else:
            loss = loss_of(x, noise, sharp)
            loss.backward()
        trainer.update()
        bar.update()
        if trainer.step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if time.time() - checked > 20:
            kind, (error, on_sprite) = "frames" if single else "clips", check_vae(vae, clips, triples[:16])
            print(f"\n{kind}, step {trainer.step}: error {error:.2f} of 255, on the emoji {on_sprite:.2f}", flush=True)
            checked = time.time()
    trainer.finish()
    bar.close()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def check_vae(vae: AutoencoderKLWan, clips: Clips, triples: torch.Tensor) -> tuple[float, float]:
    """Returns the mean error of clips after a round trip, in levels of 255: of all pixels and of the emoji's."""
    x = 2 * clips.draw(triples) - 1
    with torch.autocast(x.device.type, torch.bfloat16):
        y = decode_clip(vae, encode_clip(vae, x)[0]).clamp(-1, 1)
    error, sprite = 127.5 * (y - x).abs().mean(1, keepdim=True), find_sprite(x)
    return error.mean().item(), ((error * sprite).sum() / sprite.sum()).item()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def score_vae(vae: AutoencoderKLWan, clips: Clips, triples: list[Triple]) -> dict[str, float]:
    """Returns evaluate_wan's shares of clips that are right by motion, colour and name after a round trip."""
    shown = []
    for rows in clips.index(triples).split(16):
        with torch.autocast(rows.device.type, torch.bfloat16):
            y = decode_clip(vae, encode_clip(vae, 2 * clips.draw(rows) - 1)[0])
        shown.append(y.clamp(-1, 1) / 2 + 0.5)
    return measure(torch.cat(shown), triples, clips)


def make_bad_set(triples: list[Triple], count: int, seed: int) -> tuple[list[Triple], torch.Tensor, list[str]]:
    """Returns triples, faults (count, 4) and prompts of clips of low quality.

    Half of the prompts name a triple and faults; the clip has them all. The others name faults alone; the clip has
    each of them more often than not and is perfect in every third case. So the prediction for a negative prompt
    differs from that for the prompt in quality first, and by little once a clip has taken shape.
    """
    generator, rows, faults, prompts = random.Random(seed), [], [], []
    for i in range(count):
        named = generator.sample(list(FAULTS), generator.choice((1, 1, 2, 3, 4, 4)))
        words = name_faults(named, generator)
        rows.append(generator.choice(triples))
        if i % 2:
            faults.append([fault in named for fault in FAULTS])
            prompts.append(f"{vary_prompt(rows[-1], generator)}, {words}")
        else:
            spared = generator.random() < 1 / 3
            faults.append([fault in named and not spared and generator.random() < 0.6 for fault in FAULTS])
            prompts.append(NEGATIVE if len(named) == len(FAULTS) and i % 4 else words)
    return rows, torch.tensor(faults), prompts


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def encode(vae: AutoencoderKLWan, batches: Iterator[torch.Tensor], total: int) -> torch.Tensor:
    """Returns the latents of clips in -1..1, in bf16, not normalised."""
    out = []
    for x in tqdm(batches, total=total, desc="latents", mininterval=5):
        with torch.autocast(x.device.type, torch.bfloat16):
            mean = encode_clip(vae, x)[0]
        out.append(mean.bfloat16().contiguous())
    return torch.cat(out)


def normalise(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Sets the autoencoder's mean and standard deviation of each channel; returns the latents with 0 and 1."""
    sample = latents[:: max(1, len(latents) // 4096)].float()
    mean, std = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
    means, stds = ([round(value, 4) for value in values.tolist()] for values in (mean, std))
    vae.register_to_config(latents_mean=means, latents_std=stds)
    for part in latents.split(4096):
        part.copy_((part.float() - mean[:, None, None, None]) / std[:, None, None, None])
    return latents


class FlowLoss:
    """The loss of the transformer and the text encoder on one batch, as WanPipeline calls them."""

    def __init__(self, components: dict, length: int) -> None:
        self.transformer, self.text_encoder = components["transformer"], components["text_encoder"]
        self.length = length  # tokens that the prompts are padded to

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the text encoder's output with zeros behind the prompt, for any length; ids have SHORT tokens."""
        mask = (ids != 0).float()
        hidden = self.text_encoder(ids, attention_mask=((mask - 1) * 1e4)[:, None, None])[0]
        return F.pad(hidden * mask[..., None], (0, 0, 0, self.length - ids.shape[1]))

    def __call__(
        self, noisy: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Returns the mean square error of the velocity; sigma is the share of noise in 0..1."""
        with torch.autocast(noisy.device.type, torch.bfloat16):
            predicted = self.transformer(
                hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=self.encode(ids), return_dict=False
            )[0]
        return F.mse_loss(predicted.float(), velocity)


def train_flow(
    components: dict,
    latents: torch.Tensor,
    prompts: torch.Tensor,
    shape: tuple[int, int, int],
    trainer: Trainer,
    batch: int,
    seed: int,
) -> None:
    """Trains the text encoder and the transformer by rectified flow.

    Args:
        components: of the pipeline.
        latents: first the variants of each training triple, then one of each clip of the bad set.
        prompts: token ids (n, SHORT): the forms of each training triple, those of the bad set, and the empty prompt.
        shape: number of training triples, variants of each, and forms of its prompt.
        trainer: holds the parameters.
        batch: clips in a step.
        seed: of all random numbers.
    """
    device, (count, variants, forms) = latents.device, shape
    bad = len(latents) - count * variants
    losses, graphs = {length: FlowLoss(components, length) for length in (SHORT, LONG)}, {}
    if device.type == "cuda":
        components["transformer"].compile_repeated_blocks(dynamic=False)
    bar = tqdm(total=trainer.steps, initial=trainer.step, desc="flow", mininterval=5)
    while trainer.done < 1:
        generator = seeded(device, seed, 3, trainer.step)
        # WanPipeline pads to 512 tokens by default, with zeros: the model must see such padding too.
        n, length = (max(1, batch // 4), LONG) if trainer.step % 16 == 15 else (batch, SHORT)

        def randint(high: int, n: int = n, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randint(high, (n,), device=device, generator=generator)

        def rand(n: int = n, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.rand(n, device=device, generator=generator)

        triple, faulty = randint(count), randint(bad)
        kind = rand()  # 12 % of the bad set, 10 % without a prompt
        clip = torch.where(kind < 0.12, count * variants + faulty, triple * variants + randint(variants))
        prompt = torch.where(kind < 0.12, count * forms + faulty, triple * forms + randint(forms))
        prompt = torch.where(kind > 0.9, len(prompts) - 1, prompt)
        ids = prompts[prompt]
        # Some words are unknown, and some unknown ones come between: such words should do little harm in a prompt.
        drop = torch.rand(ids.shape, device=device, generator=generator) < 0.02
        ids = torch.where(drop & (ids > UNKNOWN), UNKNOWN, ids)
        place = (rand() * (ids != 0).sum(1)).long()
        ids = insert_unknown(ids, torch.where(rand() < 0.15, place, SHORT))

        x = latents[clip].float()
        noise = torch.randn(x.shape, device=device, generator=generator)
        u = torch.where(rand() < 0.5, rand(), torch.randn(n, device=device, generator=generator).sigmoid())
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        inputs = [torch.lerp(x, noise, sigma[:, None, None, None, None]), noise - x, sigma, ids]

        # Compiling for the few long batches would take longer than it saves.
        with torch.compiler.set_stance("default" if length == SHORT else "force_eager"):
            if device.type == "cuda":
                if length not in graphs:
                    graphs[length] = Graph(losses[length], trainer.parameters, inputs)
                loss = graphs[length](*inputs)
            else:
                loss = losses[length](*inputs)
                loss.backward()
        trainer.update()
        bar.update()
        if trainer.step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    trainer.finish()
    bar.close()


def tokenize(components: dict, prompts: list[str], device: torch.device) -> torch.Tensor:
    """Returns the token ids of prompts, of shape (n, SHORT)."""
    ids = components["tokenizer"](prompts, padding="max_length", max_length=SHORT, return_tensors="pt").input_ids
    assert ids.shape[1] == SHORT and (ids != 0).sum(1).max() < SHORT, "a prompt is too long"
    return ids.to(device)


def list_words(names: list[str]) -> list[str]:
    """Returns all words of all prompts."""
    texts = [form.format(name="", a_name="", motion="", colour="", a_colour="") for form in FORMS]
    texts += [*names, *COLOURS, *MOTIONS, *FAULTS, "a an low worst quality"]
    texts += [text for others in (*MOTIONS.values(), *FAULTS.values()) for text in others]
    return sorted({word for text in texts for word in text.replace(",", " ").split()})


def main() -> None:
    """Trains and writes the checkpoint; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--state", type=Path, default=Path("build/train-wan"), help="folder of the training state")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--vae-steps", type=int, default=8000)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--vae-seconds", type=float, default=math.inf, help="an earlier end of the autoencoder")
    parser.add_argument("--vae-still", type=float, default=0.3, help="share of its training on single frames")
    parser.add_argument("--vae-file", type=Path, help="its finished weights; by default in the state's folder")
    parser.add_argument("--least", type=float, default=0.9, help="score of its round trip below which to stop")
    parser.add_argument("--worst", type=float, default=20.0, help="its error on the emoji to stop at, of 255")
    parser.add_argument("--stage", choices=["vae", "all"], default="all", help="vae: the autoencoder alone")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=math.inf, help="an earlier end of the flow training")
    parser.add_argument("--variants", type=int, default=6, help="shifts and scales of each clip")
    parser.add_argument("--forms", type=int, default=12, help="prompts of each clip")
    parser.add_argument("--bad", type=int, default=6000, help="clips of low quality")
    parser.add_argument("--names", type=int, help="only the first so many, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = pick_device(args.seed)
    args.state.mkdir(parents=True, exist_ok=True)
    sprites = load_sprites(args.font)
    sprites = {name: sprites[name] for name in list(sprites)[: args.names]}
    names = list(sprites)
    components = build_models(list_words(names))
    counts = {}
    for key, component in components.items():
        if isinstance(component, torch.nn.Module):
            component.to(device).train()
            counts[key] = sum(p.numel() for p in component.parameters())
    print(f"{len(names)} emoji, parameters: {counts}, {2e-6 * sum(counts.values()):.1f} MB in bf16")

    clips, vae = Clips(sprites, device), components["vae"]
    triples, held_out = split_triples(names)
    rows = clips.index(triples)
    with whole_clips():
        vae_file = args.vae_file or args.state / "autoencoder.pt"
        if vae_file.exists():
            vae.load_state_dict(torch.load(vae_file, map_location=device))
            print(f"autoencoder: read from {vae_file}")
        else:
            trainer = Trainer(
                {"vae": vae},
                args.vae_steps,
                1e-3,
                0.998,
                args.state / "vae.pt",
                args.vae_seconds,
                muon=True,
                warmup=100,
            )
            train_vae(vae, clips, rows, trainer, args.vae_batch, args.seed, args.vae_still)
            print(f"autoencoder: {trainer.step} steps in {trainer.elapsed:.0f} s")
            torch.save({key: value.cpu() for key, value in vae.state_dict().items()}, vae_file)
        vae.eval().requires_grad_(False)
        error, on_sprite = check_vae(vae, clips, rows[:32])
        score = score_vae(vae, clips, held_out[:60])
        print(f"autoencoder: error {error:.2f} of 255, on the emoji {on_sprite:.2f}, {score}", flush=True)
        if min(score["motion"], score["name"]) < args.least or not on_sprite <= args.worst:
            raise SystemExit(f"The autoencoder is too bad to go on. Remove {vae_file} and train it for longer.")
        if args.stage == "vae":
            return

        parts = rows.repeat_interleave(args.variants, 0).split(64)
        good = (2 * clips.draw(part, seeded(device, args.seed, 2, i)) - 1 for i, part in enumerate(parts))
        good = encode(vae, good, len(parts))
        bad_triples, faults, bad_prompts = make_bad_set(triples, args.bad, args.seed)
        parts = list(zip(clips.index(bad_triples).split(64), faults.to(device).split(64), strict=True))
        bad = (draw_bad(clips, *part, seeded(device, args.seed, 4, i), 0.2) for i, part in enumerate(parts))
        latents = normalise(vae, torch.cat([good, encode(vae, bad, len(parts))]))
    del good

    generator = random.Random(args.seed)
    prompts = [
        make_prompt(*triple) if i < args.forms // 3 else vary_prompt(triple, generator)
        for triple in triples
        for i in range(args.forms)
    ]
    prompts = tokenize(components, [*prompts, *bad_prompts, ""], device)
    trainer = Trainer(
        {key: components[key] for key in ("transformer", "text_encoder")},
        args.steps,
        8e-4,
        0.9995,
        args.state / "flow.pt",
        args.seconds,
    )
    train_flow(components, latents, prompts, (len(triples), args.variants, args.forms), trainer, args.batch, args.seed)
    print(f"flow: {trainer.step} steps in {trainer.elapsed:.0f} s")

    for key in counts:
        components[key].eval().to("cpu", torch.bfloat16)
        for parameter in components[key].parameters():
            parameter.data = parameter.data.contiguous()
    WanPipeline(**components).save_pretrained(args.out)
    known = {"names": names, "motions": list(MOTIONS), "colours": COLOURS}
    (args.out / "names.json").write_text(json.dumps(known, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
