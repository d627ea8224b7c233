"""How a trial is done: it trains from where its checkpoint stands, and scores at the end."""

import hashlib
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import deepopt
import examples.hope
import torch_backend
from examples.hope import checkpoint, report, train
from examples.hope.study import AVERAGE, Makers, Trial, as_json, finished, headline, write_json
from examples.hope.tasks import IGNORED, Answer, Batch, Batches, Stream, Task, metrics

ROWS = 200  # of the log, about; each is the mean over the steps since the one before
MOST = 25  # steps between two rows of the log


def run(
    trial: Trial,
    folder: Path,
    makers: Makers,
    *,
    tell: Callable[[int, float | None], None] = lambda step, loss: None,
    stop: Callable[[], bool] = lambda: False,
    interval: float = 30.0,
) -> dict[str, Any] | None:
    """The result of a trial, from its folder if it is there; None if `stop` ended it before.

    A checkpoint is written every `interval` seconds and at a stop, and the trial goes on from it.
    Raises OSError where another process is at the same trial.
    tell: is given the steps done, at first those of the checkpoint, and their loss in nats.
    """
    done = finished(folder)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        for torn in folder.glob("*.part"):  # of a process that was killed while it saved
            torn.unlink(missing_ok=True)
        write_json(folder / "settings.json", trial.identity())
        training = Training(trial, folder, makers)
        tell(training.step, None)
        if not training.learn(tell, stop, interval):
            return None
        tell(training.total, None)  # where it diverged, nothing is left to do either
        result = training.result()
        write_json(folder / "result.json", result)
        return result


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, where the system has locks; OSError if another process holds it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"{str(folder)!r} belongs to another process that trains the same: wait for it, or "
                "give another --out"
            ) from None
        yield


class Lessons:
    """The batches of the part that is being learnt; a task is a stream of one part."""

    def __init__(self, task: Task | Stream, batch: int, seed: int) -> None:
        self._task, self._batch, self._seed = task, batch, seed
        self._part, self._batches = -1, None

    def draw(self, part: int) -> Batch:
        if self._batches is None or part != self._part:
            self._batches = self._open(part)
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        return {"part": self._part, "batches": self._batches and self._batches.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["batches"] is not None:
            self._batches = self._open(state["part"])
            self._batches.load_state_dict(state["batches"])

    def _open(self, part: int) -> Batches:
        self._part = part
        if isinstance(self._task, Stream):
            return self._task.batches(part, self._batch, self._seed)
        return self._task.batches(self._batch, self._seed)


@dataclass
class Tally:
    """What adds up over the interruptions of a trial: seconds, losses not yet logged, scores.

    untrained, matrix: of a stream, the scores on all parts at the start, and after each part.
    """

    wall: float = 0.0  # in training steps
    cpu: float = 0.0  # of the process, scores included
    losses: list[float] = field(default_factory=list)
    untrained: list[float] = field(default_factory=list)
    matrix: list[list[float]] = field(default_factory=list)
    diverged: int | None = None  # the step whose loss was not finite

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self), "random": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["random"])
        for name in asdict(self):
            setattr(self, name, state[name])


class Training:
    """A trial under way: model, optimizer, data and tally, restored from the checkpoint if any."""

    def __init__(self, trial: Trial, folder: Path, makers: Makers) -> None:
        self.trial, self._path = trial, folder / "checkpoint.pt"
        self._cpu = time.process_time()
        torch.manual_seed(trial.seed)
        self.task = makers.task(trial.task, trial.options)
        if (record := as_json(self.task.record())) != as_json(trial.record):
            raise ValueError(f"the data of {trial.task} changed: {trial.record} became {record}")
        self.parts = len(self.task.parts[: trial.parts]) if isinstance(self.task, Stream) else 1
        self.total = trial.steps * self.parts
        self.model: Any = makers.model(trial.model, trial.config).to(trial.device)
        optimizer = train.make_optimizer(self.model, trial.optimizer, trial.lr)
        # Every part of a stream has a warm-up and a decay of its own, as new data would.
        self.joint = isinstance(self.task, Stream) and self.task.joint
        span = self.total if self.joint else trial.steps
        scheduler = LambdaLR(optimizer, lambda step: train.schedule(step % span, span))
        self.optimizer, self.scheduler = optimizer, scheduler
        self.lessons, self.tally = Lessons(self.task, trial.batch, trial.seed), Tally()
        self._state = {
            **{"model": self.model, "optimizer": optimizer, "scheduler": scheduler},
            **{"lessons": self.lessons, "tally": self.tally},
        }
        found = self._path.exists()
        self.step = checkpoint.load(self._path, trial.identity(), self._state) if found else 0
        self._log = report.Log(folder / "log.jsonl", resume=self.step if found else None)

    def learn(
        self,
        tell: Callable[[int, float | None], None],
        stop: Callable[[], bool],
        interval: float,
    ) -> bool:
        """Train to the end or to divergence; False if stopped before. Both leave a checkpoint."""
        window = max(1, min(MOST, self.trial.steps // ROWS))
        if not self.step and isinstance(self.task, Stream):
            self.tally.untrained = self._scores(self.task)
        saved = time.monotonic()
        self.model.train()
        pending: list[Tensor] = []
        while self.step < self.total and self.tally.diverged is None and not stop():
            begun = time.perf_counter()
            pending.append(self._step())
            border = self.step % window == 0 or self.step % self.trial.steps == 0
            # Reading a loss makes a GPU wait, so there it is put off.
            if self.trial.device == "cpu" or border:
                self._read(pending)
            self.tally.wall += time.perf_counter() - begun
            if border or self.tally.diverged is not None:
                loss = sum(self.tally.losses) / len(self.tally.losses)
                self.tally.losses.clear()
                self._log.write({"step": self.step, "loss": loss, "lr": self._rate})
                tell(self.step, loss)
            ended = self.step % self.trial.steps == 0 and self.tally.diverged is None
            if ended and isinstance(self.task, Stream):
                row = self._scores(self.task)
                if all(map(math.isfinite, row)):
                    self.tally.matrix.append(row)
                else:
                    self.tally.diverged = self.step
                self.model.train()
            if time.monotonic() - saved >= interval:
                self._save(pending)
                saved = time.monotonic()
        self._save(pending)
        return self.step == self.total or self.tally.diverged is not None

    def result(self) -> dict[str, Any]:
        """What the trial came to; JSON ready, with null for scores that are not finite."""
        trial, tally = self.trial, self.tally
        scores: dict[str, float] = {}
        if tally.diverged is None:
            if isinstance(self.task, Stream):
                scores = metrics.continual(tally.matrix, self.task.better)
                moved = metrics.forward_transfer(tally.matrix, tally.untrained)
                scores["forward_transfer"] = moved
                if self.joint:  # nothing was learnt before anything else
                    scores = {AVERAGE: scores[AVERAGE]}
                answer = self.answer()
                more = [self.task.more(part, answer) for part in range(self.parts)]
                scores |= {k: sum(x[k] for x in more) / len(more) for k in more[0]}
            else:
                scores = self.task.score(self.answer(), quick=trial.quick)
        broken = not math.isfinite(scores.get(headline(self.task), math.nan))
        return {
            **{"id": trial.id(), "status": "diverged" if broken else "finished"},
            "diverged_at": tally.diverged,
            "scores": {k: float(v) if math.isfinite(v) else None for k, v in scores.items()},
            "matrix": tally.matrix,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **{"steps": self.step, "step_ms": 1e3 * tally.wall / max(self.step, 1)},
            "cpu_seconds": tally.cpu + time.process_time() - self._cpu,
            **{"torch": torch.__version__, "python": platform.python_version()},
            "code": code(),
        }

    def _scores(self, stream: Stream) -> list[float]:
        answer = self.answer()
        return [float(stream.score(part, answer)) for part in range(self.parts)]

    def answer(self) -> Answer:
        """The model as a function of tokens on the CPU, in evaluation mode."""
        self.model.eval()

        @torch.no_grad()
        def answer(tokens: Tensor) -> Tensor:
            return self._logits(tokens).cpu()

        return answer

    def _step(self) -> Tensor:
        inputs, targets = self.lessons.draw(self.step // self.trial.steps)
        loss = cost(self._logits(inputs), targets.to(self.trial.device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.trial.clip)
        self.model.before_step()
        self.optimizer.step()
        self._rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.model.after_step(self.step)
        return loss.detach()

    def _logits(self, tokens: Tensor) -> Tensor:
        half = self.trial.precision == "bfloat16"
        device = self.trial.device
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            return self.model(tokens.to(device)).float()

    def _read(self, pending: list[Tensor]) -> None:
        """Bring losses from the device, and notice the first that is not finite."""
        if not pending:
            return
        first = self.step - len(pending) + 1
        losses = torch.stack(pending).tolist()
        pending.clear()
        bad = [first + i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            self.tally.diverged = bad[0]
        self.tally.losses += losses

    def _save(self, pending: list[Tensor]) -> None:
        self._read(pending)
        now = time.process_time()
        self.tally.cpu += now - self._cpu
        self._cpu = now
        checkpoint.save(self._path, self.trial.identity(), self._state, self.step)


@cache
def code() -> str:
    """A digest of the source that a result came from: this example and the library."""
    roots = [Path(package.__path__[0]) for package in (examples.hope, deepopt, torch_backend)]
    files = sorted(path for root in roots for path in root.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def cost(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets [B, T] that ask something; 0 if none does."""
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (targets != IGNORED).sum().clamp(min=1)
