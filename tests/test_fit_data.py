"""``pgn_fast.fit`` on data that are not as they should be, or named otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from given_world import OPTIONS, Batches, model, pictures, tensors
from PIL import Image
from small_world import tiny_vit
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pgn_fast
from pgn_fast.adapters import backbone_pixels
from pgn_fast.errors import UserError
from pgn_fast.models import LinearProbe


def relabeled(label):
    """Images of which one, not the first, has another label."""
    return [*pictures(5), (pictures(1)[0][0], label)]


@pytest.mark.parametrize(
    "label, task, message",
    [
        ("cat", "multiclass", r"list given as train\[5\] has the label 'cat'; labels are numbers"),
        (None, "multiclass", r"train\[5\] has the label None"),
        (0.5, "multiclass", r"train\[5\] has the label 0.5; a class is a whole number"),
        (float("nan"), "multiclass", "the label nan"),
        (-1, "multiclass", r"label -1 is out of range for 3 classes"),
        (3, "multiclass", r"label 3 is out of range for 3 classes"),
        ([0, 1, 0], "multiclass", "give `task` multilabel; of a one-hot label .* its argmax"),
        ([0.2, 0.8, 0], "multilabel", "as a vector of 0 and 1, one place a class, got .0.2"),
        (2, "multilabel", "as a vector of 0 and 1, one place a class, got 2"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_that_cannot_be_meant_is_no_damaged_image(tmp_path, label, task, message, workers):
    data = relabeled(label)
    if task == "multilabel":
        data = [(image, [i == y for i in range(3)]) for image, y in data[:5]] + data[5:]
    options = {**OPTIONS, "workers": workers, "task": task}
    with pytest.raises(UserError, match=message) as caught:
        pgn_fast.fit(model(), data, output=tmp_path / "run", **options)
    assert "Traceback" not in str(caught.value)


def test_labels_of_one_number_and_whole_fractions_are_numbers(tmp_path):
    kinds = (float, np.uint16, torch.tensor, lambda y: torch.tensor([y]), lambda y: np.array([y]))
    heads = []
    for kind in kinds:
        folder, given = tmp_path / str(len(heads)), model()
        data = [(image, kind(y)) for image, y in pictures()]
        pgn_fast.fit(given, data, epochs=1, output=folder, **OPTIONS)
        heads.append(given.head.weight)
    assert all(torch.equal(heads[0], head) for head in heads)


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((3, 16, 16), np.uint8), r"train\[0\] is an array \(3, 16, 16\) of uint8"),
        (np.zeros((16, 16, 3), np.float32), "of float32; .H, W, 3. of uint8 is a picture"),
        (torch.zeros(16, 16, 3), r"permute\(2, 0, 1\) puts channels first"),
        (Image.new("F", (16, 16)), "floating-point pixels, whose range is unknown"),
        ("cat.png", "is a str; a PIL image"),
    ],
)
def test_what_is_no_picture_is_said_at_once(tmp_path, image, message):
    with pytest.raises(UserError, match=message):
        pgn_fast.fit(model(), [(image, 0), *pictures()], output=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_pictures_are_not_mixed_with_the_models_input(tmp_path):
    data = [(torch.randn(3, 16, 16), 0), *pictures()]
    with pytest.raises(UserError, match=r"of float32 and .* of uint8; they need one shape and"):
        pgn_fast.fit(model(), data, output=tmp_path / "run", **OPTIONS)


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: (x * 0.5 + 0.5) * 255, r"(?s)reach|holds 0 ... 255"),
        (lambda x: (x * 0.5 + 0.5).clamp(0, 1), r"trained on \(x - mean\) / std"),
        (lambda x: x * float("nan"), "not finite"),
        (lambda x: x, None),
    ],
    ids=["255", "1", "nan", "normalized"],
)
def test_tensors_that_are_not_normalized_are_said(tmp_path, recwarn, loader, change, message):
    images, labels = tensors(pictures())
    mean, std = (torch.tensor(backbone_pixels(tiny_vit())[k]) for k in ("mean", "std"))
    assert torch.equal(mean, std)  # both 0.5: see ``change``
    data = TensorDataset(change(images), labels)
    given = DataLoader(data, 6) if loader else data
    try:
        pgn_fast.fit(model(), given, epochs=1, output=tmp_path / "run", **OPTIONS)
    except UserError as error:
        assert message == "not finite" and "are not finite" in str(error)
    said = [str(w.message) for w in recwarn if "a tensor holds" in str(w.message)]
    assert len(said) == (message is not None)


class Augmented(Dataset):
    """A data set that draws its own augmentation, as torchvision's transforms do."""

    def __init__(self, as_tensor):
        self.as_tensor, self.seen = as_tensor, {}

    def __len__(self):
        return 6

    def __getitem__(self, index):
        image, label = pictures(6)[index]
        shift = int(torch.randint(1 << 30, ()))
        self.seen.setdefault(index, []).append(shift)
        if self.as_tensor:
            return torch.full((3, 16, 16), shift / (1 << 30)), label
        return image.rotate(shift % 360), label


@pytest.mark.parametrize("options", [{}, {"no_aug": True}, {"cache": "off"}], ids=str)
@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.filterwarnings("ignore:.*a tensor holds")
def test_a_data_sets_own_augmentation_is_new_in_every_epoch(tmp_path, as_tensor, options):
    data, one = Augmented(as_tensor), LinearProbe(tiny_vit(), 3)
    pgn_fast.fit(one, data, epochs=4, output=tmp_path / "run", **{**OPTIONS, **options})
    assert all(len(set(drawn[-4:])) == 4 for drawn in data.seen.values())


class Folder(list):
    """What torchvision's ImageFolder is: pairs, and the names of the classes."""

    def __init__(self, pairs, classes):
        own = sorted({classes[y] for _, y in pairs})
        super().__init__((x, own.index(classes[y])) for x, y in pairs)
        self.classes = own


def test_labels_go_by_the_names_that_the_data_give_their_classes(tmp_path):
    names = ["blue", "green", "red"]
    train = Folder(pictures(18), names)
    some = Folder([(x, y) for x, y in pictures(18) if y > 0], names)
    assert some.classes == ["green", "red"]
    one = model()
    result = pgn_fast.fit(one, train, some, test=some, output=tmp_path / "a", epochs=3, **OPTIONS)
    assert result.validation["top1"] == result.test["top1"] == 100
    assert one.class_names == names and result.test["per_class"][0] is None
    # a model that knows its classes keeps their places
    two = model()
    two.class_names = ["red", "green", "blue"]
    pgn_fast.fit(two, train, output=tmp_path / "b", epochs=3, **OPTIONS)
    assert two.class_names == ["red", "green", "blue"]
    images, labels = tensors(pictures(9))
    answers = two.eval()(images).argmax(1)
    assert answers.tolist() == (2 - labels).tolist()
    # and others are not its own
    other = Folder(pictures(), ["ant", "bee", "cat"])
    with pytest.raises(UserError, match="'ant' is none of the 3 of the former"):
        pgn_fast.fit(one, other, output=tmp_path / "c", **OPTIONS)
    renamed = ["an ant", "a bee", "a cat"]
    pgn_fast.fit(one, other, class_names=renamed, output=tmp_path / "c", epochs=1, **OPTIONS)
    assert one.class_names == renamed
    with pytest.raises(UserError, match="differ in their classes"):
        pgn_fast.fit(model(), train, other, output=tmp_path / "d", **OPTIONS)
    loader = DataLoader(some, 4, collate_fn=lambda rows: tensors(rows))
    with pytest.raises(UserError, match="`validation`: the classes of DataLoader"):
        pgn_fast.fit(model(), train, loader, output=tmp_path / "d", **OPTIONS)


def test_several_labels_that_tell_nothing_choose_by_the_loss(tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    images, labels = tensors(pictures(12))
    train = TensorDataset(images, torch.nn.functional.one_hot(labels, 3))
    nothing = TensorDataset(images[:4], torch.zeros(4, 3))
    options = {**OPTIONS, "task": "multilabel", "epochs": 3, "show": True, "head_init": "zero"}
    folder = tmp_path / "run"
    found = pgn_fast.fit(model(), train, nothing, test=nothing, output=folder, **options)
    losses = [row["validation_loss"] for row in found.history]
    assert found.best_epoch == 1 + losses.index(min(losses))
    assert found.summary["chosen_by"] == "validation loss" and "map" not in found.validation
    assert found.test["map"] is None and found.test["loss"] == pytest.approx(min(losses))
    said = capsys.readouterr().out
    assert said.count("no class has images with it and images without, so that the loss") == 1


def test_labels_of_test_images_are_looked_at_before_the_work(tmp_path):
    """A Hugging Face test split is often without labels: all are -1."""
    images, labels = tensors(pictures(12))
    train, unknown = TensorDataset(images, labels), labels.new_full((12,), -1)
    folder = tmp_path / "run"
    for name in ("val", "test"):
        given = {name: DataLoader(TensorDataset(images, unknown), 4)}
        message = rf"batch 0 of DataLoader given as {name}\w*: label -1 is out of range"
        with pytest.raises(UserError, match=message):
            pgn_fast.fit(model(), train, **given, output=folder, **OPTIONS)
        assert not folder.exists()
    # one further on is found at the end, and nothing is lost
    labels[-1] = -1
    data, late = TensorDataset(images[:6], labels[:6]), TensorDataset(images, labels)
    with pytest.raises(UserError, match=r"These are the test images: .* `resume` goes on"):
        pgn_fast.fit(model(), data, test=late, epochs=2, output=folder, **OPTIONS)
    found = pgn_fast.fit(model(), data, test=data, output=folder, resume=True, **OPTIONS)
    assert len(found.history) == 2 and found.test["images"] == 6


def test_a_loader_is_read_again_and_its_images_are_counted(tmp_path):
    images, labels = tensors(pictures(9))
    rest = [(images[:4], labels[:4]), (images[4:8], labels[4:8]), (images[8:], labels[8:])]
    loader = DataLoader(TensorDataset(images, labels), 4, drop_last=True)
    result = pgn_fast.fit(
        model(), Batches(rest), loader, epochs=1, output=tmp_path / "run", **OPTIONS
    )
    assert (result.train["images"], result.validation["images"]) == (9, 8)
    once = Batches(rest)
    once.__class__ = type("Once", (Batches,), {"__iter__": lambda self: self.left})
    once.left = iter(rest)
    with pytest.raises(UserError, match="gave no batch: a loader has to begin again"):
        pgn_fast.fit(model(), once, output=tmp_path / "once", **OPTIONS)
