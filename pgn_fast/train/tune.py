"""A search for the method, its size and its rates, under a budget of time or of trials.

Optuna proposes and judges: its TPE sampler from the scores so far, its successive halving after an
epoch's share of the run, then after more of it. A trial is an ordinary run that pauses there and
goes on to the bit. Scores are of the validation images; the test images are touched once, by the
best trial, at the end. The best trials are repeated with another seed, and so on other validation
images where these are carved, and the winner is the best in the mean.

The search is a function of its seed and of the scores alone, and scores are kept on disk: after a
kill it is played again up to where it was, without training anything twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import TrainingStopped, UserError
from ..methods import find_method
from .config import TrainConfig
from .data import load_splits
from .distributed import refuse_many
from .kinds import typed
from .loop import run
from .methods import load_backbone_for
from .parts import Parts, assemble
from .run import Run
from .run_folder import SEARCH, RunFolder
from .signals import Interrupted
from .state import Record
from .tune_report import plot_trials
from .tune_space import METHODS, propose
from .tune_state import Search, continued, load_search, save_search
from .tune_trial import FINALISTS, Trial, affordable

# of the trials go on after each rung, with as many times the epochs
REDUCTION = 3
# trials whose values are drawn before any is proposed from scores
DRAWN = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Attributes:
        best: the trial that won.
        given: fields of ``TrainConfig`` that repeat the best trial as a run of its own.
        summary: of that run, the test score included.
        trials: all of them.
    """

    best: Trial
    given: dict[str, Any]
    summary: dict[str, Any]
    trials: list[Trial]


def tune(
    given: Mapping[str, Any],
    output: Path,
    *,
    seconds: float | None = None,
    trials: int | None = None,
    methods: Sequence[str] | None = None,
    device: torch.device | None = None,
    resume: bool = False,
    show: bool = True,
) -> Found:
    """Search, and finish the best trial.

    Args:
        given: fields of ``TrainConfig`` that hold for all trials. A method, a rate, a decay, a
            number of prompts or layers among them is not searched.
        output: folder for ``tune.json``, ``tune.png``, ``trials/``, and the best run's ``best/``
            and ``summary.json``.
        seconds: begins nothing new after so many; the best trial is finished in any case.
        trials: how many at most.
        methods: that are tried; None: the usual ones.
        device: the CPU where None.
        resume: go on with the search in ``output``; its answer is that of an undisturbed one. What
            is not given is as it was, the budget too.
        show: print a line for each step.

    Raises:
        UserError: Optuna is not there, no budget, no validation images, or ``output`` holds
            another search; nothing was created.
        TrainingStopped: a signal asked to stop, or no trial could be trained.
    """
    refuse_many("tune")
    with RunFolder(output, resume=resume, search=True) as folder:
        asked = Search(
            typed(TrainConfig, given), tuple(methods or METHODS), seconds, trials, _made_by()
        )
        known = load_search(output)
        search = continued(known[0], asked, output, methods is not None) if known else asked
        if search.seconds is None and search.trials is None:
            raise UserError("tune needs a `budget`, such as 20m, or a number of `trials`.")
        if search.given.get("method") and methods:
            raise UserError("`method` and `methods`: give one of them.")
        work = _Search(search, folder, device or torch.device("cpu"), show)
        work.trials = known[1] if known else []
        try:
            work.go()
            work.repeat()
            return work.finish()
        except Interrupted as stop:
            if not (output / SEARCH).exists():
                raise  # the blocks that are frozen ran, and the same command goes on
            again = f"pgn-fast tune --resume {shlex.quote(str(output))}"
            raise stop.continued_by(again) from stop


class _Search:
    def __init__(
        self,
        search: Search,
        folder: RunFolder,
        device: torch.device,
        show: bool,
    ) -> None:
        self.search, self.folder, self.output = search, folder, folder.path
        self.given, self.methods = given, methods = search.given, search.methods
        self.seconds, self.device, self.show = search.seconds, device, show
        self.base = TrainConfig.make(**{"method": methods[0]} | given)
        given.setdefault("epochs", self.base.epochs)
        for method in methods:
            TrainConfig.make(**given | {"method": given.get("method", method)})
        for name in ("recipe", "init_from", "deploy"):
            if given.get(name):
                raise UserError(f"`{name}` {given[name]}: tune chooses a method's start itself.")
        splits = load_splits(self.base)
        if splits.validation is None:
            raise UserError("tune chooses by validation images: give `val_fraction` above 0.")
        self.splits, self.backbone = {self.base.seed: splits}, load_backbone_for(self.base)
        self.trials: list[Trial] = []
        self.finalists: list[Trial] = []
        epochs = self.base.epochs
        first = max(1, round(epochs / REDUCTION**2))
        self.rungs = [first]
        while self.rungs[-1] * REDUCTION < epochs / 1.5:
            self.rungs.append(self.rungs[-1] * REDUCTION)
        if self.rungs[-1] < epochs:
            self.rungs.append(epochs)
        if self.base.val_interval > first:
            raise UserError(
                f"`val_interval` {self.base.val_interval}: trials are judged after {first} of "
                f"`epochs` {epochs} first; give {first} or less."
            )

    def _save(self) -> None:
        self.folder.make()
        save_search(self.output, self.search, self.rungs, self.trials)

    def _folder(self, trial: Trial, seed: int) -> Path:
        again = "" if seed == self.base.seed else f"-seed{seed}"
        return self.output / "trials" / f"{trial.number:04d}{again}"

    # --- the search

    def go(self) -> None:
        """Propose, train and judge until the budget is spent."""
        optuna = _optuna()
        halving = optuna.pruners.SuccessiveHalvingPruner(self.rungs[0], REDUCTION)
        study = optuna.create_study(direction="maximize", pruner=halving)
        number, trials, given_method = 0, self.search.trials, self.given.get("method")
        while trials is None or number < trials:
            # a sampler of its own for each trial: its draws do not depend on a kill in between
            study.sampler = optuna.samplers.TPESampler(
                seed=self.base.seed + number, n_startup_trials=DRAWN
            )
            if number < len(tried := [given_method] if given_method else self.methods):
                # first of all each method as it is by default
                study.enqueue_trial({"method": tried[number], "rate": 1.0, "layers": "all"})
            asked = study.ask()
            trial = self._known(number, propose(asked, self.given, self.methods, self.backbone))
            try:
                pruned = self._climb(asked, trial)
            except _BudgetSpent:
                if not trial.scores:
                    self.trials.remove(trial)
                break
            if trial.failed is not None or pruned:
                states = optuna.trial.TrialState
                study.tell(asked, state=states.FAIL if trial.failed else states.PRUNED)
                shutil.rmtree(self._folder(trial, self.base.seed), ignore_errors=True)
            else:
                study.tell(asked, trial.rank())
            self._say_judged(trial, pruned)
            number += 1

    def _known(self, number: int, given: dict[str, Any]) -> Trial:
        """The trial of that number, as an earlier process left it or new."""
        if number == len(self.trials):
            self.trials.append(Trial(number, given))
        trial = self.trials[number]
        if trial.given != given:
            raise UserError(
                f"`resume`: trial {number} in {self.output} tried {trial.given}, and now {given} "
                "would be tried: other versions of the packages. Start a new search with `output`."
            )
        return trial

    def _climb(self, asked: Any, trial: Trial) -> bool:
        """Train from rung to rung as long as halving lets it; whether it was stopped below the top.

        Raises:
            _BudgetSpent: before something would be trained beyond it.
        """
        for epochs in self.rungs:
            if trial.failed is None and str(epochs) not in trial.scores:
                self._check_budget(trial, epochs)
                self._train(trial, epochs)
            if trial.failed is not None:
                return False
            asked.report(trial.rank(epochs), epochs)
            if epochs < self.rungs[-1] and asked.should_prune():
                return True
        return False

    def _check_budget(self, trial: Trial, epochs: int) -> None:
        if (seconds := self.seconds) is None or self.trials[0] is trial:
            return  # one trial there has to be
        left = seconds - sum(one.spent for one in self.trials) - self._reserve(seconds)
        done = max(map(int, trial.scores), default=0)
        needed = trial.seconds / done * (epochs - done) if done else 0.0
        if left <= 0 or needed > left:
            raise _BudgetSpent

    def _whole(self) -> list[Trial]:
        """The trials that had all epochs, the best first."""
        whole = [trial for trial in self.trials if str(self.rungs[-1]) in trial.scores]
        return sorted(whole, key=lambda trial: (-trial.rank(), trial.number))

    def _reserve(self, seconds: float) -> float:
        """What is kept of the budget for the repeats: a third of it at most."""
        dearest = max((trial.seconds for trial in self._whole()), default=0.0)
        counts = [n for n in range(2, FINALISTS + 1) if n * dearest <= seconds / 3]
        return dearest * max(counts, default=0)

    def repeat(self) -> None:
        """Train the best trials once more with the next seed, as many as the budget allows."""
        seed = self.base.seed + 1
        left = self.seconds and self.seconds - sum(one.spent for one in self.trials)
        self.finalists = affordable(self._whole()[:FINALISTS], seed, left)
        for trial in self.finalists:
            if str(seed) in trial.again:
                continue
            start = time.perf_counter()
            score, loss = -math.inf, math.inf
            try:
                record = self._run(trial, lambda run: run.fit(), seed)
                score, loss = record.best_score, record.best_loss
            except Interrupted:
                raise
            except TrainingStopped as error:
                self._say(f"trial {trial.number} with seed {seed}: {error}")
            spent = round(time.perf_counter() - start, 3)
            trial.again[str(seed)] = {"score": score, "loss": loss, "seconds": spent}
            self._save()
            shutil.rmtree(self._folder(trial, seed), ignore_errors=True)
            self._say(f"trial {trial.number} with seed {seed}: {score:.2f} (loss {loss:.4f})")

    def _train(self, trial: Trial, epochs: int) -> None:
        """Go on with a trial until it has had so many epochs, and keep its score."""

        def work(run: Run) -> Record:
            self._save()  # nothing was refused: from here on a kill is no loss
            return run.fit(epochs)

        start = time.perf_counter()
        try:
            record = self._run(trial, work)
            trial.scores[str(epochs)] = record.best_score
            trial.losses[str(epochs)] = record.best_loss
        except Interrupted:
            raise
        except TrainingStopped as error:
            trial.failed = str(error)
        trial.seconds += round(time.perf_counter() - start, 3)
        self._save()

    def _run(self, trial: Trial, work: Callable[[Run], T], seed: int | None = None) -> T:
        seed = self.base.seed if seed is None else seed
        # a folder that is named holds what some methods can keep, and is no claim that all can
        place = self.given.get("cache", "auto")
        named = place not in ("auto", "off")
        fields = self.given | trial.given | ({"cache": "auto"} if named else {})
        config = TrainConfig.make(**fields | {"seed": seed})
        if seed not in self.splits:
            self.splits[seed] = load_splits(config)
        keep = Path(place) if named else self.output / "frozen"
        own = find_method(config.method).trains_backbone
        backbone = load_backbone_for(config) if own else self.backbone

        def parts() -> Parts:
            return dataclasses.replace(assemble(config, self.splits[seed], backbone), keep=keep)

        folder = self._folder(trial, seed)
        return run(config, folder, parts, self.device, folder.exists(), False, work)

    def finish(self) -> Found:
        """Take the best trial to its end, and to the test images."""
        begun = [trial for trial in self.trials if trial.scores]
        if not begun:
            reasons = "; ".join(sorted({trial.failed or "" for trial in self.trials}))
            raise TrainingStopped(f"no trial could be trained: {reasons}")
        whole = self._whole()
        best = max(
            self.finalists or whole[:1] or begun,
            key=lambda trial: (trial.mean_rank(), trial.rank(), -trial.number),
        )
        folder = self._folder(best, self.base.seed)
        try:
            summary = json.loads((folder / "summary.json").read_text())
        except FileNotFoundError:
            if not whole:
                self._say(f"no trial had all epochs: number {best.number} is finished")
            summary = self._run(best, lambda run: (run.fit(), run.finish())[1])
        for name in ("best", "summary.json", "args.yaml"):
            _replace(folder / name, self.output / name)
        plot_trials(self.output / "tune.png", self.trials, best, self.base)
        shutil.rmtree(self.output / "frozen", ignore_errors=True)
        given = {k: v for k, v in self.given.items() if k != "method"} | best.given
        return Found(best, given, summary, self.trials)

    def _say(self, text: str) -> None:
        if self.show:
            print(text, flush=True)

    def _say_judged(self, trial: Trial, pruned: bool) -> None:
        tried = " ".join(f"{name}={value}" for name, value in trial.given.items())
        if trial.failed is not None:
            self._say(f"trial {trial.number}: {tried}: {trial.failed}")
            return
        epochs = max(map(int, trial.scores))
        ended = f"stopped after {epochs} epochs" if pruned else f"all {epochs} epochs"
        loss = trial.losses[str(epochs)]
        self._say(f"trial {trial.number}: {tried}: {trial.best:.2f} (loss {loss:.4f}), {ended}")


class _BudgetSpent(Exception):
    """Nothing more may be trained."""


def _optuna() -> Any:
    """Optuna, without its own log.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("tune needs the package optuna: pip install 'pgn_fast[tune]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _replace(source: Path, target: Path) -> None:
    """Copy a file or a folder, in the place of what an earlier end of the search has left."""
    beside = target.with_name(f".{target.name}.new")
    for path in (beside, target):
        if path.is_dir():
            shutil.rmtree(path)
    (shutil.copytree if source.is_dir() else shutil.copy2)(source, beside)
    beside.replace(target)


def _made_by() -> dict[str, str]:
    """What else the answer of a search depends on."""
    return {"optuna": _optuna().__version__, "ranking": "by the metric, then by the loss"}
