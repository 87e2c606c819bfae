import errno
import os
import signal
import subprocess
import sys

import pytest
import tiny_coco

from lsnet_d2.errors import UserError
from lsnet_d2.files import atomic_write, keeping, make_folder, require_new_file, require_writable


def test_make_folder(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot make this folder: File exists"):
        make_folder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot make this folder: Not a directory"):
        make_folder(tmp_path / "file" / "below")


def test_keeping_a_file(tmp_path):
    path = tmp_path / "config.yaml"
    with keeping(path):
        path.write_text("first")
    assert path.read_text() == "first"
    with pytest.raises(ZeroDivisionError), keeping(path):
        path.write_text("second")
        raise ZeroDivisionError
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_require_new_file(tmp_path):
    path = tmp_path / "file"
    require_new_file(str(path))
    path.touch()
    with pytest.raises(UserError, match="file exists: give --overwrite"):
        require_new_file(str(path))
    require_new_file(str(path), overwrite=True)
    with pytest.raises(UserError, match="is a folder"):
        require_new_file(str(tmp_path), overwrite=True)
    with pytest.raises(UserError, match=r"absent/file: no such folder: .*absent"):
        require_new_file(str(tmp_path / "absent" / "file"))


def test_atomic_write_survives_errors_and_kills(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path, "w") as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    code = (
        "import os, signal, sys; from lsnet_d2.files import atomic_write\n"
        "with atomic_write(sys.argv[1], 'w') as f:\n"
        "    f.write('half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tiny_coco.ROOT)}
    result = subprocess.run([sys.executable, "-c", code, str(path)], env=env, check=False)
    assert result.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with atomic_write(path, "w") as file:
        file.write("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_folder_that_cannot_be_written_into(tmp_path):
    require_writable(tmp_path)
    assert not os.listdir(tmp_path)
    if not os.path.isdir("/proc/self"):
        pytest.skip("no folder that nobody can write into")
    with pytest.raises(UserError, match="/proc/self: cannot write into this folder: "):
        require_writable("/proc/self")
    with pytest.raises(UserError, match="/proc/self: cannot write into this folder: "):
        require_new_file("/proc/self/model.onnx")
    with pytest.raises(OSError) as caught, atomic_write("/proc/self/model.onnx"):
        pass
    assert caught.value.filename == "/proc/self/model.onnx"


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "a.png"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.png")
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "a.png"):
        raise OSError(errno.EACCES, "Permission denied", "another.png")
    assert caught.value.filename == "another.png"
    with pytest.raises(OSError, match="^truncated$"), atomic_write(tmp_path / "a.png"):
        raise OSError("truncated")
