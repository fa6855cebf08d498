"""Ray's engines around the tasks of a folder, where Ray is installed; see docs/scale.md."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from odd_images import encode
from serving import images
from test_serve_tasks import PIXELS

import pgn_fast
from pgn_fast.adapters import save_pretrained
from pgn_fast.backbone.load import load_backbone
from pgn_fast.serve import load_served_tasks

ROOT = Path(__file__).parents[1]
EXAMPLES = ("ray_serve", "ray_data")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no ray")
# a program's: half a minute of CPU time, most of it the start of Ray's processes; on two cores that
# five others wanted, too, the slower one has taken 334 s. Below the limit of a test
SECONDS = 540
# few workers, no dashboard, and no guess at how many cores and how much memory there are
_START = (
    "import ray; ray.init(num_cpus=2, include_dashboard=False, logging_level='error', "
    "object_store_memory=100_000_000)\n"
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_shows_the_examples(name):
    code = (ROOT / "examples" / f"{name}.py").read_text()
    assert f"```python\n{code}```" in (ROOT / "docs" / "scale.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    backbone = load_backbone("pgn_demo_vit")
    torch.manual_seed(0)
    for name, mean in (("pets", (0.5, 0.4, 0.3)), ("cars", (0.1, 0.2, 0.3))):
        model = pgn_fast.VPT(backbone, 3, num_prompts=2)
        torch.nn.init.normal_(model.head.weight)
        names = ["a", "b", "c"] if name == "pets" else None
        save_pretrained(
            model, folder / name, class_names=names, preprocessing=PIXELS | {"mean": mean}
        )
    return folder


def run(code: str, folder: Path) -> str:
    """What a program prints that starts Ray; it, and all that it started, is ended in time."""
    out, err = folder / "stdout", folder / "stderr"
    with out.open("w") as stdout, err.open("w") as stderr:
        program = subprocess.Popen(
            [sys.executable, "-c", _START + code],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT / "examples"), "OMP_NUM_THREADS": "1",
                 "RAY_USAGE_STATS_ENABLED": "0"},
            # files: Ray's daemons would hold a pipe open longer than the program lives
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = program.wait(SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"Ray was not done after {SECONDS} s: {err.read_text()[-3000:]}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
    assert status == 0, err.read_text()[-3000:]
    return out.read_text()


@needs_ray
@pytest.mark.slow
def test_ray_data_writes_what_the_tasks_say(folder, tmp_path):
    pytest.importorskip("pyarrow")
    pictures = images(5, (40, 36))
    (tmp_path / "in").mkdir()
    for number, picture in enumerate(pictures):
        (tmp_path / "in" / f"{number}.png").write_bytes(encode(picture))
    (tmp_path / "in" / "5.png").write_bytes(b"torn")
    run(
        f"import sys; sys.argv = ['x', {str(folder)!r}, 'in', 'out', '--workers', '1']\n"
        "import ray_data; ray_data.main()\n",
        tmp_path,
    )
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    found = {Path(row["path"]).name: row for row in rows}
    assert len(found) == 6
    assert found["5.png"]["error"] and found["5.png"]["pets/class"] == ""
    tasks = load_served_tasks(folder, watch_s=0)
    for task, logits in tasks.every(pictures).items():
        for number, vector in enumerate(logits):
            row = found[f"{number}.png"]
            assert row["error"] == ""
            assert row[f"{task}/class"] == tasks.labels(task)[int(vector.argmax())]
            expected = float(vector.softmax(0).max())
            assert row[f"{task}/probability"] == pytest.approx(expected, rel=1e-4)


@needs_ray
@pytest.mark.slow
def test_ray_serve_answers_what_the_tasks_say(folder, tmp_path):
    pictures = images(8, (40, 36))
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(encode(picture))
    code = f"""
import json, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
from ray import serve
import ray_serve

serve.run(ray_serve.app({{"folder": {str(folder)!r}}}))

def ask(number, task=None):
    task = task or ("pets", "cars")[number % 2]
    data = open(f"{{number % 8}}.png", "rb").read()
    address = f"http://127.0.0.1:8000/?task={{task}}"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data)) as answer:
            return [task, json.load(answer)]
    except urllib.error.HTTPError as error:
        return [error.code, json.load(error)]

with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(ask, range(16)))
print("ANSWERS" + json.dumps([*answers, ask(0, "pet")]))
serve.shutdown()
"""
    (line,) = [x for x in run(code, tmp_path).splitlines() if x.startswith("ANSWERS")]
    *answers, (status, refusal) = json.loads(line.removeprefix("ANSWERS"))
    assert status == 400 and "the nearest are 'pets'" in refusal["error"]
    expected = load_served_tasks(folder, watch_s=0).every(pictures)
    for number, (task, answer) in enumerate(answers):
        right = expected[task][number % 8]
        assert torch.allclose(torch.tensor(answer["logits"]), right, atol=1e-4)
        labels = ["a", "b", "c"] if task == "pets" else ["0", "1", "2"]
        assert answer["label"] == labels[int(right.argmax())]
