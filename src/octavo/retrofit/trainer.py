"""Distils the gates of one frozen model: teacher and student are the same weights, without and with eviction.

One step: draw sequences, run the model dense, run it again under soft gates, and lower KL plus the missing
eviction. Data and noise depend only on (seed, step, rank, micro-batch), so a checkpoint needs nothing but the
gates, Adam's moments and the step to continue bit for bit.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from octavo.attachment import attach, attachment_of, require_attachment, restore
from octavo.config import Eviction
from octavo.dms import Adapter, Gates, GateSpec, SoftGates
from octavo.dms.adapter import check_fingerprint
from octavo.dms.objective import distillation_loss, eviction_loss, target_ratio
from octavo.errors import ConfigError, OutputFileError, RetrofitError, RetrofitInterrupted
from octavo.retrofit.data import Source
from octavo.retrofit.recall import recall_sequence
from octavo.support import attention_modules, check_supported, fingerprint

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"


@dataclass(frozen=True)
class RetrofitSettings:
    """How gates are trained. `batch` sequences of `length` tokens a step over all processes.

    `target`: tokens per kept token asked for at the end, reached linearly after `ramp` of the steps; the
    learning rate then falls linearly to a tenth. `recall`: share of sequences made by `recall_sequence`.
    """

    target: float = 8.0
    steps: int = 200
    batch: int = 8
    micro_batch: int = 4
    length: int = 8192
    window: int = 256
    lr: float = 2e-4
    ramp: float = 0.6
    temperature: float = 0.1
    eviction_weight: float = 1.0
    recall: float = 0.25
    seed: int = 0
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "length", "window", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.target < 1 or not self.lr > 0 or not 0 <= self.recall <= 1 or not 0 < self.ramp <= 1:
            raise ConfigError("target must be at least 1, lr positive, recall in [0, 1] and ramp in (0, 1]")
        if self.window >= self.length:
            raise ConfigError(f"window {self.window} must be shorter than length {self.length}, or nothing is evicted")


@dataclass(frozen=True)
class StepReport:
    """One line of the log; `ratio` is the compression of the hard decisions, the window set aside."""

    step: int
    kl: float
    target: float
    ratio: float
    missing: float
    lr: float
    tokens: int
    seconds: float


class Retrofit:
    """The state of one run in a folder: gates, optimiser, step. The model is attached for as long as it trains."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        sources: list[Source],
        settings: RetrofitSettings,
        folder: str | Path,
        init: Adapter | None = None,
    ) -> None:
        check_supported(model)
        if not sources:
            raise ConfigError("training needs at least one source of text")
        self.model, self.tokenizer, self.sources, self.settings = model, tokenizer, sources, settings
        self.folder = Path(folder)
        self.accelerator = Accelerator(cpu=model.device.type == "cpu")
        world = self.accelerator.num_processes
        if settings.batch % world:
            raise ConfigError(f"batch {settings.batch} must be a multiple of the {world} processes")
        config = model.config
        spec = GateSpec(
            config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, Eviction(settings.window)
        )
        self.gates = Gates(spec).to(model.device)
        self.start, self.init = 1.0, init.name if init else None
        if init is not None:
            check_fingerprint(init, fingerprint(model))
            if init.gates.spec != spec:
                raise ConfigError(f"adapter {init.name} has other gate settings: {init.gates.spec}")
            self.gates.load_state_dict(init.gates.state_dict())
            self.start = min(init.target, settings.target)
        self.optimizer = torch.optim.AdamW(self.gates.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.step = 0
        self.noise = True  # whether decisions are relaxed with logistic noise; tests compare gradients without it

    def run(self, on_step: Callable[[StepReport], None] = lambda report: None) -> Gates:
        """Train to the last step and return the gates.

        Raises RetrofitInterrupted on Ctrl-C, after writing a checkpoint, and RetrofitError when the loss is
        no longer finite.
        """
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
            if self.step == 0:
                scale = self._input_scale()
                self.gates.weight.data.mul_((self.gates.input_scale / scale)[:, :, None])
                self.gates.input_scale.copy_(scale)
            while self.step < self.settings.steps:
                report = self._train_step()
                self._log(report)
                on_step(report)
                if self.step % self.settings.checkpoint_every == 0 or self.step == self.settings.steps:
                    self.save()
        except KeyboardInterrupt:
            self.save()
            raise RetrofitInterrupted(
                f"stopped after step {self.step} of {self.settings.steps}; "
                f"{self.folder / CHECKPOINT} continues it with --resume"
            ) from None
        finally:
            for parameter, value in frozen:
                parameter.requires_grad_(value)
            restore(self.model, before)
        return self.gates

    def _train_step(self) -> StepReport:
        s, began = self.settings, time.perf_counter()
        target = target_ratio(self.step + 1, s.steps, s.target, s.ramp, self.start)
        lr = s.lr * (1.0 if self.step < s.ramp * s.steps else 1.0 - 0.9 * (self.step / s.steps - s.ramp) / (1 - s.ramp))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = self._batch()
        parts = batch.split(s.micro_batch)  # type: ignore[no-untyped-call]
        sums = torch.zeros(3, device=batch.device)
        for i, tokens in enumerate(parts):
            share = len(tokens) / len(batch)
            kl, missing, evicted = self._losses(tokens, target, i)
            ((kl + s.eviction_weight * missing) * share).backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([kl.detach(), missing.detach(), evicted]) * share
        for parameter in self.gates.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        sums = self.accelerator.reduce(sums, "mean")
        kl_value, missing_value, evicted_value = sums.tolist()
        if not np.isfinite(kl_value):
            raise RetrofitError(f"the loss is not finite at step {self.step}; lower lr (now {s.lr}) and resume")
        torch.nn.utils.clip_grad_norm_(self.gates.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        ratio = 1.0 / max(1.0 - evicted_value, 1e-6)
        return StepReport(
            self.step, kl_value, target, ratio, missing_value, lr, s.batch * s.length, time.perf_counter() - began
        )

    def _losses(self, tokens: Tensor, target: float, part: int) -> tuple[Tensor, Tensor, Tensor]:
        attachment, base = require_attachment(self.model), self.model.base_model
        head = self.model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        noise = torch.Generator(device=tokens.device).manual_seed(self._seed("noise", part)) if self.noise else None
        with attachment.using(None), torch.no_grad():
            teacher = base(input_ids=tokens, use_cache=False).last_hidden_state
        soft = SoftGates(self.gates, self.settings.temperature, noise)
        with attachment.using(soft):
            student = base(input_ids=tokens, use_cache=False).last_hidden_state
        missing, evicted = eviction_loss(soft.logits, target)
        return distillation_loss(student, teacher, head), missing, evicted

    @torch.no_grad()
    def _input_scale(self) -> Tensor:
        """1 / RMS of each layer's attention input on a first batch: [L, 1], so that all gates learn at one speed."""
        squares: list[Tensor] = []

        def measure(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            squares.append(hidden.float().square().mean())

        hooks = [m.register_forward_pre_hook(measure, with_kwargs=True) for m in attention_modules(self.model)]
        try:
            with require_attachment(self.model).using(None):
                self.model.base_model(input_ids=self._batch()[:1], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        mean: Tensor = self.accelerator.reduce(torch.stack(squares), "mean")
        return mean.rsqrt()[:, None].to(self.gates.input_scale)

    def _batch(self) -> Tensor:
        """This process's sequences of this step: [batch / processes, length] int64 on the model's device."""
        s, shares = self.settings, np.array([source.share for source in self.sources])
        rng = np.random.default_rng(self._seed("data", 0))
        rows = []
        for _ in range(s.batch // self.accelerator.num_processes):
            source = self.sources[int(rng.choice(len(self.sources), p=shares / shares.sum()))]
            recall = rng.random() < s.recall
            rows.append(
                recall_sequence(self.tokenizer, self.sources[0], rng, s.length)
                if recall
                else source.draw(rng, s.length)
            )
        return torch.from_numpy(np.stack(rows)).to(self.model.device)

    def _seed(self, purpose: str, part: int) -> int:
        name = (self.settings.seed, self.step, self.accelerator.process_index, part, len(purpose))
        return int(np.random.SeedSequence(name).generate_state(1, np.uint64)[0] >> 1)

    # The run's folder

    def save(self) -> None:
        """Write the checkpoint, aside and renamed, so that an interrupted write leaves the one before."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"gates.{name}": t.detach().cpu().contiguous() for name, t in self.gates.state_dict().items()}
        for name, parameter in self.gates.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{key}"] = value.detach().cpu().contiguous()
        aside = self.folder / (CHECKPOINT + ".new")
        settings = json.dumps(asdict(self.settings))
        save_file(tensors, aside, metadata={"step": str(self.step), "settings": settings})
        aside.replace(self.folder / CHECKPOINT)

    def resume(self) -> None:
        """Go on from the folder's checkpoint. Raises RetrofitError where it is missing, broken or of other settings."""
        path = self.folder / CHECKPOINT
        try:
            from safetensors import safe_open

            with safe_open(path, framework="pt") as f:
                metadata = f.metadata()
            tensors = load_file(path)
        except Exception as e:
            raise RetrofitError(f"cannot resume from {path}: {e}") from e
        if json.loads(metadata["settings"]) != asdict(self.settings):
            raise RetrofitError(f"{path} was made with other settings: {metadata['settings']}")
        self.gates.load_state_dict({k.removeprefix("gates."): v for k, v in tensors.items() if k.startswith("gates.")})
        for name, parameter in self.gates.named_parameters():
            prefix = f"adam.{name}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                self.optimizer.state[parameter] = {
                    k: v if k == "step" else v.to(parameter.device) for k, v in state.items()
                }
        self.step = int(metadata["step"])
        if (self.folder / LOG).exists():  # lines past the checkpoint will be written again
            lines = (self.folder / LOG).read_text().splitlines()[: self.step]
            (self.folder / LOG).write_text("".join(line + "\n" for line in lines))

    def _log(self, report: StepReport) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / LOG).open("w" if report.step == 1 else "a") as f:
                f.write(json.dumps(asdict(report)) + "\n")

    def adapter(self, name: str) -> Adapter:
        """The gates as an adapter for this model, with the run's settings on its card."""
        card: dict[str, Any] = {
            "settings": asdict(self.settings),
            "init": self.init,
            "data": {source.name: source.share for source in self.sources},
        }
        gates = Gates(self.gates.spec)
        gates.load_state_dict({k: v.cpu() for k, v in self.gates.folded_state().items()})
        return Adapter(name, gates, fingerprint(self.model), self.settings.target, card)
