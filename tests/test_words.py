"""Heads of words: class names through a text tower, files of names, and what cannot work."""

from __future__ import annotations

import json
import re

import pytest
import torch
from small_world import write_images
from tiny_clip import LENGTH, SIZE, WIDTH, tiny_open_clip, tiny_transformers
from torch.nn import functional as F

import pgn_fast
from pgn_fast.cli import main
from pgn_fast.errors import UserError
from pgn_fast.words.names import names_for, read_class_names

CLASSES = ("blue", "green", "red")
MAKE = {"transformers": tiny_transformers, "open_clip": tiny_open_clip}


@pytest.fixture(scope="module", params=MAKE)
def clip(request, tmp_path_factory):
    """(its library, the whole model, its folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, MAKE[request.param](folder), folder


def texts_by_hand(library, model, folder, texts):
    """What the library itself makes of texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        if library == "transformers":
            output = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt"))
            return output if isinstance(output, torch.Tensor) else output.pooler_output
        tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
        return model.encode_text(tokens["input_ids"])


def images_by_hand(library, model, images):
    with torch.no_grad():
        if library == "open_clip":
            return model.encode_image(images)
        output = model.get_image_features(pixel_values=images)
        return output if isinstance(output, torch.Tensor) else output.pooler_output


def test_one_template_gives_the_librarys_own_texts(clip):
    _, model, folder = clip
    words = pgn_fast.encode_class_names(str(folder), CLASSES, "this is a {}")
    expected = texts_by_hand(*clip, [f"this is a {name}" for name in CLASSES])
    assert torch.allclose(words.class_embeddings, F.normalize(expected, dim=-1), atol=1e-6)
    assert words.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    # texts that are all alike would show nothing
    assert (words.class_embeddings @ words.class_embeddings.T).min() < 0.99


def test_several_templates_are_normalized_averaged_and_normalized(clip):
    templates = ["a photo of the {}", "the big {} , a picture"]
    words = pgn_fast.encode_class_names(str(clip[2]), CLASSES, templates)
    each = [
        F.normalize(texts_by_hand(*clip, [t.replace("{}", name) for name in CLASSES]), dim=-1)
        for t in templates
    ]
    expected = F.normalize(torch.stack(each).mean(0), dim=-1)
    assert torch.allclose(words.class_embeddings, expected, atol=1e-6)
    plain = F.normalize(torch.stack([2 * each[0], each[1]]).mean(0), dim=-1)
    assert not torch.allclose(expected, plain, atol=1e-4)


def test_a_model_of_words_gives_the_librarys_logits(clip):
    """Without prompts' influence: images and texts as the whole model compares them."""
    library, model, folder = clip
    backbone = pgn_fast.load_backbone(str(folder))
    words = pgn_fast.encode_class_names(str(folder), CLASSES, "a {}", backbone=backbone)
    prompted = pgn_fast.VPT(backbone, head="zero_shot", **words._asdict(), num_prompts=1).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    features = F.normalize(images_by_hand(library, model, images), dim=-1)
    texts = F.normalize(texts_by_hand(*clip, [f"a {name}" for name in CLASSES]), dim=-1)
    expected = model.logit_scale.exp().detach() * features @ texts.T
    with torch.no_grad():
        pooled = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
        assert torch.allclose(prompted.head(pooled), expected, atol=1e-4)


def test_modules_are_taken_too(clip):
    library, model, folder = clip
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if library == "open_clip":
        with pytest.raises(UserError, match=r"pass tokenizer=open_clip\.get_tokenizer"):
            pgn_fast.encode_class_names(model, CLASSES)
        import open_clip

        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    words = pgn_fast.encode_class_names(model, CLASSES, tokenizer=tokenizer)
    named = pgn_fast.encode_class_names(str(folder), CLASSES)
    assert torch.allclose(words.class_embeddings, named.class_embeddings, atol=1e-6)


def test_siglip_texts_are_padded_to_their_whole_length(tmp_path):
    model = tiny_transformers(tmp_path, kind="Siglip")
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tmp_path)(
        [f"a {name}" for name in CLASSES],
        padding="max_length",
        max_length=LENGTH,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = model.get_text_features(input_ids=tokens["input_ids"])
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    words = pgn_fast.encode_class_names(str(tmp_path), CLASSES, "a {}")
    assert torch.allclose(words.class_embeddings, F.normalize(expected, dim=-1), atol=1e-6)


def test_another_models_image_tower_is_refused(clip, tmp_path):
    other = tmp_path / "other"
    MAKE[clip[0]](other, seed=1)
    backbone = pgn_fast.load_backbone(str(other))
    with pytest.raises(UserError, match="is not the backbone: their features of one image have a"):
        pgn_fast.encode_class_names(str(clip[2]), CLASSES, backbone=backbone)


@pytest.mark.parametrize(
    "names, templates, message",
    [
        ([], "{}", "give the names of two classes or more"),
        ("blue", "{}", "give the names of two classes or more"),
        (["blue", ""], "{}", "the name of class 1 is ''; give a word"),
        (["blue", 3], "{}", "the name of class 1 is 3; give a word"),
        (["apple pie", "red", "Apple_pie"], "{}", "classes 0 and 2 are both 'Apple_pie'"),
        (CLASSES, "a photo", r"'a photo' has no \{\}; mark the place"),
        (CLASSES, [], "none is given; mark the place"),
        (CLASSES, "a " * LENGTH + "{}", f"fills the text tower, which reads {LENGTH} tokens"),
    ],
)
def test_names_and_templates_that_cannot_work(clip, names, templates, message):
    with pytest.raises(UserError, match=message):
        pgn_fast.encode_class_names(str(clip[2]), names, templates)


def test_models_without_a_text_tower(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="pgn_demo_vit has no text tower"):
        pgn_fast.encode_class_names("pgn_demo_vit", CLASSES)
    with pytest.raises(UserError, match="a Linear has no text tower"):
        pgn_fast.encode_class_names(torch.nn.Linear(2, 2), CLASSES)
    with pytest.raises(TypeError, match="takes a name or a module, got int"):
        pgn_fast.encode_class_names(3, CLASSES)
    with pytest.raises(UserError, match="is an image tower, and open_clip knows no whole model"):
        pgn_fast.encode_class_names("vit_tiny_patch16_224", CLASSES)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="has no text tower"):
        pgn_fast.encode_class_names(str(tmp_path), CLASSES)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"is a model of open_clip, .* 'pgn_fast\[clip\]'"):
        pgn_fast.encode_class_names("vit_base_patch32_clip_224.openai", CLASSES)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {}}))
    with pytest.raises(UserError, match=r"is a model of transformers, .* 'pgn_fast\[hf\]'"):
        pgn_fast.encode_class_names(str(tmp_path), CLASSES)


def test_timm_names_lead_to_open_clips_model(monkeypatch):
    """By the repository that both load the weights from; with the activation of these weights."""
    open_clip = pytest.importorskip("open_clip")
    from pgn_fast.words import towers

    asked = []
    monkeypatch.setattr(towers, "_open_clip", lambda title, name, tag=None: asked.append(title))
    for name in ("vit_base_patch32_clip_224.openai", "vit_base_patch16_clip_224.metaclip_400m"):
        towers.find_tower(name)
    assert asked == ["ViT-B-32-quickgelu, openai", "ViT-B-16-quickgelu, metaclip_400m"]
    assert ("ViT-B-32-quickgelu", "openai") in open_clip.list_pretrained()


# Files of names, as they come from spreadsheets, editors and other people's repositories.


@pytest.mark.parametrize(
    "file, content, expected",
    [
        ("names.txt", b"cat\ndog\n", ["cat", "dog"]),
        ("names.txt", b"\xef\xbb\xbfcat\r\n\r\n dog \r\n\r\n", ["cat", "dog"]),
        ("names.txt", "Käse\nBrot".encode("utf-16"), ["Käse", "Brot"]),
        ("names.txt", b"cat\rdog", ["cat", "dog"]),
        ("names.txt", b"salt, pepper and oil\nbread", ["salt, pepper and oil", "bread"]),
        ("names.txt", b"n01\tcat\nn02\tbig dog", {"n01": "cat", "n02": "big dog"}),
        ("names.txt", b"0 cat\n1 dog\n2 horse", ["cat", "dog", "horse"]),
        ("classInd.txt", b"1 cat\r\n2 dog\r\n", ["cat", "dog"]),
        ("names.txt", b"1: cat\n2: dog", ["cat", "dog"]),
        ("names.txt", b"7 up\n2 dog", ["7 up", "2 dog"]),
        (
            "synset_words.txt",
            b"n02121808 cat, house cat\r\nn02084071 dog",
            {"n02121808": "cat, house cat", "n02084071": "dog"},
        ),
        ("names.txt", b"2 dogs\n3 cats", ["2 dogs", "3 cats"]),
        ("names.txt", b"zebra\x0bcrossing\nroad", ["zebra\x0bcrossing", "road"]),
        ("names.csv", b'\xef\xbb\xbfcat\r\n"salt, pepper"\r\n', ["cat", "salt, pepper"]),
        ("names.csv", b'n01,"salt, pepper"\nn02,dog\n\n', {"n01": "salt, pepper", "n02": "dog"}),
        ("names.json", b'["cat", "dog"]', ["cat", "dog"]),
        ("names.json", b'\xef\xbb\xbf{"1": "cat", "2": "dog"}', {"1": "cat", "2": "dog"}),
    ],
)
def test_files_of_names(tmp_path, file, content, expected):
    (tmp_path / file).write_bytes(content)
    assert read_class_names(tmp_path / file) == expected


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("names.txt", b"\r\n \r\n", "has no names in it"),
        ("names.txt", "Käse\nBrot".encode("latin-1"), r"neither UTF-8 nor UTF-16 \(byte 1\)"),
        ("names.txt", b"a\tb\nc", "rows of 1 and 2 columns, such as"),
        ("names.txt", b"a\tb\tc\nd\te\tf", "rows of 3 columns"),
        ("names.txt", b"a\tcat\na\tdog", "names 'a' twice"),
        ("names.csv", b"salt, pepper\nbread", "rows of 1 and 2 columns"),
        ("names.txt", b"1 cat\n2 dog\n4 cow", "count 1, 2, ..., 4, and there are 3: a class is"),
        ("names.json", b"{", "is no JSON"),
        ("names.json", b'{"0": ["n01", "cat"]}', "takes a list of names, or a dictionary"),
        ("names.json", b'"cat"', "takes a list of names, or a dictionary"),
    ],
)
def test_files_that_are_no_names(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_class_names(tmp_path / file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"`class_names`: .*nothing\.txt cannot be read"):
        read_class_names(tmp_path / "nothing.txt")


DATA = ["n01", "n02", "n03"]


@pytest.mark.parametrize(
    "given, classes, expected, note",
    [
        (["cat", "dog", "cow"], DATA, ["cat", "dog", "cow"], ""),
        (["cat", "dog", "cow"], None, ["cat", "dog", "cow"], ""),
        # the data's own names in another order: by name, not by place
        (
            ["Dog", "apple pie", "cat"],
            ["apple_pie", "cat", "dog"],
            ["apple pie", "cat", "Dog"],
            "m",
        ),
        ({"n03": "cow", "n01": "cat", "n02": "dog", "n9": "x"}, DATA, ["cat", "dog", "cow"], ""),
        ({"0": "cat", "2": "cow", "1": "dog"}, DATA, ["cat", "dog", "cow"], ""),
        ({"1": "cat", "2": "dog", "3": "cow"}, None, ["cat", "dog", "cow"], "count from 1"),
        # folders that are numbers are folders
        ({"1": "cat", "2": "dog", "3": "cow"}, ["1", "10", "2"], None, "no name for 1 of the 3"),
        ({"1": "cat", "10": "cow", "2": "dog"}, ["1", "2", "10"], ["cat", "dog", "cow"], ""),
        (["cat", "dog"], DATA, None, "2 names, the data has 3 classes"),
        (["n01,cat", "n02,dog", "n03,cow"], DATA, None, "'n01,cat' begins with a class of the"),
        (["n01; cat", "n03: x", "n02 = y"], DATA, None, "put a tab between folder and name"),
        (["cat", "n01", "cow"], DATA, None, "name 1 is 'n01', which is class 0 of the data"),
        ({"n01": "cat", "n02": "dog"}, DATA, None, "no name for 1 of the 3 classes .* 'n03'"),
        ({"x": "cat", "y": "dog", "z": "cow"}, DATA, None, "its 3 keys, such as 'x', are none of"),
        ({"a b": "cat", "A_B": "dog"}, DATA, None, "two of its folders read the same"),
    ],
)
def test_names_for_labels(given, classes, expected, note):
    if expected is None:
        with pytest.raises(UserError, match=note):
            names_for(given, classes, 3, "the data")
        return
    names, notes = names_for(given, classes, 3, "the data")
    assert names == expected and (note in " ".join(notes) if note else not notes)


# The command.


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), 6, CLASSES)


def train(photos, folder, output, *more):
    flags = f"--model {folder} --method vpt-deep --num-prompts 1 --epochs 1 -b 8 -j 0 --device cpu"
    words = ["train", str(photos), *flags.split(), "--head", "zero_shot", "--output", str(output)]
    return main([*words, *more])


def test_training_stores_the_words_and_loading_needs_no_text_tower(
    clip, photos, tmp_path, monkeypatch, capsys
):
    folder = clip[2]
    names = tmp_path / "names.txt"
    # in another order than the folders: matched by name
    names.write_bytes(b"\xef\xbb\xbfred\tthe red\r\nblue\tthe blue\r\ngreen\tapple\r\n")
    options = ["--class-names", str(names), "--template", "a {}", "--template", "the {}"]
    assert train(photos, folder, tmp_path / "run", *options) == 0
    assert "classes in words, such as 'the blue' and 'the red'" in capsys.readouterr().out
    expected = pgn_fast.encode_class_names(
        str(folder), ["the blue", "apple", "the red"], ["a {}", "the {}"]
    )

    monkeypatch.setattr("pgn_fast.words.find_tower", lambda *given: pytest.fail("a text tower"))
    backbone = pgn_fast.load_backbone(str(folder))
    model = pgn_fast.from_pretrained(tmp_path / "run/best", backbone)
    assert torch.allclose(model.head.class_embeddings, expected.class_embeddings, atol=1e-6)
    assert model.head.logit_scale == pytest.approx(expected.logit_scale)
    assert model.class_names == list(CLASSES)
    arguments = ["eval", str(tmp_path / "run"), str(photos), "--model", str(folder), "-j", "0"]
    assert main([*arguments, "--device", "cpu"]) == 0


def test_the_datas_own_names_are_the_default(clip, photos, tmp_path, capsys):
    assert train(photos, clip[2], tmp_path / "run") == 0
    assert "such as 'blue' and 'red'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--class-names", "two.txt"], "--class-names: 2 names, folder .* has 3 classes"),
        (["--template", "a photo"], "--template: 'a photo' has no {}"),
        (["--method", "linear"], "--head zero_shot has nothing to train with --method linear"),
        (["--head", "linear", "--template", "a {}"], "--template is for a head of words: add"),
        (["--text-model", "pgn_demo_vit"], "--text-model: pgn_demo_vit has no text tower"),
    ],
)
def test_commands_that_cannot_work(photos, tmp_path, monkeypatch, capsys, more, message):
    tiny_transformers(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("red\nblue\n")
    assert train(photos, tmp_path / "clip", tmp_path / "run", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_width_of_the_words_is_the_models(clip):
    assert pgn_fast.encode_class_names(str(clip[2]), CLASSES).class_embeddings.shape == (3, WIDTH)
