# SPDX-License-Identifier: Apache-2.0
"""The agent in one file, and how it installs itself."""

import ast
import configparser
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
from typing import Any
import zipfile

import pytest

from nova_snowflock import guest
from nova_snowflock.guest import bundle
from nova_snowflock.guest import bundled
from nova_snowflock.guest import settings as guest_settings
from tests.unit.guest import agents

SOURCES = pathlib.Path(guest.__file__).parent
PYZ = "usr/local/lib/snowflock/snowflock-guest.pyz"

# Neither the checkout nor its virtual environment: what is found is found in the bundle.
PYTHON = [os.path.realpath(sys.executable), "-I"]


def run(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [str(argument) for argument in arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("bundle") / "snowflock-guest.pyz"
    run(sys.executable, "-m", bundle.__name__, path, check=True)
    return path


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


def test_it_has_everything(pyz: pathlib.Path) -> None:
    names = zipfile.ZipFile(pyz).namelist()
    assert names == sorted(names)
    modules = {f"nova_snowflock/guest/{path.name}" for path in SOURCES.glob("*.py")}
    files = {
        f"nova_snowflock/guest/{directory}/{path.name}"
        for directory in ("files", "bindings")
        for path in (SOURCES / directory).iterdir()
    }
    assert set(names) == {"__main__.py", "nova_snowflock/__init__.py"} | modules | files
    assert files == {f"nova_snowflock/guest/{name}" for name in bundled._FILES}
    assert os.access(pyz, os.X_OK)


def test_same_sources_same_bytes(pyz: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "nova_snowflock"
    shutil.copytree(SOURCES, copy / "guest")
    shutil.copy(SOURCES.parent / "__init__.py", copy)
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    other = tmp_path / "other.pyz"
    run(sys.executable, "-m", bundle.__name__, other, check=True, cwd=tmp_path, umask=0o077)
    assert other.read_bytes() == pyz.read_bytes() == bundle.build()
    (copy / "guest" / "workers.py").write_text("# not the same\n")
    run(sys.executable, "-m", bundle.__name__, other, check=True, cwd=tmp_path)
    assert other.read_bytes() != pyz.read_bytes()


def test_where_nothing_can_be_written() -> None:
    made = run(sys.executable, "-m", bundle.__name__, "/no/such/directory/x.pyz")
    assert made.returncode == 1
    assert "/no/such/directory" in made.stderr
    assert "Traceback" not in made.stderr


def test_old_pythons_understand_it() -> None:
    """At least what it is written in."""
    for path in SOURCES.glob("*.py"):
        ast.parse(path.read_text(), str(path), feature_version=(3, 9))


def test_it_is_an_executable(pyz: pathlib.Path, tmp_path: pathlib.Path) -> None:
    agent = agents.Agent(tmp_path / "guest.sock")
    agent.answers["request_ticket"] = {"ticket": "t", "n": 2}
    environment = {**os.environ, "SNOWFLOCK_SOCKET": agent.path}
    called = run(pyz, "call", "request-ticket", "3", env=environment, check=True, cwd="/")
    assert called.stdout == "t 2\n"
    assert agent.calls == [("request_ticket", {"n": 3})]
    agent.answers["request_ticket"] = agents.Refusal("busy")
    assert run(pyz, "call", "request-ticket", "3", env=environment).returncode == 6
    agent.close()


def test_without_arguments_it_is_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Agent:
        @staticmethod
        def main() -> int:
            started.append(sys.argv)
            return 7

    monkeypatch.setitem(sys.modules, "nova_snowflock.guest.__main__", Agent)
    monkeypatch.setattr(guest, "__main__", Agent, raising=False)
    for arguments in ([], ["--option"]):
        monkeypatch.setattr(sys, "argv", ["snowflock-guest", *arguments])
        assert bundled.main() == 7
    assert started == [["snowflock-guest"], ["snowflock-guest", "--option"]]


def install(pyz: pathlib.Path, root: pathlib.Path) -> str:
    return run(*PYTHON, pyz, "install", "--root", root, check=True, cwd="/", umask=0o077).stdout


def modes(root: pathlib.Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): stat.S_IMODE(path.lstat().st_mode)
        for path in root.rglob("*")
        if not path.is_symlink()
    }


def test_install(pyz: pathlib.Path, root: pathlib.Path) -> None:
    site = root / "usr/lib/python3.9/site-packages"
    site.mkdir(parents=True)
    before = modes(root)
    shown = install(pyz, root)
    assert "neither systemd nor OpenRC" in shown
    assert (root / PYZ).read_bytes() == pyz.read_bytes()
    for name in ("snowflock-guest", "snowflock"):
        assert f"/{PYZ}" in (root / "usr/local/bin" / name).read_text()
    assert (site / "snowflock-guest.pth").read_text() == f"/{PYZ}\n"
    shared = root / "usr/local/share/snowflock"
    assert {path.name for path in shared.iterdir()} >= {"snowflock.h", "snowflock.c", "example.c"}
    assert (shared / "snowflock.h").read_bytes() == (SOURCES / "bindings/snowflock.h").read_bytes()
    for hook in ("prefork", "clone", "parent"):
        assert (root / f"etc/snowflock/{hook}.d").is_dir()
    made = {name: mode for name, mode in modes(root).items() if name not in before}
    executables = {PYZ, "usr/local/bin/snowflock", "usr/local/bin/snowflock-guest"}
    for name, mode in made.items():
        directory = (root / name).is_dir()
        assert mode == (0o755 if directory or name in executables else 0o644), name


def test_installed_wrappers(
    pyz: pathlib.Path, root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where / is another: with its path in them."""
    monkeypatch.setattr(bundled, "BUNDLE", f"{root}/{PYZ}")
    monkeypatch.setattr(bundled, "_bundle", pyz.read_bytes)
    write = bundled._write

    def write_once(base: str, path: str, data: bytes, mode: int) -> None:
        write(base, path[len(str(root)) :] if path.startswith(str(root)) else path, data, mode)

    monkeypatch.setattr(bundled, "_write", write_once)
    bundled.install(str(root))
    agent = agents.Agent(tmp_path / "guest.sock")
    agent.answers["clone"] = {"clone_id": 3}
    # What is where it is called, or in Python's path, is none of its business.
    (tmp_path / "json.py").write_text("raise SystemExit(99)")
    environment = {
        **os.environ,
        "SNOWFLOCK_SOCKET": agent.path,
        "PYTHONPATH": str(tmp_path),
    }
    called = run(
        root / "usr/local/bin/snowflock",
        *("clone", "t", "--param", "a=b  c"),
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    assert called.stdout == "3\n"
    assert agent.calls == [("clone", {"ticket": "t", "params": {"a": "b  c"}})]
    helped = run(root / "usr/local/bin/snowflock-guest", "install", "--help", check=True)
    assert "--root" in helped.stdout
    agent.close()


def test_programs_find_the_api(pyz: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """By the .pth file."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "snowflock-guest.pth").write_text(f"{pyz}\n")
    code = f"""if True:
        import site, sys, json
        site.addsitedir({str(site)!r})
        from nova_snowflock import guest
        from nova_snowflock.guest import workers
        from nova_snowflock.guest import bundled
        settings = bundled.read("files/guest.conf").decode()
        print(json.dumps([guest.__file__, workers.__file__, settings]))
    """
    shown = run(*PYTHON, "-S", "-c", code, check=True, cwd="/").stdout
    here, there, settings = json.loads(shown)
    assert here == f"{pyz}/nova_snowflock/guest/__init__.py"
    assert there == f"{pyz}/nova_snowflock/guest/workers.py"
    assert settings == (SOURCES / "files/guest.conf").read_text()


def test_path_file_of_this_system() -> None:
    """Where this interpreter looks for it."""
    (directory,) = bundled._python_directories("/")
    assert directory in sys.path
    assert bundled._python_directories("/no/such/root") == [directory]


def test_systemd(pyz: pathlib.Path, root: pathlib.Path) -> None:
    (root / "etc/systemd").mkdir(parents=True)
    assert "systemctl start" in install(pyz, root)
    unit = root / "etc/systemd/system/snowflock-guest.service"
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.read(unit)
    assert parsed["Service"]["ExecStart"] == "/usr/local/bin/snowflock-guest"
    wants = root / "etc/systemd/system/multi-user.target.wants/snowflock-guest.service"
    assert os.readlink(wants) == "/etc/systemd/system/snowflock-guest.service"
    assert not (root / "etc/init.d").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: pathlib.Path) -> None:
    unit = tmp_path / "snowflock-guest.service"
    text = (SOURCES / "files/snowflock-guest.service").read_text()
    unit.write_text(text.replace("/usr/local/bin/snowflock-guest", "/bin/true"))
    verified = run("systemd-analyze", "verify", "--man=no", unit)
    assert [line for line in verified.stderr.splitlines() if unit.name in line] == []
    unit.write_text(text.replace("Restart=always", "Restart=perhaps"))
    verified = run("systemd-analyze", "verify", "--man=no", unit)
    assert [line for line in verified.stderr.splitlines() if unit.name in line] != []


@pytest.mark.parametrize("sign", ["sbin/openrc-run", "etc/runlevels"])
def test_openrc(pyz: pathlib.Path, root: pathlib.Path, sign: str) -> None:
    (root / "etc/init.d").mkdir(parents=True)
    (root / sign).mkdir(parents=True)
    assert "rc-service" in install(pyz, root)
    script = root / "etc/init.d/snowflock-guest"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/sbin/openrc-run\n")
    link = os.readlink(root / "etc/runlevels/default/snowflock-guest")
    assert link == "/etc/init.d/snowflock-guest"


def test_init_scripts_without_openrc(pyz: pathlib.Path, root: pathlib.Path) -> None:
    (root / "etc/init.d").mkdir(parents=True)
    assert "neither" in install(pyz, root)
    assert list((root / "etc/init.d").iterdir()) == []


@pytest.mark.parametrize("name", ["snowflock-guest.openrc", "snowflock-guest.busybox"])
def test_scripts_are_scripts(name: str) -> None:
    run("sh", "-n", SOURCES / "files" / name, check=True)


def test_install_again(pyz: pathlib.Path, root: pathlib.Path) -> None:
    """By what is installed: its own file is replaced, and what was configured is not."""
    (root / "etc/systemd").mkdir(parents=True)
    install(pyz, root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    settings = root / "etc/snowflock/guest.conf"
    assert before[settings] == (SOURCES / "files/guest.conf").read_bytes()
    settings.write_text("[guest]\nhostname = keep\n")
    (root / "etc/snowflock/clone.d").chmod(0o700)
    (root / "usr/local/bin/snowflock").write_text("of an earlier version")
    install(root / PYZ, root)
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert after == {**before, settings: b"[guest]\nhostname = keep\n"}
    assert modes(root)["etc/snowflock/clone.d"] == 0o700


def test_install_from_the_sources(pyz: pathlib.Path, root: pathlib.Path) -> None:
    run(sys.executable, "-m", bundled.__name__, "install", "--root", root, check=True)
    assert (root / PYZ).read_bytes() == pyz.read_bytes()


def test_where_it_cannot_be_installed(pyz: pathlib.Path, root: pathlib.Path) -> None:
    (root / "usr").write_text("no directory")
    failed = run(*PYTHON, pyz, "install", "--root", root)
    assert failed.returncode == 1
    assert str(root / "usr") in failed.stderr
    assert "Traceback" not in failed.stderr
    failed = run(*PYTHON, pyz, "install", "--root", root / "nothing")
    assert failed.returncode == 2
    assert "is no directory" in failed.stderr


def test_settings(tmp_path: pathlib.Path) -> None:
    """All options are there and commented out, with what holds without them."""
    text = (SOURCES / "files/guest.conf").read_text()
    defaults = guest_settings.Settings()
    assert guest_settings.read(str(SOURCES / "files/guest.conf")) == defaults
    path = tmp_path / "guest.conf"
    path.write_text(re.sub(r"^#(\w+ =)", r"\1", text, flags=re.MULTILINE))
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.read(path)
    assert set(parsed["guest"]) == set(defaults._fields)
    assert guest_settings.read(str(path)) == defaults
