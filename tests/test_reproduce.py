"""The papers' experiments: plans as their code has them, runs that resume, tables with sources."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from small_world import MODEL, tiny_vit_kwargs
from test_protocols import write_clevr, write_lists
from tiny_clip import tiny_transformers

from pgn_fast.cli import main
from pgn_fast.errors import TrainingStopped, UserError
from pgn_fast.train.protocols import DATA_SETS
from pgn_fast.train.reproduce import work
from pgn_fast.train.reproduce.plans import Choices, cost_of, make_plan
from pgn_fast.train.reproduce.tables import paper_numbers, write_tables
from pgn_fast.train.reproduce.work import Result, choose, run_experiment

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Stand-ins of two tasks of VTAB, and a backbone's weights."""
    root = tmp_path_factory.mktemp("vtab")
    for name in ("dtd", "cifar"):
        write_lists(root / name)
    tiny_vit_kwargs(root)
    return root


def choices(tasks, **changes):
    common = {
        "data_dir": str(tasks),
        "model_kwargs": tiny_vit_kwargs(tasks),
        "workers": 0,
        "epochs": 2,
        "warmup_epochs": 1.0,
    }
    values = {
        "datasets": ["dtd"],
        "model": MODEL,
        "seeds": [0, 1],
        "num_prompts": [1, 2],
        "base_rates": [1.0, 0.1],
        "weight_decays": [0.0],
    }
    return Choices(**{**values, **changes}, common=common)


def words(tasks, output, *more):
    pairs = [f"{k}={v!r}" for k, v in tiny_vit_kwargs(tasks).items()]
    flags = f"--dataset dtd --data-dir {tasks} --output {output} --device cpu -j 0 --model {MODEL}"
    search = "--num-prompts 1 2 --base-lr 1 0.1 --weight-decay 0 --seeds 0 1"
    settings = ["--set", "epochs=2", "warmup_epochs=1.0"]
    return [
        "reproduce",
        "vpt",
        *flags.split(),
        *search.split(),
        "--model-kwargs",
        *pairs,
        *settings,
        *more,
    ]


# Plans.


def test_vpts_plan_is_its_codes():
    (experiment,) = make_plan("vpt", Choices(datasets=["caltech101"]))
    assert len(experiment.search) == 6 * 10 * 4 and len(experiment.final) == 5
    config = experiment.search[0].config()
    assert (config.method, config.opt, config.sched) == ("vpt-deep", "sgd", "cosine-vpt")
    assert (config.epochs, config.warmup_epochs, config.momentum) == (100, 10, 0.9)
    assert config.test_split == "none" and config.train_split is None
    assert config.no_aug and config.crop_mode == "squash" and config.prompt_dropout == 0.1
    assert {(c.options["num_prompts"], c.options["batch_size"]) for c in experiment.search} == {
        (1, 128),
        (5, 128),
        (10, 128),
        (50, 128),
        (100, 64),
        (200, 64),
    }
    final = [cell.config() for cell in experiment.final]
    assert [c.seed for c in final] == [42, 44, 82, 100, 800]
    assert all(c.train_split == "trainval" and c.test_split is None for c in final)
    assert len(make_plan("vpt", Choices())) == 19
    shallow = make_plan("vpt", Choices(datasets=["dtd"], method="vpt-shallow"))[0]
    assert shallow.search[0].config().prompt_dropout == 0.0
    linear = make_plan("vpt", Choices(datasets=["dtd"], method="linear"))[0]
    assert len(linear.search) == 40


def test_fgvcs_final_runs_keep_the_training_split():
    (experiment,) = make_plan("vpt", Choices(datasets=["cub"], suite="fgvc"))
    assert experiment.final[0].config().train_split is None
    assert experiment.final[0].config().crop_pct == 0.875


def test_pgns_plan_trains_on_all_and_chooses_nothing():
    plan = make_plan("pgn", Choices())
    assert [e.data.name for e in plan] == [n for n in DATA_SETS if n.startswith("pgn/")]
    for experiment in plan:
        (cell,) = experiment.final
        config = cell.config()
        assert not experiment.search and config.train_split == "trainval"
        assert config.head == "zero_shot" and config.opt == "sgd" and config.lr == 0.1
        assert config.vflip == (0.5 if experiment.data.short == "clevr_count" else 0.0)


def test_a_data_set_of_another_paper():
    with pytest.raises(UserError, match="`dataset` vtab/dtd is none of pgn's"):
        make_plan("pgn", Choices(datasets=["vtab/dtd"]))
    with pytest.raises(UserError, match="no data set 'pgn/cub'"):
        make_plan("pgn", Choices(datasets=["cub"]))


def test_the_cost_counts_images(tasks):
    (experiment,) = make_plan("vpt", choices(tasks))
    cost = cost_of(experiment)
    # a search of 4 runs over 800 images, validated once; 2 final runs over 1,000, tested once
    assert (cost.runs, cost.trained) == (6, 2 * (4 * 800 + 2 * 1000))
    assert cost.scored == 4 * 200 + 2 * 1880
    assert cost.hours(10.0) == pytest.approx((cost.trained + cost.scored / 3) / 36_000)


# Runs.


@pytest.fixture(scope="module")
def finished(tasks, tmp_path_factory):
    """An experiment that was run by the command, and its output."""
    output = tmp_path_factory.mktemp("output") / "vpt"
    assert main(words(tasks, output)) == 0
    return output


def test_one_folder_a_run(finished):
    found = {str(p.parent.relative_to(finished)) for p in finished.rglob("summary.json")}
    folder = "vtab/dtd/vpt-deep"
    search = {f"{folder}/search/p{p}-lr{lr}-wd0" for p in (1, 2) for lr in ("1", "0.1")}
    assert found == search | {f"{folder}/final/seed-{s}" for s in (0, 1)}
    for path in (finished / folder / "search").rglob("summary.json"):
        assert json.loads(path.read_text())["test"] is None  # the test images were not read
    final = json.loads((finished / folder / "final/seed-0/summary.json").read_text())
    assert final["test"]["images"] == 4 and final["train"]["images"] == 9


def test_the_table_has_the_papers_number_beside_ours(finished):
    text = (finished / "vtab-vpt-deep.md").read_text()
    content = json.loads((finished / "vtab-vpt-deep.json").read_text())
    row = content["rows"]["vtab/dtd"]
    assert "| vtab/dtd | 65.8 | " in text and "arXiv:2203.12119" in text and "Table 13" in text
    assert len(row["scores"]) == 2 and row["chosen"]["num_prompts"] in (1, 2)
    # a score of other images than the published ones is no score of the paper's table
    assert "| 2 (of 4 test images; published: 1880) |" in text


def test_finished_runs_are_not_run_again(tasks, finished, monkeypatch, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("summary.json")}
    monkeypatch.setattr(work, "train", lambda *a, **k: pytest.fail("trains again"))
    assert main(words(tasks, finished)) == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("summary.json")} == before
    assert "run vtab" not in capsys.readouterr().out


def test_a_killed_plan_continues_to_the_same_numbers(tasks, finished, tmp_path, monkeypatch):
    """Killed between two runs, and with one run that has no summary yet."""
    output = tmp_path / "vpt"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "vtab/dtd/vpt-deep/final/seed-1")
    (output / "vtab/dtd/vpt-deep/final/seed-0/summary.json").unlink()
    (output / "vtab-vpt-deep.json").unlink()
    assert main(words(tasks, output)) == 0
    names = ("vtab-vpt-deep.json",)
    for name in names:
        assert (output / name).read_text() == (finished / name).read_text()


def test_other_choices_are_refused(tasks, finished, capsys):
    assert main(words(tasks, finished, "--set", "epochs=3")) == 2
    error = capsys.readouterr().err
    assert "has epochs = 2, now 3 is asked for. Give another folder." in error
    assert "--output" in error


def test_the_search_chooses_by_the_last_epoch_and_prefers_low_rates(tasks, tmp_path):
    (experiment,) = make_plan("vpt", choices(tasks, num_prompts=[1], base_rates=[1.0, 0.5, 0.1]))
    for cell, tops in zip(experiment.search, ([90, 70], [10, 80], [20, 80]), strict=True):
        folder = tmp_path / cell.folder
        folder.mkdir(parents=True)
        rows = "".join(f"{i + 1},{top}\n" for i, top in enumerate(tops))
        (folder / "history.csv").write_text(f"epoch,validation_top1\n{rows}")
    assert choose(experiment, tmp_path)["lr_base"] == 0.1
    for cell in experiment.search:
        (tmp_path / cell.folder / "stopped.json").write_text("{}")
    with pytest.raises(UserError, match=r"no run of the search .* give lower `base_lr`"):
        choose(experiment, tmp_path)


def test_a_run_that_diverges_does_not_end_the_others(tasks, tmp_path, monkeypatch):
    (experiment,) = make_plan("vpt", choices(tasks, num_prompts=[1]))
    real, said = work.train, []

    def train(config, folder, **options):
        if "lr1-" in str(folder) or "seed-1" in str(folder):
            raise TrainingStopped("the loss is nan at step 3 (epoch 1); nothing is saved yet.")
        return real(config, folder, **options)

    monkeypatch.setattr(work, "train", train)
    result = run_experiment(experiment, tmp_path, CPU, said.append, show=False)
    assert result.chosen["lr_base"] == 0.1 and len(result.scores) == 1
    assert result.stopped == ["vtab/dtd/vpt-deep/final/seed-1"]
    assert any("the loss is nan" in line for line in said)
    text = write_tables(tmp_path, "vpt", "vpt-deep", {"vtab/dtd": result})
    assert "| 1 (1 diverged) (of 4 test images; published: 1880) |" in text

    monkeypatch.setattr(
        work,
        "train",
        lambda *a, **k: (_ for _ in ()).throw(TrainingStopped("the device's memory is full")),
    )
    with pytest.raises(TrainingStopped, match="memory is full"):
        run_experiment(make_plan("vpt", choices(tasks))[0], tmp_path / "b", CPU, said.append)


def test_pgn_with_words(tmp_path, capsys):
    """CLEVR's counts in words, by a CLIP that is a folder; the paper's sentence."""
    write_clevr(tmp_path / "data/clevr")
    tiny_transformers(tmp_path / "clip")
    settings = ["epochs=2", "warmup_epochs=1.0", "num_prompts=1", "library_size=4", "batch_size=8"]
    arguments = [
        "reproduce",
        "pgn",
        "--dataset",
        "clevr_count",
        "--data-dir",
        str(tmp_path / "data"),
        "--model",
        str(tmp_path / "clip"),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "-j",
        "0",
        "--set",
        *settings,
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "classes in words, such as '3' and '10'" in out
    assert "| pgn/clevr_count | – | " in out and "arXiv:2210.06466" in out
    summary = json.loads((tmp_path / "out/pgn/clevr_count/seed-0/summary.json").read_text())
    assert summary["train"]["images"] == 8 and summary["validation"] is None


# The plan that is printed, and the facts.


def test_the_printed_plan(tasks, tmp_path, capsys):
    output = tmp_path / "out"
    more = ["--plan", "--dataset", "dtd", "kitti"]
    assert main(words(tasks, output, *more)) == 0
    out = capsys.readouterr().out
    assert "| vtab/dtd | 6 (0) | " in out and "| vtab/kitti | 6 (0) | " in out
    assert "images per second in training" in out and not output.exists()
    assert (
        "does not hold vtab/kitti; --data-dir is a folder in which kitti" in out
        and out.count("| missing |") == 1
    )
    assert main(words(tasks, output, *more, "--images-per-second", "100")) == 0
    assert "| **all** | 12 | 0.1 |" in capsys.readouterr().out


def test_the_papers_numbers_give_the_papers_means():
    """Table 13's groups have the means of Table 1, and Table 14 its own."""
    numbers = paper_numbers("vpt")["numbers"]
    expected = {
        "full": (75.88, 83.36, 47.64, 88.54),
        "linear": (68.93, 77.16, 26.84, None),
        "vpt-shallow": (76.81, 79.66, 46.98, 84.62),
        "vpt-deep": (78.48, 82.43, 54.98, 89.11),
    }
    for method, means in expected.items():
        for group, mean in zip(("natural", "specialized", "structured", ""), means, strict=True):
            rows = [r.name for r in DATA_SETS.values() if r.group == group and r.suite != "pgn"]
            found = [numbers[method][name] for name in rows if name in numbers[method]]
            if mean is None:
                assert not found
            else:
                # each number is rounded to a tenth
                assert sum(found) / len(rows) == pytest.approx(mean, abs=0.051)
    assert paper_numbers("pgn")["numbers"] == {} and paper_numbers("pgn")["left_out"]


def test_means_of_groups_only_where_all_of_it_is_there(tmp_path):
    natural = [r.name for r in DATA_SETS.values() if r.group == "natural"]
    results = {name: Result([50.0, 52.0], [], {}) for name in natural}
    text = write_tables(tmp_path, "vpt", "vpt-deep", results)
    assert "| **mean of natural** | 78.5 | 51.0 | |" in text
    assert "| vtab/dtd | 65.8 | 51.0 ± 1.4 | 2 |" in text
    # later calls keep the rows of earlier ones
    text = write_tables(tmp_path, "vpt", "vpt-deep", {"vtab/kitti": None})
    assert (
        "| vtab/dtd | 65.8 | 51.0 ± 1.4 | 2 |" in text and "| vtab/kitti | 72.8 | – | 0 |" in text
    )
