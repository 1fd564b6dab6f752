# SPDX-License-Identifier: Apache-2.0
"""The modules that a run trains: their optimizers, their averages, and their files in a checkpoint."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from diffsketching_pipeline.lora import LORA_WEIGHTS_NAME, fuse_lora, has_lora, load_lora_state_dict, save_lora
from diffsketching_pipeline.registry import find_checkpoint


logger = get_logger(__name__)


def load_pretrained(model_class: Any, name_or_path: str, subfolder: str, **kwargs: Any) -> Any:
    """Load a component in float32 from a pipeline (folder or Hub id) or from a folder that holds just the model."""
    name_or_path = find_checkpoint(name_or_path)
    is_model_folder = os.path.isfile(os.path.join(name_or_path, "config.json"))
    location = {} if is_model_folder else {"subfolder": subfolder}
    return model_class.from_pretrained(name_or_path, **location, **kwargs).float()


def _empty_clone(module: Any) -> Any:
    """An untrained copy of a diffusers or transformers model."""
    if hasattr(module, "register_to_config"):
        return type(module).from_config(module.config)
    return type(module)(copy.deepcopy(module.config))


def _save_module(module: Any, folder: str) -> None:
    """Writes a model or, of one that carries an adapter, the adapter."""
    if has_lora(module):
        save_lora(module, folder)
    else:
        module.save_pretrained(folder)


class TrainedModules:
    """
    Modules with their optimizers and exponential moving averages. Buffers are not averaged, and of an adapted network the
    adapter alone is.

    Args:
        accelerator: unwraps modules, and tells the processes apart.
        modules: what is trained, by name.
        prepare: `module -> (module as it is called in losses, its optimizer)`.
        is_sharded: whether each process will hold a part of the weights only.
        ema_modules: names of the modules that get averages.
        ema_max_decays: upper bound of the decay of each average; none = no averages. The first is what is published and
            validated, `<name>_ema` in a checkpoint; the others are kept there as `<name>_ema_<decay>`.
        ema_inv_gamma, ema_power: the decay at step n is 1 - (1 + n / inv_gamma) ** -power.
        save_dtype: type of the copies that are published.

    Attributes:
        prepared: the modules as they are called in losses, wrapped for several processes.
        optimizers: one per module.
        trainable: the parameters of each that are trained.
        ema, further_ema: the averages by module, and by their bound of the decay and module.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        modules: Mapping[str, nn.Module],
        prepare: Callable[[nn.Module], tuple[nn.Module, Any]],
        *,
        is_sharded: bool = False,
        ema_modules: Iterable[str] = (),
        ema_max_decays: Sequence[float] = (),
        ema_inv_gamma: float = 1.0,
        ema_power: float = 3 / 4,
        save_dtype: torch.dtype = torch.float32,
    ):
        self.accelerator, self.is_sharded, self.save_dtype = accelerator, is_sharded, save_dtype
        self.prepared: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        self._whole_copies: dict[str, Any] = {}
        self._last_copies: dict[str, Any] = {}
        for name, module in modules.items():
            self.prepared[name], self.optimizers[name] = prepare(module)
        self.trainable = {n: [p for p in m.parameters() if p.requires_grad] for n, m in self.prepared.items()}

        def make_ema(name: str, max_decay: float) -> EMAModel:
            return EMAModel(
                self._averaged_parameters(name),
                decay=max_decay,
                use_ema_warmup=True,
                inv_gamma=ema_inv_gamma,
                power=ema_power,
                foreach=not is_sharded,  # not all of its operations know sharded tensors
            )

        averages = [{name: make_ema(name, decay) for name in ema_modules} for decay in ema_max_decays]
        self.ema: dict[str, EMAModel] = averages[0] if averages else {}
        self.further_ema = dict(zip(ema_max_decays[1:], averages[1:], strict=True))

    def _averaged_parameters(self, name: str) -> list[nn.Parameter]:
        """Return the parameters that change: those of the adapter alone if the network has one."""
        module = self.unwrap(name)
        adapted = has_lora(module)
        return [p for p in module.parameters() if p.requires_grad or not adapted]

    def unwrap(self, name: str) -> Any:
        """
        Return the module itself, without the wrapper for several processes; its forward still autocasts. In validation, one
        that is sharded is replaced by a copy with all its weights, in float32.
        """
        if name in self._whole_copies:
            return self._whole_copies[name]
        return self.accelerator.unwrap_model(self.prepared[name])

    def whole(self, name: str) -> Any:
        """
        Return a module with all its weights: itself or, if it is sharded, a copy on the CPU of the main process and None on
        the others. Every process has to call it.
        """
        module = self.accelerator.unwrap_model(self.prepared[name])
        if not self.is_sharded:
            return module
        state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self.accelerator.is_main_process:
            return None
        clone = _empty_clone(module)
        clone.load_state_dict(state)
        return clone

    @contextmanager
    def only_trainable(self, name: str) -> Iterator[None]:
        """Let gradients flow through the other modules within the block, but not accumulate in them."""
        others = [p for other, parameters in self.trainable.items() if other != name for p in parameters]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    # -- averages --

    def _averages(self) -> list[tuple[str, dict[str, EMAModel]]]:
        """Every kind of average with what its folder in a checkpoint ends in: `_ema`, and `_ema_<max decay>` of the others."""
        return [("_ema", self.ema), *((f"_ema_{decay:g}", ema) for decay, ema in self.further_ema.items())]

    def step_averages(self) -> None:
        """Take the weights as they are now into every average."""
        for _, averages in self._averages():
            for name, ema in averages.items():
                ema.step(self._averaged_parameters(name))

    @contextmanager
    def ema_weights(self, max_decay: float | None = None) -> Iterator[None]:
        """Put the averages into the modules within the block, the first ones or those of a further bound of the decay."""
        averages = self.ema if max_decay is None else self.further_ema[max_decay]
        for name, ema in averages.items():
            ema.store(self._averaged_parameters(name))
            ema.copy_to(self._averaged_parameters(name))
        try:
            yield
        finally:
            for name, ema in averages.items():
                ema.restore(self._averaged_parameters(name))

    def ema_copy(self, name: str, dtype: torch.dtype | None = None, max_decay: float | None = None) -> Any:
        """
        Return a plain copy of a module with the averaged weights, on the CPU, in eval mode, in `save_dtype` or `dtype`; an
        adapter is fused. `max_decay` chooses a further average. The main process gets the copy, the others None. Of a sharded
        module it is the state when [`TrainedModules.gather_averages`] was called last; the further averages of one are in its
        checkpoints only.

        Raises:
            ValueError: `max_decay` is asked of a sharded module.
        """
        if max_decay is not None and self.is_sharded:
            raise ValueError("`max_decay` must be None for a sharded module: take the average from a checkpoint.")
        averages = self.ema if max_decay is None else self.further_ema[max_decay]
        if not self.accelerator.is_main_process:
            return None
        module = self.unwrap(name)
        if self.is_sharded:
            clone = self._last_copies[name]
        elif has_lora(module):
            with self.ema_weights(max_decay):
                clone = fuse_lora(module).cpu()
        else:
            clone = _empty_clone(module)
            clone.load_state_dict(module.state_dict())
            if name in averages:
                averages[name].copy_to(clone.parameters())
        dtype = dtype or self.save_dtype
        return clone.eval() if dtype == clone.dtype else clone.to(dtype=dtype).eval()

    def gather_averages(self) -> None:
        """Bring the parts of sharded modules together for [`TrainedModules.ema_copy`]. Every process has to call it."""
        if self.is_sharded:
            with self.ema_weights():
                self._last_copies = {name: self.whole(name) for name in self.prepared}

    @contextmanager
    def validating(self) -> Iterator[None]:
        """
        Hold the averaged weights within the block, without gradients; the main process has the modules whole and in eval mode.
        If they are sharded, every process has to enter.
        """
        is_main = self.accelerator.is_main_process
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.ema_weights())
            if self.is_sharded:
                copies = {name: self.whole(name) for name in self.prepared}
                stack.callback(self._whole_copies.clear)  # before the modules get their own weights back
                if is_main:
                    self._whole_copies.update((n, c.to(self.accelerator.device)) for n, c in copies.items())
            if is_main:
                for module in [self.unwrap(name) for name in self.prepared]:
                    module.eval()
                    stack.callback(module.train)
            yield

    # -- files --

    def save(self, folder: str) -> None:
        """Write modules and averages as `save_pretrained` folders, from the main process. Every process has to call it."""
        is_main = self.accelerator.is_main_process
        for name in self.prepared:
            module = self.whole(name)
            if is_main:
                _save_module(module, os.path.join(folder, name))
        for max_decay, (suffix, averages) in zip((None, *self.further_ema), self._averages(), strict=True):
            with self.ema_weights(max_decay):
                for name in averages:
                    module = self.whole(name)
                    if is_main:
                        _save_module(module, os.path.join(folder, name + suffix))

    def load(self, folder: str, ema_steps: Mapping[str, int]) -> None:
        """
        Read what [`TrainedModules.save`] wrote. A further average that is not there begins from the first.

        Args:
            folder: the checkpoint.
            ema_steps: steps that each module's averages have taken.

        Raises:
            ValueError: the averages are not there.
        """
        for suffix, averages in self._averages():
            for name, ema in averages.items():
                path = os.path.join(folder, name + suffix)
                if not os.path.isdir(path) and suffix != "_ema":
                    logger.warning(f"{folder} holds no {name + suffix}: this average begins from {name}_ema.")
                    path = os.path.join(folder, f"{name}_ema")
                if not os.path.isdir(path):
                    raise ValueError(f"`use_ema` needs {name}_ema, which the checkpoint {folder} does not hold.")
                self._load_module(name, path)
                for shadow, parameter in zip(ema.shadow_params, self._averaged_parameters(name), strict=True):
                    shadow.copy_(parameter.detach())
                ema.optimization_step = ema_steps[name]
        for name in self.prepared:
            self._load_module(name, os.path.join(folder, name))

    def _load_module(self, name: str, folder: str) -> None:
        """Puts what `_save_module` wrote into a module, each process its part."""
        module = self.unwrap(name)
        if has_lora(module):
            load_lora_state_dict(module, load_file(os.path.join(folder, LORA_WEIGHTS_NAME)))
            return
        state = load_pretrained(type(module), folder, "").state_dict()
        if self.is_sharded:
            set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))
        else:
            module.load_state_dict(state)
