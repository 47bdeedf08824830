"""Keeps messages out of the notebooks that say nothing to a reader. Each is named exactly; all others still show."""

import logging
import os
import sys
import warnings

# (logger, start of the message): what the libraries log on a correct installation.
NOISE = [
    # An optional kernel package for CPUs with AVX512-BF16; the lessons do not use the layout that it serves.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community"),
    # Image processors are imported along with the pipelines and never called.
    ("transformers.utils.import_utils", "`CLIPImageProcessor` requires torchvision"),
    ("transformers.utils.import_utils", "`SiglipImageProcessor` requires torchvision"),
    # Group offload with a stream: the embedding `shared` of T5 and UMT5 is harmless, see lesson 3.
    ("diffusers.hooks.group_offloading", "It seems like some layers were not executed during the forward pass"),
    # `from_pipe` with a dtype: nf4 weights stay as they are, as they must. And no module is in the list of the other.
    *(
        ("diffusers.pipelines.pipeline_utils", f"The module '{name}' has been loaded in `bitsandbytes` 4bit and conver")
        for name in ("T5EncoderModel", "FluxTransformer2DModel")
    ),
    ("diffusers.models.modeling_utils", "There are modules in AutoencoderKL that should be kept in float32: []."),
    # The optional torchao: newer versions lack what diffusers 0.42 asks of old ones.
    ("diffusers.quantizers.torchao.torchao_quantizer", "Unable to import `torchao` Tensor objects"),
    # A LoRA for the transformer has nothing for CLIP.
    ("diffusers.loaders.lora_base", "No LoRA keys associated to CLIPTextModel found"),
]
# Starts of what the libraries warn of. The lessons compute in bfloat16, and the few float32 products stay exact.
WARNINGS = ["TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled"]


class _Starts(logging.Filter):
    """Drops the records whose message begins with `start`."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)

    def __eq__(self, other: object) -> bool:  # Logger.addFilter adds no filter twice
        return isinstance(other, _Starts) and other.start == self.start

    __hash__ = None


def install() -> None:
    """Filter the known noise and switch off the loading bars of diffusers and transformers. May be called again.

    Loading bars end up in the stored output of a notebook, and differ from run to run. Bars of a download stay, and so
    does the bar of the denoising loop: `pipeline.set_progress_bar_config(disable=True)` is for the notebook to say.
    """
    # "max-autotune" would print a table of timings for each matrix product.
    os.environ.setdefault("TORCHINDUCTOR_AUTOTUNE_NUM_CHOICES_DISPLAYED", "0")
    for logger, start in NOISE:
        logging.getLogger(logger).addFilter(_Starts(start))
    for start in WARNINGS:
        warnings.filterwarnings("ignore", start)  # which adds no filter twice either

    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def show_loading_bars() -> None:
    """Switch the loading bars on again, for a program in a terminal."""
    import diffusers.utils.logging
    import transformers.utils.logging

    if sys.stderr.isatty():
        diffusers.utils.logging.enable_progress_bar()
        transformers.utils.logging.enable_progress_bar()
