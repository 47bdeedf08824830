"""What `helpers.plan` says: shapes from headers, figures against recorded rows, and what to type.

`PYTHONPATH=.:programs python tests/test_plan.py` writes helpers/known_shapes.json anew.
"""

import dataclasses
import json
import math
import re
import shlex
import tempfile
from pathlib import Path
from types import SimpleNamespace

import draw
import pytest
import save_nf4
import tiny_pipelines
from bitsandbytes.nn import Params4bit
from diffusers import ModelMixin
from safetensors.numpy import save_file

from benchmarks import random_checkpoints
from benchmarks.families import FAMILIES
from helpers import checks, headers, models, plan, predict, prediction_errors, shapes
from helpers.cards import CARDS, find_card
from helpers.checkpoints import CHECKPOINTS
from helpers.errors import TutorialError
from helpers.predict import REPOSITORIES, Call
from helpers.records import Measurement

ROOT = Path(__file__).resolve().parent.parent
FLUX, WAN = (REPOSITORIES[model] for model in ("flux", "wan"))
KNOWN = shapes.known_shapes()
QWEN = "Qwen/Qwen-Image"
MODELS = [model for model in FAMILIES if model != "flux2-dev"]  # of which nothing is recorded
RECORDED_MODELS = [name for name, path in REPOSITORIES.items() if predict.load_recorded(path, KNOWN).rows]


def shape_from_configurations(model):
    """The shape of a full-size model, from its published configurations on the meta device, and how it is called."""
    family = FAMILIES[model]
    parts = {name: random_checkpoints.create(model, name) for name in family.components}
    pocket = ROOT / "checkpoints" / f"pocket-{family.pocket}" if family.pocket else None
    with tempfile.TemporaryDirectory() as path:
        folder, configs = Path(path), {}
        random_checkpoints.write_small_parts(family, pocket, folder)
        for name, part in parts.items():
            config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
            configs[f"{name}/config.json"] = config | {"_class_name": type(part).__name__}
            (folder / name).mkdir()
            (folder / name / "config.json").write_text("{}")
            for file in ("model", "diffusion_pytorch_model"):  # without weights, so that it counts as whole
                save_file({}, folder / name / f"{file}.safetensors")
        configs["model_index.json"] = json.loads((folder / "model_index.json").read_text())
        found = {name: {key: tuple(w.shape) for key, w in part.named_parameters()} for name, part in parts.items()}
        sizes = {name: 2 * sum(map(math.prod, tensors.values())) for name, tensors in found.items()}
        largest = max(
            min(size, int(family.file_sizes.get(name, random_checkpoints.FILE_SIZE))) for name, size in sizes.items()
        )
        made = dataclasses.replace(models.find_model(path), quantized=family.quantized)
        shape = headers.shape_of(made, found, largest, configs.__getitem__)
        return dataclasses.replace(shape, model=model, advised=advised(family, shape, models.call_parameters(path)))


def advised(family, shape, parameters):
    """What the authors of a model give a call, where that is not what its pipeline does by itself."""
    # The random Wan takes 3 steps, to be done soon.
    full = CHECKPOINTS.get((family.pocket, "full"), family.checkpoint)
    given = {"height": full.height, "width": full.width, "steps": family.steps or full.num_inference_steps}
    advice = {key: value for key, value in given.items() if value != shape.call[key]}
    scale = family.checkpoint.guidance_scale
    if scale not in (None, parameters["guidance_scale"].default) and not family.settings.get("is_distilled"):
        advice["guidance_scale"] = scale
    if shape.with_negative > shape.forwards and family.checkpoint.negative_prompt is not None:
        advice["negative_prompt"] = family.checkpoint.negative_prompt
    return advice


@pytest.mark.parametrize("model", MODELS)
def test_known_shapes_are_those_of_the_configurations(model):
    assert shape_from_configurations(model) == KNOWN[FAMILIES[model].repository], "Renew them: see the top of this file"


@pytest.mark.parametrize("model", FAMILIES)
def test_what_becomes_nf4_is_what_bitsandbytes_quantizes(model):
    for name in FAMILIES[model].quantized:
        part = random_checkpoints.create(model, name, nf4=True)
        weights = [weight for weight in part.parameters() if isinstance(weight, Params4bit)]
        tensors = {
            key: tuple(weight.shape) for key, weight in random_checkpoints.create(model, name).named_parameters()
        }
        kept = (getattr(part, "_keep_in_fp32_modules", None) or ()) if isinstance(part, ModelMixin) else ()
        assert headers._sizes(tensors, True, kept)[0] == sum(weight.numel() for weight in weights), name


@pytest.mark.parametrize("model", RECORDED_MODELS)
def test_recorded_weights_are_those_of_the_shape(model):
    rows = predict.load_recorded(REPOSITORIES[model], KNOWN).rows
    footprint = next(row.footprint_gb for row in rows if row.name == plan.RESIDENT)
    assert KNOWN[REPOSITORIES[model]].weights / 1e9 == pytest.approx(footprint, rel=0.01)


@pytest.mark.parametrize("model", ["flux", "wan"])
def test_a_folder_and_its_nf4_weights_have_the_same_shape(model, tmp_path, capsys):
    folder, out = ROOT / "checkpoints" / f"pocket-{model}", tmp_path / "nf4"
    save_nf4.main([str(folder), str(out), "--device", "cpu"])
    shape, saved = headers.read_shape(str(folder)), headers.read_shape(str(out))
    assert not shape.quantized and saved.quantized
    assert (saved.kinds, saved.rest.nf4, saved.weights) == (shape.kinds, shape.rest.nf4, shape.weights)
    written = sum(file.stat().st_size for file in out.glob("*/*.safetensors"))
    assert shape.weights == pytest.approx(written, rel=0.03)  # files have headers and small tables besides


def test_a_repository_is_read_by_the_headers_of_its_files(monkeypatch):
    folder = ROOT / "checkpoints" / "pocket-flux"
    files = [path for path in folder.glob("*/*") if path.is_file()]
    listed = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
    # A second time in float16, as many have it: it must not count twice.
    double = [
        (file.replace(".safetensors", ".fp16.safetensors"), size) for file, size in listed if "transformer/" in file
    ]

    def header(_, path, file):
        length = int.from_bytes((folder / file.replace(".fp16", "")).read_bytes()[:8], "little")
        text = (folder / file.replace(".fp16", "")).read_bytes()[8 : 8 + length]
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        return SimpleNamespace(tensors={name: SimpleNamespace(shape=entry["shape"]) for name, entry in entries.items()})

    monkeypatch.setattr(headers.checks, "hub_files", lambda path: listed + double)
    monkeypatch.setattr(models, "_read_json", lambda path, file: json.loads((folder / file).read_text()))
    monkeypatch.setattr(headers, "HfApi", type("Hub", (), {"parse_safetensors_file_metadata": header}))
    assert headers.read_shape("owner/name") == headers.read_shape(str(folder))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no-folder", "There is no folder"),
        ("tests/no-folder", "There is no folder"),
        ("owner/name", "the Hub cannot be reached"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(path, message, monkeypatch):
    def offline(path):
        raise ConnectionError

    monkeypatch.setattr(checks, "hub_files", offline)
    with pytest.raises(TutorialError, match=message) as error:
        headers.read_shape(path)
    assert str(error.value).count(". ") == 0


def test_a_unet_is_read_by_its_levels():
    tensors = {
        "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": (640, 640),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": (640, 640),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (640, 640),
        "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    }
    (kind,), outside = headers._kinds(tensors)
    assert (kind.count, kind.level, kind.used, kind.text, kind.joint) == (3, 1, 640 * 640, 640 * 2048, False)
    assert list(outside) == ["down_blocks.0.resnets.0.conv1.weight"]


KL = {"block_out_channels": [1] * 4, "latent_channels": 16}
WAN_VAE = {"dim_mult": [1] * 4, "z_dim": 16, "temperal_downsample": [False, True, True]}
LTX_VAE = {"patch_size": 4, "spatio_temporal_scaling": [True, True, True, False], "latent_channels": 128}


@pytest.mark.parametrize(
    ("denoiser", "vae", "expected"),
    [
        ({"patch_size": 1, "in_channels": 64}, KL, (16, 1)),
        ({"patch_size": 2, "in_channels": 16}, KL, (16, 1)),
        ({"patch_size": [1, 2, 2], "in_channels": 16}, WAN_VAE, (16, 4)),
        ({"in_channels": 128}, LTX_VAE, (32, 8)),
        ({"all_patch_size": [2], "in_channels": 16}, KL, (16, 1)),
        ({"patch_size": 1, "in_channels": 32}, {"encoder_block_out_channels": [1] * 6, "latent_channels": 32}, (32, 1)),
    ],
    ids=["FLUX", "SD3", "Wan", "LTX", "Z-Image", "Sana"],
)
def test_pixels_and_frames_of_a_token(denoiser, vae, expected):
    assert headers._compression(denoiser, vae)[:2] == expected


def test_operations_are_those_of_lesson_3():
    tokens = 64 * 64 + 512
    # 57 blocks of 12 matrices on each token, and attention
    expected = 57 * (2 * tokens * 12 * 3072**2 + 4 * tokens**2 * 3072)
    assert predict.operations(KNOWN[FLUX], Call(1024, 1024)) == pytest.approx(expected, rel=0.001)
    tokens = 21 * 30 * 52
    block = 2 * tokens * (6 * 5120**2 + 2 * 5120 * 13824) + 4 * tokens**2 * 5120
    assert predict.operations(KNOWN[WAN], Call(480, 832, 81)) == pytest.approx(2 * 40 * block, rel=0.01)


def test_errors_against_every_recorded_row():
    found = prediction_errors.errors()
    assert len(found) > 300 and {error["figure"] for error in found} >= {"reserved_gb", "host_peak_gb", "step_ms"}
    # The way that the plan names: all of its figures are as near as they should be.
    assert [error for error in found if "streamed" in error["name"] and not error["hit"]] == []
    cited = [error for error in found if "cited" in error["file"]]  # another card than the factors were fitted to
    assert len(cited) == 3 and all(error["hit"] for error in cited)
    for memory in (True, False):
        part = [error["hit"] for error in found if error["figure"].endswith("_gb") == memory]
        assert sum(part) / len(part) >= 0.9
    text = prediction_errors.describe_errors()
    assert text.count("recorded, ") == sum(not error["hit"] for error in found)


@pytest.mark.parametrize("name", ["fp8, resident, eager", "saved nf4, resident, eager, first block cache 0.1"])
def test_peers_are_not_worked_out(name):
    row = Measurement(name, model="flux", device="NVIDIA H200", latency_s=5.0)
    assert prediction_errors.predict_row(dataclasses.replace(row, name="saved nf4, resident, eager")) is not None
    assert prediction_errors.predict_row(row) is None


def fit_without(model, monkeypatch):
    """Fit all factors but those of decoding to the rows of the other model, each in turn."""
    decoding = ("picture", "one frame", "clip", "tiles")

    def off():
        found = prediction_errors.errors(models={*RECORDED_MODELS} - {model})
        return sum(min(abs(error["off"]), 0.5) for error in found if "cited" not in error["file"])

    for name, value in [(name, value) for name, value in predict.FIT.items() if name not in decoding]:
        tried = {}
        for factor in (0.7, 0.85, 1.0, 1.2, 1.4):
            monkeypatch.setitem(predict.FIT, name, factor * value)
            tried[factor] = off()
        monkeypatch.setitem(predict.FIT, name, min(tried, key=tried.get) * value)


@pytest.mark.parametrize("model", RECORDED_MODELS)
def test_factors_of_one_model_meet_the_other(model, monkeypatch):
    fit_without(model, monkeypatch)
    found = [error for error in prediction_errors.errors(models={model}) if "streamed" in error["name"]]
    assert found and all(error["hit"] for error in found), "CAVEATS of helpers/prediction_errors.py says so"


@pytest.mark.parametrize(
    ("model", "factor", "other", "ratio"),
    [("flux", "picture", "clip", 1.5), ("wan", "clip", "picture", 2 / 3), ("qwen-image", "one frame", "picture", 0.5)],
)
def test_what_decoding_takes_rests_on_one_model_a_factor(model, factor, other, ratio, monkeypatch):
    shape = KNOWN[REPOSITORIES[model]]
    call = Call(*(shape.call[key] for key in ("height", "width", "frames", "steps")))
    least = [predict.predict(shape, CARDS["H100"], call, limit_gb=30).least_gb]
    monkeypatch.setitem(predict.FIT, factor, predict.FIT[other])
    least.append(predict.predict(shape, CARDS["H100"], call, limit_gb=30).least_gb)
    assert least[1] / least[0] == pytest.approx(ratio, rel=0.05), "CAVEATS of helpers/prediction_errors.py says so"


def request(model=FLUX, card_gb=12, ram_gb=32, gpu="RTX 4070", **changes):
    return plan.Request(model, card_gb, ram_gb, gpu, **changes)


def row(limit, **changes):
    values = {"device": "NVIDIA H100 80GB HBM3", "model": "flux", "height": 1024, "width": 1024, "steps": 28}
    values |= {"reserved_gb": limit - 0.1, "host_peak_gb": 19.0, "step_ms": 140.0, "latency_s": 4.4, "load_s": 50.0}
    return Measurement(f"saved nf4, streamed, {limit} GB, regional compile", **values | changes)


RECORDED = predict.Recorded(
    [row(5), row(7), row(11)],
    {"reserved_gb": 6.8, "host_peak_gb": 11.1, "call_s": 17.0, "device": "NVIDIA H100"},
    34.0,
    True,
)


@pytest.mark.parametrize(("card_gb", "limit"), [(6, 5), (8, 7), (10, 7), (12, 11), (24, 11)])
def test_the_row_of_the_limit_or_the_next_lower_is_used(card_gb, limit):
    made = plan.recommend(request(card_gb=card_gb), KNOWN[FLUX], RECORDED)
    assert f"--memory-gb {limit}" in made.lines[-1] and made.problem == ""
    memory = made.figures["memory of the card"]
    assert memory == plan.Figure(f"{limit - 0.1:.1f} GB reserved", f"row of {limit} GB, H100")
    assert made.figures["host memory"].text == "19.0 GB"


def test_a_row_of_the_same_card_is_not_carried_over():
    made = plan.recommend(request(gpu="H100", steps=1000), KNOWN[FLUX], RECORDED)
    assert made.lines[-1].endswith("--steps 1000 --compile")  # which pays for so many
    assert made.figures["a step"] == plan.Figure("140 ms", "row of 11 GB, H100")


def test_another_card_is_carried_over_by_compute_and_bus():
    here = plan.recommend(request(gpu="H100", steps=1000), KNOWN[FLUX], RECORDED)
    half = plan.recommend(request(gpu="494.5/1675/25", steps=1000), KNOWN[FLUX], RECORDED)
    assert (here.figures["a step"].text, half.figures["a step"].text) == ("140 ms", "280 ms")
    assert "carried over: 494.5 Tflop/s and 25 GB/s" in half.figures["a step"].reason
    slow = plan.recommend(request(card_gb=6, gpu="989/3350/5", steps=1000), KNOWN[FLUX], RECORDED)
    assert float(slow.figures["a step"].text.split()[0]) > 1  # 6 GB at 5 GB/s


@pytest.mark.parametrize(
    ("model", "arguments", "forwards"),
    [
        ("flux", {"guidance_scale": 3.5}, 1),
        ("flux", {"guidance_scale": 3.5, "negative_prompt": "dim"}, 1),  # its true_cfg_scale is 1
        ("wan", {"guidance_scale": 5.0, "negative_prompt": "dim"}, 2),
        ("wan", {"guidance_scale": 1.0, "negative_prompt": "dim"}, 1),
        ("klein", {"guidance_scale": 4.0}, 1),  # distilled
        ("z-image", {}, 2),
        ("z-image", {"guidance_scale": 0.0}, 1),
        ("z-image", {"guidance_scale": 1.0}, 2),
        ("qwen-image", {}, 1),
        ("qwen-image", {"negative_prompt": " "}, 2),
        ("qwen-image", {"negative_prompt": " ", "guidance_scale": 1.0}, 2),  # it goes by true_cfg_scale
    ],
)
def test_forwards_are_those_of_the_call(model, arguments, forwards):
    assert shapes.called(KNOWN[REPOSITORIES[model]], arguments).forwards == forwards


ZIMAGE = REPOSITORIES["z-image"]


def rows_of_zimage(**changes):
    """Nine steps of 100 ms, and 0.3 s outside of them."""
    values = {"model": "z-image", "device": "NVIDIA H100 80GB HBM3", "step_ms": 100.0, "steps": 9, "latency_s": 1.2}
    return predict.Recorded([row(11, **values | {"call": {"guidance_scale": 0.0}} | changes)])


def drawing(recorded, **changes):
    made = plan.recommend(request(model=ZIMAGE, gpu="H100", **changes), KNOWN[ZIMAGE], recorded)
    return made.lines[-1], made.figures["a step"], made.figures["a picture of 1024x1024"].text


def test_model_offload_has_one_of_two_experts_on_the_card():
    both, one = (KNOWN[REPOSITORIES[model]] for model in ("wan22", "wan"))
    call = Call(480, 832, 81, 50)
    made = [predict.predict(shape, CARDS["H100"], call, "model offload") for shape in (both, one)]
    assert made[0].reserved_gb == pytest.approx(made[1].reserved_gb)
    assert made[0].host_peak_gb - made[1].host_peak_gb == pytest.approx((both.weights - one.weights) / 1e9)


def test_what_the_authors_advise_is_typed_unless_it_is_asked_otherwise():
    line, step, _ = drawing(rows_of_zimage())
    assert line.endswith("--memory-gb 11 --steps 9 --guidance-scale 0") and step.reason.endswith(
        "eager, the row is compiled: worked out"
    )
    line, *_ = drawing(rows_of_zimage(), steps=20, guidance_scale=5.0)
    assert line.endswith("--steps 20 --guidance-scale 5")


def test_a_row_of_other_forwards_is_scaled():
    line, step, _ = drawing(rows_of_zimage(), steps=1000, guidance_scale=5.0)
    assert line.endswith("--compile") and step.text == "200 ms"
    assert step.reason == "row of 11 GB, H100; forwards in a step: 2, in the row's: 1"
    _, step, _ = drawing(rows_of_zimage(call={"guidance_scale": 5.0}), steps=1000)
    assert step.text == "50 ms"


@pytest.mark.parametrize("steps", [9, 3])
def test_a_row_of_other_steps_gives_the_time_of_the_call(steps):
    recorded = rows_of_zimage(steps=steps, latency_s=0.3 + steps * 0.1)
    assert drawing(recorded, steps=1000)[2] == "100 s"  # and not a part of a row's
    assert drawing(recorded, steps=400)[2] == "40 s"


def test_another_training_of_the_same_shape_is_not_called_like_it(monkeypatch):
    monkeypatch.setattr(plan, "read_shape", lambda path: dataclasses.replace(KNOWN[ZIMAGE], advised={}))
    monkeypatch.setattr(plan.models, "find_path", str)
    monkeypatch.setattr(plan.models, "find_more", lambda path: "")
    assert plan.find_plan(request(model="me/Z-Image")).lines[-1].endswith("--memory-gb 8 --compile")
    assert "--steps 9 --guidance-scale 0" in plan.find_plan(request(model="nf4-z-image-turbo")).lines[-1]


def test_of_two_rows_of_a_limit_the_same_card_comes_first_then_the_fastest():
    def step(gpu, *rows):
        return plan.recommend(request(gpu=gpu, steps=1000), KNOWN[FLUX], predict.Recorded(rows)).figures["a step"]

    quiet, noisy = row(11, step_ms=140.0, latency_s=4.2), row(11, step_ms=151.0, latency_s=4.6)
    other = row(11, device="NVIDIA H200", step_ms=130.0, latency_s=4.0)
    assert step("H100", noisy, quiet).text == step("H100", quiet, noisy).text == "140 ms"
    assert step("H100", other, noisy, quiet).reason == "row of 11 GB, H100"
    assert step("RTX 4070", noisy, other, quiet).reason.startswith("row of 11 GB, H200, carried over")


def test_host_memory_is_worked_out_where_the_row_has_none():
    made = plan.recommend(request(), KNOWN[FLUX], predict.Recorded([row(11, host_peak_gb=None)]))
    host = made.figures["host memory"]
    assert host.reason.startswith("worked out") and float(host.text.split()[0]) == pytest.approx(13.6, rel=0.05)
    assert made.figures["memory of the card"].reason == "row of 11 GB, H100"


def test_the_median_step_has_the_experts_change_places_only_where_steps_are_few():
    call = [Call(480, 832, 81, steps) for steps in (2, 3, 4, 50)]
    shape = KNOWN[REPOSITORIES["wan22"]]
    steps = [predict.predict(shape, CARDS["H200"], each, "model offload").step_ms for each in call]
    compute = predict.compute_ms(shape, CARDS["H200"], call[0])
    assert steps[0] - compute == pytest.approx(2 * (steps[1] - compute)) and steps[1] > 1.2 * compute
    assert steps[2:] == [compute, compute]


def test_more_memory_than_the_row_is_given_where_it_makes_a_step_faster():
    made = plan.recommend(request(card_gb=12, gpu="989/3350/5"), KNOWN[FLUX], predict.Recorded([row(5)]))
    assert "--memory-gb 11" in made.lines[-1]
    assert made.figures["memory of the card"].reason.startswith("worked out")


def test_without_rows_all_is_worked_out_and_says_so():
    made = plan.recommend(request(height=512, width=512), KNOWN[FLUX], RECORDED)  # no row has this size
    assert made.lines[-1].endswith("--memory-gb 11 --height 512 --width 512")
    for what in ("memory of the card", "host memory", "a step"):
        assert made.figures[what].reason.startswith("worked out")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"card_gb": 4}, "With every block streamed a call takes 3.8 GB, and this card leaves 3.0: draw smaller"),
        ({"ram_gb": 16}, "Drawing takes 19.0 GB of host memory, and 16 GB leave 14.5"),
    ],
)
def test_what_does_not_fit_is_said(changes, problem):
    made = plan.recommend(request(**changes), KNOWN[FLUX], RECORDED)
    assert made.problem.startswith(problem)
    assert bool(made.lines) == ("ram_gb" in changes)


def test_a_card_too_small_for_the_largest_part_quantizes_on_the_cpu():
    made = plan.recommend(request(card_gb=6), KNOWN[FLUX], RECORDED)
    assert made.lines[0].endswith("--device cpu") and made.figures["to save: memory of the card"].text == "none"
    assert made.figures["to save: time"].text == "8.2 min"


def test_nf4_weights_are_not_saved_again():
    saved = dataclasses.replace(KNOWN[FLUX], quantized=True)
    made = plan.recommend(request(model="my nf4"), saved, RECORDED)
    assert made.lines == ["python programs/draw.py 'my nf4' \"a prompt\" --memory-gb 11"]
    assert not any(name.startswith("to save") for name in made.figures)


def test_a_clip_too_large_to_decode_whole_is_decoded_in_tiles():
    made = plan.recommend(request(model=WAN, card_gb=6), KNOWN[WAN], predict.Recorded())
    assert made.figures["decoding"].text == "in tiles" and "a clip of 81 frames, 832x480" in made.figures


def test_the_lines_are_those_of_the_programs(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(draw, "draw", lambda args: taken.append(args) or "drawn")
    monkeypatch.setattr(
        save_nf4, "find_source", lambda model: taken.append(model) or (_ for _ in ()).throw(TutorialError(""))
    )
    made = plan.recommend(request(card_gb=6, height=768, steps=40), KNOWN[FLUX], RECORDED)
    for line, program in zip(made.lines, (save_nf4, draw), strict=True):
        python, file, *arguments = shlex.split(line)
        assert python == "python" and Path(program.__file__) == ROOT / file
        try:
            program.main(arguments)
        except SystemExit as error:
            assert error.code == ""
    assert taken[0] == FLUX and vars(taken[1]).items() >= {"height": 768, "steps": 40, "memory_gb": 5.0}.items()


@pytest.mark.parametrize(
    ("name", "card"),
    [("NVIDIA GeForce RTX 4090", "RTX 4090"), ("4060", "RTX 4060"), ("rtx-4060-ti", "RTX 4060 Ti"),
     ("NVIDIA GeForce RTX 4060 Ti 16GB", "RTX 4060 Ti"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200")],
)  # fmt: skip
def test_cards_are_found_however_they_are_written(name, card):
    assert find_card(name) == (card, CARDS[card])


def test_a_slower_relative_is_another_card():
    for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe", "RTX 4070 Ti"):
        with pytest.raises(TutorialError, match="name one that is like it"):
            find_card(name)


def test_the_command(capsys):
    plan.main([FLUX, "--card", "12", "--ram", "32"])
    printed = capsys.readouterr().out
    assert "python programs/save_nf4.py black-forest-labs/FLUX.1-dev nf4-flux.1-dev\n" in printed
    assert "RTX 4070" in printed and re.search(r"memory of the card +10\.\d GB reserved +row of 11 GB, H\d00", printed)
    plan.main([ZIMAGE, "--card", "8", "--ram", "32"])
    assert "--memory-gb 4 --steps 9 --guidance-scale 0\n" in capsys.readouterr().out
    plan.main([ZIMAGE, "--card", "8", "--ram", "32", "--steps", "30", "--guidance-scale", "5"])
    printed = capsys.readouterr().out
    assert (
        "--steps 30 --guidance-scale 5 --compile\n" in printed and "forwards in a step: 2, in the row's: 1" in printed
    )
    plan.main(["--check"])
    assert "within 25%. Misses:" in capsys.readouterr().out


WRONG = [[], [FLUX, "--card", "0"], [FLUX, "--card", "inf"], [FLUX, "--gpu", "RTX 4060 Ti"]]
WRONG += [
    [FLUX, "--card", "12", "--gpu", "Voodoo"],
    [FLUX, "--card", "12", "--gpu", "0/0/0"],
    [FLUX, "--gpu", "Tesla T4"],
    [FLUX, "--card", "8", "--frames", "3"],
    [FLUX, "--card", "8", "--height", "777"],
    [FLUX, "--card", "8", "--guidance-scale", "-1"],
]
SAID = "like it|emulates bfloat16|draws pictures|let --height be 768 or 784"


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_command_says_what_is_wrong(arguments, monkeypatch):
    monkeypatch.setattr(plan, "this_card", lambda: None)
    with pytest.raises(SystemExit) as error:
        plan.main(arguments)
    assert error.value.code == 2 or re.search(SAID, error.value.code)


def test_the_memory_of_a_card_comes_from_its_name(capsys):
    plan.main([FLUX, "--gpu", "4090", "--ram", "64"])
    assert "--memory-gb 15" in capsys.readouterr().out


def test_saving_counts_too():
    in_one_file = dataclasses.replace(KNOWN[QWEN], largest_file=2 * 10**10)
    made = plan.recommend(request(model=QWEN, ram_gb=24), in_one_file, predict.load_recorded(QWEN, KNOWN))
    assert re.match(r"Saving takes 32\.\d GB of host memory, and 24 GB leave 22.5", made.problem)
    assert '--negative-prompt " "' in made.lines[-1] and "save on another machine" in made.problem
    run, begin, draw = (
        made.figures[name].text for name in ("one run of draw.py", "before it draws", "a picture of 1328x1328")
    )
    assert run.endswith("min") and draw.endswith("min") and begin.endswith("s")


@pytest.mark.parametrize("prompt", ["", " ", "a cat", 'a "cat"', "$5", "it's"])
def test_a_negative_prompt_reaches_the_program_as_it_is(prompt):
    made = plan.find_plan(request(model=QWEN, negative_prompt=prompt))
    words = shlex.split(made.lines[-1])
    assert words[words.index("--negative-prompt") + 1] == prompt


def test_a_small_model_has_megabytes():
    made = plan.find_plan(request(model=str(ROOT / "checkpoints" / "pocket-flux")))
    assert made.figures["to save: disk"] == plan.Figure(
        "7.8 MB", "and 18.3 MB for the model in bfloat16, or 36.6 MB in float32"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "QwenImageEditPipeline"}, "A QwenImageEditPipeline draws no picture or clip from a prompt"),
        ({"transformer": ["diffusers", "Qwen9Model"]}, "has a Qwen9Model, which your diffusers does not have: use a"),
        ({"text_encoder": ["transformers", "Qwen9VL"]}, "has a Qwen9VL, which your transformers does not have: use a"),
    ],
)
def test_what_draw_refuses_has_no_plan(changes, message, tmp_path):
    """Before gigabytes are downloaded and quantized."""
    folder = tiny_pipelines.save("qwen-image", tmp_path / "qwen")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))
    with pytest.raises(TutorialError, match=message):
        plan.find_plan(request(model=str(folder)))


def test_the_address_of_a_page_is_that_of_its_model():
    made = plan.find_plan(request(model=f"https://huggingface.co/{FLUX}/tree/main"))
    assert made == plan.find_plan(request(model=FLUX))


def test_more_is_given_where_less_would_decode_in_tiles():
    made = plan.find_plan(request(model=QWEN, card_gb=12))
    assert "--memory-gb 11 " in made.lines[-1] and "decoding" not in made.figures


def test_a_folder_of_the_same_shape_has_the_rows_of_the_model(monkeypatch):
    monkeypatch.setattr(plan, "read_shape", lambda path: dataclasses.replace(KNOWN[FLUX], quantized=True))
    made = plan.find_plan(request(model=str(ROOT / "checkpoints" / "pocket-flux")))
    assert made.figures["memory of the card"].reason.startswith("row of 11 GB, H")


if __name__ == "__main__":
    known = {FAMILIES[model].repository: dataclasses.asdict(shape_from_configurations(model)) for model in MODELS}
    shapes.KNOWN.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
