"""A SLURM of several nodes on this one host, for tests: loopback only, no systemd, no cgroups.

One munged, one slurmctld and a slurmd for each node run out of a temporary folder. Each node has
character devices that stand in for GPUs. The nodes' names resolve through lines in /etc/hosts, as a
job's MASTER_ADDR must; a session takes out its own lines, and those of sessions that died.
"""

import contextlib
import fcntl
import os
import random
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel", "setpriv")
HOSTS = Path("/etc/hosts")
# Variables of another cluster, or settings of the user's, that must not reach a test.
FOREIGN = ("SLURM", "SBATCH", "SRUN", "CLUSTER_", "CHERRY", "DRY_RUN")

CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# cred_expire is also how long a requeued job waits before it may start again; 5 is the least.
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# As many CPUs as the test says, whatever this host has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
# How long a node may be silent before its jobs are requeued.
SlurmdTimeout=20
InactiveLimit=0
# A test does not wait for the next scheduling round.
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """A SLURM cannot be brought up here; the text says why."""


class Cluster:
    """The running cluster.

    Attributes:
        nodes: names of its nodes.
        env: this process's environment with SLURM's clients pointed at the cluster.
    """

    def __init__(self, nodes: int = 2, cpus: int = 2, gpus: int = 2) -> None:
        """Bring it up; `stop()` ends it.

        Raises:
            Unavailable: if SLURM is not installed, or this user may not run it.
        """
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise Unavailable(f"not installed: {', '.join(missing)} (make test-deps)")
        if os.geteuid() != 0:
            raise Unavailable("needs root")
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.nodes = [f"cherry{os.getpid()}n{i}" for i in range(1, nodes + 1)]
        self._root = Path(tempfile.mkdtemp(prefix="cherry-slurm-"))
        self._mark = f"# cherry-slurm-test {os.getpid()} {self._root.name}"  # a session may have several clusters
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)},
            "SLURM_CONF": str(self._root / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        try:
            self._configure(cpus, gpus)
            self._resolve_nodes()
            self._start()
        except BaseException:
            self.stop()
            raise

    def call(self, *command: str, timeout: float = 30) -> str:
        """Output of a client such as `squeue`. Without its controller a client would wait for minutes."""
        done = subprocess.run(command, env=self.env, timeout=timeout, check=True, capture_output=True, text=True)
        return done.stdout

    def state(self, job: str) -> str:
        """A job's state such as RUNNING, or nothing when the controller does not answer just now."""
        with contextlib.suppress(subprocess.SubprocessError):
            found = re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))
            return found[1] if found else ""
        return ""

    def kill_node(self, name: str, all_of_it: bool) -> None:
        """End a node's slurmd with SIGKILL; or all that the node runs, as a power failure does."""
        (daemon,) = (daemon for daemon in self._daemons if str(daemon.args).endswith(f"'{name}']"))
        daemon.kill()
        daemon.wait()
        log = str(self._root / f"slurmd.{name}.log")  # which daemons of steps have open
        for pid in self._left_over() if all_of_it else ():
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                opened = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
                if f"SLURMD_NODENAME={name}".encode() in environment or log in opened:
                    os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the jobs and the daemons that were started here, and take back what was changed."""
        with contextlib.suppress(subprocess.SubprocessError):  # the daemons are ended all the same
            if len(self._daemons) > 1:
                self.call("scancel", f"--user={os.geteuid()}", timeout=5)
                _wait(lambda: not self.call("squeue", "-h", timeout=5), 8)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        for pid in self._left_over():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._mark in HOSTS.read_text(encoding="utf-8"):
            _edit_hosts(drop=self._mark)
        shutil.rmtree(self._root, ignore_errors=True)

    def _left_over(self) -> list[int]:
        """What its daemons and jobs left running: whoever was given its slurm.conf, which is a file of its own."""
        mark = f"SLURM_CONF={self.env['SLURM_CONF']}".encode()
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if mark in environment.read_bytes().split(b"\0"):
                    found.append(int(environment.parent.name))
        return found

    def _configure(self, cpus: int, gpus: int) -> None:
        root = self._root
        root.chmod(0o755)  # munge wants its socket in a folder that all may enter
        (root / "state").mkdir()
        for gpu in range(gpus):
            try:
                # slurmd wants character devices: these are /dev/null by other names.
                os.mknod(root / f"gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            except PermissionError:
                raise Unavailable("may not make device files") from None
        host = socket.gethostname().partition(".")[0]
        port, *ports = _free_ports(1 + len(self.nodes))
        lines, gres = [], []
        for name, own in zip(self.nodes, ports, strict=True):
            (root / f"spool.{name}").mkdir()
            lines.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={own} "
                f"CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus}"
            )
            gres.append(f"NodeName={name} Name=gpu Count={gpus} File={root}/gpu[0-{gpus - 1}]\n")
        (root / "gres.conf").write_text("".join(gres))
        conf = CONF.format(host=host, port=port, root=root, nodes="\n".join(lines))
        (root / "slurm.conf").write_text(conf)
        (root / "munge.key").write_bytes(secrets.token_bytes(128))
        (root / "munge.key").chmod(0o400)

    def _resolve_nodes(self) -> None:
        try:
            _edit_hosts(add=[f"127.0.0.1 {name} {self._mark}" for name in self.nodes])
        except OSError as error:
            raise Unavailable(f"cannot write {HOSTS}: {error.strerror}") from None

    def _start(self) -> None:
        root = self._root
        self._spawn(
            "munged", "--foreground", "--force", f"--key-file={root}/munge.key", f"--socket={root}/munge.socket",
            f"--pid-file={root}/munged.pid", f"--seed-file={root}/munge.seed", f"--log-file={root}/munged.log",
        )  # fmt: skip
        if not _wait((root / "munge.socket").exists, 10):
            raise RuntimeError(f"munged did not start:\n{self._logs()}")
        self._spawn("slurmctld", "-D", "-c")
        for name in self.nodes:
            self._spawn("slurmd", "-D", "-N", name)

        def idle() -> bool:
            try:
                states = self.call("sinfo", "-h", "-N", "-o", "%t", timeout=5).split()
            except subprocess.SubprocessError:
                return False
            return states == ["idle"] * len(self.nodes)

        if not _wait(idle, 60):
            raise RuntimeError(f"the cluster did not come up:\n{self._logs()}")

    def _spawn(self, *command: str) -> None:
        """Start a daemon in the foreground of a session of its own; it does not outlive this process."""
        with (self._root / f"{command[0]}.out").open("ab") as out:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _logs(self) -> str:
        files = sorted(self._root.glob("*.out")) + sorted(self._root.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-1500:]}" for file in files)


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _free_ports(count: int) -> list[int]:
    """Ports below those that the kernel gives to outgoing connections, which might take one before its daemon."""
    found: list[int] = []
    for port in random.sample(range(30000, 32768), 200):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def _edit_hosts(add: Sequence[str] = (), drop: str | None = None) -> None:
    """Add lines, and drop those that end in `drop` or were left by a session that is no more.

    The file is rewritten in place: in a container it often is a mount of its own.
    """
    with HOSTS.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        kept = [line for line in file.read().splitlines() if not _is_stale(line, drop)]
        file.seek(0)
        file.write("".join(f"{line}\n" for line in [*kept, *add]))
        file.truncate()


def _is_stale(line: str, drop: str | None) -> bool:
    found = re.search(r"# cherry-slurm-test (\d+) \S+$", line)
    return bool(found) and (found[0] == drop or not Path("/proc", found[1]).exists())
