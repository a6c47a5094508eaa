"""The inside of the sandbox: started as a script by `pedyra.app.tasks.sandbox`, standard library only.

Four processes: this one (the keeper) makes the namespaces and holds the clock, where nothing inside can reach it; a
helper maps the user and is gone; process 1 of the new namespace waits; its child runs the source. When process 1 ends
the kernel ends everything in the namespace, and the mounts go with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
from typing import Any, NoReturn

TIMED_OUT, REFUSED = 124, 125
"""Exit codes: the clock ran out; the sandbox could not be set up (the reason is one line on stderr)."""

SCRATCH = "/scratch"
_NOBODY = 65534
_ENVIRONMENT = {
    "HOME": SCRATCH,
    "TMPDIR": SCRATCH,
    "PATH": "",
    "LANG": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
_libc = ctypes.CDLL(None, use_errno=True)

# linux/sched.h
_NEW_MOUNTS, _NEW_UTS, _NEW_IPC = 0x20000, 0x4000000, 0x8000000
_NEW_USER, _NEW_PIDS, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_ANY_NAMESPACE = 0x7E020000
# linux/mount.h
_BIND, _RECURSIVE, _PRIVATE, _NO_SUID, _NO_DEVICES = 0x1000, 0x4000, 0x40000, 2, 4
_READ_ONLY, _NO_EXECUTION = 1, 8
_MOUNT_SETATTR, _AT_RECURSIVE, _AT_FDCWD, _DETACH = 442, 0x8000, -100, 2
# linux/prctl.h
_PARENT_DEATH_SIGNAL, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVILEGES = 1, 4, 22, 38
# System calls that a solution has no use for, and that reach past its limits: other processes' memory, namespaces and
# mounts, every socket, memory that no limit counts (System V, memfd), kernel subsystems with a history of holes.
# machine -> (audit architecture, pivot_root, clone, the denied ones); clone3 (435) is "not there", so libc uses clone.
_MACHINES = {
    "x86_64": (
        0xC000003E,
        155,
        56,
        # ptrace process_vm_readv process_vm_writev, mount umount2 pivot_root chroot unshare setns, socket,
        # shmget shmat msgget semget memfd_create memfd_secret, bpf userfaultfd perf_event_open io_uring_setup,
        # keyctl add_key request_key, open_by_handle_at fanotify_init, open_tree move_mount fsopen mount_setattr
        (101, 310, 311, 165, 166, 155, 161, 272, 308, 41, 29, 30, 68, 64, 319, 447, 321, 323, 298, 425)
        + (250, 248, 249, 304, 300, 428, 429, 430, 442),
    ),
    "aarch64": (
        0xC00000B7,
        41,
        220,
        (117, 270, 271, 40, 39, 41, 51, 97, 268, 198, 194, 196, 186, 190, 279, 447, 280, 282, 241, 425)
        + (219, 217, 218, 265, 262, 428, 429, 430, 442),
    ),
}
_CLONE3, _NO_SUCH_CALL, _NOT_PERMITTED, _X32 = 435, 38, 1, 0x40000000


class _Refusal(Exception):
    pass


def _call(what: str, result: int) -> None:
    if result != 0:
        raise _Refusal(f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    arguments = [part.encode() if part is not None else None for part in (source, target, kind)]
    _call(f"mount {target}", _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode()))


def _restrict(path: str, flags: int, recursive: bool = True) -> None:
    """Read-only and the like, for a mount and those below it (Linux 5.12)."""
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)
    depth = _AT_RECURSIVE if recursive else 0
    result = _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), depth, attributes, len(attributes))
    _call(f"mount_setattr {path} (Linux 5.12 or newer)", result)


def _stranger(kind: str) -> int:
    """A user (group) that owns nothing and runs nothing: RLIMIT_NPROC does not hold root, and counts by user."""
    wanted = (1 << 30) + os.getpid()
    with open(f"/proc/self/{kind}_map") as file:
        extents = [tuple(map(int, line.split())) for line in file]
    return wanted if any(first <= wanted < first + count for first, _, count in extents) else _NOBODY


def _new_namespaces() -> None:
    """Leave every namespace of the host; inside, root maps to root and nobody to a stranger, or nobody to the user."""
    keeper, maps = os.getpid(), {}
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        root = os.geteuid() == 0
        maps[kind] = f"0 {own} 1\n{_NOBODY} {_stranger(kind)} 1\n" if root else f"{_NOBODY} {own} 1\n"
    ready, go = os.pipe()
    helper = os.fork()
    if helper == 0:  # the maps are written from outside, with the rights that the keeper is about to lose
        code = 1
        try:
            os.close(go)
            if os.read(ready, 1):
                if os.geteuid() != 0:
                    _write(f"/proc/{keeper}/setgroups", "deny")
                for kind in ("gid", "uid"):
                    _write(f"/proc/{keeper}/{kind}_map", maps[kind])
                code = 0
        except OSError as error:
            code = error.errno or 1
        os._exit(code)
    os.close(ready)
    flags = _NEW_USER | _NEW_MOUNTS | _NEW_PIDS | _NEW_NET | _NEW_IPC | _NEW_UTS
    result = _libc.unshare(flags)
    reason = os.strerror(ctypes.get_errno())
    if result == 0:
        os.write(go, b"x")
    os.close(go)
    status = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if result != 0:
        raise _Refusal(f"this system gives no namespaces (unshare: {reason})")
    if status != 0:
        raise _Refusal(f"no user can be mapped ({os.strerror(status)})")


def _write(path: str, text: str) -> None:
    file = os.open(path, os.O_WRONLY)
    os.write(file, text.encode())
    os.close(file)


def _new_root(plan: dict[str, Any]) -> None:
    """A root of its own: the interpreter's libraries read-only, four devices, a scratch folder in memory, no /proc."""
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NO_SUID | _NO_DEVICES, "size=1m,nr_inodes=512,mode=755")
    os.mkdir("/tmp/old")
    os.chdir("/tmp")
    pivot = _MACHINES[platform.machine()][1]
    _call("pivot_root", _libc.syscall(pivot, b".", b"old"))
    os.chdir("/")
    _write("/old/proc/self/oom_score_adj", "1000")  # where memory ends, this ends first
    for path in plan["links"]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(os.readlink("/old" + path), path)
    for source, target in plan["visible"]:
        _bind(source, target)
        _restrict(target, _READ_ONLY | _NO_SUID | _NO_DEVICES)
    for path in plan["hidden"]:
        _mount("tmpfs", path, "tmpfs", _NO_SUID | _NO_DEVICES, "size=4k,nr_inodes=2,mode=755")
        _restrict(path, _READ_ONLY)
    for name in ("null", "zero", "random", "urandom"):
        _bind(f"/dev/{name}", f"/dev/{name}")
        _restrict(f"/dev/{name}", _READ_ONLY | _NO_SUID | _NO_EXECUTION)
    os.mkdir(SCRATCH)
    room = f"size={plan['scratch']},nr_inodes={plan['scratch_files']},mode=777"
    _mount("tmpfs", SCRATCH, "tmpfs", _NO_SUID | _NO_DEVICES, room)
    _call("umount of the old root", _libc.umount2(b"/old", _DETACH))
    os.rmdir("/old")
    _restrict("/", _READ_ONLY | _NO_SUID | _NO_DEVICES, recursive=False)


def _bind(source: str, target: str) -> None:
    if os.path.isdir("/old" + source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount("/old" + source, target, None, _BIND | _RECURSIVE)


def _drop_rights() -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _call("capset", _libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", *[0] * 6)))
    _call("no_new_privs", _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _call("not dumpable", _libc.prctl(_DUMPABLE, 0, 0, 0, 0))
    _call("death with the keeper", _libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))


def _set_limits(plan: dict[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (plan["cpu_seconds"], plan["cpu_seconds"] + 1))  # SIGXCPU, then SIGKILL
    for limit, value in (
        (resource.RLIMIT_AS, plan["memory"]),
        (resource.RLIMIT_FSIZE, plan["file_size"]),
        (resource.RLIMIT_NPROC, plan["processes"] + plan["own_processes"]),
        (resource.RLIMIT_NOFILE, plan["open_files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _filter_calls() -> None:
    """A seccomp filter (classic BPF) for this process and all that it starts."""
    architecture, _, clone, denied = _MACHINES[platform.machine()]
    load, equal, least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x50000
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(least, 0, 1, _X32), (give, 0, 0, error | _NOT_PERMITTED)]
    steps += [(equal, 0, 1, _CLONE3), (give, 0, 0, error | _NO_SUCH_CALL)]
    for number in denied:
        steps += [(equal, 0, 1, number), (give, 0, 0, error | _NOT_PERMITTED)]
    steps += [(equal, 0, 3, clone), (load, 0, 0, 16), (bits, 0, 1, _ANY_NAMESPACE)]
    steps += [(give, 0, 0, error | _NOT_PERMITTED), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    _call("seccomp", _libc.prctl(_SECCOMP, 2, ctypes.byref(program), 0, 0))


def _run(plan: dict[str, Any]) -> NoReturn:
    """The source, in this process, with everything dropped. Exit code 0 unless it raised."""
    os.chdir(SCRATCH)
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    sys.path.append(plan["packages"])
    sys.argv = [""]
    _set_limits(plan)
    _filter_calls()
    _silence()
    code = 1
    try:
        exec(compile(plan["source"], "<sandbox>", "exec"), {"__name__": "__sandbox__"})
        sys.stdout.flush()
        code = 0
    finally:
        os._exit(code)


def _silence() -> None:
    """From here on nothing can be written where refusals are read."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _close(fds: list[int]) -> None:
    for fd in (0, 1, *fds):
        os.close(fd)


def _first_process(plan: dict[str, Any]) -> NoReturn:
    _drop_rights()
    worker = os.fork()
    if worker == 0:
        _run(plan)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # with no handler, process 1 is deaf to all inside
    _close(plan["keep"])
    _silence()
    while True:  # orphans are process 1's to reap
        ended, status = os.wait()
        if ended == worker:
            signalled = os.WIFSIGNALED(status)
            os._exit(TIMED_OUT if signalled and os.WTERMSIG(status) == signal.SIGXCPU else int(status != 0))


def main() -> int:
    """Set up, run, and wait no longer than the plan's seconds."""
    plan = json.loads(sys.argv[1])
    plan["own_processes"] = 1 if os.geteuid() == 0 else 2  # process 1 and, where it is the same user, the keeper
    _libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    try:
        if platform.machine() not in _MACHINES:
            raise _Refusal(f"no system call filter for {platform.machine()}, only for {', '.join(_MACHINES)}")
        _new_namespaces()
        _new_root(plan)
        first = os.fork()
        if first == 0:
            _first_process(plan)
    except (_Refusal, OSError) as error:
        os.write(2, str(error).encode())
        return REFUSED
    _close(plan["keep"])
    signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))  # `Popen.terminate`: no more is needed
    poll = select.poll()
    poll.register(os.pidfd_open(first), select.POLLIN)
    in_time = poll.poll(plan["seconds"] * 1000)
    os.kill(first, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    return abs(status) if in_time else TIMED_OUT


if __name__ == "__main__":
    sys.exit(main())
