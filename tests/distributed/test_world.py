"""Ranks: torchrun's environment, checks of the launch, and a process group that closes however a run ends."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from fsdp_qlora.config.options import LaunchOptions
from fsdp_qlora.distributed import world as world_module
from fsdp_qlora.distributed.world import World, idle_gpus, open_world, peer_is_gone
from fsdp_qlora.errors import UserError
from fsdp_qlora.runtime import launcher as environment
from fsdp_qlora.runtime.launcher import Launch, check_launch, rank_from_environment, read_launch
from tests.support.torchrun import ROOT, finish, run_torchrun, start_torchrun

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_torchruns_environment_is_read():
    assert read_launch(TORCHRUN) == Launch(3, 4, 1, 2, "node0", 29500)
    assert read_launch({}) == Launch(0, 1, 0, 1, None, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"LOCAL_RANK": None}, ["LOCAL_RANK", "torchrun"]),
        ({"RANK": "three"}, ["RANK", "three"]),
        ({"RANK": "4"}, ["RANK=4", "WORLD_SIZE=4"]),
        ({name: None for name in TORCHRUN} | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, ["srun", "torchrun"]),
    ],
)
def test_a_broken_environment_is_a_users_mistake(changes, words):
    environ = {name: value for name, value in (TORCHRUN | changes).items() if value is not None}
    with pytest.raises(UserError) as caught:
        read_launch(environ)
    assert all(word in str(caught.value) for word in words)


def test_options_that_ask_for_another_launch_show_the_command():
    launch = Launch(0, 2, 0, 2, "localhost", 29500)
    check_launch(LaunchOptions(), launch)
    check_launch(LaunchOptions(world_size=2, master_addr="localhost", master_port=29500), launch)
    with pytest.raises(UserError, match=r"--world_size 4, but 2 ranks started.*torchrun --nproc_per_node=4"):
        check_launch(LaunchOptions(world_size=4), launch)
    with pytest.raises(UserError, match=r"--master_port 1234, but.*29500.*--master_port=1234"):
        check_launch(LaunchOptions(master_port=1234), launch)


@pytest.mark.parametrize("given", [{"master_addr": "localhost"}, {"master_port": 29500}])
def test_an_address_that_nobody_meets_at_is_a_mistake(given):
    name, value = next(iter(given.items()))
    with pytest.raises(UserError, match=rf"^--{name} {value}, but torchrun has not started.*--{name}={value} train.py"):
        check_launch(LaunchOptions(**given), Launch())
    check_launch(LaunchOptions(world_size=1), Launch())


@pytest.mark.parametrize(
    ("device", "ranks", "gpus", "line"),
    [
        ("cuda", 1, 2, "cards     1 of 2 GPUs used; torchrun --nproc_per_node 2 starts a rank on each"),
        ("cuda", 2, 2, None),
        ("cpu", 1, 2, None),
    ],
)
def test_gpus_that_no_rank_uses_are_told(monkeypatch, device, ranks, gpus, line):
    """The scripts of fsdp_qlora start train.py alone, which then starts a process for each GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert idle_gpus(World(0, ranks, 0, ranks, torch.device(device))) == line


def test_the_rank_is_known_without_torch():
    code = (
        "import sys, fsdp_qlora.runtime.launcher as e; print(e.rank_from_environment()); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"RANK": "5"}, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("5\n", "")
    assert "RANK" in os.environ or rank_from_environment() == 0


def test_one_process_without_torchrun_has_a_group_and_leaves_none():
    with open_world(LaunchOptions(), seed=7) as world:
        first = torch.rand(3)
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert dist.is_initialized()
        assert world.gather([1.5, 2.0]) == [[1.5, 2.0]]
        world.barrier()
    assert not dist.is_initialized()
    with open_world(LaunchOptions(), seed=7):
        assert torch.equal(first, torch.rand(3))
    with pytest.raises(KeyError, match="the body's own"), open_world(LaunchOptions(), seed=7):
        raise KeyError("the body's own")
    assert not dist.is_initialized()


def test_more_ranks_than_gpus_says_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"3 ranks .* 2 usable GPUs.*--nproc_per_node 2.*CUDA_VISIBLE_DEVICES"):
        world_module._choose_device(Launch(0, 3, 0, 3, "localhost", 29500))


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (RuntimeError("[pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection closed by peer"), False),
    ],
)
def test_which_errors_mean_that_a_peer_is_gone(error, gone):
    assert peer_is_gone(error) is gone
    outer = RuntimeError("while reducing gradients")
    outer.__cause__ = error
    assert peer_is_gone(outer) is gone


def test_a_peer_that_hangs_is_not_said_to_have_ended():
    done = run_torchrun(
        """
        import os, signal, sys, time
        from datetime import timedelta
        from fsdp_qlora.config.options import LaunchOptions
        from fsdp_qlora.distributed import group, world as worlds
        from fsdp_qlora.errors import TrainingStopped

        group.COLLECTIVE_TIMEOUT = worlds.COLLECTIVE_TIMEOUT = timedelta(seconds=3)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with worlds.open_world(LaunchOptions(), 0) as world:
                if world.rank == 1:
                    time.sleep(8)
                    os._exit(0)
                world.barrier()
        except TrainingStopped as stopped:
            sys.stdout.write(f"{stopped}\\n")
        sys.stdout.flush()
        os._exit(0)
        """
    )
    assert "rank 0 stopped because another rank sent nothing for 0 minutes: it hangs" in done.stdout, done.stderr
    assert "dmesg" not in done.stdout


def test_two_ranks_meet_share_cores_and_part():
    done = run_torchrun(
        """
        import os, torch, torch.distributed as dist
        from fsdp_qlora.config.options import LaunchOptions
        from fsdp_qlora.distributed.world import open_world

        with open_world(LaunchOptions(world_size=2), seed=11) as world:
            world.say(f"said by {world.rank}")
            numbers = world.gather([world.rank, torch.rand(()).item(), torch.get_num_threads()])
            on_device = torch.ones(2, device=world.device)
            dist.all_reduce(on_device)
            assert on_device.tolist() == [2.0, 2.0]
            assert [row[0] for row in numbers] == [0.0, 1.0], numbers
            assert numbers[0][1] == numbers[1][1], "the ranks' seeds differ"
            cores = len(os.sched_getaffinity(0))
            assert numbers[0][2] * 2 <= max(2, cores), numbers
            assert os.environ["OMP_NUM_THREADS"] == str(int(numbers[0][2])), "libraries loaded later are told as well"
        assert not dist.is_initialized()
        """,
        env={"OMP_NUM_THREADS": None},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("said by") == 1
    assert "said by 0" in done.stdout


def test_a_users_number_of_threads_is_told_from_torchruns():
    script = """
        from fsdp_qlora.runtime.launcher import user_set_omp_threads
        assert user_set_omp_threads() is {expected}
        """
    for value, expected in (("1", True), (None, False)):
        done = run_torchrun(script.format(expected=expected), env={"OMP_NUM_THREADS": value})
        assert done.returncode == 0, done.stderr


# A stand-in for train.py's last lines: an error is one line and an exit code.
PEERS = """
    import os, signal, sys, torch, torch.distributed as dist
    from fsdp_qlora.config.options import LaunchOptions
    from fsdp_qlora.errors import TrainingStopped
    from fsdp_qlora.distributed.interrupt import Interrupt
    from fsdp_qlora.distributed.world import open_world

    try:
        with open_world(LaunchOptions(), seed=1) as world, Interrupt(world):
            for step in range(10_000_000):
                if world.rank == 1 and step == 20:
                    {fate}
                numbers = torch.ones(1000, device=world.device)
                dist.all_reduce(numbers)
                numbers.sum().item()
    except TrainingStopped as stop:
        print(stop, file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        assert not dist.is_initialized()
    """


@pytest.mark.parametrize(
    "fate",
    ["os.kill(os.getpid(), signal.SIGKILL)", "raise ValueError('rank 1 tripped')"],
    ids=["killed", "raised"],
)
def test_the_others_end_with_a_message_when_a_rank_ends(fate):
    start = time.monotonic()
    done = finish(start_torchrun(PEERS.format(fate=fate)), timeout=60)
    assert time.monotonic() - start < 60
    assert done.returncode != 0
    assert "rank 0 stopped because another rank ended" in done.stderr or "another rank has probably" in done.stderr
    assert "rank 1 tripped" in done.stderr or "SIGKILL" in fate
    assert "while closing the process group" not in done.stderr
    assert "AssertionError" not in done.stderr


def test_gpu_memory_grows_page_by_page_unless_the_user_says_otherwise(monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "_kernel", lambda: "6.1.0-microsoft-standard-wsl2")
    environment.choose_allocator()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.setattr(environment, "_kernel", lambda: "6.1.0-28-amd64")
    environment.choose_allocator()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert environment.allocator_grows()
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    environment.choose_allocator()
    assert not environment.allocator_grows(), "the plan then leaves more free"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
