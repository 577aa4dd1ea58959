"""The preflight as the launch scripts start it: real on this machine's CPU, with a stand-in nvidia-smi for GPUs."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import pytest

ROOT = Path(__file__).parents[2]
CONFIG = "launch/configs/demo.yaml"
GOOD_GPU = "NVIDIA H100 80GB HBM3, GPU-{n}, 570.86.15, 0, 345, 1980, 31, 4, 0x0000000000000001"


@dataclass
class Node:
    """A node's stand-ins, its run directory, and its reports."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def command(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def package(self, name: str, text: str = "") -> None:
        """A stand-in that Python finds before the real one."""
        folder = self.folder / "packages" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text)

    def gpus(self, *lines: str) -> None:
        """What nvidia-smi prints of each GPU."""
        listed = "\n".join(line.format(n=n) for n, line in enumerate(lines))
        self.command("nvidia-smi", f"#!/bin/sh\ncat <<'END'\n{listed}\nEND\n")

    def check(self, *arguments: str, gpus: int = 2, name: str = "gpu001", **environment: str) -> tuple[int, dict, str]:
        """(exit code, {check: finding}, output) of the node's check."""
        report = self.folder / "reports" / f"{name}.json"
        done = preflight(
            *("node", "--gpus", gpus, "--run-dir", self.run_dir, "--report", report, "--config", CONFIG, *arguments),
            **self.environment | {"SLURMD_NODENAME": name} | environment,
        )
        assert report.exists(), done.stderr
        return done.returncode, findings(report), done.stdout + done.stderr


def findings(report: Path) -> dict[str, dict]:
    return {finding["check"]: finding for finding in orjson.loads(report.read_bytes())["findings"]}


def preflight(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.preflight", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """On CPUs, with empty stand-ins for two packages that take seconds to import."""
    (tmp_path / "bin").mkdir()
    paths = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path / "packages")}
    node = Node(tmp_path, paths | {"PREFLIGHT_CPU": "1"})
    for package in ("deepspeed", "megatron/core"):
        node.package(package)
    return node


@pytest.fixture
def torchless(node: Node) -> Node:
    """Its torch does not load: a finding, and the other checks take no seconds to import it."""
    node.package("torch", "raise ImportError('built for another driver')")
    return node


@pytest.fixture
def gpu_node(torchless: Node) -> Node:
    torchless.environment["PREFLIGHT_CPU"] = ""
    return torchless


def levels(found: dict[str, dict], *but: str) -> set[str]:
    return {finding["level"] for check, finding in found.items() if check not in but}


# One node


def test_good_node_with_the_real_packages(node):
    del node.environment["PYTHONPATH"]
    (node.run_dir / "checkpoints/step_00000050").mkdir(parents=True)
    code, found, output = node.check("model.vocab_size=4100", "checkpoint.keep_last=12", f"--head-time={time.time()}")
    assert code == 0, output
    checks = {"GPUs", "kernels", "software", "code", "config", "data"}
    assert found.keys() == checks | {"run disk", "/tmp", "/dev/shm", "names", "clock"}
    assert levels(found, "data") == {"ok"}
    assert found["kernels"]["detail"] == "self-test passed on CPU"
    assert "deepspeed 0." in found["software"]["detail"] and "megatron.core 0." in found["software"]["detail"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert found["code"]["detail"].startswith(commit or "unknown")
    assert "gpu001: checked in" in output
    # 12 × 4,520,192 bytes each; keep_last and the next one, less the one that is there.
    assert "needs 0.6 (checkpoints to come: 12)" in found["run disk"]["detail"]
    assert [path.name for path in node.run_dir.iterdir()] == ["checkpoints"]  # the clock's probe is gone


def test_wrong_config_is_no_nodes_fault(node):
    code, found, output = node.check("train.sede=3")
    assert code == 2
    assert found["config"]["level"] == "bad"
    assert "'train.sede'; did you mean 'train.seed'" in output


def test_several_faults_are_all_found(torchless):
    """A full disk, a name that nothing resolves, another node that is this machine, a late clock, a broken package."""
    hosts = "gpu001\\nno-such-node.invalid\\nlocalhost\\n"
    torchless.command("scontrol", f"#!/bin/sh\n[ $2.$3 = 'hostnames.gpu[001-3]' ] && printf '{hosts}'\n")
    settings = {"MIN_FREE_GIB": "1e9", "MIN_TMP_GIB": "0", "SLURM_JOB_NODELIST": "gpu[001-3]"}
    code, found, output = torchless.check(f"--head-time={time.time() + 600}", **settings)
    assert code == 1
    assert levels(found, "run disk", "names", "clock", "software", "kernels") == {"ok"}
    assert levels(found, "GPUs", "/tmp", "/dev/shm") == {"bad"}
    assert "needs 1000000000.0 (MIN_FREE_GIB)" in found["run disk"]["detail"]
    assert "no-such-node.invalid: " in found["names"]["detail"]
    assert "localhost: is " in found["names"]["detail"]
    assert "the clock differs by -" in found["clock"]["detail"]
    assert "import torch: ImportError: built for another driver" in found["software"]["detail"]
    assert "CPU: kernels.selftest: exit code 1: ImportError: built for" in found["kernels"]["detail"]
    assert all(finding["detail"] in " ".join(output.split()) for finding in found.values())


def test_run_directory_that_cannot_be_made(torchless):
    torchless.run_dir.touch()
    code, found, _ = torchless.check()
    assert code == 1
    assert "cannot write to" in found["clock"]["detail"]


def test_setting_that_is_no_number_is_named(torchless):
    folder = torchless.folder
    arguments = ("--gpus", 1, "--run-dir", torchless.run_dir, "--report", folder / "a.json", "--config", CONFIG)
    done = preflight("node", *arguments, **torchless.environment | {"MIN_TMP_GIB": "two"})
    assert done.returncode == 2
    assert "MIN_TMP_GIB='two'" in done.stderr


# GPUs


def test_good_gpus_are_given_to_the_self_test(gpu_node):
    """Good by nvidia-smi; the self-test, which has no torch here, is started on each."""
    gpu_node.gpus(GOOD_GPU, GOOD_GPU)
    code, found, _ = gpu_node.check()
    assert (found["GPUs"]["level"], found["driver"]["detail"]) == ("ok", "570.86.15")
    assert found["GPUs"]["detail"] == "2 × NVIDIA H100 80GB HBM3, up to 31 °C"
    assert code == 1
    for gpu in ("GPU 0", "GPU 1"):
        assert f"{gpu}: kernels.selftest: exit code 1: ImportError" in found["kernels"]["detail"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({3: "7"}, "GPU 1: 7 uncorrected ECC errors"),
        ({4: "210", 8: "0x48"}, "slowed down to 210 of 1980 MHz (hardware slowdown, hardware thermal slowdown)"),
        ({6: "91"}, "GPU 1: 91 °C while idle"),
        ({7: "70000"}, "GPU 1: 70000 MiB in use"),
        ({3: "[GPU requires reset]"}, "GPU 1: nvidia-smi reads [GPU requires reset]"),
    ],
)
def test_bad_gpu_is_told(gpu_node, fields, problem):
    values = GOOD_GPU.split(", ")
    for place, value in fields.items():
        values[place] = value
    gpu_node.gpus(GOOD_GPU, ", ".join(values))
    code, found, _ = gpu_node.check()
    assert code == 1
    assert problem in found["GPUs"]["detail"]
    assert "GPU 0" not in found["GPUs"]["detail"]
    assert found["kernels"]["level"] == "warning"  # nothing is run on it


def test_missing_gpu_and_figures_that_are_not_counted(gpu_node):
    gpu_node.gpus(GOOD_GPU.replace(", 0, 345, 1980, 31", ", [N/A], [Not Supported], 1980, N/A"))
    _, found, _ = gpu_node.check()
    assert found["GPUs"]["detail"] == "1 visible, needs 2"


def test_older_driver_is_asked_by_the_older_name(gpu_node):
    line = GOOD_GPU.format(n=0)
    newer = "*event_reasons*) echo 'Field \"clocks_event_reasons.active\" is not a valid field to query.'; exit 2;;"
    gpu_node.command("nvidia-smi", f"#!/bin/sh\ncase $1 in {newer} *) echo '{line}';; esac\n")
    _, found, _ = gpu_node.check(gpus=1)
    assert found["GPUs"]["level"] == "ok"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sleep 600 & wait", "0 visible, needs 2: nvidia-smi: no answer in 1 s"),
        ("echo 'no driver' >&2; exit 9", "0 visible, needs 2: nvidia-smi: exit code 9: no driver"),
        ("echo one, two", "nvidia-smi: cannot read 'one, two'"),
    ],
)
def test_nvidia_smi_that_does_not_answer(gpu_node, text, problem):
    gpu_node.command("nvidia-smi", f"#!/bin/sh\n{text}\n")
    code, found, _ = gpu_node.check(NVIDIA_SMI_SECONDS="1")
    assert code == 1
    assert problem in found["GPUs"]["detail"]


# The nodes' reports


def write_report(folder: Path, node: str, **details: str) -> None:
    """`check="detail"` must be the same on all nodes; `disk="bad…"` is bad by itself."""
    found = [
        {"check": check, "level": "bad" if text.startswith("bad") else "ok", "detail": text, "same": check != "disk"}
        for check, text in details.items()
    ]
    (folder / f"{node}.json").write_bytes(orjson.dumps({"node": node, "seconds": 3.0, "findings": found}))


def test_report_of_good_nodes(tmp_path):
    for node in ("gpu001", "gpu002"):
        write_report(tmp_path, node, driver="570", disk="ok")
    done = preflight("report", tmp_path, "--expect", "gpu001,gpu002")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines == [["node", "driver", "disk", "seconds"], *([n, "ok", "ok", "3"] for n in ("gpu001", "gpu002"))]


def test_report_names_the_bad_the_silent_and_the_different(tmp_path):
    for node in ("gpu001", "gpu002", "gpu003", "gpu006"):
        write_report(tmp_path, node, code="abc", driver="570", disk="ok")
    write_report(tmp_path, "gpu004", code="def", driver="570", disk="ok")
    write_report(tmp_path, "gpu005", code="abc", driver="570", disk="bad: full [/]")
    (tmp_path / "gpu006.json").write_text('{"node": "gpu006", "sec')  # killed while it wrote
    done = preflight("report", tmp_path, "--expect", ",".join(f"gpu00{n}" for n in range(1, 8)))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "bad nodes: gpu004,gpu005,gpu006,gpu007"
    assert "gpu004: code: def; the other nodes have abc" in done.stdout
    assert "gpu005: disk: bad: full [/]" in done.stdout
    assert "gpu007: report: no report" in done.stdout


@pytest.mark.parametrize(
    ("first", "second", "bad"),
    [("abc", "def", "gpu002"), ("data.train missing", "data.train abc", "gpu001")],
)
def test_of_two_different_nodes_the_first_is_right_unless_it_misses_something(tmp_path, first, second, bad):
    write_report(tmp_path, "gpu001", data=first)
    write_report(tmp_path, "gpu002", data=second)
    done = preflight("report", tmp_path, "--expect", "gpu001,gpu002")
    assert done.stdout.splitlines()[-1] == f"bad nodes: {bad}"


def test_report_of_no_nodes_is_refused(tmp_path):
    done = preflight("report", tmp_path, "--expect", "")
    assert (done.returncode, "--expect names no node" in done.stderr) == (2, True)


# All nodes together


def fabric(folder: Path, *launcher: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    report = folder / "fabric.json"
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "launch.preflight", "fabric", "--report", str(report)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "SLURMD_NODENAME": "gpu001"} | environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert report.exists(), done.stderr
    return done, orjson.loads(report.read_bytes())


def test_fabric_of_two_processes(tmp_path):
    done, report = fabric(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert done.returncode == 0, done.stderr
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert all(rank["matmul_tflops"] > 0 and rank["inside_gb_s"] > 0 for rank in report["ranks"])
    assert all(rank["across_gb_s"] is None and rank["wrong"] == [] for rank in report["ranks"])
    assert "floors: no TFLOP/s, no GB/s" in done.stdout
    assert done.stdout.count("slowest") >= 2
    assert "bad nodes" not in done.stdout


def test_fabric_below_a_floor_names_the_node_here_and_in_the_report(tmp_path):
    done, _ = fabric(tmp_path, MIN_MATMUL_TFLOPS="1e6")
    assert done.returncode == 1
    assert "rank 0: " in done.stdout and "needs 1e+06 (MIN_MATMUL_TFLOPS)" in done.stdout
    assert done.stdout.splitlines()[-1] == "bad nodes: gpu001"
    write_report(tmp_path, "gpu001", driver="570")
    write_report(tmp_path, "gpu002", driver="570")
    done = preflight("report", tmp_path, "--expect", "gpu001,gpu002")
    assert done.stdout.splitlines()[-1] == "bad nodes: gpu001"


def test_fabric_across_two_nodes(tmp_path):
    """Two processes, each a node of its own: the sum across them is below the floor, and neither is to blame alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "MIN_ALLREDUCE_GB_S": "1e6"}
    nodes = [
        world | {"RANK": str(n), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": f"gpu00{n + 1}"}
        for n in range(2)
    ]
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda node: preflight("fabric", "--report", tmp_path / "fabric.json", **node), nodes)
    assert first.stdout, first.stderr
    assert first.returncode == second.returncode == 1
    assert first.stdout.splitlines()[-1] == "bad nodes: gpu001,gpu002"
    assert second.stdout == ""
    assert "gpu002: rank 1: " in first.stdout and "GB/s across nodes, needs 1e+06" in first.stdout
    report = orjson.loads((tmp_path / "fabric.json").read_bytes())
    assert all(rank["inside_gb_s"] is None and rank["across_gb_s"] > 0 for rank in report["ranks"])
