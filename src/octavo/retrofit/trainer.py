"""Distils gates, SwiftKV weights or both: the teacher is the frozen model, the student the same weights with them.

One step: draw rows, run the model as it is, run it again as the student, and lower the KL between the two, the
error of the hidden states before the last layer (SwiftKV) and the eviction still missing (gates). Means are over
the tokens that count, of the whole step on all processes; only the missing eviction is taken per micro-batch
(`dms.objective`). Data and noise depend only on (seed, step, rank, micro-batch), so a checkpoint needs nothing but
what is trained, Adam's moments and the step to continue bit for bit.
"""

import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from octavo.attachment import attachment_of, require_attachment
from octavo.attachment.attach import attach, restore
from octavo.attachment.supported import check_supported, fingerprint
from octavo.dms import Adapter, Gates, SoftGates
from octavo.dms.objective import eviction_loss, target_ratio
from octavo.errors import ConfigError, OutputFileError, RetrofitError, RetrofitInterrupted
from octavo.retrofit.checkpoint import (
    CHECKPOINT,
    cut_log,
    held_interrupt,
    read_checkpoint,
    refuse_unfinished,
    write_checkpoint,
    write_log,
)
from octavo.retrofit.data import Source, shares_by_name
from octavo.retrofit.exercises import exercise_sequence
from octavo.retrofit.fusing import fused
from octavo.retrofit.lesson import teach
from octavo.retrofit.packing import Packer, Rows, unbroken
from octavo.retrofit.preparation import scale_inputs
from octavo.retrofit.readout import readout
from octavo.retrofit.recall import recall_sequence
from octavo.retrofit.regression import fit_gates, fit_keys_values
from octavo.retrofit.settings import RetrofitSettings
from octavo.retrofit.start import Init, check_sources, chosen, first_gates, first_transform, made_with
from octavo.swiftkv import SwiftKVAdapter
from octavo.swiftkv.adapter import as_stored

DIVERGED = "begin again in another folder with a lower lr"
FITTED_TOKENS = (
    256  # for a start by regression, per element of the stream; fits to two tokens have half as many an input
)


@dataclass(frozen=True)
class StepReport:
    """One line of the log: loss = kl + mse_weight * mse + eviction_weight * missing; None where not trained.

    `kl` is T^2 * KL at temperature T, `mse` as in `hidden_error`. `ratio` is the compression of the gates' hard
    decisions, the window set aside; `lr` is the gates' where there are gates.
    """

    step: int
    loss: float
    kl: float
    mse: float | None
    target: float | None
    ratio: float | None
    missing: float | None
    lr: float
    tokens: int
    seconds: float


class Retrofit:
    """The state of one run in a folder: what is trained, optimiser, step. The model is attached while it trains.

    `init`: adapters to start from, see `start.py`. Raises ConfigError, AdapterMismatchError, UnsupportedModelError.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        sources: list[Source],
        settings: RetrofitSettings,
        folder: str | Path,
        init: Init = (),
    ) -> None:
        check_supported(model)
        check_sources(model, sources, settings.length)
        self.head = readout(model)
        self.model, self.tokenizer, self.sources, self.settings = model, tokenizer, sources, settings
        self.folder = Path(folder)
        self.accelerator = Accelerator(cpu=model.device.type == "cpu")
        world = self.accelerator.num_processes
        if settings.batch % world:
            raise ConfigError(f"batch {settings.batch} must be a multiple of the {world} processes")
        gates, swiftkv = chosen(model, settings, init)
        self.init = {"gates": gates.name if gates else None, "swiftkv": swiftkv.name if swiftkv else None}
        self.inside = swiftkv.name if swiftkv and gates and gates.made_on is not None else None  # where gates came from
        self.transform = first_transform(model, settings, swiftkv)
        self.gates, self.start = first_gates(model, settings, self.transform.spec if self.transform else None, gates)
        s = settings.swiftkv
        self.fits = s is not None and s.start == "regression" and swiftkv is None
        self.taught_by = gates.gates if gates and self.transform is not None and gates.made_on is None else None
        # Each part has a learning rate of its own, set at every step.
        groups = [{"params": list(part.parameters()), "name": name} for name, part in self._trained().items()]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.packer = Packer(sources, tokenizer, settings.recall, settings.length, settings.exercises)
        self.step, self.resumed = 0, False
        self.noise = True  # whether decisions are relaxed with logistic noise; tests compare gradients without it

    def run(self, on_step: Callable[[StepReport], None] = lambda report: None) -> None:
        """Train to the last step.

        Raises RetrofitInterrupted on Ctrl-C, after the step that runs and its checkpoint; the second Ctrl-C raises
        KeyboardInterrupt at once. Raises RetrofitError when loss or weights are no longer finite, and where the
        folder holds an unfinished run that was not resumed; OutputFileError where the folder cannot be written.
        """
        if self.step == 0 and not self.resumed:
            refuse_unfinished(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputFileError(f"cannot write to {self.folder}: {e.strerror}") from e
        before = attachment_of(self.model)
        frozen = [(p, p.requires_grad) for p in self.model.parameters()]
        self.model.requires_grad_(False)
        self.model.eval()  # type: ignore[no-untyped-call]
        attach(self.model)
        try:
            with held_interrupt() as interrupted:
                if self.step == 0:
                    self._prepare()
                self._train(interrupted, on_step)
        finally:
            for parameter, value in frozen:
                parameter.requires_grad_(value)
            restore(self.model, before)

    def _train(self, interrupted: Callable[[], bool], on_step: Callable[[StepReport], None]) -> None:
        with fused(self.model), ThreadPoolExecutor(1) as ahead:
            drawn = ahead.submit(self._rows, self.step)
            self._stop_if(interrupted())
            while self.step < self.settings.steps:  # the next step's rows are drawn while this one runs
                rows, drawn = drawn.result(), ahead.submit(self._rows, self.step + 1)
                report = self._train_step(rows.to(self.model.device))
                if self.accelerator.is_main_process:
                    write_log(self.folder, asdict(report))
                on_step(report)
                if self.step % self.settings.checkpoint_every == 0 or self.step == self.settings.steps:
                    self.save()
                self._stop_if(interrupted())

    def _stop_if(self, interrupted: bool) -> None:
        """Save and raise where any process was interrupted: all have done the same steps then."""
        flag = torch.tensor(float(interrupted), device=self.model.device)
        if not self.accelerator.reduce(flag, "sum"):
            return
        self.save()
        raise RetrofitInterrupted(
            f"stopped after step {self.step} of {self.settings.steps}; "
            f"{self.folder / CHECKPOINT} continues it with --resume"
        )

    def _train_step(self, rows: Rows) -> StepReport:
        s, began = self.settings, time.perf_counter()
        gates, swiftkv = s.gates, s.swiftkv
        target = target_ratio(self.step + 1, s.steps, gates.target, gates.ramp, self.start) if gates else None
        for group in self.optimizer.param_groups:
            group["lr"] = getattr(s, group["name"]).lr_at(self.step, s.steps)
        count = self.accelerator.reduce(rows.counted.sum(), "sum")
        weights = torch.tensor(
            [1.0, swiftkv.mse_weight if swiftkv else 0.0, gates.eviction_weight if gates else 0.0, 0.0],
            device=rows.tokens.device,
        )
        sums = torch.zeros_like(weights)  # kl, mse, missing, evicted
        for i, part in enumerate(rows.split(s.micro_batch)):
            losses = self._losses(part, part.counted / count, target, i)
            (losses @ weights).backward()  # type: ignore[no-untyped-call]
            sums += losses.detach()
        for part_of_it in self._trained().values():
            for parameter in part_of_it.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
            torch.nn.utils.clip_grad_norm_(part_of_it.parameters(), 1.0)
        sums = self.accelerator.reduce(sums, "sum")
        loss, (kl, mse, missing, evicted) = (sums @ weights).item(), sums.tolist()
        if not np.isfinite(loss):
            raise RetrofitError(f"the loss is not finite at step {self.step + 1}; {DIVERGED}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepReport(
            self.step,
            loss,
            kl,
            mse if swiftkv else None,
            target,
            1.0 / max(1.0 - evicted, 1e-6) if gates else None,
            missing if gates else None,
            self.optimizer.param_groups[0]["lr"],
            int(count),
            time.perf_counter() - began,
        )

    def _losses(self, rows: Rows, weight: Tensor, target: float | None, part: int) -> Tensor:
        """This micro-batch's part of (KL, error of hidden states, missing eviction, evicted fraction), [4]."""
        soft = None
        if self.gates is not None and self.settings.gates is not None:
            device = rows.tokens.device
            seed = self._seed("noise", self.step, part)
            noise = torch.Generator(device=device).manual_seed(seed) if self.noise else None
            soft = SoftGates(self.gates, self.settings.gates.temperature, noise)
        attachment = require_attachment(self.model)
        lesson = teach(attachment, rows, weight, self.settings.temperature, soft, self.transform, self.head)
        missing = evicted = torch.zeros_like(lesson.kl)
        if soft is not None and target is not None:
            share = len(rows.tokens) / self.settings.batch
            missing, evicted = (x * share for x in eviction_loss(soft.logits, target))
        return torch.stack([lesson.kl, lesson.mse, missing, evicted])

    # Before the first step

    @torch.no_grad()
    def _prepare(self) -> None:
        device, attachment = self.model.device, require_attachment(self.model)
        total = functools.partial(self.accelerator.reduce, reduction="sum")
        if self.gates is not None:  # scaled already where a run was interrupted in its first step
            self.gates.load_state_dict(self.gates.folded_state())
        if self.transform is not None and self.fits:
            fit_keys_values(attachment, self.transform, self._fitted(), total=total)
        if self.transform is not None and self.gates is not None and self.taught_by is not None:
            fit_gates(attachment, self.transform, self.gates, self.taught_by.to(device), self._fitted(), total=total)
        if self.gates is not None:
            mean = functools.partial(self.accelerator.reduce, reduction="mean")
            scale_inputs(attachment, self.transform, self.gates, next(self._rows(0).to(device).split(1)), mean)

    def _fitted(self) -> Iterator[Rows]:
        """This process's rows for a start by regression, in micro-batches."""
        s = self.settings
        wanted = FITTED_TOKENS * self.model.config.hidden_size
        for step in range(-(-wanted // (s.batch * s.length))):
            yield from self._rows(step).to(self.model.device).split(s.micro_batch)

    # Data

    def _rows(self, step: int) -> Rows:
        """This process's rows of a step, [batch / processes, length].

        With gates a row is one stream, chats included: eviction is about what lies far back, and short documents
        have nothing past the window.
        """
        s, rng = self.settings, np.random.default_rng(self._seed("data", step, 0))
        count = s.batch // self.accelerator.num_processes
        if s.gates is None:
            return self.packer.rows(rng, count)
        shares = np.array([source.share for source in self.sources])
        rows = []
        for _ in range(count):
            source = self.sources[int(rng.choice(len(self.sources), p=shares / shares.sum()))]
            kind = rng.random()
            if kind < s.recall:
                rows.append(recall_sequence(self.tokenizer, self.sources[0], rng, s.length))
            elif kind < s.recall + s.exercises:
                rows.append(exercise_sequence(self.tokenizer, self.sources, rng, s.length))
            else:
                rows.append(source.draw(rng, s.length))
        return unbroken(np.stack(rows))

    def _seed(self, purpose: str, step: int, part: int) -> int:
        name = (self.settings.seed, step, self.accelerator.process_index, part, len(purpose))
        return int(np.random.SeedSequence(name).generate_state(1, np.uint64)[0] >> 1)

    # The run's folder

    def _parts(self) -> dict[str, nn.Module]:
        """What is trained or trained on, by the names in the settings and in checkpoints."""
        parts = {"gates": self.gates, "swiftkv": self.transform}
        return {name: part for name, part in parts.items() if part is not None}

    def _trained(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self._parts().items() if getattr(self.settings, name).lr > 0}

    def save(self) -> None:
        """Write the checkpoint; only one process does. Raises RetrofitError where weights are no longer finite."""
        weights = (p for part in self._trained().values() for p in part.parameters())
        if not all(torch.isfinite(p).all() for p in weights):
            raise RetrofitError(f"weights are not finite after step {self.step}, nothing was saved; {DIVERGED}")
        if self.accelerator.is_main_process:
            write_checkpoint(self.folder, self._parts(), self.optimizer, self.step, self._made_with())

    def resume(self) -> None:
        """Go on from the folder's checkpoint.

        Raises RetrofitError where it or the log is missing or damaged, or where it was made with anything else.
        """
        self.step = read_checkpoint(self.folder, self._parts(), self.optimizer, self._made_with())
        self.resumed = True
        if self.accelerator.is_main_process:
            cut_log(self.folder, self.step)

    def _made_with(self) -> dict[str, Any]:
        return made_with(self.model, self.settings, self.sources, self.init)

    def adapters(self, name: str, gates_name: str | None = None) -> list[SwiftKVAdapter | Adapter]:
        """What was trained, as adapters for this model with the run's settings on their cards.

        With both, the first is the SwiftKV adapter `name`, and the gates are `gates_name`. SwiftKV weights are
        rounded to what files hold.
        """
        settings = {k: v for k, v in asdict(self.settings).items() if v is not None}
        card: dict[str, Any] = {"settings": settings, "data": shares_by_name(self.sources)}
        card["tokens"] = dict(zip(card["data"], (len(source.tokens) for source in self.sources), strict=True))
        made_for, made_on = fingerprint(self.model), None
        out: list[SwiftKVAdapter | Adapter] = []
        if self.transform is not None:
            stored = as_stored(self.transform)
            made_on = stored.fingerprint()
            out.append(SwiftKVAdapter(name, stored, made_for, {**card, "init": self.init["swiftkv"]}))
        if self.gates is not None and self.settings.gates is not None:
            target, init = self.settings.gates.target, self.init["gates"]
            gates = Gates(self.gates.spec)
            gates.load_state_dict({k: v.cpu() for k, v in self.gates.folded_state().items()})
            if self.inside is not None:
                init = f"{init}, made on {self.inside}"
            own = name if self.transform is None else gates_name or self.settings.gates.name
            out.append(Adapter(own, gates, made_for, target, {**card, "init": init}, made_on))
        return out
