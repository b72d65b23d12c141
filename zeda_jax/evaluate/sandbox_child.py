"""Runs one untrusted program under limits. Executed as a script in a process of its own; standard library only.

    python -I sandbox_child.py SPECIFICATION

SPECIFICATION is a file with a JSON object: see `zeda_jax.evaluate.sandbox`, which writes it. What
keeps the program in, in the order in which it is put on; each is noted where the kernel grants it:

  limits      CPU seconds, address space, size of a file, open files (setrlimit)
  mounts      user, mount, network and IPC namespaces: everything read-only but the working directory, a small tmpfs
  landlock    reading only Python and the system's libraries, writing only the working directory, no TCP, no signals out
  seccomp     no processes, no sockets, no signals to others, no tracing, no mounts

The file of results gets "ready LAYERS" before the program starts, and the token of the specification after it ended
well.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import traceback
import types

UNCONTAINED = 97  # exit status: a layer that was asked for is not to be had here
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc", "/proc", "/sys/devices/system/cpu")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

_MACHINES: dict[str, dict] = {
  "x86_64": {
    "arch": 0xC000003E,
    "clone": 56,
    "kill": (62, 234),
    "denied": (
      *(57, 58, 200, 129, 297, 434, 424, 101, 310, 311, 41, 42, 49, 272, 308, 165, 166, 155, 428, 429),
      *(430, 431, 432, 442, 248, 249, 250, 321, 298, 425, 323),
    ),
  },
  "aarch64": {
    "arch": 0xC00000B7,
    "clone": 220,
    "kill": (129, 131),
    "denied": (
      *(130, 138, 240, 434, 424, 117, 270, 271, 198, 203, 200, 97, 268, 40, 39, 41, 428, 429),
      *(430, 431, 432, 442, 217, 218, 219, 280, 241, 425, 282),
    ),
  },
}  # denied: fork, vfork, tkill, rt_(tg)sigqueueinfo, pidfd_open, pidfd_send_signal, ptrace, process_vm_readv/writev,
# socket, connect, bind, unshare, setns, mount, umount2, pivot_root, open_tree, move_mount, fsopen, fsconfig, fsmount,
# mount_setattr, add_key, request_key, keyctl, bpf, perf_event_open, io_uring_setup, userfaultfd
_CLONE3 = 435
_EPERM, _ENOSYS = 1, 38


def _set_limits(limits):
  def limit(kind, soft, hard=None):
    most = resource.getrlimit(kind)[1]
    soft, hard = (value if most == resource.RLIM_INFINITY else min(value, most) for value in (soft, hard or soft))
    resource.setrlimit(kind, (soft, hard))

  limit(resource.RLIMIT_CORE, 0)
  limit(resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1)
  limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
  limit(resource.RLIMIT_NOFILE, limits["open_files"])
  if platform.system() == "Linux":  # macOS refuses it
    limit(resource.RLIMIT_AS, limits["memory_bytes"])


def _limit_processes():
  """Where seccomp cannot forbid them: counted for the whole user, and not enforced for root."""
  resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))


def _isolate(libc, directory, disk_bytes):
  """New namespaces; all mounts read-only, a tmpfs on the working directory."""
  uid, gid = os.getuid(), os.getgid()
  new_user, new_mounts, new_network, new_ipc = 0x10000000, 0x20000, 0x40000000, 0x08000000
  if libc.unshare(new_user | new_mounts | new_network | new_ipc):
    return False
  for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
    with open(f"/proc/self/{name}", "w") as file:
      file.write(text)
  private, recursive = 1 << 18, 1 << 14
  if libc.mount(b"none", b"/", None, private | recursive, None):
    return False
  read_only = struct.pack("QQQQ", 1, 0, 0, 0)
  if libc.syscall(442, -100, b"/", 0x8000, read_only, 32):  # mount_setattr, AT_RECURSIVE
    return False
  no_suid_dev = 2 | 4
  return not libc.mount(b"tmpfs", directory.encode(), b"tmpfs", no_suid_dev, f"size={disk_bytes},mode=700".encode())


def _lock_files(libc, directory):
  """Landlock: which files may be read and written. Its system calls have the same numbers on all machines."""
  version = libc.syscall(444, None, 0, 1)
  if version < 1:
    return False
  rights = (1 << (13 + (version >= 2) + (version >= 3))) - 1  # execute, write, read, ..., refer, truncate
  attributes = [rights]
  if version >= 4:
    attributes.append(3)  # TCP bind and connect
  if version >= 6:
    attributes.append(3)  # abstract sockets and signals of others
  ruleset = libc.syscall(444, struct.pack("Q" * len(attributes), *attributes), 8 * len(attributes), 0)
  if ruleset < 0:
    return False
  on_file, reading, writing = 1 | 2 | 4 | (rights & 1 << 14), 1 | 4 | 8, 2 | 4 | (rights & 1 << 14)
  rules = [(directory, rights), *((path, writing) for path in _DEVICES)]
  rules += [(path, reading) for path in {*_SYSTEM, sys.prefix, sys.base_prefix}]
  for path, allowed in rules:
    try:
      file = os.open(path, os.O_PATH)
    except OSError:
      continue
    if not os.path.isdir(path):
      allowed &= on_file
    failed = libc.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, file), 0)
    os.close(file)
    if failed:
      return False
  done = not libc.syscall(446, ruleset, 0)
  os.close(ruleset)
  return done


def _filter_calls(libc):
  """seccomp: system calls that a program that computes does not need."""
  machine = _MACHINES.get(platform.machine())
  if machine is None:
    return False
  load, equal, above, has_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
  allow, refuse, die = 0x7FFF0000, 0x00050000, 0x80000000
  number, arch, first_argument = 0, 4, 16
  code = [(load, 0, 0, arch), (equal, 1, 0, machine["arch"]), (answer, 0, 0, die), (load, 0, 0, number)]
  if platform.machine() == "x86_64":
    code += [(above, 0, 1, 0x40000000), (answer, 0, 0, die)]
  for call in machine["denied"]:
    code += [(equal, 0, 1, call), (answer, 0, 0, refuse | _EPERM)]
  code += [(equal, 0, 1, _CLONE3), (answer, 0, 0, refuse | _ENOSYS)]  # libc falls back to clone
  thread = 0x10000
  own = ((machine["clone"], has_bits, thread), *((call, equal, os.getpid()) for call in machine["kill"]))
  for call, test, value in own:
    code += [(equal, 0, 4, call), (load, 0, 0, first_argument), (test, 1, 0, value)]
    code += [(answer, 0, 0, refuse | _EPERM), (answer, 0, 0, allow)]
  code.append((answer, 0, 0, allow))
  packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
  program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(packed))
  return not libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _contain(specification):
  """Puts the layers on; which of them are."""
  directory, layers = specification["directory"], []
  _set_limits(specification["limits"])
  if platform.system() == "Linux":
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = specification["layers"]
    if "mounts" in wanted and _isolate(libc, directory, specification["limits"]["disk_bytes"]):
      layers.append("mounts")
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if "landlock" in wanted and _lock_files(libc, directory):
      layers.append("landlock")
    if "seccomp" in wanted and _filter_calls(libc):
      layers.append("seccomp")
  if "seccomp" not in layers:
    _limit_processes()
  os.chdir(directory)
  return layers


def main():
  with open(sys.argv[1], encoding="utf-8") as file:
    specification = json.load(file)
  results = specification["results"]
  with open(specification["program"], encoding="utf-8") as file:
    source = file.read()
  layers = _contain(specification)
  # Files and other processes are out of reach by either of two layers for the files, and by seccomp for the rest.
  contained = "seccomp" in layers and ("mounts" in layers or "landlock" in layers)
  os.write(results, f"ready {','.join(layers)}\n".encode())
  if not (contained or specification["allow_weak"]):
    os._exit(UNCONTAINED)
  module = types.ModuleType("__main__")
  module.__dict__["RESULTS"] = results
  sys.modules["__main__"], sys.argv = module, ["solution.py"]
  status = 0
  try:
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    os.write(results, specification["token"].encode())
  except SystemExit as error:
    status = error.code if isinstance(error.code, int) else int(error.code is not None)
  except BaseException:
    status = 1
    try:
      traceback.print_exc()
    except BaseException:
      status = 2
  try:
    sys.stdout.flush()
    sys.stderr.flush()
  finally:
    os._exit(status & 0xFF)


if __name__ == "__main__":
  main()
