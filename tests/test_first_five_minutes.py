"""What people type first, coming from timm, PEFT, transformers, open_clip or torchvision: it works,
or one sentence says what does."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from small_world import MODEL, SIZES, tiny_vit, transformers_of_the_twins, write_images

import pgn_fast
from pgn_fast import cli
from pgn_fast.backbone.load import load_backbone

IMAGES = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()


# ---- timm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "timm/", "hf-hub:timm/"])
def test_timms_names(prefix, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(tiny_vit().state_dict(), path)
    backbone = load_backbone(prefix + MODEL, checkpoint_path=str(path), pretrained=False, **SIZES)
    assert pgn_fast.VPT(backbone, 10, num_prompts=1)(IMAGES).shape == (2, 10)


@pytest.mark.parametrize("options", [{}, {"use_naflex": True}])
def test_naflex_is_refused_by_a_sentence(options):
    name = "vit_base_patch16_224" if options else "naflexvit_base_patch16_gap"
    with torch.device("meta"):
        backbone = timm.create_model(name, depth=1, **options)
    with pytest.raises(ValueError, match=r"NaFlexVit is not a vision .*such as vit_"):
        pgn_fast.VPT(backbone, 10)


def test_other_models_of_timm_are_refused_by_a_sentence():
    """Before anything is downloaded."""
    for name in ("resnet18", *timm.list_models("gemma4_vit*")[:1]):
        with pytest.raises(ValueError, match=r"is not a vision transformer .*such as vit_"):
            pgn_fast.VPT(name, 10)


def test_another_input_size_is_refused_by_a_sentence():
    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=1)
    with pytest.raises(AttributeError, match=r"image size; build it on a backbone of the other"):
        model.set_input_size(img_size=192)
    assert not hasattr(model, "set_input_size")


def test_timms_feature_interface():
    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=1)
    (maps,) = model.forward_intermediates(
        IMAGES, indices=1, output_fmt="NCHW", intermediates_only=True
    )
    (tokens,) = model.get_intermediate_layers(IMAGES, n=1)
    assert maps.shape == (2, 32, 2, 2) and tokens.shape == (2, 4, 32)
    for name in ("default_cfg", "feature_info", "num_prefix_tokens", "global_pool"):
        assert getattr(model, name) == getattr(model.backbone, name)
    assert model.head_hidden_size == 32


@pytest.mark.parametrize(
    "words",
    [
        *("--mixup 0.8", "--cutmix 1.0", "--model-ema", "--bce-loss", "--layer-decay 0.7"),
        *("--opt-kwargs momentum=0.8", "--lr-base 0.1", "--img-size 384", "--pretrained"),
        *("--experiment x", "--val-interval 2", "--checkpoint-hist 3", "--log-wandb"),
    ],
)
def test_timms_training_flags_are_understood(words):
    cli.build_parser("train").parse_args(["train", "digits", *words.split()])


def test_timms_settings_file_points_to_the_way(capsys, tmp_path):
    (tmp_path / "cfg.yaml").write_text("epochz: 3\n")
    assert cli.main(["train", "digits", "-c", str(tmp_path / "cfg.yaml")]) == 2
    assert "epochz is no setting of this command; did you mean epochs" in capsys.readouterr().err


# ---- PEFT -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["get_peft_model", "VPTConfig", "PeftModel", "PeftConfig"])
def test_pefts_functions_point_to_ours(name):
    with pytest.raises(AttributeError, match=r"VPT\(backbone|from_pretrained"):
        getattr(pgn_fast, name)


def test_pefts_methods_point_to_ours():
    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=1)
    for name in ("load_adapter", "set_adapter", "add_adapter", "delete_adapter"):
        with pytest.raises(AttributeError, match=r"pgn_fast\.TaskBank\(backbone\) holds many"):
            getattr(model, name)
    with pytest.raises(AttributeError, match=r"frozen backbone is \.backbone"):
        model.get_base_model()
    with pytest.raises(AttributeError, match="nothing to merge"):
        model.merge_and_unload()
    # other missing names are told as ever
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        model.nonsense  # noqa: B018


def test_pefts_adapter_names_point_to_the_bank():
    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=1)
    with pytest.raises(ValueError, match=r"adapter_names: a model holds one adapter; .*TaskBank"):
        model(IMAGES, adapter_names=["pets", "__base__"])
    bank = pgn_fast.TaskBank(model.backbone)
    bank.add("pets", model)
    with torch.no_grad():
        right = model.eval()(IMAGES)
        assert torch.allclose(torch.stack(bank(IMAGES, ["pets", "pets"])), right, atol=1e-5)


def test_the_bare_backbone_under_pefts_name():
    vit = tiny_vit()
    model = pgn_fast.VPT(vit, 10, num_prompts=1)
    options = {"indices": [0, 1], "norm": True, "output_fmt": "NLC", "return_prefix_tokens": True}
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IMAGES), vit(IMAGES))
        assert torch.equal(model.forward_reference(IMAGES), vit(IMAGES))
        tokens = model.forward_features(IMAGES)
        assert torch.equal(model.forward_head(tokens), vit(IMAGES))
        pooled = model.forward_head(tokens, pre_logits=True)
        assert torch.equal(pooled, vit.forward_head(tokens, pre_logits=True))
        final, found = model.forward_intermediates(IMAGES, **options)
        expected, wanted = vit.forward_intermediates(IMAGES, **options)
        assert torch.equal(final, expected)
        pairs = zip(found, wanted, strict=True)
        assert all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


def test_pefts_own_reader_is_told_who_reads_it(tmp_path):
    peft = pytest.importorskip("peft")
    pgn_fast.VPT(tiny_vit(), 10, num_prompts=1).save_pretrained(tmp_path)
    for reader in (peft.PeftConfig, peft.LoraConfig):
        with pytest.raises(Exception, match=r"pgn_fast\.from_pretrained loads this adapter"):
            reader.from_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"pgn_fast\.from_pretrained loads this adapter"):
        peft.PeftModel.from_pretrained(tiny_vit(), tmp_path)


@pytest.mark.parametrize("command", ["eval", "verify", "export", "serve", "push", "predict"])
def test_a_hub_that_does_not_answer_is_one_sentence(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "no folder me/pets, and on the hub, me/pets: HF_HUB_OFFLINE is set"
    with pytest.raises(ValueError, match=message):
        pgn_fast.from_pretrained("me/pets")
    images = [str(write_images(tmp_path, 1))] if command == "predict" else []
    assert cli.main([command, "me/pets", *images]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_publishing_without_a_hub_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=1)
    with pytest.raises(ValueError, match=r"^me/pets: HF_HUB_OFFLINE is set.* nothing was up"):
        model.push_to_hub("me/pets")


def test_pefts_words_of_loading(tmp_path):
    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=1)
    model.save_pretrained(tmp_path)
    again = pgn_fast.VPT.from_pretrained(tmp_path, tiny_vit(), trainable=True)
    assert again.training
    with pytest.raises(ValueError, match=r"here it is trainable=True"):
        pgn_fast.from_pretrained(tmp_path, tiny_vit(), is_trainable=True)
    with pytest.raises(ValueError, match="there is no folder"):
        pgn_fast.from_pretrained(tmp_path / "nowhere")


def lora_backbone():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    vit = tiny_vit()
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, vit)


def test_lora_in_the_backbone_is_told_to_be_frozen():
    with pytest.warns(UserWarning, match=r"4 tensors of LoRA .*frozen with it"):
        model = pgn_fast.VPT(lora_backbone(), 10, num_prompts=1)
    assert "attn.qkv" in model.explain()
    assert torch.equal(model(IMAGES), model.forward_reference(IMAGES))


def test_lora_beside_prompts_is_trained_where_it_is_switched_on():
    with pytest.warns(UserWarning, match="LoRA"):
        model = pgn_fast.VPT(lora_backbone(), 10, num_prompts=1)
    lora = [p for n, p in model.backbone.named_parameters() if "lora_" in n]
    for p in lora:
        p.requires_grad_(True)
    model(IMAGES).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora)
    assert model.prompter.prompts.grad.abs().sum() > 0
    assert {id(p) for p in lora} <= {id(p) for p in model.trainable_parameters()}


def test_merged_lora_runs_on_the_engine():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    vit = tiny_vit()
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    wrapped = peft.get_peft_model(vit, config)
    with torch.no_grad():
        adapted = wrapped(IMAGES)
        merged = wrapped.merge_and_unload()
        assert torch.allclose(merged(IMAGES), adapted, atol=1e-5)
    model = pgn_fast.VPT(merged, 10, num_prompts=1)
    assert "no savings" not in model.explain()
    assert torch.allclose(model(IMAGES), model.forward_reference(IMAGES), atol=1e-5)


def test_a_peft_model_is_refused_by_a_sentence():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_vit(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(ValueError, match=r"PEFT's wrapper.*merge_and_unload\(\).*get_base_model"):
        pgn_fast.VPT(wrapped, 10)


# ---- transformers, open_clip, torchvision ----------------------------------------------------


def test_transformers():
    transformers = transformers_of_the_twins()
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    for model in (transformers.AutoModel, transformers.AutoModelForImageClassification):
        original = model.from_config(config)
        assert pgn_fast.VPT(original, 10, num_prompts=1)(IMAGES).shape == (2, 10)


def test_timms_models_inside_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(architecture=MODEL, model_args=SIZES)
    for kind in (
        transformers.TimmWrapperModel,
        transformers.TimmWrapperForImageClassification,
    ):
        original = kind(config)
        assert pgn_fast.VPT(original, 10, num_prompts=1)(IMAGES).shape == (2, 10)


def test_transformers_names_of_images_and_labels():
    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=1)
    output = model(pixel_values=IMAGES, labels=torch.tensor([1, 2]))
    assert output.loss.requires_grad and output.logits.shape == (2, 10)


DATA = [{"pixel_values": x, "labels": i} for i, x in enumerate(IMAGES)]


def test_transformers_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=1)
    before = model.head.bias.detach().clone()
    transformers.Trainer(model, args, train_dataset=DATA).train()
    assert not torch.equal(model.head.bias, before)


def test_accelerate_and_timms_average_and_mixup():
    accelerate = pytest.importorskip("accelerate")
    from timm.data import Mixup
    from timm.utils import ModelEmaV3

    model = pgn_fast.VPT(tiny_vit(), 10, num_prompts=1)
    average = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    images, labels = Mixup(num_classes=10)(IMAGES.clone(), torch.tensor([1, 2]))
    accelerator.backward(torch.nn.functional.cross_entropy(wrapped(images), labels))
    optimizer.step()
    average.update(model)
    assert not torch.equal(average.module.head.bias, model.head.bias)
    assert average.module(IMAGES).shape == (2, 10)


def test_open_clip_and_torchvision():
    transformer = pytest.importorskip("open_clip").transformer
    from torchvision.models.vision_transformer import VisionTransformer

    for original in (
        transformer.VisionTransformer(16, 8, 32, 1, 2, 2.0, output_dim=8),
        VisionTransformer(16, 8, 1, 2, 32, 64),
    ):
        assert pgn_fast.PGN(original, 10, num_prompts=1, library_size=2)(IMAGES).shape == (2, 10)


# ---- anyone ----------------------------------------------------------------------------------


def test_fit_takes_loaders(tmp_path):
    pairs = [(image, i) for i, image in enumerate(IMAGES)]
    loader = torch.utils.data.DataLoader(pairs, batch_size=2)
    model = pgn_fast.VPT(tiny_vit(), 2, num_prompts=1)
    result = pgn_fast.fit(model, loader, loader, epochs=1, output=tmp_path)
    assert result.validation["images"] == 2


def test_functional_transforms():
    model = pgn_fast.VPT(tiny_vit(), 2, num_prompts=1).eval()
    prompts = model.prompter.prompts.detach()

    def loss(tokens):
        names = {"prompter.prompts": tokens}
        return torch.func.functional_call(model, names, (IMAGES,)).square().sum()

    plain = prompts.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(plain), plain)
    assert torch.allclose(torch.func.grad(loss)(prompts), expected, atol=1e-5)
    sets = torch.stack([prompts, 2 * prompts])
    each = torch.stack([loss(tokens) for tokens in sets])
    assert torch.allclose(torch.func.vmap(loss)(sets), each, rtol=1e-4)


# ---- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.commands())
def test_commands_that_are_expected(command, capsys):
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    examples = shown.partition("example")[2]
    assert f"pgn-fast {command}" in examples


def test_a_missing_adapter_is_one_line(capsys, tmp_path):
    assert cli.main(["verify", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    assert cli.main(["push", str(tmp_path), "me/x"]) == 2
