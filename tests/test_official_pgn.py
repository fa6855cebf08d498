"""PromptGenerator with the published PGN checkpoints, against the official code's own numbers."""

from __future__ import annotations

import pytest
import torch
from official.goldens import FIXTURES, GRADIENT, assert_close, load, part
from torch.nn import functional as F

from pgn_fast import PromptGenerator
from pgn_fast.prompts.official import official_name

CHECKPOINTS = ["pgn_clip_cifar100", "pgn_vit_eurosat"]


@pytest.fixture(params=CHECKPOINTS, scope="module")
def golden(request):
    """The path of published weights, and the official numbers; images normalized."""
    tensors, config = load(f"official_pgn/{request.param}.golden")
    mean, std = (tensors[name].view(3, 1, 1) for name in ("norm_mean", "norm_std"))
    tensors["images"] = (tensors["images_u8"].float() / 255 - mean) / std
    return FIXTURES / "official_pgn" / f"{request.param}.pt", tensors, config["settings"]


def test_sizes_are_read_off_the_checkpoint(golden):
    path, _, settings = golden
    generator = PromptGenerator.from_official(path)
    assert generator.num_prompts == settings["nr_output_vectors"] == 16
    assert generator.library_size == settings["mixture_size"]
    assert generator.embed_dim == settings["vector_dim"]
    assert generator.config["generator_kwargs"] == {
        "channels": settings["initial_channels"],
        "groups": settings["nr_groups"],
        "blocks_per_group": settings["blocks_per_group"],
        "in_chans": 3,
    }


@torch.no_grad()
def test_eval_outputs(golden):
    path, tensors, _ = golden
    generator, images = PromptGenerator.from_official(path).eval(), tensors["images"]
    assert_close("logits", generator.mixture_logits(images), tensors["logits"])
    assert_close("mix", generator.mixture(images), tensors["mix"])
    assert_close("prompts", generator(images), tensors["prompts"])
    # 160 x 224 pixels become 224 x 313: the shorter side counts, the longer is cut to an integer
    assert_close("prompts_wide", generator(images[:, :, 32:192]), tensors["prompts_wide"])


@torch.no_grad()
def test_eval_options(golden):
    path, tensors, _ = golden
    images = tensors["images"]
    sigmoid = PromptGenerator.from_official(path, activation="sigmoid").eval()
    assert_close("sigmoid", sigmoid(images), tensors["prompts_sigmoid"])
    no_pool = PromptGenerator.from_official(path, generator_kwargs={"max_pool": False}).eval()
    assert_close("nomaxpool", no_pool(images), tensors["prompts_nomaxpool"])
    small = PromptGenerator.from_official(path, resolution=112).eval()
    assert_close("res112", small(images), tensors["prompts_res112_antialias"])
    # older torchvision did not antialias: whoever wants that resizes before
    rough = F.interpolate(images, (112, 112), mode="bilinear", antialias=False)
    assert_close("res112 rough", small(rough), tensors["prompts_res112_noantialias"])


def test_train_mode_and_gradients(golden):
    path, tensors, _ = golden
    generator, images = PromptGenerator.from_official(path).train(), tensors["images"]
    seen = {}
    generator.generator.head.register_forward_hook(
        lambda _, inputs, output: seen.update(pooled=inputs[0], logits=output)
    )
    prompts = generator(images)
    seen["logits"].retain_grad()
    loss = (prompts * tensors["g"]).sum()
    loss.backward()

    assert_close("prompts_train", prompts, tensors["prompts_train"])
    assert_close("logits_train", seen["logits"].view_as(tensors["logits"]), tensors["logits_train"])
    assert_close("pooled_train", seen["pooled"], tensors["pooled_train"])
    assert_close("loss_train", loss, tensors["loss_train"])

    state = generator.state_dict()
    buffers = part(tensors, "after_train.")
    assert len(buffers) == 3 * 9  # mean, variance and count of nine batch norms
    for name, value in buffers.items():
        assert_close(name, state[official_name(name)].to(value.dtype), value)

    grads = {name: p.grad for name, p in generator.named_parameters()}
    grad_logits = seen["logits"].grad.view_as(tensors["logits"])
    assert_close("grad_logits", grad_logits, tensors["grad_logits_train"], GRADIENT)
    for name, value in part(tensors, "grad.").items():
        name, every_fourth_row, _ = name.partition("[::4]")
        stride = 4 if every_fourth_row else 1
        assert_close(name, grads[official_name(name)][::stride], value, GRADIENT)
    whole = tensors["grad_logits_train"].flatten(1).T @ tensors["pooled_train"]
    assert_close("head.weight", grads["generator.head.weight"], whole, GRADIENT)
    norms = part(tensors, "gradnorm.")
    assert len(norms) == len(grads)
    for name, value in norms.items():
        assert_close(f"norm of {name}", grads[official_name(name)].norm(), value, GRADIENT)


VARIANTS, SETTINGS = load("official_pgn_vit/pgn_variants")


@pytest.mark.parametrize("variant", [name for name in SETTINGS if name != "iip"])
def test_constructor_options(variant):
    settings, tensors = SETTINGS[variant], part(VARIANTS, f"{variant}.")
    generator = PromptGenerator.from_official(
        part(tensors, "pgn."),
        resolution=settings["pgn_resolution"],
        activation=settings["pgn_act_fn"],
        generator_kwargs={"max_pool": settings["init_max_pool"]},
    )
    assert generator.num_prompts == settings["nr_output_vectors"]
    kwargs = generator.config["generator_kwargs"]
    assert kwargs["groups"] == settings["nr_groups"]
    assert kwargs["blocks_per_group"] == settings["blocks_per_group"]
    images, size = VARIANTS["images"], settings["pgn_resolution"]
    assert_close("prompts", generator.eval()(images), tensors["prompts"])
    if "prompts_noantialias" in tensors:
        rough = F.interpolate(images, (size, size), mode="bilinear", antialias=False)
        assert_close("noantialias", generator(rough), tensors["prompts_noantialias"])
    assert_close("prompts_train", generator.train()(images), tensors["prompts_train"])


def test_every_variant_is_compared():
    compared = {"pgn", "prompts", "prompts_noantialias", "prompts_train"}
    names = {name.split(".")[1] for name in VARIANTS if "." in name and name[:4] != "iip."}
    assert names == compared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("tl_vectors"), "lacks token_library"),
        (lambda s: s.update(surprise=torch.ones(1)), "'surprise' is no tensor"),
        (lambda s: s.update({"model.output_net.2.bias": torch.ones(31)}), "no multiple of the 10"),
    ],
)
def test_foreign_checkpoints_are_refused(change, message):
    state = part(VARIANTS, "base.pgn.")
    change(state)
    with pytest.raises(ValueError, match=message):
        PromptGenerator.from_official(state)


def test_a_lightning_checkpoint_holds_the_pgn_as_a_part(tmp_path):
    state = part(VARIANTS, "base.pgn.")
    whole = {f"pgn_module.{name}": value for name, value in state.items()}
    whole["vit_model.class_token"] = torch.ones(1, 1, 24)
    torch.save({"epoch": 3, "state_dict": whole}, tmp_path / "last.ckpt")
    generator = PromptGenerator.from_official(tmp_path / "last.ckpt", resolution=64).eval()
    assert_close("prompts", generator(VARIANTS["images"]), VARIANTS["base.prompts"])


def test_a_size_that_contradicts_the_tensors_is_refused():
    with pytest.raises(ValueError, match=r"num_prompts=16 was given, but .* 3"):
        PromptGenerator.from_official(part(VARIANTS, "base.pgn."), num_prompts=16)


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="it holds a list"):
        PromptGenerator.from_official(tmp_path / "list.pt")


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("this must not run",))

    torch.save({"tl_vectors": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt: it holds a .*print"):
        PromptGenerator.from_official(tmp_path / "bad.pt")
