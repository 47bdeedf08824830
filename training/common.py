"""What the training programs share: tokenizer, optimizer loop, CUDA graph, and loading the result."""

import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers import devices

UNKNOWN = 3  # the token of an unknown word


def pick_device(seed: int) -> torch.device:
    """Seeds the random numbers, sets PyTorch up for training and returns the device to train on."""
    torch.manual_seed(seed)
    random.seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward broke off at these sizes (torch 2.11, Hopper)
    return devices.accelerator()


def build_tokenizer(words: list[str], max_length: int, bos: bool) -> PreTrainedTokenizerFast:
    """Builds a word-level tokenizer: lower case, split at blanks, commas and full stops; an unknown word is [UNK]."""
    special = ["<pad>", "</s>", "<s>", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate(special + sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(",", " "), normalizers.Replace(".", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="[UNK]",
    )


class Muon(torch.optim.Optimizer):
    """Momentum whose step for each weight has singular values near 1: as a matrix, of outputs x everything else.

    So all directions of a convolution's kernel learn at one speed; AdamW leaves the weak ones behind. As in
    torch.optim.Muon, which takes matrices alone, the step is as large as AdamW's of the same learning rate.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """One step for all parameters with a gradient, those of one shape together."""
        for group in self.param_groups:
            shapes = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                for parameter in parameters:
                    if "momentum" not in self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                momenta = [self.state[parameter]["momentum"] for parameter in parameters]
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                steps = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"])).flatten(2)
                tall = steps.shape[1] > steps.shape[2]
                steps = self.orthogonalise(steps.mT if tall else steps)
                steps = (steps.mT if tall else steps).to(parameters[0].dtype).reshape(-1, *shape)
                size = 0.2 * max(shape[0], shape[1:].numel()) ** 0.5
                torch._foreach_add_(parameters, list(steps.unbind()), alpha=-group["lr"] * size)

    @staticmethod
    def orthogonalise(x: torch.Tensor) -> torch.Tensor:
        """Brings the singular values of wide matrices (n, rows, columns) near 1, by the Newton-Schulz iteration."""
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)).bfloat16()
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (2.0315 * (a @ a) - 4.7750 * a) @ x
        return x.float()


def t5_settings(vocabulary: int, width: int) -> dict:
    """Returns the settings of a small T5 or UMT5 encoder for the tokens of `build_tokenizer`."""
    return dict(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=64,
        d_ff=2 * width,
        num_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


class Trainer:
    """Counts steps, follows a learning-rate schedule, keeps an average of the weights, saves and resumes.

    Training ends after `steps` steps, or after `seconds` of training if that comes first; the schedule follows
    whichever is nearer to its end. With `muon`, that optimizer steps the kernels of convolutions, AdamW the rest.
    """

    def __init__(
        self,
        modules: dict,
        steps: int,
        rate: float,
        decay: float,
        state_file: Path,
        seconds: float = math.inf,
        muon: bool = False,
        warmup: int = 500,
    ) -> None:
        self.modules = torch.nn.ModuleDict(modules)
        self.parameters = list(self.modules.parameters())
        kernels = [p for p in self.parameters if muon and p.ndim > 3 and p[0].numel() > 1 and len(p) > 1]
        others = [p for p in self.parameters if all(p is not kernel for kernel in kernels)]
        self.optimizers = [
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=others[0].is_cuda)
        ]
        if kernels:
            self.optimizers.append(Muon(kernels, rate))
        self.steps, self.rate, self.decay, self.warmup = steps, rate, decay, warmup
        self.average = [p.detach().clone() for p in self.parameters]
        self.state_file, self.step, self.saved = state_file, 0, time.time()
        self.seconds, self.elapsed, self.updated = seconds, 0.0, None
        if state_file.exists():
            state = torch.load(state_file, map_location=self.parameters[0].device)
            self.modules.load_state_dict(state["modules"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.average, self.step, self.elapsed = state["average"], state["step"], state.get("elapsed", 0.0)

    @property
    def done(self) -> float:
        """The share of the training that is done; 1 or more at the end."""
        return max(self.step / self.steps, self.elapsed / self.seconds)

    def save(self) -> None:
        """Writes the state in one rename, so that a stop half-way loses nothing."""
        part = self.state_file.with_suffix(".part")
        torch.save(
            {
                "modules": self.modules.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "average": self.average,
                "step": self.step,
                "elapsed": self.elapsed,
            },
            part,
        )
        part.replace(self.state_file)
        self.saved = time.time()

    def update(self) -> None:
        """One optimizer step with the gradients that the parameters hold; drops them."""
        now = time.time()
        self.elapsed += now - (self.updated or now)  # the first step, which compiles, does not count
        self.updated = now
        rate = self.rate * min(1, (self.step + 1) / self.warmup) * min(1, 2 * max(0, 1 - self.done) + 1e-3)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - min(self.decay, self.step / (self.step + 20)))
        if time.time() - self.saved > 60:
            self.save()

    @torch.no_grad()
    def finish(self) -> None:
        """Puts the averaged weights into the modules."""
        self.save()
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)


def seeded(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator for one step of one stage, so that a resumed run draws what an uninterrupted one would."""
    return torch.Generator(device).manual_seed(hash(numbers) % 2**62)


def insert_unknown(ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Inserts the token [UNK] into each row of `ids` at the position `at`; a position past the end changes nothing."""
    place = torch.arange(ids.shape[1], device=ids.device)[None]
    at = at[:, None]
    return ids.gather(1, place - (place > at).long()).masked_fill(place == at, UNKNOWN)


class Graph:
    """A loss with its backward pass, recorded as a CUDA graph: launching its 2,000 kernels costs the CPU nothing."""

    def __init__(
        self, loss: Callable[..., torch.Tensor], parameters: list[torch.Tensor], inputs: list[torch.Tensor]
    ) -> None:
        self.parameters, self.inputs = parameters, [x.clone() for x in inputs]
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, tunes, sets libraries up
                loss(*self.inputs).backward()
                for parameter in parameters:
                    parameter.grad = None
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph, stream=stream):
            value = loss(*self.inputs)
            value.backward()
            self.value = value.detach()
        del value
        self.gradients = [parameter.grad for parameter in parameters]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Computes the loss and the gradients of the parameters; returns the loss."""
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.value


def load_pipeline(checkpoint: str, nf4: bool) -> DiffusionPipeline:
    """Loads the checkpoint in bf16 or with nf4 weights in the transformer and the large text encoder."""
    parts = json.loads((Path(checkpoint) / "model_index.json").read_text())
    config = None
    if nf4:
        config = PipelineQuantizationConfig(
            quant_backend="bitsandbytes_4bit",
            quant_kwargs={
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": torch.bfloat16,
            },
            components_to_quantize=["transformer", "text_encoder_2" if "text_encoder_2" in parts else "text_encoder"],
        )
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16, quantization_config=config)
    pipeline.to(devices.accelerator())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
