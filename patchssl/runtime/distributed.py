"""The one file that names torch.distributed: everything here is a no-op when there is one process.

Sharding (FSDP2) is imported where it is asked for: it takes a second. Sharded modules and tensors are known by what
they can do, `reshard` and `to_local`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from patchssl.runtime.errors import FolderInUse, PatchSSLError, UsageError, causes
from patchssl.runtime.lock import locked

T = TypeVar("T")
_PARENT = os.getppid()
_LAUNCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# what gloo, NCCL and the store of torch say then
_OF_PEERS = re.compile(r"closed by peer|reset by peer|Broken pipe|[Tt]imed out|[Tt]imeout|remote process|NCCL error|"
                       r"gloo/transport|Socket is not connected|Connection refused|recvValue failed|failed to recv")


def join_launched(device_type: str = "cpu") -> None:
    """Join the processes that torchrun started, by gloo, or nccl on GPUs; nothing to do without a launcher."""
    _require_whole_launch()
    if _is_launched() and dist.is_available() and not dist.is_initialized():
        import torch._dynamo  # noqa: F401  timm imports it: after the group is up it would hold it for good

        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
        atexit.register(_leave)


def end_launched(code: int) -> None:
    """End a launched process with exit code `code`, together with the others; nothing to do without a launcher.

    At once: sharded weights hold the process group to the end, whose threads may abort while Python tears itself down.
    """
    if _is_launched():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _is_launched() -> bool:
    size = os.environ.get("WORLD_SIZE", "1")
    return size.isdecimal() and int(size) > 1


def _require_whole_launch() -> None:
    """UsageError for a part of what a launcher sets, and for tasks of srun, which alone numbers those of a step."""
    found = {name: os.environ[name] for name in _LAUNCH if os.environ.get(name)}
    how = "start it with torchrun --nproc-per-node=N -m patchssl ..., which sets them all"
    if wrong := [f"{name}={found[name]}" for name in _LAUNCH[:3] if name in found and not found[name].isdecimal()]:
        raise UsageError(f"{', '.join(wrong)} in the environment is no number; {how}, or unset it")
    size, own = int(found.get("WORLD_SIZE", "1")), int(found.get("RANK", "0"))
    if missing := [name for name in (*_LAUNCH[:2], *_LAUNCH[3:]) if name not in found and (size > 1 or own)]:
        raise UsageError(f"the environment holds {', '.join(f'{name}={value}' for name, value in found.items())}, but "
                         f"no {', '.join(missing)}: of processes that work together each needs all of them; {how}, or "
                         "unset them for one process")
    if own >= size:
        raise UsageError(f"RANK={own} in the environment is none of WORLD_SIZE={size} processes, from 0 on; {how}")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in found and "SLURM_PROCID" in os.environ and tasks.isdecimal() and int(tasks) > 1:
        raise UsageError(f"srun started {tasks} tasks of this command, which know nothing of each other: each would do "
                         "all of it. Start one task on each node that runs torchrun (srun --ntasks-per-node=1 torchrun "
                         "...), or let 'patchssl pretrain --slurm' ask for the processes; if each task is to work by "
                         "itself, with its own --out, set WORLD_SIZE=1")


@contextlib.contextmanager
def joined(device_type: str = "cpu") -> Iterator[None]:
    """Inside, launched processes work together; one that fails leaves at once, so that no other waits for it."""
    join_launched(device_type)
    try:
        yield
    except BaseException:
        if is_active():
            dist.destroy_process_group()
        raise


def is_orphan() -> bool:
    """Whether torchrun, which started this process, is gone: nobody is there to end or to restart it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and world_size() > 1 and os.getppid() != _PARENT


def lost_peer(error: BaseException | None) -> bool:
    """Whether `error` says that another process of several ended, or answers no more."""
    return world_size() > 1 and any(isinstance(cause, RuntimeError) and _OF_PEERS.search(str(cause)) is not None
                                    for cause in causes(error))


def peer_sentence(error: BaseException) -> str:
    """That this is so, in words; which of them it was its own last words say."""
    first = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    return (f"another of the {world_size()} processes of this command ended or does not answer; its own last words say "
            f"why (told to process {rank()} on {socket.gethostname()}: {first})")


def _leave() -> None:
    """End together: a process that goes while another still talks to it brings that one down."""
    if is_active():
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Go on when every process is here."""
    all_gather_objects(None)


@contextlib.contextmanager
def locked_by_one(folder: Path | None) -> Iterator[None]:
    """`folder`, where there is one, for the processes of this command alone; FolderInUse in all of them."""
    with contextlib.ExitStack() as stack:
        busy: FolderInUse | None = None
        if rank() == 0 and folder is not None:
            try:
                stack.enter_context(locked(folder))
            except FolderInUse as error:
                busy = error
        if (busy := all_gather_objects(busy)[0]) is not None:
            raise busy
        yield


def once_on_each_machine(compute: Callable[[], T]) -> T:
    """What `compute` gives in the first process of this machine; all have to be here. It must not raise."""
    return all_gather_objects(compute() if local_rank() == 0 else None)[rank() - local_rank()]  # type: ignore[return-value]


def first_on_each_machine(work: Callable[[], T]) -> T:
    """What `work` gives, in every process, the first one of each machine before the others: they find what it kept."""
    if local_rank():
        wait_for_all()
        return work()
    try:
        found = work()
    except PatchSSLError:
        wait_for_all()  # the others shall say the same
        raise
    wait_for_all()
    return found


def local_rank() -> int:
    """This process's number on its machine, which chooses its GPU; 0 without a launcher."""
    number = os.environ.get("LOCAL_RANK", "0")
    if not number.isdecimal():
        raise UsageError(f"LOCAL_RANK={number} in the environment is no number: unset it, or start with torchrun")
    return int(number)


def is_active() -> bool:
    """Whether a process group of several ranks is up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 alone."""
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    """How many processes work together, 1 alone."""
    return dist.get_world_size() if is_active() else 1


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean of `x` over all processes; `x` itself when there is only one.

    Losses and metrics call this and stay the same in a test and on eight GPUs.
    """
    return all_reduce_sum(x) / world_size() if is_active() else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over all processes; `x` itself when there is only one."""
    return _all_reduce(x, dist.ReduceOp.SUM) if is_active() else x


def all_reduce_max(x: Tensor) -> Tensor:
    """Largest `x` of all processes, entry by entry; `x` itself when there is only one."""
    return _all_reduce(x, dist.ReduceOp.MAX) if is_active() else x


def all_gather_objects(own: T) -> list[T]:
    """What every process hands in, in the order of their ranks; alone, a list of `own`."""
    if not is_active():
        return [own]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with its gradients averaged over all processes after every backward pass; itself when alone."""
    if not is_active():
        return module
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


def shard(module: nn.Module, parts: Sequence[nn.Module]) -> nn.Module:
    """`module` with its weights sharded over all processes (FSDP2), gathered for each of `parts` when it computes.

    In place. Its own forward pass has to be called: weights are whole inside only. Alone, nothing changes.
    """
    if is_active():
        from torch.distributed.fsdp import fully_shard

        for part in (*parts, module):
            fully_shard(part)
    return module


def reshard(module: nn.Module) -> None:
    """Give back the weights that a forward pass without a backward one left gathered."""
    for part in _shards(module):
        part.reshard()


def gradients_shared(module: nn.Module, *, when: bool) -> contextlib.AbstractContextManager[None]:
    """Average gradients in the backward passes inside only `when` it is said to: the last of accumulated ones."""
    for part in _shards(module)[:1]:  # the root's setting is everybody's
        part.set_requires_gradient_sync(when)
    if isinstance(module, DistributedDataParallel) and not when:
        return module.no_sync()
    return contextlib.nullcontext()


def own_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor: all of it, unless it is sharded over processes."""
    return [getattr(tensor, "to_local", lambda whole=tensor: whole)() for tensor in tensors]


def whole_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor, (len(tensors),), over all processes where tensors are sharded over them."""
    norms = torch.stack(torch._foreach_norm(own_shards(tensors)))
    return all_reduce_sum(norms.square()).sqrt() if hasattr(tensors[0], "to_local") else norms


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The state of a `module` that may be sharded, whole and on the CPU; in rank 0, which writes it, at least."""
    if not _shards(module):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole_state(module: nn.Module, state: dict[str, Any]) -> None:
    """The inverse of `whole_state`, in every process."""
    if not _shards(module):
        module.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))


def whole_optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state of the optimizer of `module`, by the names of its weights: sharded or not, it reads the same."""
    if _shards(module):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(module, optimizer, options=options)
    return _renamed(optimizer.state_dict(), dict(enumerate(_names(module, optimizer))))


def load_whole_optimizer_state(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `whole_optimizer_state`, whether or not the weights were sharded then or are now."""
    if _shards(module):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        whole = {**state, "state": {**_untouched(module, state), **state["state"]}}
        set_optimizer_state_dict(module, optimizer, whole, options=StateDictOptions(full_state_dict=True))
    else:
        optimizer.load_state_dict(_renamed(state, {name: i for i, name in enumerate(_names(module, optimizer))}))


def _untouched(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """AdamW's state before its first step for weights that had none yet: sharded weights want one for each."""
    names = {name for group in state["param_groups"] for name in group["params"]} - state["state"].keys()
    shapes = {name: weight.shape for name, weight in module.named_parameters() if name in names}
    return {name: {"step": torch.zeros(()), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
            for name, shape in shapes.items()}


def _names(module: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names in `module` of the weights of `optimizer`, in its order."""
    names = {id(weight): name for name, weight in module.named_parameters()}
    return [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]


def _renamed(state: dict[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """The state of an optimizer with its weights called otherwise."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}


def _shards(module: nn.Module) -> list[Any]:
    """The sharded parts of `module`, itself first."""
    return [part for part in module.modules() if hasattr(part, "set_requires_gradient_sync")]


def _all_reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, operation)
    return total
