import errno

import pytest

from lsnet_d2.errors import ConfigError, UserError, did_you_mean, exit_on_user_error, one_line


def test_user_errors_are_one_line_and_exit_2(capsys):
    @exit_on_user_error(KeyError)
    def main(error):
        raise error

    for error in (ConfigError("a\n b"), KeyError("x")):
        with pytest.raises(SystemExit) as exit_info:
            main(error)
        assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: a b\nerror: 'x'\n"
    with pytest.raises(ZeroDivisionError):
        main(ZeroDivisionError())
    worker = "Caught X in DataLoader worker process 0.\nOriginal Traceback (...):\n  f()\nm.X: a: b"
    assert one_line(UserError(worker)) == "a: b"
    assert did_you_mean("q", ["abc"]) == ""


def test_what_the_system_refuses_is_one_line(capsys):
    @exit_on_user_error()
    def main(error):
        raise error

    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (PermissionError(errno.EACCES, "Permission denied", "a.png"), full):
        with pytest.raises(SystemExit) as exit_info:
            main(error)
        assert exit_info.value.code == 2
    assert capsys.readouterr().err == (
        "error: a.png: Permission denied\nerror: No space left on device\n"
    )
    with pytest.raises(FileNotFoundError):  # a bug: files of users are asked for before
        main(FileNotFoundError(errno.ENOENT, "No such file or directory", "a.png"))


def test_a_dead_worker_is_one_line(capsys):
    @exit_on_user_error()
    def main(error):
        raise error

    dead = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. It is possible ...")
    with pytest.raises(SystemExit) as exit_info:
        main(dead)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == (
        "error: a process that loads images has ended (DataLoader worker (pid 7) is killed by "
        "signal: Killed). There may be too little memory: try a lower DATALOADER.NUM_WORKERS\n"
    )
    with pytest.raises(RuntimeError, match="another"):
        main(RuntimeError("another"))
